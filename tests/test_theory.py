import math

import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from wmateacher import kernels, theory
from wmateacher.schedule import Clock
from wmateacher.theory import LinearWorld, PowerLaw, predict

DISTILL_WEIGHT = 0.9


def world(seed=0, d=3, d_image=8, d_text=5, examples=6, rank=4):
    """A task whose features span only a part of the space."""
    random = np.random.default_rng(seed)
    features = random.normal(size=(d_image, rank)) @ random.normal(size=(rank, examples))
    targets = theory.contrastive_targets(
        random.normal(size=(d, d_text)), random.normal(size=(d_text, examples))
    )
    return LinearWorld(features, targets, random.normal(size=(d, d_image)))


def descend(world, gradient, smoothness, steps=60_000):
    weights = world.start
    for _ in range(steps):
        step = gradient(weights) / smoothness
        weights = weights - step
        if np.abs(step).max() < 1e-16:
            break
    return weights


def largest(world):
    return np.linalg.eigvalsh(world.features @ world.features.T).max()


def task_gradient(world):
    return lambda w: (w @ world.features - world.targets) @ world.features.T


def test_contrastive_targets_are_each_text_against_all():
    random = np.random.default_rng(0)
    weights, features = random.normal(size=(2, 3)), random.normal(size=(3, 4))
    embedded = weights @ features
    expected = np.stack([sum(embedded[:, i] - embedded[:, j] for j in range(4)) for i in range(4)], axis=1)
    np.testing.assert_allclose(theory.contrastive_targets(weights, features), expected, atol=1e-13)


def test_the_projector_keeps_the_features_and_nothing_else():
    w = world()
    p = w.projector
    np.testing.assert_allclose(p @ w.features, w.features, atol=1e-12)
    np.testing.assert_allclose(p @ p, p, atol=1e-13)
    np.testing.assert_allclose(p, p.T, atol=1e-14)
    assert np.trace(p) == pytest.approx(4)


def test_gradient_descent_ends_where_each_formula_says():
    w = world()
    task, smooth = task_gradient(w), largest(w)
    # Beside W - W^0, distillation's pull counts only what the features see.
    pull = lambda v: DISTILL_WEIGHT * (v - w.start) @ w.features @ w.features.T  # noqa: E731
    for expected, gradient, smoothness in [
        (w.finetuned(), task, smooth),
        (
            w.l2_sp(DISTILL_WEIGHT),
            lambda v: task(v) + DISTILL_WEIGHT * (v - w.start),
            smooth + DISTILL_WEIGHT,
        ),
        (w.static_distillation(DISTILL_WEIGHT), lambda v: task(v) + pull(v), (1 + DISTILL_WEIGHT) * smooth),
    ]:
        np.testing.assert_allclose(descend(w, gradient, smoothness), expected, atol=1e-9)
    assert (
        w.task_loss(w.finetuned())
        <= w.task_loss(w.static_distillation(DISTILL_WEIGHT))
        <= w.task_loss(w.start)
    )
    assert w.residual(w.finetuned()) < 1e-11


def test_every_method_leaves_what_the_task_does_not_see():
    """The L2 pull too: it differs only inside, where it mixes by eigenvalues."""
    w = world()
    outside = np.eye(8) - w.projector
    for end in (
        w.finetuned(),
        w.l2_sp(DISTILL_WEIGHT),
        w.static_distillation(DISTILL_WEIGHT),
        theory.distil(w, "uniform", 20, DISTILL_WEIGHT).student,
    ):
        np.testing.assert_allclose(end @ outside, w.start @ outside, atol=1e-11)
    shares = (w.l2_sp(DISTILL_WEIGHT) - w.optimum) @ w.projector
    values, vectors = np.linalg.eigh(w.covariance)
    for value, v in zip(values[-4:], vectors.T[-4:], strict=True):
        expected = DISTILL_WEIGHT / (value + DISTILL_WEIGHT) * ((w.start - w.optimum) @ v)
        np.testing.assert_allclose(shares @ v, expected, atol=1e-9)


@pytest.mark.parametrize("update_every", [1, 3])
@pytest.mark.parametrize("kernel", oracle.KERNELS)
def test_a_prediction_is_what_distillation_does(kernel, update_every):
    total, w = 50, world()
    start = w.residual(w.start)
    run = theory.distil(w, kernel, total, DISTILL_WEIGHT, update_every)
    predicted = predict(kernel, total, DISTILL_WEIGHT, update_every)
    assert predicted.teacher_residual == pytest.approx(run.teacher_residual[-1] / start, rel=1e-9, abs=1e-13)
    assert predicted.student_residual == pytest.approx(run.student_residual[-1] / start, rel=1e-9, abs=1e-13)
    assert predicted.gap == pytest.approx(run.gap[-1] / start, rel=1e-9, abs=1e-13)
    weights = oracle.realised(kernel, total, update_every, total)
    assert predicted.start_weight == pytest.approx(weights[0], rel=1e-9, abs=1e-15)
    # From the definition of the average, without omegas: every state lies between optimum and start.
    errors = [1.0]
    for t in range(1, total + 1):
        seen = oracle.realised(kernel, total, update_every, t - 1)
        errors.append(DISTILL_WEIGHT / (1 + DISTILL_WEIGHT) * float(seen @ np.array(errors)))
    assert predicted.teacher_residual == pytest.approx(float(weights @ np.array(errors)), rel=1e-9, abs=1e-13)


def test_each_step_of_distillation_is_the_minimum_of_its_loss():
    w = world()
    run = theory.distil(w, "uniform", 7, DISTILL_WEIGHT)
    before = theory.distil(w, "uniform", 6, DISTILL_WEIGHT)
    gradient = task_gradient(w)(run.student) + DISTILL_WEIGHT * (run.student - before.teacher) @ w.covariance
    assert np.abs(gradient).max() < 1e-10


@pytest.mark.parametrize("update_every", [1, 3])
@pytest.mark.parametrize("kernel", oracle.KERNELS)
def test_every_step_of_distillation_obeys_the_recursion_of_its_error(kernel, update_every):
    total, w = 50, world()
    run = theory.distil(w, kernel, total, DISTILL_WEIGHT, update_every)
    clock = Clock(kernels.build(kernel), total, update_every)
    error, scale = (w.start - w.optimum) @ w.projector, w.residual(w.start)
    assert run.teacher_residual[0] == run.student_residual[0] == scale
    assert run.gap[0] == 0
    for t in range(1, total + 1):
        omega, student = clock.tick() or 0.0, DISTILL_WEIGHT / (1 + DISTILL_WEIGHT) * error
        error = (1 - omega / (1 + DISTILL_WEIGHT)) * error
        measured = (run.teacher_residual[t], run.student_residual[t], run.gap[t])
        expected = [np.linalg.norm(e) for e in (error, student, error - student)]
        np.testing.assert_allclose(measured, expected, rtol=1e-13, atol=1e-13 * scale)
    np.testing.assert_allclose((run.teacher - w.optimum) @ w.projector, error, atol=1e-13 * scale)


def test_the_bias_vanishes_only_where_the_omegas_add_up_to_infinity():
    horizons = (100, 10_000, 1_000_000)
    for kernel in ("uniform", "ema(0.9999)"):  # sums log T and T / 10,000
        left = [predict(kernel, t, DISTILL_WEIGHT) for t in horizons]
        for name in ("teacher_residual", "student_residual"):
            shares = [getattr(p, name) for p in left]
            assert shares == sorted(shares, reverse=True)
            assert shares[-1] < 1.2e-3
    assert {predict("static", t, DISTILL_WEIGHT).teacher_residual for t in horizons} == {1.0}
    # omega_t = 1 / (t + 1)^2 adds up to less than 0.65.
    fading = predict(Fading(), 1_000_000, DISTILL_WEIGHT)
    assert fading.teacher_residual == pytest.approx(
        predict(Fading(), 10_000, DISTILL_WEIGHT).teacher_residual, rel=1e-4
    )
    assert fading.teacher_residual > 1 - 0.65 / (1 + DISTILL_WEIGHT)


class Fading(kernels.Kernel):
    name = "fading"

    def retention(self, steps, total_steps):
        return 1 - 1 / (steps + 1.0) ** 2


def test_a_weak_l2_pull_ends_where_fine_tuning_does():
    w = world()
    np.testing.assert_allclose(w.l2_sp(1e-14), w.finetuned(), atol=1e-11)
    for lam in (1e-2, 1.0, 1e4):
        right = w.targets @ w.features.T + lam * w.start
        written_out = right @ np.linalg.inv(w.features @ w.features.T + lam * np.eye(8))
        np.testing.assert_allclose(w.l2_sp(lam), written_out, atol=1e-10)


def test_a_strong_pull_costs_the_gap_no_digits():
    lam, total = 1e12, 50
    expected = (1 - 1 / (total + 1)) / lam
    assert predict("uniform", total, lam).gap == pytest.approx(expected, rel=1e-10, abs=0)


def test_a_world_keeps_its_own_copy():
    features = np.eye(3)
    w = LinearWorld(features, np.ones((2, 3)), np.zeros((2, 3)))
    features[:] = 0
    np.testing.assert_array_equal(w.optimum, np.ones((2, 3)))
    with pytest.raises(ValueError, match="read-only"):
        w.start[0, 0] = 1


def test_published_scale():
    """FACTS: what is left over the published horizon, and that a static teacher leaves 47.4%."""
    long = predict("beta(0.5,0.5)", 25_030, DISTILL_WEIGHT)
    assert long.teacher_residual == pytest.approx(0.048, abs=5e-4)
    assert long.student_residual == pytest.approx(0.023, abs=5e-4)
    assert long.start_weight == pytest.approx(0.00285, abs=5e-6)
    assert predict("static", 25_030, DISTILL_WEIGHT).student_residual == pytest.approx(0.474, abs=5e-4)
    assert theory.persistence_bound("beta(0.5,0.5)", 25_030) == long.start_weight


@pytest.mark.parametrize(
    ("kernel", "low", "high"),
    [
        ("ema(0.9)", 0, 1e-13),
        ("ema(0.99)", 5e-6, 5e-5),
        ("ema(0.999)", 0.175, 0.185),
        ("ema(0.9999)", 0.465, 0.475),
        ("beta(0.5,0.5)", 0.0485, 0.0495),
    ],
)
def test_whether_an_ema_collapses_depends_on_its_retention(kernel, low, high):
    assert low <= predict(kernel, 2_000, DISTILL_WEIGHT).gap <= high


@pytest.mark.parametrize(
    ("kernel", "a"),
    [
        ("beta(0.5,0.5)", 0.5),
        ("beta(0.5,1.5)", 0.5),
        ("uniform", 1.0),
        ("beta(1.0,1.5)", 1.0),
        ("beta(1.5,0.5)", 1.5),
    ],
)
def test_the_bias_shrinks_as_a_power_of_the_horizon_that_the_early_weights_give(kernel, a):
    horizons = np.array([2_000, 8_000, 32_000])
    left = [predict(kernel, int(t), DISTILL_WEIGHT).teacher_residual for t in horizons]
    slope = np.polyfit(np.log(horizons), np.log(left), 1)[0]
    assert slope == pytest.approx(-a / (1 + DISTILL_WEIGHT), abs=0.02)


@given(
    ahead=hnp.arrays(float, 20, elements=st.floats(0, 1)),
    aside=hnp.arrays(float, (19, 2), elements=st.floats(-10, 10)),
    kernel=st.sampled_from(oracle.KERNELS),
    update_every=st.sampled_from([1, 3]),
)
@settings(deadline=None)
def test_a_teacher_persists_behind_a_trajectory_monotone_along_its_way(ahead, aside, kernel, update_every):
    """It may wander off the line from W^0 to W^T on the way, but not turn back along it."""
    way = np.zeros((21, 3))
    way[1:, 0] = np.cumsum(ahead)
    way[1:-1, 1:] = aside
    average = oracle.realised(kernel, 20, update_every, 20) @ way
    bound = theory.persistence_bound(kernel, 20, update_every) * np.linalg.norm(way[-1] - way[0])
    assert np.linalg.norm(way[-1] - average) >= bound - 1e-9


def test_monotone_along_another_direction_is_not_enough():
    way = np.array([[0, 0], [0.01, 2], [0.02, 1]])
    behind = np.linalg.norm(way[-1] - way.mean(axis=0))
    bound = theory.persistence_bound("uniform", 2)
    assert behind < bound * np.linalg.norm(way[-1] - way[0])
    assert behind >= bound * (way[-1] - way[0])[0]


@pytest.mark.parametrize("lam", [0.0, 0.9, 5.0])
@pytest.mark.parametrize("exponent", [-0.9, -0.5, 0.0, 1.0, 6.94, 120.0])
def test_closed_forms_of_power_functions_are_what_the_recursion_gives(exponent, lam):
    law, kernel = PowerLaw(exponent, lam), kernels.Power(exponent=exponent)
    steps = np.array([1, 2, 30, 1_000, 30_000])
    exact = {"rtol": 1e-9, "atol": 1e-30}
    np.testing.assert_allclose(law.omega(steps), 1 - kernel.retention(steps, None), **exact)
    for t in steps:
        expected, summary = predict(kernel, int(t), lam), kernel.summary(int(t))
        np.testing.assert_allclose(law.start_weight(t), summary.start_weight, **exact)
        np.testing.assert_allclose(law.mean_age(t), summary.mean_age, rtol=1e-9, atol=1e-15)
        np.testing.assert_allclose(law.teacher_residual(t), expected.teacher_residual, **exact)
        np.testing.assert_allclose(law.student_residual(t), expected.student_residual, **exact)
        np.testing.assert_allclose(law.gap(t), expected.gap, **exact)
    np.testing.assert_array_equal(law.teacher_residual([0]), [1.0])
    np.testing.assert_array_equal(law.mean_age([0]), [0.0])


@pytest.mark.parametrize("exponent", [-0.5, 0.0, 1.0])
def test_closed_forms_of_power_functions_hold_for_any_length_of_run(exponent):
    law, far = PowerLaw(exponent, DISTILL_WEIGHT), 10**12
    a = exponent + 1
    limit = law.residual_factor * (far + 1.0) ** (-a / (1 + DISTILL_WEIGHT))
    assert law.teacher_residual(far) == pytest.approx(limit, rel=1e-9)
    assert law.mean_age(far) == pytest.approx(far / (a + 1), rel=1e-9)
    assert law.omega(far) == pytest.approx(a / far, rel=1e-9)
    c = DISTILL_WEIGHT / (1 + DISTILL_WEIGHT)
    if exponent == 0:
        assert law.residual_factor == pytest.approx(1 / math.gamma(1 + c), rel=1e-10)


@pytest.mark.parametrize("exponent", [-0.5, 0.7])
def test_a_power_function_tends_to_a_beta_kernel_but_for_a_factor_at_the_start(exponent):
    """Profiles, mean age and rates agree in the limit; what the first steps decide differs by a factor."""
    a, total = exponent + 1, 100_000
    power, beta = kernels.Power(exponent=exponent), kernels.Beta(a, 1)
    apart = [np.abs(power.profile(t) - beta.profile(t)).sum() for t in (1_000, total)]
    assert apart[1] < 0.2 * apart[0]
    assert apart[1] < 5e-3
    law = PowerLaw(exponent, DISTILL_WEIGHT)
    assert beta.summary(total).start_weight / law.start_weight(total) == pytest.approx(
        a * 0.5**exponent, rel=5e-3
    )
    assert beta.summary(total).mean_age == pytest.approx(law.mean_age(total), rel=5e-3)
    ratios = [
        predict(beta, t, DISTILL_WEIGHT).teacher_residual / law.teacher_residual(t)
        for t in (total // 10, total)
    ]
    assert ratios[0] == pytest.approx(ratios[1], rel=5e-3)
    omegas = 1 - beta.retention(np.array([total]), total)
    assert omegas[0] == pytest.approx(law.omega(total), rel=5e-3)


def test_a_prediction_prints():
    text = str(predict("beta(0.5, 0.5)", 2_000))
    assert text.startswith("beta(0.5,0.5) over 2000 steps, distill_weight = 0.9\n")
    assert "gap at the end" in text


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (
            lambda: predict("uniform", 10, -1),
            "predict: distill_weight must be a finite number of at least 0, got -1",
        ),
        (
            lambda: predict("uniform", 10, "x"),
            "predict: distill_weight must be a finite number of at least 0, got 'x'",
        ),
        (
            lambda: world().residual(np.ones(8)),
            r"weights must have the shape of start, \(3, 8\), got \(8,\)",
        ),
        (lambda: theory.projector([["a"]]), "features must be a matrix of real numbers"),
        (lambda: world().l2_sp(0), "l2_sp: penalty must be a finite number above 0, got 0"),
        (lambda: theory.projector(np.ones(3)), r"features must be a matrix, got shape \(3,\)"),
        (
            lambda: theory.projector(np.full((2, 2), np.nan)),
            "features must be finite, got 4 entries that are not finite",
        ),
        (
            lambda: LinearWorld(np.ones((3, 4)), np.ones((2, 5)), np.ones((2, 3))),
            r"targets \(2, 5\) and start \(2, 3\) do not fit together: pass \[d_I, n\], \[d, n\]",
        ),
        (lambda: theory.contrastive_targets(np.ones((2, 3)), np.ones((2, 3))), "cannot be multiplied"),
        (lambda: PowerLaw(-1), "power: exponent must be above -1"),
        (lambda: PowerLaw(0, -1), "PowerLaw: distill_weight must be a finite number of at least 0, got -1"),
        (lambda: PowerLaw(0).gap(0), "steps must be whole numbers of at least 1, got 0"),
        (
            lambda: PowerLaw(0).mean_age([1, 2.5]),
            r"steps must be whole numbers of at least 0, got \[1, 2.5\]",
        ),
        (lambda: predict("betta(1,1)", 10), "unknown kernel 'betta'"),
        (lambda: predict("uniform", 0), "total_steps must be a whole number of at least 1, got 0"),
        (lambda: predict("gap(0.5)", 0), "total_steps must be a whole number of at least 1, got 0"),
        (lambda: predict("gap(0.5)", 2.5), "total_steps must be a whole number of at least 1, got 2.5"),
        (lambda: predict("gap(0.5)", 9, 0.9, 0), "update_every must be a whole number of at least 1, got 0"),
        (lambda: PowerLaw(1e7), r"PowerLaw: exponent must be at most 100000, got 1e\+07"),
    ],
)
def test_bad_input(action, message):
    with pytest.raises(ValueError, match=message):
        action()
