"""Buffers that grow, appear, vanish or change their kind while the student runs."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call

from wmateacher import WMATeacher
from wmateacher.posthoc import Recorder, synthesise


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2))


class Rotary(Base):
    """A cache with its length beside it, recomputed for longer inputs."""

    def __init__(self):
        super().__init__()
        self.length = 0
        self.extend(2)

    def extend(self, length):
        self.length = length
        self.register_buffer("cos", torch.arange(length).cos(), persistent=False)

    def forward(self, x):
        if x.shape[1] > self.length:
            self.extend(x.shape[1])
        return (x @ self.weight) * self.cos[: x.shape[1], None]


class Mask(Base):
    """A mask that is None until it is needed."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mask", None)

    def forward(self, x):
        if self.mask is None or len(self.mask) < x.shape[1]:
            self.mask = torch.full((x.shape[1],) * 2, -torch.inf).triu(1)
        return torch.softmax(self.mask[: x.shape[1], : x.shape[1]], 1) @ x @ self.weight


class Late(Base):
    """A buffer that the first forward pass registers, in a submodule."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Module()

    def forward(self, x):
        if not hasattr(self.inner, "offset"):
            self.inner.register_buffer("offset", torch.zeros(x.shape[1], 1))
        if self.inner.offset.shape[0] < x.shape[1]:
            self.inner.offset = torch.zeros(x.shape[1], 1)
        return x @ self.weight + self.inner.offset[: x.shape[1]]


class Queue(Base):
    """A persistent queue of whole numbers that becomes one of fractions, tied under two names."""

    def __init__(self):
        super().__init__()
        self.register_buffer("queue", torch.zeros(2, dtype=torch.long))
        self.again = nn.Module()
        self.again.register_buffer("queue", self.queue)

    def forward(self, x):
        if len(self.queue) < x.shape[1]:
            self.queue = self.again.queue = torch.arange(x.shape[1]) / 2
        return x @ self.weight + self.again.queue.sum()


STUDENTS = [Rotary, Mask, Late, Queue]
PERSISTENT = [Mask, Late, Queue]


def batch(length):
    return torch.linspace(-1, 1, 2 * length).view(1, length, 2)


def move(student, step):
    with torch.no_grad():
        student.weight.fill_(1.0 + step)


def expected_output(student, weight, x):
    """The output of the student's architecture with given weights, computed on a copy."""
    return functional_call(copy.deepcopy(student), {"weight": torch.full((2, 2), weight)}, (x,))


def buffers(model):
    return dict(model.named_buffers(remove_duplicate=False))


def assert_same_buffers(one, other):
    one, other = buffers(one), buffers(other)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype is other[name].dtype, name
        assert torch.equal(tensor, other[name]), name
        assert tensor is not other[name], name


@pytest.mark.parametrize("nonfinite", ["warn", "skip"])
@pytest.mark.parametrize("kind", STUDENTS)
def test_changed_buffers_follow_the_student(kind, nonfinite):
    student = kind()
    teacher = WMATeacher(student, "ema(0.5)", nonfinite=nonfinite)
    average = 1.0
    for step, length in enumerate([3, 3, 5, 4, 9], 1):
        student(batch(length))
        move(student, step)
        teacher.update()
        average += 0.5 * (1 + step - average)
        assert_same_buffers(teacher.module, student)
        for asked in (2, length):
            torch.testing.assert_close(teacher(batch(asked)), expected_output(student, average, batch(asked)))
    assert teacher.skipped == ()
    assert (teacher.module.weight == average).all()


@pytest.mark.parametrize("kind", STUDENTS)
def test_the_teacher_may_grow_its_own_buffer_first(kind):
    student = kind()
    teacher = WMATeacher(student, "ema(0.5)")
    for step, (mine, theirs) in enumerate([(6, 2), (8, 3), (10, 5)], 1):
        expected = expected_output(student, teacher.module.weight[0, 0].item(), batch(mine))
        if kind is not Queue:  # whose values come from the inputs
            torch.testing.assert_close(teacher(batch(mine)), expected)
        teacher(batch(mine))
        student(batch(theirs))
        move(student, step)
        teacher.update()
        assert_same_buffers(teacher.module, student)


@pytest.mark.parametrize("kind", STUDENTS)
def test_a_vanished_buffer_is_taken_away(kind):
    student = kind()
    student(batch(4))
    teacher = WMATeacher(student, "ema(0.5)")
    for name in buffers(student):
        path, _, leaf = name.rpartition(".")
        student.get_submodule(path)._buffers[leaf] = None
    teacher.update()
    assert buffers(teacher.module) == {}


def test_buffers_are_followed_at_snapshots_only():
    student = Rotary()
    teacher, static = WMATeacher(student, "uniform", 10, update_every=2), WMATeacher(student, "static")
    student(batch(5))
    teacher.update()
    static.update()
    assert teacher.module.cos.shape == static.module.cos.shape == (2,)
    assert static(batch(5)).shape == (1, 5, 2)
    teacher.update()
    assert teacher.module.cos.shape == (5,)


def test_a_cast_teacher_keeps_its_dtype():
    student = Rotary()
    teacher = WMATeacher(student, "ema(0.5)").to(torch.float64)
    for length in (2, 4):
        student(batch(length))
        teacher.update()
        assert teacher(batch(length).double()).dtype is torch.float64
        assert teacher.module.cos.dtype is torch.float64
        torch.testing.assert_close(teacher.module.cos, student.cos.double())


@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
def test_a_student_that_is_not_averaged_passes_no_buffers_on(nonfinite):
    student = Rotary()
    teacher = WMATeacher(student, "ema(0.5)", nonfinite=nonfinite)
    student(batch(5))
    student.weight.data.fill_(torch.nan)
    with pytest.raises(RuntimeError) if nonfinite == "raise" else pytest.warns(UserWarning, match="step 1"):
        teacher.update()
    assert teacher.module.cos.shape == (2,)


@pytest.mark.parametrize("kind", STUDENTS)
def test_a_swap_lends_the_teachers_buffers_and_restores_the_students(kind):
    student = kind()
    student(batch(3))
    teacher = WMATeacher(student, "ema(0.5)")
    student(batch(6))
    move(student, 3)
    before = buffers(student)
    numbers, values = dict(vars(student)), {n: b.clone() for n, b in before.items()}
    with teacher.swap():
        assert_same_buffers(student, teacher.module)
        student(batch(9))
    assert buffers(student).keys() == before.keys()
    assert all(b is before[n] for n, b in buffers(student).items())
    assert all(torch.equal(b, values[n]) for n, b in buffers(student).items())
    assert vars(student).get("length") == numbers.get("length")
    assert (student.weight == 4).all()
    student(batch(8))
    target = kind()
    teacher.copy_to(target)
    assert_same_buffers(target, teacher.module)
    assert torch.equal(target(batch(3)), teacher(batch(3)))


@pytest.mark.parametrize("kind", STUDENTS)
def test_what_a_student_registers_inside_a_swap_is_gone_after_it(kind):
    student = kind()
    before = buffers(student)
    teacher = WMATeacher(student, "ema(0.5)")
    with teacher.swap():
        student(batch(9))
    after = buffers(student)
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)


@pytest.mark.parametrize("kind", STUDENTS)
def test_a_fresh_teacher_resumes(kind):
    student = kind()
    whole, saved = (WMATeacher(student, "uniform", 6) for _ in range(2))
    for step, length in enumerate([2, 5], 1):
        student(batch(length))
        move(student, step)
        whole.update()
        saved.update()
    state = copy.deepcopy(saved.state_dict())
    resumed = WMATeacher(kind(), "uniform", 6)
    resumed.load_state_dict(state)
    if kind in PERSISTENT:
        assert_same_buffers(resumed.module, whole.module)
        again = WMATeacher(kind(), "uniform", 6)
        again.load_state_dict(resumed.state_dict())
        assert_same_buffers(again.module, whole.module)
    for step in (3, 4):
        student(batch(3 + step))
        move(student, step)
        whole.update()
        resumed.update(student)
    assert torch.equal(resumed.module.weight, whole.module.weight)
    assert_same_buffers(resumed.module, whole.module)
    student.load_state_dict(whole.averaged_state_dict())
    assert torch.equal(student(batch(4)), whole(batch(4)))


def test_a_resumed_teacher_has_no_buffer_that_had_vanished():
    student = Queue()
    teacher = WMATeacher(student, "ema(0.5)")
    student.queue = student.again.queue = None
    teacher.update()
    fresh = WMATeacher(Queue(), "ema(0.5)")
    fresh.load_state_dict(teacher.state_dict())
    assert buffers(fresh.module) == {}


def test_a_state_of_another_architecture_is_still_refused():
    teacher = WMATeacher(Queue(), "ema(0.5)")
    state = teacher.state_dict()
    for name, value in [("other", torch.ones(2)), ("queue", torch.ones(7)), ("inner.offset", torch.ones(1))]:
        with pytest.raises(ValueError, match=f"module.{name}'"):
            teacher.load_state_dict({**state, f"module.{name}": value})


class Persistent(Rotary):
    def extend(self, length):
        super().extend(length)
        self._non_persistent_buffers_set.clear()


@pytest.mark.parametrize(("kind", "name"), [(Persistent, "cos"), (Mask, "mask"), (Late, "inner.offset")])
def test_an_average_of_a_changed_buffer_says_what_to_do(kind, name):
    student = kind()
    teacher = WMATeacher(student, "ema(0.5)", buffers="average")
    student(batch(4))
    message = rf"buffer '{name}' has appeared, .*exclude=\['{name}'\].*buffers='copy'"
    for use in (teacher.update, lambda: teacher.copy_to(student), lambda: teacher.swap().__enter__()):
        with pytest.raises(ValueError, match=message):
            use()
    assert teacher.step == 0


def test_an_averaging_teacher_follows_the_buffers_that_it_does_not_average():
    for kind, exclude in [(Persistent, ["cos"]), (Rotary, [])]:
        student = kind()
        teacher = WMATeacher(student, "ema(0.5)", buffers="average", exclude=exclude)
        student(batch(4))
        teacher.update()
        assert_same_buffers(teacher.module, student)


@pytest.mark.parametrize("kind", STUDENTS)
def test_kept_buffers_stay_the_teachers_own(kind):
    student = kind()
    teacher = WMATeacher(student, "ema(0.5)", buffers="keep")
    before = buffers(teacher.module)
    for step, length in enumerate([4, 6], 1):
        student(batch(length))
        move(student, step)
        teacher.update()
        assert all(before[name] is buffer for name, buffer in buffers(teacher.module).items())
    assert (teacher.module.weight == 2.25).all()
    assert teacher(batch(3)).shape == (1, 3, 2)
    teacher.update()
    with teacher.swap():
        assert_same_buffers(student, teacher.module)


def test_an_excluded_parameter_must_keep_its_shape():
    student = Base()
    student.extra = nn.Parameter(torch.ones(3))
    teacher = WMATeacher(student, "ema(0.5)", exclude=["extra"])
    student.extra = nn.Parameter(torch.ones(4))
    with pytest.raises(ValueError, match=r"'extra' has shape \(4,\), the teacher's has \(3,\)"):
        teacher.update()


@pytest.mark.parametrize("kind", STUDENTS)
def test_recorded_runs_synthesise(kind, tmp_path):
    student = kind()
    recorder = Recorder(student, 6, folder=tmp_path, every=1)
    direct = WMATeacher(student, "power(sigma_rel=0.05)", 6)
    for step in range(1, 7):
        student(batch(1 + step))
        move(student, step)
        recorder.update()
        direct.update()
    state, _ = synthesise(tmp_path, "power(sigma_rel=0.05)")
    torch.testing.assert_close(state["weight"], direct.module.weight)
    assert {n: t.shape for n, t in state.items()} == {
        n: t.shape for n, t in direct.averaged_state_dict().items()
    }


def test_a_buffer_that_is_none_at_first_may_be_excluded():
    student = nn.Linear(3, 3)
    student.register_buffer("cache", None)
    teacher = WMATeacher(student, "uniform", 9, buffers="average", exclude=["cache"])
    student.cache = torch.ones(3)
    teacher.update()
    assert torch.equal(teacher.module.cache, student.cache)
    student.cache = None
    teacher = WMATeacher(student, "uniform", 9, buffers="average")
    student.cache = torch.ones(3)
    with pytest.raises(ValueError, match=r"'cache' has appeared.*exclude=\['cache'\]"):
        teacher.update()
