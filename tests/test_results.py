"""What the README shows is what lies in benchmarks/results."""

import json
from pathlib import Path

import pytest

from wmateacher.integrations.clip import report

ROOT = Path(__file__).parents[1]
RESULTS = sorted((ROOT / "benchmarks/results").glob("*/results.json"))


def test_the_readmes_table_is_the_measured_one():
    results = json.loads((ROOT / "benchmarks/results/clip-digits/results.json").read_text())
    assert report.table(results) in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("file", RESULTS, ids=lambda p: p.parent.name)
def test_results_are_complete_and_shown(file):
    results = json.loads(file.read_text())
    assert {"config", "environment", "methods"} <= set(results)
    assert report.table(results) in (ROOT / "benchmarks/results/README.md").read_text()
