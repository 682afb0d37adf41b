"""Modules that write to their own weights in the forward pass: the teacher's forward changes no average."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from wmateacher import WMATeacher

INDICES = torch.tensor([[0, 1], [2, 0]])


class Tokens(nn.Module):
    """An embedding whose rows are renormalised when they are looked up."""

    def __init__(self, make):
        super().__init__()
        self.tokens = make(3, 4, max_norm=1.0)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.tokens(x))


class Functional(nn.Module):
    """The same through a function call."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(3, 4))

    def forward(self, x):
        return F.embedding(x, self.table, max_norm=1.0)


class Normalised(nn.Module):
    """A classifier that normalises its weights before it uses them."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))

    def forward(self, x):
        with torch.no_grad():
            self.weight.copy_(F.normalize(self.weight))
        return F.one_hot(x, 3).float().to(self.weight.dtype) @ self.weight


def train(student, step):
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.copy_(3 * torch.randn(parameter.shape, generator=generator))


def averages(teacher):
    return {k: v.clone() for k, v in teacher.state_dict().items() if k != "_extra_state"}


def assert_equal(states, expected):
    assert states.keys() == expected.keys()
    assert all(torch.equal(states[key], expected[key]) for key in expected)


@pytest.mark.parametrize("call", ["teacher", "module", "inference"])
@pytest.mark.parametrize("options", [{}, {"dtype": torch.float64}, {"dtype": "split"}], ids=str)
@pytest.mark.parametrize("make", [nn.Embedding, nn.EmbeddingBag])
def test_embeddings_with_a_max_norm_keep_their_average(make, options, call):
    student = Tokens(make).to(torch.bfloat16 if options.get("dtype") == "split" else torch.float32)
    teacher, untouched = (WMATeacher(student, "ema(0.5)", **options) for _ in range(2))
    for step in range(3):
        train(student, step)
        before = averages(teacher)
        with torch.inference_mode(call == "inference"), torch.no_grad():
            output = teacher.module(INDICES) if call == "module" else teacher(INDICES)
        # What the forward computes is right: that of the renormalised average.
        reference = copy.deepcopy(untouched.module)
        assert torch.equal(output, reference(INDICES))
        assert not torch.equal(reference.tokens.weight, untouched.module.tokens.weight)
        assert_equal(averages(teacher), before)
        assert_equal(teacher.averaged_state_dict(), untouched.averaged_state_dict())
        teacher.update()
        untouched.update()
        assert_equal(averages(teacher), averages(untouched))
        assert torch.equal(teacher.module.tokens.weight, untouched.module.tokens.weight)


def test_a_renormalised_embedding_survives_casts_copies_and_resuming():
    student = Tokens(nn.Embedding)
    teacher, untouched = (WMATeacher(student, "ema(0.5)") for _ in range(2))
    teacher.to(torch.float64).to(torch.float32)
    for step in range(2):
        train(student, step)
        teacher(INDICES)
        teacher.update()
        untouched.update()
    duplicate = copy.deepcopy(teacher)
    duplicate(INDICES)
    assert_equal(averages(duplicate), averages(untouched))
    resumed = WMATeacher(student, "ema(0.5)")
    resumed(INDICES)
    resumed.load_state_dict(teacher.state_dict())
    resumed(INDICES)
    assert_equal(averages(resumed), averages(untouched))


@pytest.mark.parametrize(("make", "name"), [(Functional, "table"), (Normalised, "weight")])
def test_a_forward_pass_that_writes_to_its_average_is_an_error(make, name):
    student = make()
    teacher = WMATeacher(student, "ema(0.5)")
    good = copy.deepcopy(teacher.state_dict())
    with torch.no_grad():
        student.get_parameter(name).mul_(3)
        teacher.update()  # the average is not normalised
    with pytest.raises(RuntimeError, match=f"module's '{name}' held the average .*dtype=torch.float64"):
        teacher(INDICES)
    teacher.load_state_dict(good)
    assert torch.equal(teacher.state_dict()[f"module.{name}"], good[f"module.{name}"])


@pytest.mark.parametrize(
    ("make", "dtype", "asked"),
    [
        (Functional, torch.float32, torch.float64),
        (Normalised, torch.float32, torch.float64),
        (Normalised, torch.bfloat16, "auto"),
    ],
    ids=["functional", "copied", "bfloat16"],
)
def test_averages_beside_the_module_need_no_error(make, dtype, asked):
    student = make().to(dtype)
    teacher, untouched = (WMATeacher(student, "ema(0.5)", dtype=asked) for _ in range(2))
    for step in range(3):
        train(student, step)
        teacher(INDICES)
        teacher.module(INDICES)
        teacher.update()
        untouched.update()
        assert_equal(averages(teacher), averages(untouched))
        assert_equal(teacher.averaged_state_dict(), untouched.averaged_state_dict())


@pytest.mark.parametrize("buffers", ["copy", "average"])
def test_writing_the_same_values_from_outside_is_no_error(buffers):
    """DDP broadcasts parameters and buffers of what it wraps, and flatten_parameters() moves memory."""
    student = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    teacher = WMATeacher(student, "ema(0.5)", buffers=buffers)
    before = teacher.averaged_state_dict()
    with torch.no_grad():
        for tensor in (*teacher.module.parameters(), *teacher.module.buffers()):
            tensor.copy_(tensor.clone())
    teacher.module[0].weight.data = teacher.module[0].weight.data.clone()
    teacher(torch.ones(4, 3))
    assert_equal(teacher.averaged_state_dict(), before)
    nn.init.zeros_(student[0].weight)
    teacher.update()
    assert torch.equal(teacher.module[0].weight, before["0.weight"] / 2)


def test_statistics_that_are_recalibrated_stay_until_the_next_update():
    student = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    teacher = WMATeacher(student, "ema(0.5)", buffers="average")
    x = torch.randn(64, 3)
    torch.optim.swa_utils.update_bn([x], teacher.module)
    recalibrated = teacher.module[1].running_mean.clone()
    assert recalibrated.abs().max() > 0.01
    teacher(x)
    assert torch.equal(teacher.module[1].running_mean, recalibrated)
    teacher.update()
    assert torch.equal(teacher.module[1].running_mean, student[1].running_mean)
