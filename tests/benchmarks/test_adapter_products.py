import json
import re
from pathlib import Path

import programs
import pytest

PROGRAM = Path(__file__).parents[2] / "benchmarks/adapter_products.py"


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
def test_the_distances_of_averages_of_factors_are_measured(tmp_path):
    short = ["--seeds", 1, "--ranks", 2, "--rates", 5e-3, "--pretraining", 2, "--steps", 6]
    kernels = ["--kernels", "static", "ema(0.0)", "uniform"]
    done = programs.run(PROGRAM, *short, *kernels, "--output", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    frozen, live, uniform = json.loads((tmp_path / "results.json").read_text())["runs"]
    # One state is its own average, whatever is averaged; and a product of zeros has no relative distance.
    assert frozen["kl_factors"] < 1e-9 < frozen["kl_student"]
    assert frozen["factors"] is frozen["student"] is None
    assert re.search(r"static +\d+\.\d +- +- ", done.stdout)
    assert "nan" not in done.stdout
    assert live["factors"] < 1e-6
    assert live["student"] < 1e-6
    assert 1e-4 < uniform["factors"] < uniform["student"]
