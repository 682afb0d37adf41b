"""Losses inside compiled functions: one graph, with the same values and gradients."""

import copy

import pytest
import torch
from loss_cases import REQUIRED, inputs_for, leaves, require_grad
from torch._dynamo.testing import CompileCounter

from wmateacher import losses

SPECS = (*(REQUIRED.get(name, name) for name in losses.available()), "kl(2.0,top_k=2)", "kl + 0.5*mse")
MASK = torch.tensor([[True, False, True], [False, True, True]])


def value_and_gradients(criterion, student, teacher, **options):
    ours = require_grad(student)
    value = criterion(ours, teacher, **options)
    return [value, *torch.autograd.grad(3 * value, leaves(ours), allow_unused=True)]


def compare(spec, **options):
    torch._dynamo.reset()
    counter = CompileCounter()
    criterion = losses.build(spec).double()
    other = copy.deepcopy(criterion)  # DINO's has a centre, which moves
    compiled = torch.compile(other, backend=counter, fullgraph=True)
    for seed in range(3):
        inputs = inputs_for(spec.partition(" ")[0], seed)
        expected = value_and_gradients(criterion, *inputs, **options)
        torch.testing.assert_close(value_and_gradients(compiled, *inputs, **options), expected)
    torch.testing.assert_close(other.state_dict(), criterion.state_dict())
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("spec", SPECS)
def test_a_compiled_loss_is_one_graph(spec):
    compare(spec)


def test_a_compiled_loss_with_a_mask_is_one_graph():
    compare("kl", mask=MASK, num_items=3)
