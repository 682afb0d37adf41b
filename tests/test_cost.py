"""The calculator against what small models hold; what they send is in tests/distributed."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from wmateacher import WMATeacher, averaging, cli
from wmateacher.cost import Model, cost

PAGE = Path(__file__).parents[1] / "docs/guides/scaling.md"
MODELS = ["1B/16", "8B/32", "70B/80", "--ranks", "8", "64"]


def generated(capsys, student):
    assert cli.main(["cost", *MODELS, "--student", student]) == 0
    return capsys.readouterr().out.strip()


@pytest.mark.parametrize("student", ["bfloat16", "float32"])
def test_the_page_has_the_calculators_tables(capsys, student):
    found = re.search(rf"<!-- {student} -->\n(.*?)\n?<!-- end -->", PAGE.read_text(), re.DOTALL)
    assert found[1].strip() == generated(capsys, student)


@pytest.mark.parametrize(
    ("student", "average"), [("float32", "auto"), ("bfloat16", "auto"), ("bfloat16", "split")]
)
def test_memory_and_checkpoint_are_what_a_teacher_holds(student, average):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).to(getattr(torch, student))
    expected = cost(Model(sum(p.numel() for p in model.parameters())), student=student, average=average)
    teacher = WMATeacher(model, "uniform", dtype=average)
    held = sum(p.nbytes for p in teacher.module.parameters())
    held += sum(t.nbytes for t in teacher._shadow._beside.values())
    assert held == expected.device
    state = [t for t in teacher.state_dict().values() if isinstance(t, torch.Tensor)]
    assert sum(t.nbytes for t in state) == expected.checkpoint
    assert {t.dtype for t in state} == {torch.float32}


@pytest.mark.parametrize(
    ("student", "average"), [("float32", "auto"), ("bfloat16", "auto"), ("bfloat16", "split")]
)
def test_an_update_moves_what_is_counted(student, average):
    """Of the tensors that live in memory: what an update reads, and what it writes."""
    value = torch.zeros(1000, dtype=getattr(torch, student))
    held = averaging.Average.of(value.float(), value.clone(), split=average == "split")
    read = [value, held.held] + ([held.own] if held.split else [])
    written = [held.held] + ([held.own] if held.beside is not None else [])
    moved = sum(t.nbytes for t in (*read, *written))
    assert moved == cost(Model(1000), student=student, average=average).update


def test_shards_divide_memory_and_offloading_moves_it():
    model = Model(8e9, 32)
    whole, sharded, away = (cost(model, p, 64) for p in ("ddp", "fsdp2", "offload"))
    assert whole.device == 64 * sharded.device == 64 * away.host == 48e9
    assert whole.update == 64 * sharded.update
    assert (whole.network, whole.gathered, whole.bus, whole.host, away.device) == (0, 0, 0, 0, 0)
    assert sharded.network == away.network == 16e9 * 63 / 64
    assert away.bus == 2 * 16e9 / 64
    assert cost(model, "fsdp2", 1).network == 0


@pytest.mark.parametrize(
    ("text", "parameters", "units"), [("8B", 8e9, 32), ("350m/24", 3.5e8, 24), ("7e9", 7e9, 32)]
)
def test_sizes(text, parameters, units):
    assert Model.parse(text) == Model(parameters, units)


@pytest.mark.parametrize("text", ["", "B", "8X", "-1B", "8B/0", "8B/x", "inf"])
def test_bad_sizes(text):
    with pytest.raises(ValueError, match="a model must be such as 8B, 350M or 70B/80"):
        Model.parse(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"placement": "fsdp"}, "placement must be one of ddp, fsdp2, offload, got 'fsdp'"),
        ({"ranks": 0}, "ranks must be at least 1, got 0"),
        ({"student": "int8"}, "student must be one of float32, bfloat16, got 'int8'"),
        ({"student": "float32", "average": "split"}, "average='split' is for bfloat16 students"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        cost(Model(1e9), **options)
