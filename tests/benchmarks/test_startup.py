import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import startup


def test_seconds_of_a_start_are_measured_and_shown_above_torchs():
    assert 0 < startup.measure(["-S", "-c", "pass"], rounds=1) < 60
    text = startup.table({"seconds": {"import torch": 2.0, "import wmateacher": 2.25}})
    assert text.splitlines()[2].split() == ["import", "wmateacher", "2.25", "0.25"]
