"""The comparison of synthesised averages with kept ones runs, and they agree as the profiles do."""

import json
from pathlib import Path

import programs
import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_synthesised_averages_beside_kept_ones(tmp_path):
    options = [
        "--cache",
        tmp_path / "cache",
        "--steps",
        8,
        "--pretrain-steps",
        6,
        "--every",
        2,
        "--output",
        tmp_path / "out",
    ]
    kernels = ["--kernels", "uniform", "beta(0.5, 0.5)"]
    done = programs.run(ROOT / "benchmarks/posthoc_synthesis.py", *options, *kernels)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert list(results["kernels"]) == ["uniform", "beta(0.5,0.5)"]
    for row in results["kernels"].values():
        assert row["weights_apart"] < row["l1_error"] + 1e-3
        assert row["profile_error"] < 0.5
    assert (tmp_path / "out/profiles.png").exists()
