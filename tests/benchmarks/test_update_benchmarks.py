"""The benchmarks of an update run, and tell what they measured."""

import json
import sys
from pathlib import Path

import programs
import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import averagers  # noqa: E402


def benchmark(script, *arguments):
    return programs.run(ROOT / "benchmarks" / script, *arguments)


@pytest.mark.parametrize("precision", averagers.PRECISIONS)
@pytest.mark.parametrize("name", averagers.on("cpu"))
def test_every_helper_makes_the_same_average(name, precision):
    """What is compared does the same work: one EMA update, in float32 where the helper can."""
    torch.manual_seed(0)
    student = torch.nn.Linear(8, 3).to(averagers.PRECISIONS[precision])
    start = student.weight.detach().float().clone()
    made = averagers.start(name, student)
    if isinstance(made, str):
        unsupported = {
            "wmateacher, split": "fp32",
            "wmateacher, fp32 forward": "fp32",
            "torch AveragedModel, multi_avg_fn": "bf16",
        }
        assert unsupported[name] == precision, made
        return
    with torch.no_grad():
        student.weight.add_(1)
    made.update()
    expected = 0.999 * start + 0.001 * student.weight.detach().float()
    tensors = [t for t in held(made.keep) if t.shape == (3, 8)]
    assert any(torch.allclose(t.float(), expected, rtol=0, atol=2e-5) for t in tensors)


def held(keep):
    if isinstance(keep, list):
        return keep
    if hasattr(keep, "shadow_params"):
        return keep.shadow_params
    return [t for t in keep.state_dict().values() if torch.is_tensor(t)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "picture"), [("update_overhead.py", "overhead.png"), ("memory.py", "memory.png")]
)
def test_a_benchmark_leaves_its_results(forks, script, picture, tmp_path):
    rounds = ["--rounds", "1"] if script == "update_overhead.py" else []
    helpers = ["wmateacher", "timm ModelEmaV3"]
    options = ["--models", "3,000 tensors", "--helpers", *helpers, "--output", tmp_path]
    done = benchmark(script, *options, *rounds)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert {"command", "environment"} <= set(results)
    assert list(results["models"]) == ["3,000 tensors, fp32 -> fp32", "3,000 tensors, bf16 -> fp32"]
    assert (tmp_path / picture).stat().st_size > 10_000
    for name in helpers:
        assert name in done.stdout


@pytest.mark.slow
def test_bad_input():
    done = benchmark("update_overhead.py", "--rounds", "0")
    assert done.returncode == 2
    assert "--rounds must be at least 1, got 0" in done.stderr
    done = benchmark("memory.py", "--models", "gpt")
    assert done.returncode == 2
    assert "invalid choice: 'gpt'" in done.stderr
