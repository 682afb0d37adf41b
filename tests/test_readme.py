"""The README's code runs, and its commands name what exists."""

import re
from pathlib import Path

import torch
from torch import nn

import wmateacher
from wmateacher import kernels, losses

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_python_blocks_run():
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    model = nn.Linear(4, 3)
    scope = {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "loader": [(torch.randn(8, 4), torch.randint(0, 3, (8,))) for _ in range(5)],
        "total_steps": 5,
        "task_loss": nn.functional.cross_entropy,
        "validate": lambda model: model(torch.randn(8, 4)),
    }
    for block in blocks:
        exec(block, scope)
    assert isinstance(scope["teacher"], wmateacher.WMATeacher)
    assert scope["teacher"].step == 5
    assert model.load_state_dict(scope["best"])


def test_the_kernels_and_losses_that_it_lists_are_those_there_are():
    section = README.split("## Kernels")[1].split("## Losses")[0]
    cells = "\n".join(line.split("|")[1] for line in section.splitlines() if line.startswith("| `"))
    named = [k for k in re.findall(r"`([^`]+)`", cells) if "lambda" not in k and "a,b" not in k]
    names = {str(kernels.build(k)).split("(")[0] for k in named}
    assert set(kernels.available()) <= names
    for typed in re.findall(r"`(kernels\.[A-Z][^`]+\))`", section):
        assert isinstance(eval(typed), kernels.Kernel), typed
    listed = README.split("## Losses")[1].split("\n## ")[0]
    for name in losses.available():
        assert f"`{name}`" in listed
    built = re.search(r'losses.build\("([^"]+)"\)` is', README)
    assert losses.build(built[1]).family == "paired"


def test_links_to_files_exist():
    for target in re.findall(r"\]\(((?!http)[^)#]+)\)", README):
        assert (ROOT / target).exists(), target
