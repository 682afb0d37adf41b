"""A teacher that keeps its distance: its weights against a float64 loop over the definition, in every kind of run."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from wmateacher import WMATeacher, kernels, theory, updating
from wmateacher.schedule import Clock

STATES = 40


class Walker(nn.Module):
    """A student whose parameters hold the mark of its state, one-hot, and a walk."""

    def __init__(self, dtype=torch.float64, seed=0):
        super().__init__()
        drawn = torch.Generator().manual_seed(seed)
        self.states = torch.eye(STATES, dtype=torch.float64) * 0.1
        steps = torch.randn(STATES, 4, generator=drawn, dtype=torch.float64) + 0.5
        self.walk = steps.cumsum(0).to(dtype).double()
        self.mark = nn.Parameter(self.states[0].to(dtype, copy=True))
        self.place = nn.Parameter(self.walk[0].view(2, 2).to(dtype, copy=True))

    def go(self, step):
        with torch.no_grad():
            self.mark.copy_(self.states[step])
            self.place.copy_(self.walk[step].view(2, 2))


def reference(trajectory, share, steps, due):
    """The weights by the definition, written out in float64: `[steps + 1]`."""
    weights = np.eye(steps + 1)[0]
    for t in due:
        student = trajectory[t]
        apart = np.linalg.norm(weights @ trajectory[: steps + 1] - student)
        wanted = share * np.linalg.norm(student - trajectory[0])
        omega = 1 - wanted / apart if apart > wanted else 0.0
        weights = (1 - omega) * weights + omega * np.eye(steps + 1)[t]
    return weights


def trajectory(student):
    dtype = student.mark.dtype
    return torch.cat([student.states.to(dtype).double(), student.walk], 1).numpy()


def run(teacher, student, until):
    for step in range(teacher.step + 1, until + 1):
        student.go(step)
        teacher.update()


def averages(teacher):
    return {name: average.clone() for name, _, average in teacher.averaged_pairs()}


@given(
    share=st.sampled_from([0.1, 0.5, 0.7, 1.0]),
    every=st.sampled_from([1, 2, 3, 7]),
    total=st.none() | st.integers(12, STATES - 1),
    resume=st.integers(0, 12),
    extended=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    seed=st.integers(0, 5),
)
@settings(max_examples=25, deadline=None)
def test_realised_weights_are_the_definitions_through_interval_resume_and_extension(
    share, every, total, resume, extended, dtype, seed
):
    student = Walker(dtype, seed)
    teacher = WMATeacher(student, kernels.Gap(share), total, update_every=every)
    run(teacher, student, resume)
    # W^0 comes from the state, not from the student that the second teacher is built from.
    other = Walker(dtype, seed + 1)
    other.go(9)
    resumed = WMATeacher(other, f"gap({share})", total, update_every=every)
    resumed.load_state_dict(teacher.state_dict())
    other.walk = student.walk
    horizons = [total] * (STATES + 1)
    if extended and total is not None:
        at = max(resume, 11)
        run(teacher, student, at)
        run(resumed, other, at)
        for each in (teacher, resumed):
            each.set_total_steps(STATES - 1)
        horizons[at + 1 :] = [STATES - 1] * (STATES - at)
    end = total if total is not None and not extended else STATES - 1
    run(teacher, student, end)
    run(resumed, other, end)

    due = [t for t in range(1, end + 1) if t % every == 0 or t == horizons[t]]
    expected = reference(trajectory(student), share, end, due)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    np.testing.assert_allclose(teacher.trajectory_weights(), expected, atol=tolerance)
    mark = averages(teacher)["mark"].double().numpy()[: end + 1]
    scale = student.states.to(dtype).double()[0, 0].item()
    np.testing.assert_allclose(mark / scale, teacher.trajectory_weights(), atol=tolerance)
    np.testing.assert_array_equal(resumed.trajectory_weights(), teacher.trajectory_weights())
    for name, average in averages(teacher).items():
        assert torch.equal(averages(resumed)[name], average)
    if due and due[-1] == end and dtype == torch.float64:
        gap, moved = (
            sum((p - o).square().sum() for p, o in zip(student.parameters(), others, strict=True)).sqrt()
            for others in (averages(teacher).values(), Start(student))
        )
        assert gap <= share * moved * (1 + 1e-9)


class Start(list):
    """The parameters at step 0."""

    def __init__(self, student):
        super().__init__([student.states[0], student.walk[0].view(2, 2)])


@pytest.mark.parametrize("share", [0.5, 2 / 3, 0.3])
@pytest.mark.parametrize("decaying", [False, True])
def test_on_a_straight_way_it_is_the_interpolation_of_start_and_student(share, decaying):
    """At a constant speed omega = c / (t + c) with c = 1 / share - 1; else steps count by their length."""
    student = nn.Linear(3, 2).double()
    start = student.weight.detach().clone()
    teacher = WMATeacher(student, kernels.Gap(share))
    rates = 1 - np.arange(STATES) / STATES if decaying else np.ones(STATES)
    c, way = 1 / share - 1, 0.0
    for rate in rates:
        with torch.no_grad():
            student.weight.add_(float(rate) * torch.arange(6.0).double().view(2, 3))
        teacher.update()
        assert teacher.omega == pytest.approx(c * rate / (way + (c + 1) * rate), rel=1e-9)
        way += rate
        expected = share * start + (1 - share) * student.weight
        torch.testing.assert_close(teacher.module.weight, expected, rtol=1e-10, atol=0)
    weights = teacher.trajectory_weights()
    if not decaying and share == 0.5:
        np.testing.assert_allclose(weights, 1 / (STATES + 1), rtol=1e-9)
    if not decaying:
        assert weights @ np.arange(STATES, -1, -1) == pytest.approx(share * STATES)


def test_a_share_of_one_is_a_static_teacher():
    student = Walker(torch.float32)
    teacher = WMATeacher(student, "gap(1)")
    run(teacher, student, 20)
    assert teacher.trajectory_weights()[0] == 1
    assert torch.equal(teacher.module.mark, student.states[0].float())


def test_a_student_that_has_not_moved_has_no_weight():
    teacher = WMATeacher(nn.Linear(2, 2), "gap(0.5)")
    teacher.update()
    assert (teacher.omega, *teacher.trajectory_weights()) == (0, 1, 0)


class Mixed(nn.Module):
    """Many kinds of tensors: matrices, vectors, a complex one, an excluded one and buffers."""

    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)
        self.phase = nn.Parameter(torch.randn(5, dtype=torch.complex64))
        self.left_out = nn.Parameter(torch.zeros(3))

    def wander(self, step):
        drawn = torch.Generator().manual_seed(step)
        with torch.no_grad():
            for name, p in self.named_parameters():
                if p.requires_grad:
                    p.add_(torch.randn(p.shape, generator=drawn, dtype=p.dtype), alpha=0.1)
                    if name == "left_out":
                        p.add_(1e3)
            self.norm.running_mean.add_(1e3)


OPTIONS = {"exclude": ["left_out"], "buffers": "average", "mode": "eval"}


def wandered(model, steps, *, kernel="gap(0.4)", since=0, teacher=None, **options):
    teacher = teacher or WMATeacher(model, kernel, **{**OPTIONS, **options})
    for step in range(since + 1, steps + 1):
        model.wander(step)
        teacher.update()
    return teacher


def test_the_distance_is_over_all_averaged_parameters_and_no_buffers():
    torch.manual_seed(0)
    model = Mixed()
    start = copy.deepcopy(model)
    teacher = wandered(model, 6)
    ways = []
    for other in (teacher.module, start):
        pairs = [
            (p, q)
            for (n, p), q in zip(model.named_parameters(), other.parameters(), strict=True)
            if n != "left_out"
        ]
        ways.append(sum((p - q).abs().double().square().sum() for p, q in pairs).sqrt().item())
    assert ways[0] / ways[1] == pytest.approx(0.4, rel=1e-5)
    assert torch.equal(teacher.module.left_out, model.left_out)
    assert set(teacher.state_dict()) >= {"start.body.weight", "start.phase"}
    assert not any(
        key.startswith("start.norm.running") or "left_out" in key
        for key in teacher.state_dict()
        if key.startswith("start")
    )


def test_a_parameter_that_is_unfrozen_later_had_its_start_all_along():
    results = []
    for frozen in ("share", "copy"):
        torch.manual_seed(0)
        model = Mixed()
        model.body.requires_grad_(False)
        teacher = wandered(model, 4, frozen=frozen)
        model.body.requires_grad_(True)
        optimizer = torch.optim.SGD(model.parameters())
        optimizer.step()  # the teacher looks before it
        wandered(model, 9, since=4, teacher=teacher)
        resumed = WMATeacher(copy.deepcopy(model), "gap(0.4)", frozen=frozen, **OPTIONS)
        resumed.load_state_dict(teacher.state_dict())
        wandered(resumed.student, 12, since=9, teacher=resumed)
        wandered(model, 12, since=9, teacher=teacher)
        np.testing.assert_array_equal(resumed.trajectory_weights(), teacher.trajectory_weights())
        results.append(teacher.trajectory_weights())
    np.testing.assert_array_equal(*results)


def test_copies_pickles_and_moved_teachers_go_on_alike():
    torch.manual_seed(0)
    teacher = wandered(Mixed(), 3)
    twins = copy.deepcopy(teacher), pickle.loads(pickle.dumps(teacher)), copy.deepcopy(teacher).to("cpu")
    wandered(teacher.student, 6, since=3, teacher=teacher)
    for twin in twins:
        wandered(twin.student, 6, since=3, teacher=twin)
        np.testing.assert_array_equal(twin.trajectory_weights(), teacher.trajectory_weights())
        assert twin.omega == teacher.omega


@pytest.mark.parametrize(
    ("dtype", "precision"), [(torch.float32, "auto"), (torch.bfloat16, "auto"), (torch.bfloat16, "split")]
)
@pytest.mark.parametrize("nonfinite", ["warn", "skip"])
def test_the_device_acts_on_a_weight_that_the_host_has_not_read(monkeypatch, dtype, precision, nonfinite):
    def teach():
        torch.manual_seed(0)
        model = Mixed()
        if dtype == torch.bfloat16:
            del model.phase  # there is no complex bfloat16
            model.to(dtype)
        teacher = WMATeacher(model, "gap(0.4)", dtype=precision, nonfinite=nonfinite, exclude=["left_out"])
        for step in range(1, 8):
            model.wander(step)
            kept = copy.deepcopy(model.state_dict())
            if step == 4 and nonfinite == "skip":
                model.head.weight.data[0, 0] = float("nan")
            teacher.update()
            model.load_state_dict(kept)
        return teacher

    host = teach() if nonfinite == "warn" else warned(teach)
    assert not host._shadow._plan.on_device
    monkeypatch.setattr(updating, "_decides_on_device", lambda *unused: True)
    device = teach() if nonfinite == "warn" else warned(teach)
    assert device._shadow._plan.on_device
    assert isinstance(device._distances.omega(device._shadow._plan), torch.Tensor)
    np.testing.assert_allclose(device.trajectory_weights(), host.trajectory_weights(), rtol=1e-5)
    assert device.skipped == host.skipped == ((4,) if nonfinite == "skip" else ())
    assert (host.trajectory_weights()[4] == 0) == (nonfinite == "skip")
    for (name, _, one), (_, _, other) in zip(device.averaged_pairs(), host.averaged_pairs(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, msg=name)


def warned(call):
    with pytest.warns(UserWarning, match="NaN or infinite values at step 4"):
        return call()


def test_a_refused_student_leaves_weights_and_average_as_they_were():
    student = Walker()
    teacher = WMATeacher(student, "gap(0.5)", nonfinite="raise")
    run(teacher, student, 3)
    before, weights = averages(teacher), teacher.trajectory_weights()
    student.go(4)
    student.place.data[0, 0] = float("inf")
    with pytest.raises(RuntimeError, match="step 4"):
        teacher.update()
    assert all(torch.equal(v, before[n]) for n, v in averages(teacher).items())
    np.testing.assert_array_equal(teacher.trajectory_weights(), [*weights, 0])
    run(teacher, student, 6)
    expected = reference(trajectory(student), 0.5, 6, [1, 2, 3, 5, 6])
    np.testing.assert_allclose(teacher.trajectory_weights(), expected, atol=1e-12)


def test_what_needs_weights_before_the_run_is_refused():
    gap = kernels.build("gap(0.5)")
    message = (
        r"'gap\(0.5\)' has no weights before the run.*teacher.trajectory_weights\(\).*'power\(exponent=0\)'"
    )
    for call in (lambda: gap.profile(10), lambda: gap.summary(10), lambda: Clock(gap, 10).tick()):
        with pytest.raises(ValueError, match=message):
            call()
    student = Walker()
    teacher = WMATeacher(student, gap)
    run(teacher, student, 3)
    with pytest.raises(
        ValueError, match=r"cannot continue an average that was made elsewhere.*\(step=3\): load"
    ):
        teacher.load_average(None, 3)
    with pytest.raises(ValueError, match="cannot continue an average"):
        teacher.load_average(teacher.averaged_state_dict(), 5)
    assert teacher.step == 3


@pytest.mark.parametrize("share", [0, -0.5, 1.5, float("nan"), "half"])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(ValueError, match=r"gap: share must be a share .* in \(0, 1\], got"):
        kernels.Gap(share)


def test_the_kernel_prints_as_it_is_written():
    assert str(kernels.Gap(0.5)) == "gap(0.5)"
    assert kernels.build("gap(share=0.5)") == kernels.Gap(0.5)


def _lacking(state):
    del state["start.mark"]


def _additional(state):
    state["start.other"] = torch.zeros(1)


def _reshaped(state):
    state["start.mark"] = torch.zeros(3)


def _of_whole_numbers(state):
    state["start.mark"] = torch.zeros(STATES, dtype=torch.int64)


def _shorter(state):
    state["_extra_state"]["measured"][1].pop()


def _impossible(state):
    state["_extra_state"]["measured"][1][0] = 2.0


def _unmeasured(state):
    del state["_extra_state"]["measured"]


def _of_other_steps(state):
    state["_extra_state"]["measured"][0][-1] = 2


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_lacking, r"must hold W\^0 for each .*mark"),
        (_additional, r"must hold W\^0 for each .*other"),
        (
            _reshaped,
            r"'start.mark' is torch.float32, \(3,\), not sharded, the teacher's is torch.float64, \(40,\)",
        ),
        (_of_whole_numbers, "'start.mark' is torch.int64.*load the state of a teacher of this model"),
        (_shorter, "no measured weight for each of its snapshots"),
        (_impossible, "no measured weight for each of its snapshots"),
        (_unmeasured, "no measured weight for each of its snapshots"),
        (_of_other_steps, "no measured weight for each of its snapshots"),
    ],
)
def test_a_damaged_state_changes_nothing(damage, message):
    student = Walker()
    teacher = WMATeacher(student, "gap(0.5)")
    run(teacher, student, 5)
    state = copy.deepcopy(teacher.state_dict())
    damage(state)
    fresh = Walker()
    other = WMATeacher(fresh, "gap(0.5)")
    with pytest.raises(ValueError, match=message.replace("W^0", r"W\^0")):
        other.load_state_dict(state)
    assert other.step == 0
    assert torch.equal(other.module.mark, fresh.mark)
    assert torch.equal(other.state_dict()["start.mark"], fresh.mark)


def test_states_of_other_kernels_are_refused_by_name():
    student = Walker()
    state = WMATeacher(student, "gap(0.5)").state_dict()
    for kernel in ("gap(0.4)", "uniform"):
        with pytest.raises(ValueError, match=r"written with kernel='gap\(0.5\)'"):
            WMATeacher(student, kernel).load_state_dict(state)
    with pytest.raises(ValueError, match="written with kernel='uniform'"):
        WMATeacher(student, "gap(0.5)").load_state_dict(WMATeacher(student, "uniform").state_dict())


# --- what theory says of it ---------------------------------------------------------------------------


def linear_world():
    drawn = np.random.default_rng(0)
    return theory.LinearWorld(drawn.normal(size=(8, 4)), drawn.normal(size=(3, 4)), drawn.normal(size=(3, 8)))


@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
@pytest.mark.parametrize(("distill_weight", "every"), [(0, 1), (0.9, 1), (5, 1), (5, 7)])
def test_its_bias_in_the_linear_world_is_its_closed_form(share, distill_weight, every):
    world, kernel, steps = linear_world(), kernels.Gap(share), 40
    run = theory.distil(world, kernel, steps, distill_weight, every)
    predicted = theory.predict(kernel, steps, distill_weight, every)
    bias = world.residual(world.start)
    assert run.teacher_residual[-1] / bias == pytest.approx(predicted.teacher_residual, abs=1e-12)
    assert run.student_residual[-1] / bias == pytest.approx(predicted.student_residual, abs=1e-12)
    assert run.gap[-1] / bias == pytest.approx(predicted.gap, abs=1e-12)
    moved = np.linalg.norm(run.student - world.start)
    if every == 1 and distill_weight < 1:
        assert run.gap[-1] == pytest.approx(share * moved, rel=1e-10)
    # In the limit: a static teacher at `share` times the weight.
    limit = theory.predict(kernel, 10_000, distill_weight).student_residual
    static = theory.predict("static", 10_000, share * distill_weight).student_residual
    assert limit == pytest.approx(static, abs=1e-12)
    ends = world.residual(world.static_distillation(share * distill_weight))
    assert limit * bias == pytest.approx(ends, rel=1e-10)


def test_the_teacher_chooses_the_weights_that_theory_predicts():
    world, lam, share = linear_world(), 0.9, 0.5
    student = nn.Linear(8, 3, bias=False).double()
    with torch.no_grad():
        student.weight.copy_(torch.tensor(world.start))
    teacher = WMATeacher(student, kernels.Gap(share))
    inside, optimum = torch.tensor(world.projector), torch.tensor(world.optimum)
    for _ in range(12):
        with torch.no_grad():
            pulled = (lam * teacher.module.weight @ inside + optimum) / (1 + lam)
            student.weight.copy_(student.weight - student.weight @ inside + pulled)
        teacher.update()
    expected = theory.predict("gap(0.5)", 12, lam)
    assert teacher.trajectory_weights()[0] == pytest.approx(expected.start_weight, rel=1e-10)
    left = world.residual(teacher.module.weight.detach().numpy()) / world.residual(world.start)
    assert left == pytest.approx(expected.teacher_residual, rel=1e-10)


def test_on_a_straight_way_the_start_has_the_weight_of_a_power_function():
    """Gamma(T + 1) Gamma(1 + c) / Gamma(T + 1 + c), which falls as T^-c."""
    student = nn.Linear(1, 1, bias=False).double()
    teacher, steps, c = WMATeacher(student, "gap(0.7)"), 200, 1 / 0.7 - 1
    for _ in range(steps):
        student.weight.data.add_(1)
        teacher.update()
    expected = math.exp(math.lgamma(steps + 1) + math.lgamma(1 + c) - math.lgamma(steps + 1 + c))
    weights = teacher.trajectory_weights()
    assert weights[0] == pytest.approx(expected, rel=1e-9)
    assert 0.5 * np.abs(weights - kernels.Power(exponent=c - 1).profile(steps)).sum() < 0.015


@pytest.mark.parametrize("share", [0.5, 3**-0.5, 0.7])
def test_on_a_random_walk_it_averages_a_power_function_of_another_exponent(share):
    """With 2 c + 1 = 1 / share^2 the mean age is T / (c + 1); 1 / sqrt(3) is the running mean."""
    generator = torch.Generator().manual_seed(0)
    student = nn.Linear(20_000, 1, bias=False).double()
    teacher, steps, c = WMATeacher(student, kernels.Gap(share)), 150, (1 / share**2 - 1) / 2
    for _ in range(steps):
        student.weight.data.add_(torch.randn(student.weight.shape, generator=generator, dtype=torch.float64))
        teacher.update()
    ages = np.arange(steps, -1, -1)
    assert teacher.trajectory_weights() @ ages == pytest.approx(steps / (c + 1), rel=0.03)
