"""Modules that Lightning Fabric has set up."""

import copy

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
