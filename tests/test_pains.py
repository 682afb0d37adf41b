"""The common pitfalls of averaging helpers, one test for each, named after what the teacher does instead."""

import copy
import threading

import pytest
import torch
from torch import nn

from wmateacher import WMATeacher


def student(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)).to(dtype)


def perturb(model):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_average_of_a_low_precision_student_does_not_stall(dtype):
    model = student(dtype)
    teacher = WMATeacher(model, "ema(0.999)")
    for p in model.parameters():
        nn.init.constant_(p, 2.0)
    for _ in range(5000):
        teacher.update()
    for p in teacher.module.parameters():
        torch.testing.assert_close(p, torch.full_like(p, 2.0), rtol=0.02, atol=0)


@pytest.mark.parametrize("asked", ["auto", "split", torch.float32, torch.float64], ids=str)
def test_a_bfloat16_student_may_be_averaged_in_any_precision(asked):
    model = student(torch.bfloat16)
    teacher = WMATeacher(model, "uniform", dtype=asked)
    perturb(model)
    teacher.update()
    assert teacher(torch.randn(3, 4).bfloat16()).dtype is torch.bfloat16


def test_a_resumed_teacher_keeps_its_step_count():
    model = student()
    teacher = WMATeacher(model, "uniform")
    for _ in range(9):
        teacher.update()
    resumed = WMATeacher(model, "uniform")
    resumed.load_state_dict(copy.deepcopy(teacher.state_dict()))
    perturb(model)
    resumed.update()
    assert resumed.step == 10
    assert resumed.omega == pytest.approx(1 / 11)


def test_a_state_without_a_teacher_is_refused():
    teacher = WMATeacher(student(), "uniform")
    for state in ({}, student().state_dict(), {"_orig_mod.module.0.weight": torch.zeros(8, 4)}):
        for strict in (True, False):
            with pytest.raises(ValueError, match="no teacher state under the prefix '': it holds no clock"):
                teacher.load_state_dict(state, strict=strict)


def test_the_student_cannot_be_saved_while_weights_are_swapped():
    model = student()
    teacher = WMATeacher(model, "uniform")
    with teacher.swap(), pytest.raises(RuntimeError, match="state_dict"):
        model.state_dict()


def test_the_student_gets_its_weights_back_after_an_exception_in_validation():
    model = student()
    teacher = WMATeacher(model, "uniform")
    perturb(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ZeroDivisionError), teacher.swap():
        _ = 1 / 0
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_teacher_that_was_never_updated_is_the_student():
    model = student().eval()
    teacher = WMATeacher(model, "beta(0.5,0.5)", 100)
    x = torch.randn(3, 4)
    assert torch.equal(teacher(x), model(x))
    with teacher.swap():
        assert torch.equal(teacher(x), model(x))


def test_batch_norm_statistics_follow_and_integers_are_copied():
    model = student()
    for buffers in ("copy", "average"):
        teacher = WMATeacher(model, "ema(0.9)", buffers=buffers)
        for _ in range(3):
            model.train()(torch.randn(16, 4) + 5)
            teacher.update()
        assert torch.equal(teacher.module[1].num_batches_tracked, model[1].num_batches_tracked)
        ours, theirs = teacher.module[1].running_mean, model[1].running_mean
        assert torch.equal(ours, theirs) if buffers == "copy" else (ours.abs() > 0).all()
        model[1].reset_running_stats()


def test_a_compiled_student_is_matched_by_name():
    model = student()
    teacher = WMATeacher(model, "ema(0.5)")
    compiled = torch.compile(nn.Sequential(torch.compile(model[0]), model[1], torch.compile(model[2])))
    perturb(model)
    before = teacher.module[0].weight.clone()
    teacher.update(compiled)
    torch.testing.assert_close(teacher.module[0].weight, (before + model[0].weight) / 2)


def test_modules_that_cannot_be_deep_copied_get_a_factory():
    model = student()
    model.cache = model[0].weight * 2
    assert torch.equal(WMATeacher(model, "uniform").module.cache, model.cache)
    model.cache = [model.cache]
    assert torch.equal(WMATeacher(model, "uniform").module.cache[0], model.cache[0])
    model.lock = threading.Lock()
    with pytest.raises(ValueError, match="pass module_factory=FACTORY"):
        WMATeacher(model, "uniform")
    WMATeacher(model, "uniform", module_factory=student)


@pytest.mark.parametrize("kernel", ["ema(0.999)", "power(sigma_rel=0.1)", "beta(0.5,0.5)"])
def test_an_update_interval_keeps_the_window(kernel):
    ages = {}
    for every in (1, 10):
        model = nn.Linear(1, 1)
        teacher = WMATeacher(model, kernel, 6000, update_every=every)
        for _ in range(6000):
            teacher.update()
        weights = teacher.trajectory_weights()
        ages[every] = 6000 - weights @ range(6001)
    assert ages[10] == pytest.approx(ages[1], abs=5)


def test_a_teacher_of_an_adapter_shares_the_frozen_base():
    model = student()
    model[0].requires_grad_(False)
    teacher = WMATeacher(model, "uniform")
    assert teacher.module[0].weight is model[0].weight


@pytest.mark.parametrize(("kernel", "number"), [("ema(7)", "7"), ("ema(-0.1)", "-0.1"), ("ema(1.5)", "1.5")])
def test_a_decay_out_of_range_is_refused(kernel, number):
    with pytest.raises(ValueError, match=rf"ema: .*retention.* got {number}"):
        WMATeacher(student(), kernel)


def test_an_attached_teacher_updates_once_after_each_step():
    model = student()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    teacher = WMATeacher(model, "tail(0.5)", 8)  # before the tail: the latest student
    teacher.attach(optimizer)
    for micro_batch in range(8):
        model(torch.randn(16, 4)).sum().backward()
        if micro_batch % 4 == 3:
            optimizer.step()
            assert torch.equal(teacher.module[0].weight, model[0].weight)
    assert teacher.step == 2


def test_tied_weights_are_averaged_once():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    nn.init.zeros_(model[0].weight)
    teacher = WMATeacher(model, "ema(0.9)")
    nn.init.ones_(model[0].weight)
    teacher.update()
    torch.testing.assert_close(teacher.module[1].weight, torch.full((3, 3), 0.1))


def test_dropout_is_off_in_the_teacher():
    teacher = WMATeacher(nn.Dropout(0.5), "uniform").train()
    x = torch.ones(100)
    assert torch.equal(teacher(x), x)
