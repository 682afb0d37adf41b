"""Adapters on a quantised base, whose layers keep more than their registered tensors."""

import copy

import pytest
import torch
from torch import nn

from wmateacher import WMATeacher


class Packed(nn.Parameter):
    """An int8 weight whose scale lies in an attribute, like the parameters of bitsandbytes."""

    def __new__(cls, data):
        scale = data.abs().amax() / 127
        packed = torch.Tensor._make_subclass(cls, (data / scale).round().to(torch.int8), False)
        packed.scale = scale
        return packed


class FourBit(nn.Module):
    """A layer that saves its scale under the key of its weight and never reads it, like `Linear4bit`."""

    def __init__(self):
        super().__init__()
        self.weight = Packed(torch.randn(8, 8))

    def forward(self, x):
        return x @ (self.weight.float() * self.weight.scale).T

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight.absmax"] = self.weight.scale


class Found:
    SCB = None


class EightBit(nn.Module):
    """A layer whose first forward pass moves the scale from the weight to `state`, like `Linear8bitLt`."""

    def __init__(self):
        super().__init__()
        self.weight = Packed(torch.randn(8, 8))
        self.state = Found()

    def forward(self, x):
        if self.weight.scale is not None:
            self.state.SCB, self.weight.scale = self.weight.scale, None
        return x @ (self.weight.float() * self.state.SCB).T

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "SCB"] = self.state.SCB if self.weight.scale is None else self.weight.scale


class Adapted(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("student_first", [False, True])
@pytest.mark.parametrize("layer", [FourBit, EightBit])
def test_a_quantised_base_is_shared_and_only_the_adapter_averaged_and_saved(layer, student_first):
    student, x = Adapted(layer()), torch.randn(4, 8)
    start = [copy.deepcopy(m.weight.detach()) for m in (student.down, student.up)]
    teacher = WMATeacher(student, "uniform", total_steps=1)
    if student_first:
        student(x)
    with torch.no_grad():
        for p in (student.down.weight, student.up.weight):
            p.add_(1)
    teacher.update()
    down, up = (w + 0.5 for w in start)
    torch.testing.assert_close(teacher(x), student.base(x) + x @ down.T @ up.T)
    assert teacher.module.base.weight is student.base.weight
    assert teacher.roles.shared == ("base.weight",)
    state = teacher.state_dict()
    assert state.keys() == {"_extra_state", "module.down.weight", "module.up.weight"}
    again = WMATeacher(student, "uniform", total_steps=1)
    again.load_state_dict(state)
    assert torch.equal(again(x), teacher(x))


def test_a_quantised_base_has_no_copy():
    with pytest.raises(ValueError, match=r"'base.weight' is quantised \(Packed\).*frozen='share'"):
        WMATeacher(Adapted(FourBit()), "static", frozen="copy")
