import sys
import types
from pathlib import Path

import programs
import pytest
from torch import nn

from wmateacher import WMATeacher

pytest.importorskip("deepspeed")


@pytest.mark.slow
def test_two_processes(tmp_path):
    """Each rank asserts in the program: counts, the definition of the average, resuming, refusals."""
    for rank in programs.launch(2, Path(__file__).parent / "deepspeed_ranks.py", tmp_path):
        assert rank.returncode == 0, rank.stderr[-3000:]
        assert "the averages are right" in rank.stdout


def test_an_engine_without_an_optimizer_says_what_to_do(monkeypatch):
    engine = type("Engine", (), {"optimizer": None})()
    base = types.SimpleNamespace(DeepSpeedEngine=type(engine))
    monkeypatch.setitem(sys.modules, "deepspeed.runtime.engine", base)
    teacher = WMATeacher(nn.Linear(2, 2), "uniform")
    with pytest.raises(
        ValueError, match="DeepSpeed engine has no optimizer .*pass optimizer= to deepspeed.init"
    ):
        teacher.attach(engine)


def test_a_removed_attachment_counts_no_more_whatever_was_attached_since(monkeypatch):
    class Optimizer:
        def __init__(self, parameters):
            self.bit16_groups, self.overflow = [list(parameters)], False

        def step(self):
            pass

    base = types.SimpleNamespace(DeepSpeedOptimizer=Optimizer)
    monkeypatch.setitem(sys.modules, "deepspeed.runtime.base_optimizer", base)
    student = nn.Linear(2, 2)
    optimizer = Optimizer(student.parameters())
    first, second = WMATeacher(student, "uniform"), WMATeacher(student, "uniform")
    handle = first.attach(optimizer)
    second.attach(optimizer)
    optimizer.step()
    handle.remove()
    optimizer.step()
    assert (first.step, second.step) == (1, 2)
    first.attach(optimizer)
    optimizer.step()
    assert (first.step, second.step) == (2, 3)
