"""What a teacher holds and moves, against the table in the scaling guide."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from wmateacher import WMATeacher, averaging

GUIDE = (Path(__file__).parents[1] / "docs/guides/scaling.md").read_text()
ROW = re.compile(r'^\| ([a-z0-9, ]+) \| `"(\w+)"` \| (\d+) \| (\d+) \| (\d+) \|$', re.MULTILINE)
ROWS = [
    (student, dtype, *map(int, numbers))
    for students, dtype, *numbers in ROW.findall(GUIDE)
    for student in students.split(", ")
]


def test_the_guide_has_the_table():
    assert [row[:2] for row in ROWS] == [
        ("float32", "auto"), ("bfloat16", "auto"), ("float16", "auto"), ("bfloat16", "split"),
    ]  # fmt: skip


@pytest.mark.parametrize(("student", "dtype", "held", "moved", "saved"), ROWS)
def test_bytes_per_parameter(student, dtype, held, moved, saved):
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)).to(
        getattr(torch, student)
    )
    count = sum(p.numel() for p in model.parameters())
    teacher = WMATeacher(model, "uniform", dtype=dtype)
    module = sum(p.nbytes for p in teacher.module.parameters())
    assert module + sum(t.nbytes for t in teacher._shadow._beside.values()) == held * count
    tensors = [t for t in teacher.state_dict().values() if isinstance(t, torch.Tensor)]
    assert sum(t.nbytes for t in tensors) == saved * count
    assert {t.dtype for t in tensors} == {torch.float32}

    value = torch.zeros(1000, dtype=getattr(torch, student))
    average = averaging.Average.of(value.float(), value.clone(), split=dtype == "split")
    read = [value, average.held] + ([average.own] if average.split else [])
    written = [average.held] + ([average.own] if average.beside is not None else [])
    assert sum(t.nbytes for t in (*read, *written)) == moved * 1000
