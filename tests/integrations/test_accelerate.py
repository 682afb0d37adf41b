"""A loop of Accelerate's: nothing but public calls of both."""

from pathlib import Path

import programs
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from wmateacher import WMATeacher

STEPS = 10


def parts(scaler=None):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    x = torch.randn(80, 4, generator=torch.Generator().manual_seed(0))
    data = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=4)
    return model, torch.optim.AdamW(model.parameters(), 1e-2), data


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


def run(folder, accumulated=2, stop=None, resume=None, attach=True):
    """Twenty batches of 4, as ten steps of two; the states passed through, and the teacher."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulated)
    model, optimizer, data = parts()
    teacher = WMATeacher(model, "beta(0.5,0.5)", total_steps=STEPS)
    model, optimizer, data = accelerator.prepare(model, optimizer, data)
    accelerator.register_for_checkpointing(teacher)
    first = 0
    if resume is not None:
        accelerator.load_state(str(resume))
        first = teacher.step * accumulated
    if attach:
        teacher.attach(optimizer)
    states = [weights(model)]
    for inputs, targets in accelerator.skip_first_batches(data, first):
        with accelerator.accumulate(model):
            outputs = model(inputs)
            loss = (outputs - targets).square().mean() + (outputs - teacher(inputs)).square().mean()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            states.append(weights(model))
            if not attach:
                teacher.update()
            if teacher.step == stop:
                accelerator.save_state(str(folder))
                return states, teacher
    return states, teacher


@pytest.mark.parametrize("attach", [True, False])
def test_steps_of_a_prepared_optimizer_count(tmp_path, attach):
    states, teacher = run(tmp_path, attach=attach)
    assert teacher.step == STEPS == len(states) - 1
    expected = torch.from_numpy(teacher.trajectory_weights()) @ torch.stack(states).double()
    torch.testing.assert_close(weights(teacher.module).double(), expected, rtol=1e-5, atol=1e-6)


def test_a_run_that_stopped_ends_with_the_same_bits(tmp_path):
    _, whole = run(tmp_path)
    run(tmp_path / "state", stop=4)
    _, resumed = run(tmp_path, resume=tmp_path / "state")
    assert resumed.step == STEPS
    assert torch.equal(weights(resumed.module), weights(whole.module))


def test_steps_that_the_scaler_skips_do_not_count():
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    model, optimizer, data = parts()
    teacher = WMATeacher(model, "beta(0.5,0.5)", total_steps=20)
    model, optimizer, data = accelerator.prepare(model, optimizer, data)
    teacher.attach(optimizer)
    skipped = 0
    for i, (inputs, targets) in enumerate(data):
        loss = (model(inputs) - targets).square().mean()
        accelerator.backward(loss * (float("inf") if i in (3, 7) else 1))
        optimizer.step()
        optimizer.zero_grad()
        skipped += accelerator.optimizer_step_was_skipped
    assert (skipped, teacher.step) == (2, 18)


@pytest.mark.parametrize("alone", [True, False])
def test_a_teacher_is_registered_and_not_prepared(alone):
    """A prepared model is saved by safetensors, which holds no clock."""
    accelerator = Accelerator(cpu=True)
    model, optimizer, _ = parts()
    teacher = WMATeacher(model, "ema(0.9)")
    others = () if alone else (model, optimizer)
    with pytest.raises(
        RuntimeError, match=r"leave it out of prepare\(\), .*register_for_checkpointing\(teacher"
    ):
        accelerator.prepare(*others, teacher)


@pytest.mark.slow
def test_two_processes(tmp_path):
    for rank in programs.launch(2, Path(__file__).parent / "accelerate_ranks.py", tmp_path):
        assert rank.returncode == 0, rank.stderr[-3000:]
        assert rank.stdout.count("average is right") == 2


@pytest.fixture
def new_accelerator():
    """Forget the process's first Accelerator, whose settings all later ones must share."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("plain_forward", [True, False])
def test_the_teacher_of_a_prepared_model_computes_with_the_average(plain_forward, new_accelerator):
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    if not plain_forward:
        original = model.forward
        model.forward = lambda x: original(x)
    accelerator = new_accelerator(mixed_precision="bf16", cpu=True)
    student = accelerator.prepare(model)
    teacher = WMATeacher(student, "ema(0.5)")
    with torch.no_grad():
        for p in student.parameters():
            p.add_(torch.randn_like(p))
    teacher.update()
    fresh = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    fresh.load_state_dict(teacher.averaged_state_dict())
    x = torch.randn(5, 4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = fresh(x)
    assert teacher(x).dtype is torch.float32
    assert torch.equal(teacher(x), expected.float())
