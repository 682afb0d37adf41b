"""The README is short, its code runs, its links lead somewhere, and what it says of results is what they are."""

import json
import re
from pathlib import Path

import pytest
import torch

import wmateacher
from wmateacher import kernels, losses

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PROJECT = (ROOT / "pyproject.toml").read_text()
RESULTS = ROOT / "benchmarks/results"


def test_it_is_read_in_five_minutes():
    assert len(re.sub(r"```bibtex.*?```", "", README, flags=re.S).split()) <= 800


def test_the_python_block_runs_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", README, re.S)
    scope = {}
    exec(block, scope)
    assert isinstance(scope["teacher"], wmateacher.WMATeacher)
    assert scope["teacher"].step == scope["teacher"].total_steps == 100
    saved = torch.load(tmp_path / "average.pt", weights_only=True)
    assert torch.equal(saved["weight"], scope["teacher"].module.weight)


def test_links_lead_to_files_and_headings_that_exist():
    links = re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset)=\"([^\"]+)\"", README)
    inside = [target for target in map("".join, links) if not target.startswith("https://")]
    assert len(inside) > 20
    for target in inside:
        name, _, anchor = target.partition("#")
        file = ROOT / name
        assert file.exists(), target
        headings = re.findall(r"^#+ (.+)$", file.read_text(), re.M) if anchor else []
        assert anchor in {"", *(re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings)}, (
            target
        )


def test_badges_are_true():
    for badge, setting in {"python": 'requires-python = ">=', "pytorch": 'dependencies = ["torch>='}.items():
        version = re.search(re.escape(setting) + r"([\d.]+)", PROJECT)[1]
        assert f"badge/{badge}-%E2%89%A5{version}-" in README
    licence = re.search(r'^license = "(.+)"$', PROJECT, re.M)[1]
    assert f"badge/licence-{licence.replace('-', '--')}-" in README


def test_the_kernels_that_it_names_can_be_built():
    section = README.split("## Which kernel?")[1].split("\n## ")[0]
    rows = "\n".join(line for line in section.splitlines() if line.startswith("|"))
    named = re.findall(r"`([a-z]+(?:\([^`]*\))?)`", rows)
    assert len(named) >= 5
    for kernel in named:
        kernels.build(kernel)


def test_the_accuracies_that_it_names_are_the_measured_ones():
    methods = json.loads((RESULTS / "clip-emoji/results.json").read_text())["methods"]
    shown = {k: (f"{methods[k]['id']:.1f}", f"{methods[k]['ood']:.1f}") for k in methods}
    text = " ".join(README.split())
    assert "Without a teacher it reaches {}% there and {}% on the others".format(*shown["flyp"]) in text
    assert "less than the {}% before fine-tuning".format(shown["zero-shot"][1]) in text
    assert "Lipsum-FT ({} and {}) is better than TRACER".format(*shown["lipsum-ft"]) in text
    assert "A frozen teacher holds it back ({} and {})".format(*shown["static-sd"]) in text
    assert "it teaches little ({} and {})".format(*shown["ema"]) in text
    assert "keeps both: {} and {}".format(*shown["tracer"]) in text
    runs = {(run["pretraining"], run["seed"]) for run in methods["tracer"]["runs"]}
    assert runs == {(start, seed) for start in range(2) for seed in range(3)}
    assert "(two pre-trainings, three seeds each)" in text


def test_it_says_that_nothing_has_run_on_a_gpu_as_long_as_that_is_so():
    measured = any((RESULTS / "gpu").glob("*.json"))
    assert ("nothing on a GPU" in README) == (not measured)


def test_the_rows_beside_other_libraries_are_those_of_the_comparison():
    def cells(text):
        lines = [line for line in text.splitlines() if line.startswith("|") and "---" not in line]
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]

    names = {
        "any density over the run": "any density over the run as kernel",
        "same window at any update interval": "the same window at any update interval",
        "fused float32 average of bfloat16": "float32 average of a bfloat16 student, fused",
        "step count in the state": "step count in the state",
        "LoRA: frozen weights shared": "frozen weights are shared, not copied",
        "FSDP2, resharded checkpoints": "FSDP2, checkpoints on any number of processes",
    }
    page = cells((ROOT / "docs/comparison.md").read_text().split("\n## ")[0])
    full = {row[0]: [cell.split(",")[0] for cell in row[1:]] for row in page}
    short = cells(README.split("## Beside other libraries")[1].split("\n## ")[0])
    assert {row[0] for row in short[1:]} == names.keys()
    for name, *values in short[1:]:
        ours, torch_, timm, ema_pytorch, _, lightning, diffusers = full[names[name]]
        assert values == [ours, torch_, timm, ema_pytorch, diffusers, lightning], name


def test_the_kernels_and_losses_that_the_guides_list_are_those_there_are():
    page = (ROOT / "docs/kernels.md").read_text()
    section = page.split("## All kernels")[1].split("\n## ")[0]
    cells = "\n".join(line.split("|")[1] for line in section.splitlines() if line.startswith("| `"))
    named = [k for k in re.findall(r"`([^`]+)`", cells) if "lambda" not in k and "a,b" not in k]
    names = {str(kernels.build(k)).split("(")[0] for k in named}
    assert set(kernels.available()) <= names
    listed = (ROOT / "docs/losses.md").read_text()
    for name in losses.available():
        assert f"`{name}`" in listed
    built = re.search(r'losses.build\("([^"]+)"\)` is TRACER', listed)
    assert losses.build(built[1]).family == "paired"


@pytest.mark.parametrize("command", ["examples/clip_tracer.py", "benchmarks/kernel_sweep.py"])
def test_its_commands_name_files_that_exist(command):
    assert f"`python {command}`" in README
    assert (ROOT / command).exists()
