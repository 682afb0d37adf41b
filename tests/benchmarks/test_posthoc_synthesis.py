"""The comparison of synthesised averages with kept ones runs, and they agree as the profiles do."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_synthesised_averages_beside_kept_ones(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks/posthoc_synthesis.py"), "--cache", tmp_path / "cache"]
    options = ["--steps", 8, "--pretrain-steps", 6, "--every", 2, "--output", tmp_path / "out"]
    kernels = ["--kernels", "uniform", "beta(0.5, 0.5)"]
    done = subprocess.run([*map(str, [*command, *options, *kernels])], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert list(results["kernels"]) == ["uniform", "beta(0.5,0.5)"]
    for row in results["kernels"].values():
        assert row["weights_apart"] < row["l1_error"] + 1e-3
        assert row["profile_error"] < 0.5
    assert (tmp_path / "out/profiles.png").exists()
