"""Teacher states of format 1 load and continue. `states_of_format_1.json` was written by version 0.1.0."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from wmateacher import WMATeacher

STATES = json.loads(Path(__file__).with_name("states_of_format_1.json").read_text())
TOTAL = 12

# Name in the file -> kernel, the student's dtype, and the teacher's options.
CASES = {
    "beta": ("beta(0.5,0.5)", torch.float32, {}),
    "dino": ("ema(0.996,1.0,schedule=cosine)", torch.float32, {}),
    "carot": ("ema(0.05,0.9,schedule=linear,warmup=0.2)", torch.bfloat16, {"update_every": 2}),
    "ema": ("ema(0.999)", torch.bfloat16, {"dtype": "split", "buffers": "average"}),
    "power": ("power(sigma_rel=0.1)", torch.float64, {"buffers": "keep"}),
    "uniform": ("uniform", torch.float16, {"exclude": ["head.*"]}),
    "tail": ("tail(0.25)", torch.float32, {"frozen": "copy", "update_every": 3}),
    "scipy": ("scipy.stats.beta(2.0,3.0)", torch.float32, {"dtype": torch.float64}),
}


class Student(nn.Module):
    """A student whose values at each step are fixed, so that they do not depend on a random generator."""

    def __init__(self, dtype):
        super().__init__()
        self.body = nn.Linear(3, 2, dtype=dtype)
        self.norm = nn.BatchNorm1d(2, dtype=dtype)
        self.head = nn.Linear(2, 2, dtype=dtype)
        self.head.bias.requires_grad_(False)
        self.at(0)

    @torch.no_grad()
    def at(self, step):
        for i, tensor in enumerate(self.state_dict().values()):
            values = (torch.arange(tensor.numel()) * (step + 2) + 3 * i + step * step) % 11
            tensor.copy_(values.view(tensor.shape) / 8)


def read(state):
    """A state from the file, whose tensors are written as [dtype, values]."""
    return {
        key: torch.tensor(value[1], dtype=getattr(torch, value[0])) if isinstance(value, list) else value
        for key, value in state.items()
    }


@pytest.mark.parametrize("name", CASES)
def test_a_state_of_version_0_1_continues_to_the_same_end(name):
    kernel, dtype, options = CASES[name]
    student = Student(dtype)
    teacher = WMATeacher(student, kernel, TOTAL, **options)
    teacher.load_state_dict(read(STATES[name]["saved"]))
    assert teacher.step == 5
    for step in range(6, TOTAL + 1):
        student.at(step)
        teacher.update()
    state, expected = teacher.state_dict(), read(STATES[name]["end"])
    clock, written = state.pop("_extra_state"), expected.pop("_extra_state")
    assert (clock.pop("format"), written.pop("format")) == (2, 1)
    assert clock.pop("shared") == ([] if options.get("frozen") == "copy" else ["head.bias"])
    # Format 2 tells which average joined, what was skipped or unfrozen, and has the mass of densities alone.
    assert (clock.pop("joined"), clock.pop("skipped"), clock.pop("unfrozen")) == (0, [], [])
    assert clock.keys() == written.keys()
    if clock["mass"] is None:
        del clock["mass"], written["mass"]
    for key, value in written.items():
        assert clock[key] == (pytest.approx(value, rel=1e-12) if isinstance(value, float) else value), key
    assert state.keys() == expected.keys()
    for key, tensor in expected.items():
        # Version 0.1 averaged vectors in float32.
        torch.testing.assert_close(state[key].to(tensor.dtype), tensor, rtol=1e-6, atol=1e-6)


def test_the_file_has_every_case():
    assert STATES.keys() == CASES.keys()
