"""What the READMEs show is what lies in benchmarks/results."""

import json
import sys
from pathlib import Path

import pytest

from wmateacher.integrations.clip import report

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import memory  # noqa: E402
import update_overhead  # noqa: E402

RESULTS = sorted((ROOT / "benchmarks/results").glob("*/results.json"))
BY_MODEL = {"memory": memory.table, "update-overhead": update_overhead.table}


def tables(folder):
    """A folder's tables, as its results print."""
    results = json.loads((ROOT / "benchmarks/results" / folder / "results.json").read_text())
    if folder in BY_MODEL:
        return [BY_MODEL[folder](name, rows) for name, rows in results["models"].items()]
    return [report.table(results)]


def test_the_readmes_tables_are_the_measured_ones():
    readme = (ROOT / "README.md").read_text()
    for table in (tables("clip-digits")[0], *tables("update-overhead")[:2]):
        assert table in readme


@pytest.mark.parametrize("file", RESULTS, ids=lambda p: p.parent.name)
def test_results_are_complete_and_shown(file):
    results = json.loads(file.read_text())
    assert {"config", "methods"} <= set(results) or {"command", "models"} <= set(results)
    assert "environment" in results
    shown = (ROOT / "benchmarks/results/README.md").read_text()
    for table in tables(file.parent.name):
        assert table in shown
