"""Who may import whom, and what importing the library loads."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = sorted(
    p for p in (ROOT / "wmateacher").rglob("*.py") if "integrations" not in p.relative_to(ROOT).parts
)
OTHERS = [*sorted((ROOT / "integrations").rglob("*.py")), *sorted((ROOT / "examples").glob("*.py"))]

# Module of the core -> modules of the core that it may import.
ALLOWED = {
    "spec": set(),
    "checks": set(),
    "kernels": {"checks", "spec"},
    "schedule": {"checks", "kernels"},
    "sharding": set(),
    "pairing": {"checks", "sharding"},
    "averaging": set(),
    "attachment": set(),
    "swapping": {"averaging", "sharding"},
    "shadow": {"averaging", "pairing", "sharding"},
    "teacher": {"attachment", "kernels", "pairing", "schedule", "shadow", "sharding", "swapping"},
    "collectives": set(),
    "distributed": {"collectives", "pairing", "sharding"},
    "losses": {"checks", "collectives", "losses", "spec"},
    "diagnostics": {"checks", "losses", "sharding", "teacher"},
    "files": set(),
    "posthoc": {"checks", "files", "kernels", "pairing", "posthoc", "schedule", "teacher"},
    "theory": {"checks", "kernels", "schedule"},
    "migration": {"checks", "kernels", "pairing", "teacher"},
    "cli": {"checks", "kernels", "posthoc", "theory"},
    "__init__": {"diagnostics", "kernels", "losses", "migration", "posthoc", "teacher", "theory"},
}


def imported(path):
    """Dotted names of everything that a module imports, anywhere in it."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names += [f"{node.module}.{a.name}" for a in node.names]
    return names


def room(path):
    return path.relative_to(ROOT / "wmateacher").parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", CORE, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_core_depends_one_way_and_never_on_integrations(path):
    for name in imported(path):
        top, *rest = name.split(".")
        if top == "wmateacher":
            assert rest[0] in ALLOWED[room(path)], f"{path} imports {name}"
        else:
            assert top in {*sys.stdlib_module_names, "torch", "numpy", "scipy"}, f"{path} imports {name}"


@pytest.mark.parametrize("path", OTHERS, ids=lambda p: str(p.relative_to(ROOT)))
def test_integrations_and_examples_use_public_names_only(path):
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "wmateacher":
            assert not any(p.startswith("_") for p in parts if p != "__future__"), f"{path} imports {name}"
        assert parts[0] != "integrations", f"{path} imports {name}: the package is wmateacher.integrations"


def test_importing_the_library_loads_no_optional_package():
    code = """
import sys, wmateacher, wmateacher.diagnostics, wmateacher.migration
optional = {
    "open_clip", "timm", "torchvision", "torchmetrics", "sklearn", "matplotlib", "tyro", "lightning",
    "transformers", "accelerate", "diffusers", "ema_pytorch", "torch_ema", "tensorboard", "webdataset",
}
print(sorted(optional & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_every_public_name_has_a_docstring():
    import importlib
    import inspect
    import pkgutil

    import wmateacher

    names = [f"wmateacher.{m.name}" for m in pkgutil.iter_modules(wmateacher.__path__)]
    for module in (wmateacher, *map(importlib.import_module, names)):
        assert module.__doc__, module.__name__
        for name, value in vars(module).items():
            ours = str(getattr(value, "__module__", None)).startswith("wmateacher")
            if name.startswith("_") or not ours or not callable(value):
                continue
            assert inspect.getdoc(value), f"{module.__name__}.{name}"
