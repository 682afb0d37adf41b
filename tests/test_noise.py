"""The moments of SGD's noise against simulated runs, and against the closed forms of their limits."""

import numpy as np
import oracle
import pytest

from wmateacher import theory
from wmateacher.theory import moments, predict, reference_run

STEPS, RUNS = 25, 120_000
COSINE = 0.4 * (1 + np.cos(np.pi * np.arange(STEPS) / STEPS)) / 2


def simulate(kernel, lam, rates, h, sigma, start, update_every, runs=RUNS):
    """Mean and covariance of student and teacher over runs; the average is written out from its definition."""
    random = np.random.default_rng(0)
    states = [np.full(runs, start)]
    teacher = states[0]
    for t, rate in enumerate(rates, 1):
        x = states[-1]
        gradient = h * x + lam * h * (x - teacher) + sigma * random.normal(size=runs)
        states.append(x - rate * gradient)
        seen = oracle.realised(kernel, len(rates), update_every, t)
        teacher = sum(w * s for w, s in zip(seen, states, strict=False) if w)
    return np.array([states[-1].mean(), teacher.mean()]), np.cov(states[-1], teacher)


@pytest.mark.parametrize(
    ("kernel", "lam", "rates", "update_every"),
    [
        ("beta(0.5,0.5)", 0.9, COSINE, 1),
        ("power(exponent=-0.5)", 0.9, np.full(STEPS, 0.4), 3),
        ("ema(0.9)", 3.0, COSINE, 1),
        ("uniform", 0.0, np.full(STEPS, 0.4), 1),
    ],
)
def test_moments_are_those_of_simulated_runs(kernel, lam, rates, update_every):
    h, sigma, start = 0.7, 1.5, 40.0
    means, covariance = simulate(kernel, lam, rates, h, sigma, start, update_every)
    m = moments(
        kernel, STEPS, lam, learning_rate=rates, curvature=h, noise_variance=sigma**2, start=start,
        update_every=update_every,
    )  # fmt: skip
    noise = 4 * np.sqrt(np.diag(covariance) / RUNS)
    np.testing.assert_array_less(np.abs(means - [m.student_bias[0], m.teacher_bias[0]]), noise)
    computed = [[m.student_variance[0], m.covariance[0]], [m.covariance[0], m.teacher_variance[0]]]
    np.testing.assert_allclose(computed, covariance, rtol=0.01)
    gap = (means[0] - means[1]) ** 2 + covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    assert m.squared_gap[0] == pytest.approx(gap, rel=0.015)
    assert m.student_error[0] == m.student_bias[0] ** 2 + m.student_variance[0]
    assert m.teacher_error[0] == m.teacher_bias[0] ** 2 + m.teacher_variance[0]


@pytest.mark.parametrize("update_every", [1, 3])
@pytest.mark.parametrize("kernel", oracle.KERNELS)
def test_steps_that_solve_their_task_without_noise_are_those_of_predict(kernel, update_every):
    h, lam = np.array([0.2, 3.0]), 0.9
    for eigenvalue in h:
        rate = 1 / (eigenvalue * (1 + lam))
        m = moments(
            kernel,
            30,
            lam,
            learning_rate=rate,
            curvature=eigenvalue,
            noise_variance=0,
            update_every=update_every,
        )
        expected = predict(kernel, 30, lam, update_every)
        assert m.teacher_bias[0] == pytest.approx(expected.teacher_residual, rel=1e-12, abs=1e-15)
        assert m.student_bias[0] == pytest.approx(expected.student_residual, rel=1e-12, abs=1e-15)
        assert m.squared_gap[0] == pytest.approx(expected.gap**2, rel=1e-9, abs=1e-15)
        assert not np.any([m.student_variance, m.teacher_variance, m.covariance])


def test_a_frozen_teacher_divides_the_students_noise():
    rate, h, lam = 0.1, np.array([0.5, 2.0]), 0.9
    m = moments(
        "static", 2_000, lam, learning_rate=rate, curvature=h, noise_variance=[1.0, 4.0], start=[1, 2]
    )
    stiff = h * (1 + lam)
    np.testing.assert_allclose(m.student_bias, lam / (1 + lam) * np.array([1, 2]), rtol=1e-12)
    np.testing.assert_allclose(
        m.student_variance, rate * np.array([1, 4]) / (stiff * (2 - rate * stiff)), rtol=1e-12
    )
    assert not m.teacher_variance.any()


def test_the_variance_of_averages_that_only_watch():
    rate, h, total = 0.2, 0.5, 20_000
    kept = 1 - rate * h
    student = rate / (h * (2 - rate * h))
    ema = moments("ema(0.99)", total, 0, learning_rate=rate, curvature=h)
    assert ema.student_variance[0] == pytest.approx(student, rel=1e-12)
    expected = student * 0.01 * (1 + 0.99 * kept) / (1.99 * (1 - 0.99 * kept))
    assert ema.teacher_variance[0] == pytest.approx(expected, rel=1e-12)
    mean = moments("uniform", total, 0, learning_rate=rate, curvature=h)
    assert total * mean.teacher_variance[0] == pytest.approx(1 / h**2, rel=2e-3)


def test_distilling_from_its_own_average_costs_an_average_some_of_its_variance():
    total, lam, h = 20_000, 0.3, 0.5
    for kernel, a in (("uniform", 1.0), ("power(exponent=0.5)", 1.5)):
        m = moments(kernel, total, lam, learning_rate=0.2, curvature=h)
        expected = a**2 / (2 * a / (1 + lam) - 1) / (h * (1 + lam)) ** 2
        assert total * m.teacher_variance[0] == pytest.approx(expected, rel=0.02)


def test_the_reference_run_has_less_noise_and_more_bias_with_a_stiffer_teacher():
    runs = [reference_run(kernel, 400) for kernel in ("static", "beta(0.5,0.5)", "ema(0.9)")]
    biases = [np.linalg.norm(run.student_bias) for run in runs]
    variances = [run.student_variance.sum() for run in runs]
    assert biases == sorted(biases, reverse=True)
    assert variances == sorted(variances)
    rate = (1 + np.cos(np.pi * np.arange(400) / 400)) / 2 / 1.9
    same = theory.moments("static", 400, 0.9, learning_rate=rate, curvature=[1, 0.1, 0.01])
    np.testing.assert_allclose(same.student_bias, runs[0].student_bias, rtol=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": [0.1, 0.2]}, r"learning_rate must be a number or one for each of the total_steps=9 steps.*\(2,\)"),
        ({"learning_rate": -0.1}, "learning_rate must not be negative, got -0.1"),
        ({"learning_rate": float("nan")}, "learning_rate must be a finite number"),
        ({"curvature": [1, -2]}, "curvature must not be negative, got -2"),
        ({"curvature": []}, "curvature must be a finite number or a sequence of them"),
        ({"curvature": [1, 2], "start": [1, 2, 3]}, r"curvature \(2,\), noise_variance \(1,\) and start \(3,\) do not fit"),
        ({"noise_variance": "x"}, "noise_variance must be a number or a sequence of numbers"),
        ({"distill_weight": -1}, "moments: distill_weight must be a finite number of at least 0, got -1"),
        ({"learning_rate": 1e200, "total_steps": 9}, r"the run diverges, got 1e\+200: stay below .* = 1.05263"),
    ],
)  # fmt: skip
def test_bad_input(settings, message):
    with pytest.raises(ValueError, match=message):
        moments("uniform", **{"total_steps": 9, "learning_rate": 0.1, **settings})
