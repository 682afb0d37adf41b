"""Students and averages with NaN or infinite values: noticed and named, or kept out of the average."""

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from wmateacher import WMATeacher, averaging, updating
from wmateacher.finiteness import Detector, Verdict

TOTAL = 12


class Student(nn.Module):
    """A student whose values at each step are fixed, with every kind of tensor that a teacher takes in."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.body = nn.Linear(4, 3, dtype=dtype)
        self.norm = nn.BatchNorm1d(3, dtype=dtype)
        self.phase = nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))
        self.register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1))
        self.at(0)

    @torch.no_grad()
    def at(self, step):
        generator = torch.Generator().manual_seed(step)
        for tensor in [*self.parameters(), self.norm.running_var]:
            tensor.copy_(torch.randn(tensor.shape, generator=generator).abs())
        self.norm.num_batches_tracked.fill_(step)


def flat(student, dtype=torch.float64):
    parameters = [torch.view_as_real(p) if p.is_complex() else p for p in student.parameters()]
    return torch.cat([p.detach().flatten().to(dtype) for p in parameters])


def spoil(student, name, value):
    with torch.no_grad():
        student.state_dict()[name].view(-1)[-1] = value


def run(nonfinite, bad=(), kernel="uniform", name="body.weight", value=torch.nan, steps=TOTAL, **options):
    """Return a teacher after some steps, of which some have a student that is not finite, and its students."""
    dtype = options.pop("student", torch.float32)
    student = Student(dtype)
    teacher = WMATeacher(student, kernel, TOTAL, nonfinite=nonfinite, **options)
    trajectory = [flat(student)]
    for step in range(1, steps + 1):
        student.at(step)
        trajectory.append(flat(student))
        if step in bad:
            spoil(student, name, value)
        teacher.update()
    return teacher, torch.stack(trajectory)


@pytest.fixture(params=["host", "device"])
def decides(request, monkeypatch):
    """Where it is decided that a snapshot counts: the device's way is run on the CPU here."""
    if request.param == "device":
        monkeypatch.setattr(updating, "_decides_on_device", lambda *unused: True)
        monkeypatch.setattr(Verdict, "has_arrived", lambda self: False)
    return request.param


PATHS = {
    "float32": {},
    "bfloat16": {"student": torch.bfloat16},
    "split": {"student": torch.bfloat16, "dtype": "split"},
    "float64 average": {"dtype": torch.float64},
    "averaged buffers": {"buffers": "average", "exclude": ["mask"]},
}


@pytest.mark.parametrize("options", PATHS.values(), ids=PATHS.keys())
@pytest.mark.parametrize("kernel", ["uniform", "tail(0.5)"])
def test_finite_students_are_averaged_as_ever(kernel, options, decides):
    plain, _ = run("warn", kernel=kernel, **options)
    careful, _ = run("skip", kernel=kernel, **options)
    assert careful.skipped == ()
    state, expected = careful.state_dict(), plain.state_dict()
    assert state.pop("_extra_state") == expected.pop("_extra_state")
    assert all(torch.equal(state[key], expected[key]) for key in expected)


@pytest.mark.parametrize("options", PATHS.values(), ids=PATHS.keys())
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("body.weight", torch.nan),
        ("body.bias", -torch.inf),
        ("phase", complex(0, torch.nan)),
        ("norm.running_var", torch.inf),
    ],
)
def test_a_skipped_snapshot_changes_no_tensor(name, value, options, decides):
    before, _ = run("skip", steps=4, **options)
    with pytest.warns(UserWarning, match=f"step 5 in '{name}', and was not averaged"):
        after, _ = run("skip", steps=5, bad=[5], name=name, value=value, **options)
        assert after.skipped == (5,)
    assert (after.step, after.omega) == (5, 0.0)
    for key, tensor in before.module.state_dict().items():
        assert torch.equal(after.module.state_dict()[key], tensor), key
    expected = before.state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in after.state_dict().items() if k != "_extra_state")


@pytest.mark.parametrize("kernel", ["uniform", "beta(0.5,0.5)", "ema(0.9)"])
@pytest.mark.parametrize("every", [1, 3])
def test_the_average_is_what_its_weights_say(kernel, every, decides):
    bad = [3, 6, 7, 9]
    with pytest.warns(UserWarning, match="Later ones are listed in teacher.skipped") as record:
        teacher, trajectory = run("skip", bad=bad, kernel=kernel, update_every=every, dtype=torch.float64)
        weights = teacher.trajectory_weights()
    assert sum("Later ones" in str(warning.message) for warning in record) == 1
    due = [step for step in bad if step % every == 0]
    assert teacher.skipped == tuple(due)
    assert (weights[due] == 0).all()
    assert weights.sum() == pytest.approx(1)
    average = Student().double()
    teacher.copy_to(average)
    torch.testing.assert_close(flat(average), torch.from_numpy(weights) @ trajectory)
    if (kernel, every) == ("ema(0.9)", 1):  # the mass of a skipped snapshot goes to the next one
        expected = [1.0]
        for omega in (0.1, 0.1, 0, 0.19, 0.1, 0, 0, 0.271, 0, 0.19, 0.1, 0.1):
            expected = [w * (1 - omega) for w in expected] + [omega]
        np.testing.assert_allclose(weights, expected, atol=1e-15)


def test_a_run_resumes_after_a_skipped_snapshot(decides):
    with pytest.warns(UserWarning, match="step 5"):
        whole, _ = run("skip", bad=[5])
    student = Student()
    first, second = (WMATeacher(student, "uniform", TOTAL, nonfinite="skip") for _ in range(2))
    with pytest.warns(UserWarning, match="step 5"):
        for step in range(1, 6):
            student.at(step)
            if step == 5:
                spoil(student, "norm.bias", torch.nan)
            first.update()
        second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.skipped == (5,)
    for step in range(6, TOTAL + 1):
        student.at(step)
        second.update()
    np.testing.assert_array_equal(second.trajectory_weights(), whole.trajectory_weights())
    for key, tensor in whole.module.state_dict().items():
        assert torch.equal(second.module.state_dict()[key], tensor)


READERS = {
    "update": lambda teacher: teacher.update(),
    "state_dict": lambda teacher: teacher.state_dict(),
    "trajectory_weights": lambda teacher: teacher.trajectory_weights(),
    "omega": lambda teacher: teacher.omega,
    "deepcopy": copy.deepcopy,
    "set_total_steps": lambda teacher: teacher.set_total_steps(TOTAL + 5),
}


@pytest.mark.parametrize("reader", READERS)
def test_raise_names_step_and_tensors_and_the_run_can_go_on(reader, decides):
    student = Student()
    teacher, skipping = (WMATeacher(student, "uniform", TOTAL, nonfinite=p) for p in ("raise", "skip"))
    message = r"NaN or infinite values at step 2 in 'body.weight', 'norm.bias'"
    with pytest.warns(UserWarning, match=message):
        for step in (1, 2):
            student.at(step)
            if step == 2:
                spoil(student, "body.weight", torch.nan)
                spoil(student, "norm.bias", torch.nan)
            skipping.update()
        assert skipping.skipped == (2,)
    student.at(1)
    teacher.update()
    student.at(2)
    spoil(student, "body.weight", torch.nan)
    spoil(student, "norm.bias", torch.nan)
    if decides == "host":
        with pytest.raises(RuntimeError, match=message):
            teacher.update()
    else:
        teacher.update()
        if reader == "update":
            student.at(3)  # which counts, and is averaged
        with pytest.raises(RuntimeError, match=message):
            READERS[reader](teacher)
    assert (teacher.step, teacher.skipped) == (3 if (decides, reader) == ("device", "update") else 2, (2,))
    if teacher.step == 2:
        student.at(3)
        teacher.update()
    skipping.update()
    assert torch.equal(teacher.module.body.weight, skipping.module.body.weight)
    np.testing.assert_array_equal(teacher.trajectory_weights(), skipping.trajectory_weights())


def test_an_average_must_not_start_at_nan():
    student = Student()
    spoil(student, "norm.weight", torch.inf)
    for policy in ("skip", "raise"):
        with pytest.raises(ValueError, match="'norm.weight', and every average would begin.*exclude="):
            WMATeacher(student, "uniform", 10, nonfinite=policy)
    WMATeacher(student, "uniform", 10, nonfinite="skip", exclude=["norm.weight"])
    with pytest.raises(ValueError, match="nonfinite policy"):
        WMATeacher(student, "uniform", 10, nonfinite="ignore")


USES = {
    "state_dict": lambda teacher, student: teacher.state_dict(),
    "averaged_state_dict": lambda teacher, student: teacher.averaged_state_dict(),
    "swap": lambda teacher, student: teacher.swap().__enter__(),
    "copy_to": lambda teacher, student: teacher.copy_to(student),
}


@pytest.mark.parametrize("options", [{}, PATHS["split"]], ids=["float32", "split"])
@pytest.mark.parametrize("name", ["body.weight", "norm.bias"])
@pytest.mark.parametrize("use", USES)
def test_an_average_that_became_nan_is_named_when_it_is_used(use, name, options):
    teacher, _ = run("warn", bad=[2], name=name, **options)
    target = Student(options.get("student", torch.float32))
    with pytest.warns(UserWarning, match=f"the average has NaN or infinite values in '{name}'"):
        USES[use](teacher, target)


def test_the_warning_comes_once_until_the_average_changes():
    teacher, _ = run("warn", bad=[2], steps=4)
    with pytest.warns(UserWarning, match="'body.weight'"):
        teacher.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        teacher.state_dict()
        teacher.averaged_state_dict()
    student = Student()
    spoil(student, "norm.weight", torch.nan)
    teacher.update(student)
    with pytest.warns(UserWarning, match=r"'body.weight', 'norm.weight'"):
        teacher.state_dict()
    assert teacher.skipped == ()


def test_what_is_finite():
    tensors = {
        "nan": torch.tensor([1, torch.nan]).half(),
        "large half": torch.full((9,), 6e4).half(),
        "large": torch.full((9,), 3e38),
        "large double": torch.full((9,), 1e300, dtype=torch.float64),
        "large bfloat16": torch.full((9,), 3e38).bfloat16(),
        "imaginary": torch.tensor([complex(1, -torch.inf)]),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(-torch.inf),
        "float8": torch.ones(2).to(torch.float8_e4m3fn),
        "sparse": torch.tensor([[0, torch.nan]]).to_sparse(),
        "whole": torch.ones(2, dtype=torch.long),
        "transposed": torch.tensor([[1.0, torch.inf], [2.0, 3.0]]).t(),
    }
    detector = Detector(tensors)
    assert set(detector.names) == tensors.keys() - {"whole"}
    found = Verdict(detector.names, detector()).nonfinite()
    assert set(found) == {"nan", "imaginary", "scalar", "sparse", "transposed"}
    assert Verdict([], Detector({})()).nonfinite() == []


def test_a_masked_update_of_many_small_batches(monkeypatch):
    """Tensors that are cut into pieces are masked in all of them."""
    monkeypatch.setattr(averaging.steps, "SCRATCH_BYTES", {"cpu": 256, "other": 256})
    held = [torch.randn(40, 3), torch.randn(5), torch.randn(7, 7).t()]
    values = [torch.full_like(t, torch.nan) for t in held]
    before = copy.deepcopy(held)
    update = averaging.Update([averaging.Average(t) for t in held], values, masked=True)
    assert len(update._steps) > 3
    for omega in (0.3, 1.0):
        update(omega, torch.tensor(False))
        assert all(map(torch.equal, held, before))
    for value in values:
        value.fill_(2.0)
    update(0.25, torch.tensor(True))
    for tensor, old in zip(held, before, strict=True):
        torch.testing.assert_close(tensor, 0.75 * old + 0.5)
