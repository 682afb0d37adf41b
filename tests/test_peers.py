"""The test scenarios of other libraries' averages, for this one: the table in docs/comparison.md names them all."""

import copy
import pickle
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from wmateacher import WMATeacher, kernels

ROOT = Path(__file__).parents[1]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5, momentum=0.3), nn.Conv2d(5, 2, 3))


def step(net, by=None):
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p) if by is None else by)


def close(one, other):
    for name, value in one.items():
        torch.testing.assert_close(other[name].detach(), value.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("decay", "kernel"), [(0.9, "ema(0.9,start_step=1)"), (None, "uniform(start_step=1)")]
)
@pytest.mark.parametrize("use_buffers", [False, True])
def test_torchs_average_is_one_that_starts_at_step_1(decay, kernel, use_buffers):
    """Its first update copies the model."""
    net = network()
    options = {} if decay is None else {"multi_avg_fn": get_ema_multi_avg_fn(decay)}
    peer = AveragedModel(net, use_buffers=use_buffers, **options)
    teacher = WMATeacher(net, kernel, buffers="average" if use_buffers else "copy")
    states = []
    for _ in range(10):
        step(net)
        net(torch.randn(2, 1, 8, 8))  # moves the running statistics
        states.append({n: p.double() for n, p in net.state_dict().items()})
        peer.update_parameters(net)
        teacher.update()
    weights = [0.1] * 10 if decay is None else [decay**9] + [0.1 * decay**k for k in range(8, -1, -1)]
    for name, value in teacher.module.state_dict().items():
        averaged = value.is_floating_point() and (use_buffers or "running" not in name)
        expected = (
            sum(w * s[name] for w, s in zip(weights, states, strict=True)) if averaged else states[-1][name]
        )
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    close(dict(peer.module.named_parameters()), dict(teacher.module.named_parameters()))


class Normalised(nn.Module):
    def __init__(self, layer, norm):
        super().__init__()
        self.layer, self.bn = layer, norm

    def forward(self, x):
        return self.bn(self.layer(x))


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("shape", [(5,), (5, 6, 6)])
def test_update_bn_computes_the_averages_statistics(shape, momentum):
    torch.manual_seed(0)
    if len(shape) == 1:
        net = Normalised(nn.Linear(5, 7), nn.BatchNorm1d(7, momentum=momentum))
    else:
        net = Normalised(nn.Conv2d(5, 7, 3), nn.BatchNorm2d(7, momentum=momentum))
    peer, teacher = AveragedModel(net), WMATeacher(net, "uniform(start_step=1)", buffers="keep")
    for _ in range(4):
        step(net)
        peer.update_parameters(net)
        teacher.update()
    x = torch.randn(100, *shape)
    averaged = copy.deepcopy(teacher.module.layer).double()(x.double()).transpose(0, 1).flatten(1)
    data = torch.utils.data.TensorDataset
    for dataset in (data(x), data(x, torch.randn(100))):  # without and with targets
        loader = torch.utils.data.DataLoader(dataset, batch_size=20)
        update_bn(loader, peer)
        update_bn(loader, teacher)
        own, theirs = teacher.module.bn, peer.module.bn
        torch.testing.assert_close(own.running_mean, theirs.running_mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(own.running_var, theirs.running_var, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(own.running_mean.double(), averaged.mean(1), rtol=1e-5, atol=1e-5)
        assert own.momentum == momentum
        assert own.num_batches_tracked == theirs.num_batches_tracked == 5
    assert not teacher.module.training
    assert teacher.trajectory_weights()[1:] == pytest.approx(0.25)


def test_a_teacher_may_be_pickled():
    teacher = WMATeacher(network(), "ema(0.9)")
    teacher.update()
    again = pickle.loads(pickle.dumps(teacher))
    assert again.step == 1
    assert all(torch.equal(v, again.module.state_dict()[k]) for k, v in teacher.module.state_dict().items())


def test_an_average_moves_with_its_student_and_only_then():
    net = network()
    teacher, fast = WMATeacher(net, "ema(0.9)"), WMATeacher(net, "ema(0)")
    start = {n: p.clone() for n, p in net.named_parameters()}
    for _ in range(4):
        teacher.update()
    assert all(torch.equal(p, start[n]) for n, p in teacher.module.named_parameters())
    before = start
    for count in (5, 6):
        step(net, by=1.0)
        teacher.update()
        fast.update()
        assert teacher.step == count
        now = {n: p.detach().clone() for n, p in teacher.module.named_parameters()}
        for name, student in net.named_parameters():
            assert (before[name] < now[name]).all()
            assert (now[name] < student).all()
        close(dict(net.named_parameters()), dict(fast.module.named_parameters()))
        before = now


@pytest.mark.parametrize(("start", "total"), [(200_000, None), (200_000, 2_000_000), (5_000_000, 5_000_000)])
def test_a_network_with_batch_normalisation_may_have_an_average_that_starts_very_late(start, total):
    teacher = WMATeacher(network(), kernels.Ema(0.999, start_step=start), total)
    teacher.update()
    assert teacher.omega == 1


@dataclass(frozen=True)
class HalfLifeFraction(kernels.Kernel):
    """The decay of torchtitan: the half-life is a fraction of the steps so far."""

    fraction: float = 0.05
    name = "half_life_fraction"
    stepwise = True
    needs_horizon = False

    def retention(self, steps, total_steps):
        return np.where(steps > 0, 2.0 ** (-1.0 / (self.fraction * np.maximum(steps, 1))), 0.0)


@pytest.mark.parametrize("joined", [0, 6])
def test_any_schedule_of_decays_is_a_kernel_and_goes_on_after_a_resume(joined):
    net = nn.Linear(4, 4)
    teacher = WMATeacher(net, HalfLifeFraction())
    teacher.load_average(None, joined)  # as if so many steps had been counted
    expected = net.weight.detach().double()
    for count in range(joined + 1, 301):
        with torch.no_grad():
            net.weight.fill_(1.0 if count > 5 else count)
        teacher.update()
        decay = 2.0 ** (-1.0 / (0.05 * count))
        expected = decay * expected + (1 - decay) * net.weight.detach().double()
        if count < 10:
            torch.testing.assert_close(teacher.module.weight.double(), expected, rtol=1e-6, atol=1e-6)
    again = WMATeacher(nn.Linear(4, 4), HalfLifeFraction())
    again.load_state_dict(teacher.state_dict())
    with torch.no_grad():
        again.student.weight.fill_(99.0)
    again.update()
    decay = 2.0 ** (-1.0 / (0.05 * 301))
    torch.testing.assert_close(
        again.module.weight.double(), decay * expected + (1 - decay) * 99, rtol=1e-5, atol=1e-5
    )


def test_the_parts_of_a_model_have_one_teacher():
    parts = nn.ModuleList([nn.Linear(2, 2), nn.BatchNorm1d(2)])
    teacher = WMATeacher(parts, "ema(0.5)", buffers="average")
    with torch.no_grad():
        parts[1].running_mean.fill_(4.0)
    teacher.update()
    assert torch.equal(teacher.module[1].running_mean, torch.full((2,), 2.0))


def test_an_update_leaves_no_graph_and_draws_no_random_numbers():
    net = network()
    teacher = WMATeacher(net, "ema(0.9)")
    state = torch.get_rng_state()
    for _ in range(3):
        teacher.update()  # with gradients enabled
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(t.requires_grad or t.grad_fn for t in teacher.module.state_dict(keep_vars=True).values())


def test_freezing_a_parameter_afterwards_is_allowed():
    net = nn.Linear(2, 2)
    teacher = WMATeacher(net, "ema(0.5)")
    with torch.no_grad():
        net.weight.add_(2.0)
    net.weight.requires_grad_(False)
    before = teacher.module.weight.detach().clone()
    teacher.update()
    torch.testing.assert_close(teacher.module.weight.detach(), before + 1.0)


def test_the_table_of_scenarios_names_tests_that_exist():
    page = (ROOT / "docs/comparison.md").read_text()
    rows = [line for line in page.splitlines() if "::" in line]
    assert len(rows) > 60
    for row in rows:
        for file, name in re.findall(r"`([\w/]+\.py)::(\w+)`", row):
            assert re.search(rf"^def {name}\(", (ROOT / "tests" / file).read_text(), re.MULTILINE), (
                file,
                name,
            )
