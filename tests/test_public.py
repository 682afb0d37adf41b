"""The public surface of the library: what `import wmateacher` provides, shows and loads."""

import importlib
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

import wmateacher

SURFACE = ["WMATeacher", "diagnostics", "kernels", "losses", "migration", "posthoc", "recalibrate", "theory"]
ROOT = Path(wmateacher.__file__).parent
FILES = [p.relative_to(ROOT.parent).with_suffix("") for p in sorted(ROOT.rglob("*.py"))]
MODULES = [".".join(p.parts).removesuffix(".__init__") for p in FILES if "integrations" not in p.parts]


def test_the_public_surface_is_there_after_one_import_and_loads_late():
    code = f"""
import sys, torch, wmateacher
assert not {{"scipy.stats", "scipy.optimize", "wmateacher.posthoc", "wmateacher.theory"}} & set(sys.modules)
assert "torch.distributed.tensor" not in sys.modules, "it takes longer than the rest of wmateacher"
teacher = wmateacher.WMATeacher(torch.nn.Linear(2, 2), "ema(0.999)")
teacher.update()
assert not [m for m in sys.modules if m.split(".")[0] == "scipy"], "an EMA needs no scipy"
assert all(getattr(wmateacher, name).__name__ for name in {SURFACE})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert dir(wmateacher) == sorted([*SURFACE, "__version__"])


def test_an_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'wmateacher' has no attribute 'kernel'"):
        _ = wmateacher.kernel


@pytest.mark.parametrize("name", MODULES)
def test_a_module_shows_its_public_names_only(name):
    module = importlib.import_module(name)
    hidden = [n for n in module.__all__ if n.startswith("_") and not n.startswith("__")]
    assert not hidden
    assert all(hasattr(module, n) for n in module.__all__)
    shown = [n for n in dir(module) if not (n.startswith("__") and n.endswith("__"))]
    assert set(shown) <= set(module.__all__)


def test_the_version_is_that_of_pyproject():
    pyproject = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    written = re.search(r'^version = "(.+)"$', pyproject, re.MULTILINE)[1]
    assert wmateacher.__version__ == written, "the installed metadata is of another version: install again"


def test_a_tree_that_is_not_installed_has_an_unknown_version(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", missing)
    assert wmateacher.__version__ == "0+unknown"
