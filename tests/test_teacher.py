import copy
import io
import threading

import numpy as np
import oracle
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from wmateacher import WMATeacher
from wmateacher.pairing import tensors

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
# The student's dtype and the average's: every path by which a tensor is averaged.
PRECISIONS = {
    "float32": (torch.float32, "auto"),
    "float64": (torch.float64, "auto"),
    "bfloat16": (torch.bfloat16, "auto"),
    "float16": (torch.float16, "auto"),
    "complex64": (torch.complex64, "auto"),
    "split": (torch.bfloat16, "split"),
    "float32 in float64": (torch.float32, torch.float64),
}


class OneHot(nn.Module):
    """A student whose k-th state is the k-th unit vector: averaged, it reads the weights out."""

    def __init__(self, states, dtype):
        super().__init__()
        self.state = nn.Parameter(torch.zeros(states, 2, dtype=dtype))
        self.vector = nn.Parameter(torch.zeros(states, dtype=dtype))
        self.at(0)

    def at(self, k):
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()[k] = 1.0

    def forward(self):
        return self.state


class Net(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.body = nn.Linear(4, width)
        self.norm = nn.BatchNorm1d(width)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        return self.head(self.drop(self.norm(self.body(x))))


def train_step(student, optimizer):
    loss = F.cross_entropy(student(torch.randn(16, 4)), torch.randint(0, 3, (16,)))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def saved(teacher):
    """The teacher's state after a round trip through a file, loaded without unpickling code."""
    file = io.BytesIO()
    torch.save(teacher.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def held(teacher, name="state"):
    """The average at full precision."""
    return teacher.state_dict()[f"module.{name}"]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("every", [1, 3, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 7, 50))])
@pytest.mark.parametrize("kernel", oracle.KERNELS)
def test_realised_weights_equal_the_kernels(kernel, every, precision):
    """The property: one-hot students, resumed at a random step, read the kernel's weights out."""
    total = 60
    dtype, asked = PRECISIONS[precision]
    resume_at = int(torch.randint(0, total + 1, ()))
    student = OneHot(total + 1, dtype)
    teacher = WMATeacher(student, kernel, total, update_every=every, dtype=asked)
    double = torch.float64 in (dtype, asked)
    assert held(teacher).dtype is (dtype if dtype.is_complex else torch.float64 if double else torch.float32)
    assert held(teacher, "vector").dtype is (torch.complex128 if dtype.is_complex else torch.float64)
    for step in range(1, total + 1):
        if step == resume_at:
            state = saved(teacher)
            teacher = WMATeacher(OneHot(total + 1, dtype), kernel, total, update_every=every, dtype=asked)
            teacher.load_state_dict(state)
        student.at(step)
        teacher.update(student)
        if precision != "float32" and step % 10 and step < total - 3:
            continue  # the later averages hold what went wrong here
        expected = oracle.realised(kernel, total, every, step)
        np.testing.assert_allclose(teacher.trajectory_weights(), expected, rtol=1e-9, atol=1e-12)
        for average in (held(teacher)[:, 1], held(teacher, "vector")):
            eps = torch.finfo(average.dtype).eps
            np.testing.assert_allclose(
                average[: step + 1].real.double().numpy(), expected, rtol=1e-9 + step * eps, atol=eps
            )
    assert teacher().dtype is dtype


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bfloat16", "split", "float32"])
@pytest.mark.parametrize("kernel", ["beta(0.5,0.5)", "uniform", "ema(0.99975)"])
def test_the_weights_of_5_000_updates(kernel, precision):
    """Students of 200 steps each are told apart; their weights hold to 1e-5 of themselves."""
    total = 5_000
    dtype, asked = PRECISIONS[precision]
    student = OneHot(26, dtype)
    teacher = WMATeacher(student, kernel, total, dtype=asked)
    for step in range(1, total + 1):
        if step % 200 == 1:
            student.at(1 + step // 200)
        teacher.update()
    weights = teacher.trajectory_weights()
    expected = np.concatenate([weights[:1], weights[1:].reshape(25, 200).sum(1)])
    np.testing.assert_allclose(held(teacher)[:, 1].double().numpy(), expected, rtol=1e-5)
    np.testing.assert_allclose(held(teacher, "vector").numpy(), expected, rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bfloat16", "split", "float32"])
def test_5_000_small_updates_track_the_float64_average(precision):
    dtype, asked = PRECISIONS[precision]
    student = OneHot(64, dtype)
    teacher = WMATeacher(student, "ema(0.99975)", dtype=asked)
    expected = student.state.detach().double().clone()
    walk = expected.clone()
    for _ in range(5_000):
        walk += 0.01 * torch.randn(64, 2, dtype=torch.float64)
        student.state.data.copy_(walk)
        teacher.update()
        expected += teacher.omega * (student.state.detach().double() - expected)
    error = (held(teacher).double() - expected).norm() / expected.norm()
    assert error < 1e-5
    assert (student.state.detach().double() - expected).norm() / expected.norm() > 0.1  # they are apart


class Gains(nn.Module):
    """A student of norm gains, a logit scale and a class token, which the teacher averages in float64."""

    def __init__(self, dtype):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(3, dtype=dtype))
        self.scale = nn.Parameter(torch.ones((), dtype=dtype))
        self.token = nn.Parameter(torch.ones(1, 1, 4, dtype=dtype))


@pytest.mark.parametrize(
    ("total", "start", "steps"),
    [
        (300_000, 299_000, 1_000),
        (300_000, 150_000, 1_000),
        pytest.param(25_000, 0, 25_000, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "split"])
def test_gains_that_drift_by_a_hundredth_do_not_stall(total, start, steps, precision):
    """Float32 near 1 would lose the small updates of a long run: the error is measured against the drift."""
    dtype, asked = PRECISIONS[precision]
    student = Gains(dtype)
    names = dict(student.named_parameters())
    teacher = WMATeacher(student, "uniform", total, dtype=asked)
    begun = mean = 1 + 0.01 * start / total / 2  # the mean so far of a drift from 1 to 1.01
    if start:
        teacher.load_average(
            {n: torch.full(p.shape, mean, dtype=torch.float64) for n, p in names.items()}, start
        )
    for step in range(start + 1, start + steps + 1):
        if (step - start) % 500 == 1:
            value = torch.tensor(1 + 0.01 * step / total).to(dtype)
            for parameter in names.values():
                parameter.data.fill_(value)
        teacher.update()
        mean += (value.item() - mean) / (step + 1)
    for name in names:
        error = (held(teacher, name) - mean).abs().max().item()
        assert error < 1e-3 * abs(mean - begun), name


def test_a_slow_average_of_a_bf16_student_does_not_stall():
    """1,000 updates of weight 1e-3 from 1.0 towards 2.0, which bfloat16 itself would swallow."""
    student = nn.Linear(1, 1, bias=False).bfloat16()
    nn.init.ones_(student.weight)
    teacher = WMATeacher(student, "ema(0.999)")
    nn.init.constant_(student.weight, 2.0)
    for _ in range(1000):
        teacher.update()
    expected = 2 - 0.999**1000
    assert held(teacher, "weight").item() == pytest.approx(expected, rel=1e-5)
    assert teacher.module.weight.item() == pytest.approx(expected, rel=2**-8)
    assert teacher.module.weight.dtype is torch.bfloat16


@pytest.mark.parametrize("every", [1, 3])
def test_uniform_is_the_running_mean_of_a_real_run(every):
    student = Net()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    teacher = WMATeacher(student, "uniform", dtype=torch.float64, update_every=every)
    states = [student.head.weight.detach().double().clone()]
    for step in range(1, 13):
        train_step(student, optimizer)
        teacher.update()
        if step % every == 0:
            states.append(student.head.weight.detach().double().clone())
    # With update_every, W^0 stands for fewer steps than the snapshots between: weigh by realised ones.
    weights = teacher.trajectory_weights()[::every]
    expected = sum(w * s for w, s in zip(weights, states, strict=True))
    torch.testing.assert_close(held(teacher, "head.weight"), expected, rtol=1e-12, atol=1e-14)
    if every == 1:
        torch.testing.assert_close(expected, torch.stack(states).mean(0), rtol=1e-12, atol=1e-14)


def test_static_never_moves_nor_its_buffers():
    student = Net()
    before = copy.deepcopy(student.state_dict())
    teacher = WMATeacher(student, "static")
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    for _ in range(5):
        train_step(student, optimizer)
        teacher.update()
    assert teacher.omega == 0
    for name, tensor in teacher.module.state_dict().items():
        assert torch.equal(tensor, before[name]), name
        if name != "norm.num_batches_tracked":
            assert not torch.equal(student.state_dict()[name], before[name]), name


def test_before_a_tail_starts_the_teacher_is_the_latest_student():
    student = Net()
    teacher = WMATeacher(student, "tail(0.25)", 20)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    for _ in range(10):
        train_step(student, optimizer)
        teacher.update()
        assert torch.equal(teacher.module.head.weight, student.head.weight)


def test_forward_is_in_eval_mode_without_gradient_and_off_the_students_graph():
    student = Net().train()
    teacher = WMATeacher(student, "uniform").train()
    x = torch.randn(6, 4, requires_grad=True)
    out = teacher(x)
    assert not out.requires_grad
    assert torch.equal(out, teacher(x))  # no dropout
    assert not teacher.module.training
    assert student.training
    assert not any(p.requires_grad for p in teacher.parameters())
    own, theirs = tensors(teacher.module), tensors(student)
    assert not {t.data_ptr() for t in own.values()} & {t.data_ptr() for t in theirs.values()}


def test_the_teacher_starts_as_the_student():
    student = Net().eval()
    x = torch.randn(3, 4)
    teacher = WMATeacher(student, total_steps=10)
    assert torch.equal(teacher(x), student(x))
    assert teacher.trajectory_weights().tolist() == [1.0]
    assert (teacher.step, teacher.total_steps, str(teacher.kernel)) == (0, 10, "beta(0.5,0.5)")
    assert "kernel=beta(0.5,0.5), step=0, total_steps=10, update_every=1" in repr(teacher)


@pytest.mark.parametrize("policy", ["copy", "average", "keep"])
def test_buffers_follow_their_policy(policy):
    student = Net()
    teacher = WMATeacher(student, "ema(0.5)", buffers=policy)
    start = student.norm.running_mean.clone()
    student(torch.randn(32, 4) + 3)
    teacher.update()
    now = student.norm.running_mean
    expected = {"copy": now, "average": (start + now) / 2, "keep": start}[policy]
    torch.testing.assert_close(teacher.module.norm.running_mean, expected)
    assert teacher.module.norm.num_batches_tracked.item() == (policy != "keep")


def test_excluded_tensors_are_copied():
    student = Net()
    teacher = WMATeacher(student, "ema(0.9)", exclude=["head.*"])
    for p in student.parameters():
        nn.init.constant_(p, 7.0)
    teacher.update()
    assert (teacher.module.head.weight == 7).all()
    assert not (teacher.module.body.weight == 7).any()


def test_frozen_parameters_are_the_students_own_and_not_in_the_state():
    student = Net()
    student.body.requires_grad_(False)
    teacher = WMATeacher(student, "ema(0.9)")
    assert teacher.module.body.weight is student.body.weight
    assert not [k for k in saved(teacher) if "body" in k]
    again = WMATeacher(student, "ema(0.9)")
    again.load_state_dict(saved(teacher))
    assert again.module.body.weight is student.body.weight
    apart = WMATeacher(student, "ema(0.9)", frozen="copy")
    assert apart.module.body.weight is not student.body.weight


def test_tied_weights_move_once_and_stay_tied():
    student = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    student[1].weight = student[0].weight
    student.bfloat16()
    assert student[1].weight is student[0].weight
    nn.init.zeros_(student[0].weight)
    teacher = WMATeacher(student, "ema(0.9)")
    nn.init.ones_(student[0].weight)
    teacher.update()
    assert teacher.module[0].weight is teacher.module[1].weight
    state = saved(teacher)
    for key in ("module.0.weight", "module.1.weight"):
        torch.testing.assert_close(state[key], torch.full((3, 3), 0.1))
    again = WMATeacher(student, "ema(0.9)")
    again.load_state_dict(state)
    torch.testing.assert_close(held(again, "0.weight"), torch.full((3, 3), 0.1))


def test_compiled_and_parallel_students_are_matched_by_name():
    student = Net()
    teacher = WMATeacher(torch.compile(student), "ema(0.5)")
    assert type(teacher.module) is Net
    teacher.update(nn.DataParallel(torch.compile(student)))
    assert teacher.step == 1


def test_a_factory_builds_what_cannot_be_copied():
    class Locked(Net):
        def __init__(self):
            super().__init__()
            self.lock = threading.Lock()

    student = Locked()
    with pytest.raises(ValueError, match=r"\(Locked\) cannot be deep-copied .*pass module_factory=FACTORY"):
        WMATeacher(student, "uniform")
    student.head.requires_grad_(False)
    teacher = WMATeacher(student, "uniform", module_factory=Locked)
    x = torch.randn(5, 4)
    assert torch.equal(teacher(x), student.eval()(x))
    assert teacher.module.head.weight is student.head.weight
    with pytest.raises(ValueError, match="module with the student's tensors, .* has 'body.weight' of shape"):
        WMATeacher(student, "uniform", module_factory=lambda: Net(9))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_resumed_run_is_bit_identical(dtype):
    def start():
        torch.manual_seed(1)
        student = Net().to(dtype)
        teacher = WMATeacher(student, "beta(0.5,0.5)", 20, update_every=3, buffers="average")
        return student, teacher, torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)

    def go(student, teacher, optimizer, steps):
        for step in steps:
            torch.manual_seed(step)
            x = torch.randn(16, 4).to(dtype)
            (student(x) - teacher(x)).square().mean().add(student(x).mean()).backward()
            optimizer.step()
            optimizer.zero_grad()
            teacher.update()

    whole = start()
    go(*whole, range(20))
    first = start()
    go(*first, range(7))
    second = start()
    for part, done in zip(second, first, strict=True):
        part.load_state_dict(copy.deepcopy(done.state_dict()))
    go(*second, range(7, 20))
    expected = whole[1].state_dict()
    for key, value in second[1].state_dict().items():
        assert (
            torch.equal(value, expected[key]) if isinstance(value, torch.Tensor) else value == expected[key]
        )
    for key, value in whole[1].module.state_dict().items():
        assert torch.equal(value, second[1].module.state_dict()[key])


def test_the_state_nests_in_another_modules():
    class Lit(nn.Module):
        def __init__(self):
            super().__init__()
            self.student = Net().bfloat16()
            self.student.body.requires_grad_(False)
            self.teacher = WMATeacher(self.student, "ema(0.9)")

    first, second = Lit(), Lit()
    first.student.head.weight.data.add_(1)
    first.teacher.update()
    result = second.load_state_dict(first.state_dict())
    assert result.missing_keys == result.unexpected_keys == []
    assert second.teacher.step == 1
    assert torch.equal(held(second.teacher, "head.weight"), held(first.teacher, "head.weight"))
    assert second.teacher.module.body.weight is second.student.body.weight
    second.train()
    assert not second.teacher.module.training


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("cast", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_cast_changes_the_forward_and_never_the_average(precision, cast):
    dtype, asked = PRECISIONS[precision]
    student = OneHot(5, dtype)
    teacher, uncast = (WMATeacher(student, "ema(0.9)", dtype=asked) for _ in range(2))
    for cast_now in (False, True, False):
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(torch.rand(parameter.shape).to(dtype))
        if cast_now and not dtype.is_complex:
            assert teacher.to(cast)().dtype is cast
        teacher.update()
        uncast.update()
    for name in ("state", "vector"):
        assert held(teacher, name).dtype is held(uncast, name).dtype
        assert torch.equal(held(teacher, name), held(uncast, name))
    assert torch.equal(teacher(), held(uncast).to(teacher().dtype))


def test_a_refused_state_changes_nothing():
    student = Net()
    teacher = WMATeacher(student, "uniform", 10)
    teacher.update()
    before = copy.deepcopy(teacher.state_dict())
    further = WMATeacher(student, "uniform", 10)
    further.update()
    further.update()
    good = copy.deepcopy(further.state_dict())
    good["module.head.weight"] += 1
    without, reshaped, extra, newer, *damaged = (copy.deepcopy(good) for _ in range(8))
    del without["module.norm.bias"]
    reshaped["module.norm.bias"] = torch.zeros(9)
    extra["module.tail.bias"] = torch.zeros(9)
    newer["_extra_state"]["format"] = 99
    del damaged[0]["_extra_state"]["kernel"]
    damaged[1]["_extra_state"]["step"] = float("nan")
    del damaged[2]["_extra_state"]["omega"]
    damaged[3]["_extra_state"]["omega"] = float("nan")
    for state, message in [
        (Net().state_dict(), "holds no clock.*load them into the student and build the teacher from it"),
        ({}, "holds no clock"),
        (without, "another architecture: missing 'module.norm.bias'"),
        (reshaped, r"'module.norm.bias' has shape \(9,\) there and \(8,\) here"),
        (extra, "another architecture: unexpected 'module.tail.bias'"),
        (newer, "has format 99, but this version reads formats 1 to 2"),
        (damaged[0], "the state of the teacher's clock lacks kernel: it is damaged"),
        (damaged[1], "clock has step=nan, which no run leads to: .* load another checkpoint"),
        (damaged[2], r"omega must be a weight in \[0, 1\], got None"),
        (damaged[3], r"omega must be a weight in \[0, 1\], got nan"),
        (WMATeacher(student, "uniform", 11).state_dict(), "total_steps=11, this teacher has total_steps=10"),
        (
            WMATeacher(student, "static", 10).state_dict(),
            "kernel='static', this teacher has kernel='uniform'",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            teacher.load_state_dict(state)
        for key, value in teacher.state_dict().items():
            same = torch.equal(value, before[key]) if torch.is_tensor(value) else value == before[key]
            assert same, (message, key)
    teacher.load_state_dict(good)
    assert teacher.step == 2


def test_a_few_steps_too_many_do_not_lose_the_run():
    student = Net()
    teacher = WMATeacher(student, "uniform", 3)
    for _ in range(3):
        teacher.update()
    before = teacher.module.head.weight.clone()
    student.head.weight.data.add_(1)
    with pytest.warns(UserWarning, match="after step 3 of total_steps=3") as caught:
        teacher.update()
        teacher.update()
    assert [w.filename for w in caught] == [__file__]
    assert torch.equal(teacher.module.head.weight, before)
    teacher.set_total_steps(5)
    teacher.update()
    assert teacher.step == 4


def test_a_student_that_changed_shape_is_an_error_and_no_step_is_counted():
    student = Net()
    teacher = WMATeacher(student, "uniform")
    student.head = nn.Linear(8, 4)
    with pytest.raises(ValueError, match=r"'head.weight' has shape \(4, 8\), the teacher's has \(3, 8\)"):
        teacher.update()
    assert teacher.step == 0


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"total_steps": None}, ValueError, r"'beta\(0.5,0.5\)' needs total_steps, got None"),
        ({"kernel": "betta(1,1)"}, ValueError, "unknown kernel 'betta'; did you mean 'beta'"),
        ({"kernel": "beta(-1,1)"}, ValueError, "beta: a must be a finite number above 0, got -1"),
        ({"update_every": 0}, ValueError, "update_every must be a whole number of at least 1, got 0"),
        ({"buffers": "none"}, ValueError, "unknown buffers policy 'none'; .*available: average, copy, keep"),
        ({"dtype": torch.int32}, ValueError, "dtype must be 'auto', 'split' or a floating-point torch.dtype"),
        ({"dtype": "bf16"}, ValueError, "dtype must be 'auto', 'split' or .*, got 'bf16'"),
        ({"dtype": "split"}, ValueError, "no averaged tensor of this one is bfloat16: use dtype='auto'"),
        (
            {"dtype": "split", "model": Net().half()},
            ValueError,
            r"'body.weight' is torch.float16: use dtype='auto'",
        ),
        (
            {"model": nn.LazyLinear(3)},
            ValueError,
            "'weight' belongs to a lazy module .*run one batch through the student before",
        ),
        ({"model": "resnet"}, TypeError, "model must be an nn.Module, got str"),
    ],
)
def test_bad_arguments_say_what_to_do(changes, error, message):
    arguments = {"model": Net(), "total_steps": 10, **changes}
    with pytest.raises(error, match=message):
        WMATeacher(**arguments)


def test_sharing_needs_the_students_device():
    student = Net()
    student.body.requires_grad_(False)
    with pytest.raises(ValueError, match="device='meta' differs .* pass frozen='copy'"):
        WMATeacher(student, "uniform", device="meta")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_average_that_joins_between_two_snapshots_leaves_later_states_their_weights(dtype):
    """Each state is one-hot in the entry of its step; entry 0 is for all states of the joined average."""
    student = nn.Linear(21, 1, bias=False, dtype=dtype)
    teacher = WMATeacher(student, "uniform", 20, update_every=4)
    joined = torch.zeros(1, 21)
    joined[0, 0] = 1
    teacher.load_average({"weight": joined}, 7)
    for step in range(8, 21):
        with torch.no_grad():
            student.weight.zero_()[0, step] = 1
        teacher.update()
    average = teacher.averaged_state_dict(torch.float64)["weight"][0]
    expected = torch.zeros(21, dtype=torch.float64)
    expected[[0, 8, 12, 16, 20]] = torch.tensor([8, 2, 4, 4, 3], dtype=torch.float64) / 21
    torch.testing.assert_close(average, expected, rtol=1e-6, atol=1e-7)
    weights = torch.from_numpy(teacher.trajectory_weights())
    torch.testing.assert_close(weights[8:], expected[8:])
    torch.testing.assert_close(weights[:8], torch.full((8,), 1 / 21, dtype=torch.float64))
