from pathlib import Path

import programs
import pytest

pytest.importorskip("deepspeed")


@pytest.mark.slow
def test_two_processes(tmp_path):
    """Each rank asserts in the program: counts, the definition of the average, resuming, refusals."""
    for rank in programs.launch(2, Path(__file__).parent / "deepspeed_ranks.py", tmp_path):
        assert rank.returncode == 0, rank.stderr[-3000:]
        assert "the averages are right" in rank.stdout
