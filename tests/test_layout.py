"""Who may import whom, which names they may use, and what an import loads."""

import ast
import graphlib
import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A module or package of the core -> what it may import of the core. A package also imports itself.
CORE = {
    "spec": set(),
    "checks": set(),
    "collectives": set(),
    "caches": {"walking"},
    "averaging": {"caches", "transfers"},
    "buffers": {"naming", "pairing", "walking"},
    "rewriting": {"naming"},
    "transfers": set(),
    "finiteness": {"transfers"},
    "attachment": {"zero"},
    "walking": set(),
    "zero": {"walking"},
    "naming": {"walking"},
    "unfreezing": {"pairing", "rewriting"},
    "updating": {"averaging", "buffers", "caches", "finiteness", "pairing"},
    "rebinding": {"walking"},
    "copying": {"rebinding", "walking"},
    "sharding": {"walking"},
    "kernels": {"checks", "spec"},
    "schedule": {"checks", "kernels"},
    "pairing": {"averaging", "checks", "naming", "sharding", "walking", "zero"},
    "adapters": {"naming"},
    "watching": {"adapters", "walking"},
    "swapping": {"averaging", "adapters", "caches", "sharding", "walking", "watching"},
    "building": {"averaging", "copying", "pairing", "sharding", "walking"},
    "shadow": {
        *("averaging", "buffers", "building", "caches", "copying", "finiteness", "normalisation"),
        *("pairing", "rewriting", "sharding", "unfreezing", "updating", "walking"),
    },
    "normalisation": {"naming", "pairing"},
    "recalibration": {
        *("averaging", "caches", "checks", "collectives", "normalisation", "pairing", "sharding", "walking"),
    },
    "modes": {"normalisation", "schedule", "shadow", "updating"},
    "controller": {"averaging", "kernels", "pairing", "schedule", "shadow", "sharding", "transfers", "updating"},
    "states": {"buffers", "naming", "pairing", "schedule", "shadow", "sharding"},
    "teacher": {
        *("adapters", "attachment", "buffers", "caches", "checks", "controller", "copying", "finiteness"),
        *("kernels", "modes", "naming", "normalisation", "pairing", "shadow", "sharding", "states", "swapping"),
        *("transfers", "unfreezing", "walking", "zero"),
    },
    "distributed": {"collectives", "naming", "pairing", "sharding"},
    "losses": {"checks", "collectives", "spec"},
    "diagnostics": {"checks", "losses", "sharding", "teacher", "transfers"},
    "contents": set(),
    "files": {"contents"},
    "folders": {"checks", "files"},
    "posthoc": {"checks", "contents", "files", "folders", "kernels", "naming", "pairing", "schedule", "teacher"},
    "noise": {"checks", "kernels", "schedule"},
    "suggestion": {"checks", "kernels"},
    "power_law": {"checks", "kernels"},
    "theory": {"checks", "kernels", "noise", "power_law", "schedule", "suggestion"},
    "migration": {"checks", "kernels", "teacher", "walking"},
    "printing": {"kernels", "theory"},
    "cli": {"__init__", "checks", "files", "kernels", "posthoc", "printing", "theory"},
    "__init__": {"diagnostics", "kernels", "losses", "migration", "posthoc", "recalibration", "teacher", "theory"},
}  # fmt: skip

# A room of the integrations -> the rooms that it may import. The adapters are the modules at the top.
ROOMS = {
    "adapters": set(),
    "engine": set(),
    "vision": {"engine"},
    "clip": {"engine", "vision"},
    "dino": {"engine", "vision"},
    "mean_teacher": {"engine", "vision"},
    "language": {"adapters", "engine"},
}
ENGINE_MAY_USE = {"checks", "collectives", "files", "spec"}
IMAGES = {"PIL", "open_clip", "sklearn", "timm", "torchmetrics", "torchvision"}
DECLARATIONS = [
    "clip.ablations", "clip.methods", "clip.paper", "clip.plots", "clip.recipes", "dino.recipes",
    "language.recipes", "mean_teacher.recipes",
]  # fmt: skip


def modules(folder, package):
    """Files of a package by the dotted names of their modules; symbolic links are not followed."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        if package != "wmateacher" or parts[0] != "integrations":
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


LIBRARY = modules(ROOT / "wmateacher", "wmateacher")
INTEGRATIONS = modules(ROOT / "integrations", "wmateacher.integrations")
OURS = LIBRARY | INTEGRATIONS
PROGRAMS = {str(p.relative_to(ROOT)): p for d in ("examples", "benchmarks") for p in (ROOT / d).rglob("*.py")}
TREES = {name: ast.parse(path.read_text()) for name, path in (OURS | PROGRAMS).items()}


def imported(name):
    """Pairs (module, name in it or None) of every import statement of a module, wherever it stands."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import of {node.module}"
            for alias in node.names:
                module = f"{node.module}.{alias.name}"
                yield (module, None) if module in OURS else (node.module, alias.name)


def core_part(name):
    """The key of `CORE` that a module of the library belongs to."""
    return [*name.split("."), "__init__"][1]


def room(name):
    """The key of `ROOMS` that a module of the integrations belongs to."""
    parts = name.split(".")[2:]
    return parts[0] if parts and parts[0] in ROOMS else "adapters"


@pytest.mark.parametrize("name", LIBRARY)
def test_the_core_depends_one_way_and_never_on_integrations(name):
    part = core_part(name)
    for target, _ in imported(name):
        if target in OURS:
            assert target in LIBRARY, f"{name} imports {target}"
            assert core_part(target) in CORE[part] | {part}, f"{name} imports {target}"
        else:
            known = {*sys.stdlib_module_names, "torch", "numpy", "scipy"}
            known |= {"triton"} if name.startswith("wmateacher.averaging.") else set()  # comes with torch
            assert target.split(".")[0] in known, f"{name} imports {target}"


def test_the_table_of_the_core_is_complete():
    assert {core_part(name) for name in LIBRARY} == set(CORE)


@pytest.mark.parametrize("name", INTEGRATIONS)
def test_rooms_of_the_integrations_depend_one_way(name):
    own = room(name)
    for target, _ in imported(name):
        if target in INTEGRATIONS:
            assert room(target) in ROOMS[own] | {own}, f"{name} imports {target}"
        elif own == "engine":
            assert target.split(".")[0] not in IMAGES, f"{name} imports {target}"
            if target in LIBRARY:
                assert core_part(target) in ENGINE_MAY_USE, f"{name} imports {target}"


def test_no_module_imports_itself_through_others():
    graph = {name: {target for target, _ in imported(name) if target in OURS} - {name} for name in OURS}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def exported(module):
    """The names in `__all__` of one of our modules; None if it has none."""
    for node in TREES[module].body:
        if isinstance(node, ast.Assign) and any(getattr(t, "id", "") == "__all__" for t in node.targets):
            return set(ast.literal_eval(node.value))
    return None


@pytest.mark.parametrize("name", OURS | PROGRAMS)
def test_only_public_names_of_other_modules_are_used(name):
    aliases = {}
    for target, attribute in imported(name):
        assert target.split(".")[0] != "integrations", f"{name} imports {target}: use wmateacher.integrations"
        if target not in OURS:
            continue
        if attribute is None:
            aliases[target.rpartition(".")[2]] = target
        else:
            public = exported(target)
            assert not attribute.startswith("_") or attribute == "__version__", f"{target}.{attribute}"
            assert public is None or attribute in public, f"{target}.{attribute} is not in its __all__"
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", None) in aliases:
            private = node.attr.startswith("_") and not node.attr.startswith("__")
            assert not private, f"{name}, line {node.lineno}: {aliases[node.value.id]}.{node.attr}"


# The packages that the integrations and the programs use, and the library does not.
OPTIONAL = {target.split(".")[0] for name in INTEGRATIONS | PROGRAMS for target, _ in imported(name)} - {
    *sys.stdlib_module_names, "numpy", "scipy", "torch", "wmateacher",
}  # fmt: skip


@pytest.fixture(scope="module")
def loaded():
    """The modules that a new process loads for the library, and for the declarations as well."""
    program = f"""
import json, sys, warnings
warnings.simplefilter("ignore")
import numpy, scipy, torch
before = set(sys.modules)
import wmateacher, wmateacher.diagnostics, wmateacher.migration, wmateacher.posthoc, wmateacher.theory
library = sorted(set(sys.modules) - before)
for name in {DECLARATIONS}:
    __import__(f"wmateacher.integrations.{{name}}")
print(json.dumps([library, sorted(set(sys.modules) - before)]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_importing_the_library_loads_no_optional_package(loaded):
    library, _ = loaded
    assert {"lightning", "timm", "transformers"} < OPTIONAL
    assert not OPTIONAL & set(library)


def test_declarations_load_no_model_library(loaded):
    _, declarations = loaded
    assert not OPTIONAL & set(declarations)


@pytest.mark.parametrize("name", LIBRARY)
def test_every_public_name_has_a_docstring(name):
    module = importlib.import_module(name)
    assert module.__doc__
    for key, value in vars(module).items():
        ours = str(getattr(value, "__module__", None)).startswith("wmateacher")
        if ours and not key.startswith("_") and callable(value):
            assert inspect.getdoc(value), f"{name}.{key}"
