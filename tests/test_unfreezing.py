"""Parameters that are frozen, unfrozen and replaced in the middle of a run."""

import copy
import random

import numpy as np
import oracle
import pytest
import torch
from torch import nn

from wmateacher import WMATeacher
from wmateacher.posthoc import Recorder, synthesise


class States(nn.Module):
    """A student whose k-th state is the k-th unit vector, in two parameters and two shapes."""

    def __init__(self, states):
        super().__init__()
        self.late = nn.Parameter(torch.zeros(states, dtype=torch.float64))
        self.later = nn.Parameter(torch.zeros(2, states, dtype=torch.float64))
        self.always = nn.Parameter(torch.zeros(states, dtype=torch.float64))
        for parameter in self.parameters():
            parameter.data[..., 0] = 1

    def forward(self):
        return self.late


class March(torch.optim.Optimizer):
    """An optimizer that moves what requires grad to the unit vector of its step."""

    def __init__(self, model):
        super().__init__(model.parameters(), {})
        self.steps = 0

    @torch.no_grad()
    def step(self):
        self.steps += 1
        for parameter in self.param_groups[0]["params"]:
            if parameter.requires_grad:
                parameter.zero_()[..., self.steps] = 1


def since(kernel, total, every, first):
    """The weights at the end of a parameter that was frozen for the first steps, and its value that of step 0."""
    weights = oracle.realised(kernel, total, every, total).copy()
    weights[0], weights[1 : first + 1] = weights[: first + 1].sum(), 0
    return weights


def check(teacher, kernel, total, every, unfrozen):
    for name, first in unfrozen.items():
        average = getattr(teacher.module, name).detach()
        expected = since(kernel, total, every, first)
        for row in average.view(-1, total + 1):
            np.testing.assert_allclose(row.numpy(), expected, rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("kernel", oracle.KERNELS)
def test_an_unfrozen_parameter_is_averaged_with_the_value_that_it_had(kernel, every):
    """Unfreezing at any step x kernel x interval x resume, with two phases."""
    draw = random.Random(f"{kernel} {every}")
    total = 24
    for _ in range(4):
        late, later = sorted(draw.choices(range(total), k=2))
        resume = draw.randrange(total)
        student = States(total + 1)
        student.late.requires_grad_(False)
        student.later.requires_grad_(False)
        teacher = WMATeacher(student, kernel, total, update_every=every)
        optimizer = March(student)
        for step in range(total):
            if step == resume:
                kept, weights = teacher.state_dict(), copy.deepcopy(student.state_dict())
                frozen = {n: p.requires_grad for n, p in student.named_parameters()}
                student = States(total + 1)
                for name, parameter in student.named_parameters():
                    # The script that resumes may freeze before it builds the teacher, after it, or later,
                    # and it may load the student's weights after the teacher's.
                    parameter.requires_grad_(draw.choice([frozen[name], name == "always", True]))
                    parameter.data.zero_()
                teacher = WMATeacher(student, kernel, total, update_every=every)
                teacher.load_state_dict(copy.deepcopy(kept))
                student.load_state_dict(weights)
                for name, parameter in student.named_parameters():
                    parameter.requires_grad_(frozen[name])
                optimizer, optimizer.steps = March(student), step
            student.late.requires_grad_(step >= late)
            student.later.requires_grad_(step >= later)
            if draw.random() < 0.5:
                teacher()
            optimizer.step()
            teacher.update()
        check(teacher, kernel, total, every, {"late": late, "later": later, "always": 0})
        assert teacher.roles.shared == ()
        state = teacher.state_dict()["_extra_state"]
        assert state["shared"] == []
        assert dict(state["unfrozen"]).items() <= {"late": late, "later": later}.items()


def test_freezing_again_changes_no_role():
    student = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    student[0].requires_grad_(False)
    teacher = WMATeacher(student, "uniform", 8)
    expected = [[p.detach().clone()] for p in student.parameters()]
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    for step in range(8):
        student[0].requires_grad_(step % 3 == 1)
        student[1].requires_grad_(step % 3 != 1)
        student(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        teacher.update()
        for states, parameter in zip(expected, student.parameters(), strict=True):
            states.append(parameter.detach().clone())
    for states, average in zip(expected, teacher.module.parameters(), strict=True):
        torch.testing.assert_close(average, torch.stack(states).mean(0))


class Bare:
    """An optimizer of another library, which runs no hooks."""

    def __init__(self, model):
        self.model = model

    @torch.no_grad()
    def step(self):
        for parameter in self.model.parameters():
            parameter.add_(1)


def test_without_hooks_a_forward_pass_of_the_teacher_takes_the_value_up():
    student = nn.Linear(2, 2)
    student.bias.requires_grad_(False)
    start = student.bias.detach().clone()
    teacher = WMATeacher(student, "uniform", 10)
    student.bias.requires_grad_(True)
    teacher(torch.ones(1, 2))
    Bare(student).step()
    teacher.update()
    torch.testing.assert_close(teacher.module.bias, start + 0.5)


def test_without_hooks_a_value_that_is_lost_is_an_error():
    student = nn.Linear(2, 2)
    student.bias.requires_grad_(False)
    teacher = WMATeacher(student, "uniform", 10)
    optimizer = Bare(student)
    optimizer.step()  # frozen here, and nevertheless written: it is the student's own value
    teacher.update()
    student.bias.requires_grad_(True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="'bias' was unfrozen and written .* runs no hooks.*frozen='copy'"):
        teacher.update()
    with pytest.raises(RuntimeError, match="'bias' was unfrozen and written"):
        teacher(torch.ones(1, 2))  # it stays an error
    assert teacher.step == 1


def test_a_duplicate_takes_parameters_up():
    student = nn.Linear(2, 2)
    student.bias.requires_grad_(False)
    with torch.no_grad():
        student.bias.zero_()
    teacher = WMATeacher(student, "uniform", 10)
    duplicate = copy.deepcopy(teacher)
    duplicate.student.bias.requires_grad_(True)
    duplicate(torch.ones(1, 2))
    Bare(duplicate.student).step()
    duplicate.update()
    assert (duplicate.module.bias == 0.5).all()
    untouched = copy.deepcopy(teacher)
    untouched.student.bias.requires_grad_(True)
    untouched.update()
    assert untouched.roles.shared == ()


def test_a_split_average_takes_parameters_up():
    student = nn.Sequential(nn.Linear(64, 4), nn.Linear(4, 2)).bfloat16()
    student[0].requires_grad_(False)
    start = student[0].weight.detach().float()
    teacher = WMATeacher(student, "ema(0.5)", dtype="split")
    optimizer = torch.optim.SGD(student.parameters(), lr=0.25)
    student.requires_grad_(True)
    student(torch.ones(1, 64).bfloat16()).sum().backward()
    optimizer.step()
    teacher.update()
    expected = (start + student[0].weight.detach().float()) / 2
    assert torch.equal(teacher.state_dict()["module.0.weight"], expected)


def test_excluded_parameters_are_copied_once_they_are_unfrozen():
    student = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    student[0].requires_grad_(False)
    teacher = WMATeacher(student, "static", 9, exclude=["0.bias"])
    student.requires_grad_(True)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.25)
    start = copy.deepcopy(student)
    student(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert torch.equal(teacher.module[0].bias, start[0].bias)
    assert torch.equal(teacher.module[0].weight, start[0].weight)
    other = WMATeacher(start.requires_grad_(False), "ema(0.5)", exclude=["0.bias"])
    start.requires_grad_(True)
    other(torch.ones(1, 2))
    for _ in range(2):
        nn.init.ones_(start[0].bias)
        other.update()
    assert (other.module[0].bias == 1).all()


def test_tied_weights_stay_tied_when_they_are_unfrozen():
    student = nn.ModuleDict({"embed": nn.Embedding(3, 2), "head": nn.Linear(2, 3, bias=False)})
    student["head"].weight = student["embed"].weight
    student.requires_grad_(False)
    teacher = WMATeacher(student, "uniform", 9)
    student.requires_grad_(True)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    start = student["head"].weight.detach().clone()
    student["head"](student["embed"](torch.tensor([1]))).sum().backward()
    optimizer.step()
    teacher.update()
    assert teacher.module["head"].weight is teacher.module["embed"].weight
    assert teacher.module["head"].weight is not student["head"].weight
    torch.testing.assert_close(teacher.module["head"].weight, (start + student["head"].weight) / 2)


def test_a_frozen_recurrent_network_survives_moves_and_casts_and_is_unfrozen():
    student = nn.Sequential(nn.LSTM(2, 3, num_layers=2), nn.Identity())
    student.requires_grad_(False)
    teacher = WMATeacher(student, "uniform", 9)
    x = torch.ones(4, 1, 2)
    teacher.to("cpu")
    torch.testing.assert_close(teacher(x)[0], student(x)[0])
    teacher.double()  # shared parameters are the student's and stay as they are
    torch.testing.assert_close(teacher(x)[0], student(x)[0])
    student.requires_grad_(True)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    start = copy.deepcopy(student)
    student(x)[0].sum().backward()
    optimizer.step()
    torch.testing.assert_close(teacher(x)[0], start(x)[0])
    teacher.update()
    for average, one, two in zip(*(m.parameters() for m in (teacher.module, start, student)), strict=True):
        torch.testing.assert_close(average, (one + two) / 2)
    with teacher.swap():
        torch.testing.assert_close(teacher(x)[0], student(x)[0])


def test_a_replaced_frozen_parameter_is_shared_anew_if_its_value_is_the_same():
    student = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    student[0].requires_grad_(False)
    teacher = WMATeacher(student, "uniform")
    start = student[0].weight.detach().clone()
    student[0].weight = nn.Parameter(start.clone(), requires_grad=False)
    teacher.update()
    assert teacher.module[0].weight is student[0].weight
    student[0].weight = nn.Parameter(torch.full((2, 2), 9.0), requires_grad=False)
    teacher.update()
    torch.testing.assert_close(teacher.module[0].weight, (2 * start + 9) / 3)
    student[0].bias = nn.Parameter(torch.full((2,), 9.0))
    with torch.no_grad():
        student[0].bias += 1
    before = teacher.module[0].bias.detach().clone()
    teacher.update()
    torch.testing.assert_close(teacher.module[0].bias, (3 * before + 10) / 4)


def test_another_model_is_averaged_with_its_own_frozen_layers():
    student = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    student[0].requires_grad_(False)
    teacher = WMATeacher(student, "uniform", 9)
    same, other = copy.deepcopy(student), copy.deepcopy(student)
    with torch.no_grad():
        other[0].bias += 4
    teacher.update(same)
    assert teacher.module[0].weight is student[0].weight
    start = student[0].bias.detach().clone()
    teacher.update(other)
    assert teacher.module[0].weight is student[0].weight
    torch.testing.assert_close(teacher.module[0].bias, start + 4 / 3)
    teacher.update()
    torch.testing.assert_close(teacher.module[0].bias, start + 1)


def test_a_state_written_while_a_parameter_was_trained_is_loaded_where_it_is_frozen():
    student = nn.Linear(2, 2)
    teacher = WMATeacher(student, "uniform", 9)
    nn.init.ones_(student.bias)
    teacher.update()
    average = teacher.module.bias.detach().clone()
    student.requires_grad_(False)
    again = WMATeacher(student, "uniform", 9)
    assert again.roles.averaged == ()
    again.load_state_dict(teacher.state_dict())
    assert torch.equal(again.module.bias, average)
    assert (student.bias == 1).all()
    apart = WMATeacher(student, "uniform", 9, frozen="copy")
    with pytest.raises(ValueError, match="missing 'module.weight', 'module.bias'"):
        apart.load_state_dict(WMATeacher(student, "uniform", 9).state_dict())


def test_a_recorder_says_that_unfrozen_parameters_are_not_in_earlier_snapshots(tmp_path):
    student = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    student[0].requires_grad_(False)
    recorder = Recorder(student, 4, folder=tmp_path, every=1)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    recorder.update()
    student.requires_grad_(True)
    student(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    with pytest.warns(UserWarning, match=r"'0.weight', '0.bias' had been frozen until step 1.*frozen='copy'"):
        recorder.update()
    with pytest.raises(ValueError, match=r"If parameters were unfrozen during the run.*frozen='copy'"):
        synthesise(tmp_path, "uniform")
