import functools
import os
import sys
from pathlib import Path

# One thread for this process and for those that tests start: the tensors are small, and tests share their
# cores. Both must be set before torch is imported.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
# TRL warns on import that its experimental trainers may change, whichever test imports them first.
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import pytest
import torch

try:
    import hypothesis
except ModuleNotFoundError:  # the tests marked gpu do without, on whatever machine has one
    hypothesis = None

TESTS = Path(__file__).parent

# Autograd counts the devices once, in the first backward pass of a process. If a test made that pass while it
# imitates an accelerator, autograd would start threads for it, and refuse to run in forks from then on.
torch.ones(1, requires_grad=True).sum().backward()

# A folder, or a module beside this file, -> its group. Everything else is the library alone.
GROUPS = {
    "integrations": "integration",
    "benchmarks": "system",
    "distributed": "system",
    "examples": "system",
    "test_docs.py": "system",
    "test_layout.py": "system",
    "test_migration.py": "integration",
    "test_packaging.py": "system",
    "test_readme.py": "system",
    "test_results.py": "system",
    "test_workflows.py": "system",
}

EXAMPLES = {"quick": 15, "full": 100}
"""How many examples hypothesis tries, without and with `--runslow`."""


def group(path):
    return GROUPS.get(path.relative_to(TESTS).parts[0], "core")


def pytest_addoption(parser):
    parser.addoption("--runslow", action="store_true", help="also run the tests marked slow")
    parser.addoption("--device", default="cuda", help="the device of the tests marked gpu (default: cuda)")


def pytest_configure(config):
    torch.set_num_threads(1)
    if hypothesis:
        for name, count in EXAMPLES.items():
            hypothesis.settings.register_profile(name, max_examples=count, deadline=None)
        hypothesis.settings.load_profile("full" if config.getoption("--runslow") else "quick")


def pytest_ignore_collect(collection_path, config):
    """Do not even import the modules of the other groups: `-m core` needs no integration's packages."""
    asked = config.option.markexpr
    if asked in {"core", *GROUPS.values()} and collection_path.suffix == ".py":
        return True if group(collection_path) != asked else None
    return None


def pytest_collection_modifyitems(config, items):
    device = torch.device(config.getoption("--device"))
    missing = device.type == "cuda" and not torch.cuda.is_available()
    for item in items:
        item.add_marker(group(item.path))
        if missing and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        if "slow" in item.keywords and not config.getoption("--runslow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --runslow"))


def pytest_collection_finish():
    """CLIP's vocabulary is read once, not again for each small model, and each caption is tokenised once."""
    if open_clip := sys.modules.get("open_clip"):
        open_clip.get_tokenizer = functools.cache(open_clip.get_tokenizer)
        open_clip.SimpleTokenizer.encode = functools.cache(open_clip.SimpleTokenizer.encode)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def device(request):
    """The device of a test marked gpu, with its index."""
    return torch.empty(0, device=request.config.getoption("--device")).device
