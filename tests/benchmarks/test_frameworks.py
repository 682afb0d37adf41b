import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import frameworks


@pytest.mark.parametrize("framework", frameworks.PROGRAMS)
def test_programs_run_and_differ_by_few_lines(framework, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(frameworks, "WIDTH", 8)
    rows = frameworks.measure(framework, steps=2, rounds=1)
    assert all(row["milliseconds"] > 0 for row in rows.values())
    assert rows["ours"]["lines"] == 0
    assert all(row["lines"] in (1, 2) for name, row in rows.items() if name != "ours")
    text = frameworks.table({"frameworks": {framework: rows}}).splitlines()[1:]
    assert all(name in line for name, line in zip(rows, text, strict=True))


def test_lines_that_change_are_counted():
    assert frameworks.changed("a\nb\n", "a\nc\nd\n") == 2
