"""Modules that Lightning Fabric has set up."""

import copy
from pathlib import Path

import programs
import pytest
import torch
from lightning.fabric import Fabric
from torch import nn

from wmateacher import WMATeacher, naming, pairing

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.module = nn.Linear(3, 2)

    def forward(self, x):
        return self.module(self.body(x))


@pytest.fixture(scope="module")
def fabric():
    return Fabric(accelerator="cpu", devices=1)


def inside(fabric, model):
    model.body, model.module = fabric.setup(model.body), fabric.setup(model.module)
    return model


WRAPS = {
    "set up": lambda fabric, model: fabric.setup(model),
    "compiled and set up": lambda fabric, model: fabric.setup(torch.compile(model)),
    "set up inside": inside,
}


@pytest.fixture(params=WRAPS.values(), ids=WRAPS)
def wrap(request, fabric):
    return lambda model: request.param(fabric, model)


def trained(model):
    torch.manual_seed(0)
    teacher = WMATeacher(model, "uniform", 10)
    for _ in range(3):
        with torch.no_grad():
            for p in pairing.tensors(pairing.unwrap(model)).values():
                p.add_(torch.rand(p.shape).to(p.dtype))
        teacher.update(model)
    return teacher


def test_a_teacher_of_a_fabric_module_is_that_of_the_plain_one(wrap):
    torch.manual_seed(1)
    plain = Net()
    model = wrap(copy.deepcopy(plain))
    expected, teacher = trained(plain), trained(model)
    state = teacher.state_dict()
    assert state.keys() == expected.state_dict().keys()
    assert all(torch.equal(v, state[k]) for k, v in expected.state_dict().items() if torch.is_tensor(v))
    x = torch.rand(4, 3)
    assert torch.equal(teacher(x), expected(x))
    for fresh in (WMATeacher(Net(), "uniform", 10), WMATeacher(wrap(Net()), "uniform", 10)):
        for source in (state, expected.state_dict()):
            fresh.load_state_dict(source)
            assert fresh.step == 3
            assert torch.equal(fresh(x), expected(x))


def test_averages_go_to_and_come_from_fabric_modules(wrap):
    teacher = trained(Net())
    model = wrap(Net())
    own = copy.deepcopy(pairing.tensors(pairing.unwrap(model)))
    with teacher.swap(model):
        held = pairing.tensors(pairing.unwrap(model))
        assert all(torch.equal(v, held[k]) for k, v in pairing.tensors(teacher.module).items())
    assert all(torch.equal(v, own[k]) for k, v in pairing.tensors(pairing.unwrap(model)).items())
    teacher.copy_to(model)
    other = WMATeacher(Net(), "uniform", 10)
    other.load_average(model.state_dict(), 3)
    x = torch.rand(4, 3)
    assert torch.equal(other(x), teacher(x))
    assert set(naming.canonical(model, model.state_dict()).values()) == teacher.module.state_dict().keys()


@pytest.mark.parametrize("order", ["before setup", "after setup"])
def test_fabric_saves_and_loads_a_teacher(tmp_path, fabric, order):
    def build():
        torch.manual_seed(1)
        plain = Net()
        teacher = WMATeacher(plain, "uniform", 10) if order == "before setup" else None
        model, optimizer = fabric.setup(plain, torch.optim.AdamW(plain.parameters(), 1e-2))
        return model, optimizer, teacher or WMATeacher(model, "uniform", 10)

    def train(model, optimizer, teacher, steps, states=None):
        with teacher.attach(optimizer):
            for step in steps:
                fabric.backward(model(torch.ones(2, 3) * step).square().mean())
                optimizer.step()
                optimizer.zero_grad()
                if states is not None:
                    states.append(model.state_dict()["module.weight"].clone())

    model, optimizer, teacher = build()
    states = [model.state_dict()["module.weight"].clone()]
    train(model, optimizer, teacher, range(3), states)
    assert teacher.state_dict().keys() == WMATeacher(Net(), "uniform", 10).state_dict().keys()
    fabric.save(tmp_path / "all.ckpt", {"model": model, "optimizer": optimizer, "teacher": teacher})
    train(model, optimizer, teacher, range(3, 6), states)
    resumed = build()
    fabric.load(tmp_path / "all.ckpt", dict(zip(("model", "optimizer", "teacher"), resumed, strict=True)))
    assert resumed[2].step == 3
    train(*resumed, range(3, 6))
    assert resumed[2].step == teacher.step == 6
    for name, value in teacher.averaged_state_dict().items():
        assert torch.equal(resumed[2].averaged_state_dict()[name], value)
    mean = torch.stack(states).double().mean(0)
    torch.testing.assert_close(teacher.module.module.weight.double(), mean, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_sharded_fabric_module_has_a_teacher(tmp_path):
    for rank in programs.launch(2, Path(__file__).parent / "fabric_ranks.py", tmp_path):
        assert rank.returncode == 0, rank.stderr[-3000:]
        assert "the average is restored" in rank.stdout
