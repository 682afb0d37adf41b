from pathlib import Path

import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wmateacher import kernels
from wmateacher.schedule import Clock


def run(clock, steps):
    return [clock.tick() for _ in range(steps)]


@given(
    kernel=st.sampled_from(oracle.KERNELS),
    total=st.integers(1, 90),
    every=st.sampled_from([1, 2, 3, 7, 50]),
    fraction=st.floats(0, 1),
)
@settings(max_examples=300, deadline=None)
def test_realised_weights_are_the_kernels(kernel, total, every, fraction):
    step = round(fraction * total)
    clock = Clock(kernels.build(kernel), total, every)
    run(clock, step)
    np.testing.assert_allclose(
        clock.trajectory_weights(), oracle.realised(kernel, total, every, step), rtol=1e-9, atol=1e-12
    )


@given(
    kernel=st.sampled_from(list(oracle.LATE)),
    total=st.integers(13, 90),
    every=st.sampled_from([1, 2, 3, 7, 50]),
    fraction=st.floats(0, 1),
    resume=st.integers(0, 90),
)
@settings(max_examples=150, deadline=None)
def test_a_late_start_holds_for_every_interval_and_resume(kernel, total, every, fraction, resume):
    step = round(fraction * total)
    clock = Clock(kernels.build(kernel), total, every)
    run(clock, min(resume, step))
    clock = Clock.resumed(clock.state())
    run(clock, step - clock.step)
    weights = clock.trajectory_weights()
    np.testing.assert_allclose(weights, oracle.realised(kernel, total, every, step), rtol=1e-9, atol=1e-12)
    if step <= 13:  # the latest snapshot
        assert weights[step if step == total else step - step % every] == 1
    if not clock.kernel.needs_horizon and step < total:
        endless = Clock(kernels.build(kernel), None, every)
        run(endless, step)
        assert step > total - every or np.array_equal(endless.trajectory_weights(), weights)


def test_a_start_after_the_end_of_the_run_is_refused():
    message = r"'ema\(0.9,start_step=13\)' starts at step 13, after the end of a run of total_steps=12: lower"
    with pytest.raises(ValueError, match=message):
        Clock(kernels.build("ema(0.9,start_step=13)"), 12)
    clock = Clock(kernels.build("ema(0.9,start_step=13)"), 20)
    run(clock, 5)
    state = clock.state()
    with pytest.raises(ValueError, match=message):
        clock.set_total_steps(12)
    assert clock.state() == state
    run(clock, 15)
    np.testing.assert_allclose(
        clock.trajectory_weights(), oracle.realised("ema(0.9,start_step=13)", 20, 1, 20)
    )


@pytest.mark.parametrize("every", [1, 2, 3, 7, 50])
def test_ema_at_an_interval_is_its_closed_form(every):
    omegas = [o for o in run(Clock(kernels.build("ema(0.99)"), None, every), 500) if o is not None]
    np.testing.assert_allclose(omegas, 1 - 0.99**every, rtol=1e-12)
    assert len(omegas) == 500 // every


def test_the_papers_recursion():
    """omega_t = alpha_t / sum_{j <= t} alpha_j with alpha_k = Beta(.5,.5) at (k + 1/2) / (T + 1)."""
    total = 60
    alpha = 1 / np.sqrt((tau := (np.arange(total + 1) + 0.5) / (total + 1)) * (1 - tau))
    for text in ("beta(0.5,0.5)", "arcsine"):
        omegas = run(Clock(kernels.build(text), total), total)
        np.testing.assert_allclose(omegas, alpha[1:] / np.cumsum(alpha)[1:], rtol=1e-9)


@pytest.mark.parametrize("every", [1, 5])
def test_a_kernel_without_horizon_gives_the_same_with_and_without(every):
    for text in ("uniform", "ema(0.9)", "power(sigma_rel=0.1)", "static"):
        endless, finite = Clock(kernels.build(text), None, every), Clock(kernels.build(text), 1000, every)
        np.testing.assert_allclose(run(endless, 40), run(finite, 40), rtol=1e-12) if every == 1 else None
        run(endless, 40), run(finite, 40)
        np.testing.assert_allclose(endless.trajectory_weights(), finite.trajectory_weights(), rtol=1e-12)


def test_the_mean_age_does_not_depend_on_the_interval():
    ages = []
    for every in (1, 10, 50):
        clock = Clock(kernels.build("beta(0.5,0.5)"), 2000, every)
        run(clock, 2000)
        ages.append(clock.trajectory_weights() @ np.arange(2000, -1, -1))
    np.testing.assert_allclose(ages, 1000, rtol=0.01)


def test_past_the_horizon_the_clock_holds_with_one_warning():
    clock = Clock(kernels.build("beta(0.5,0.5)"), 4)
    run(clock, 4)
    before = clock.trajectory_weights()
    with pytest.warns(UserWarning, match="after step 4 of total_steps=4.*call set_total_steps") as caught:
        assert run(clock, 3) == [None, None, None]
    assert len(caught) == 1
    assert clock.step == 4
    np.testing.assert_array_equal(clock.trajectory_weights(), before)


@given(
    kernel=st.sampled_from(list(oracle.DENSITIES)),
    old=st.integers(10, 60),
    new=st.integers(10, 60),
    at=st.integers(1, 9),
    every=st.sampled_from([1, 2, 3, 7]),
)
@settings(max_examples=150, deadline=None)
def test_a_new_horizon_keeps_proportions_and_gives_the_past_its_new_mass(kernel, old, new, at, every):
    clock = Clock(kernels.build(kernel), old, every)
    run(clock, at)
    before = clock.trajectory_weights()
    clock.set_total_steps(new)
    np.testing.assert_array_equal(clock.trajectory_weights(), before)
    run(clock, new - at)
    after, target = clock.trajectory_weights(), oracle.realised(kernel, new, every, new)
    np.testing.assert_allclose(after[at + 1 :], target[at + 1 :], rtol=1e-9, atol=1e-12)
    past = target[: at + 1].sum()
    np.testing.assert_allclose(after[: at + 1], before * past, rtol=1e-9, atol=1e-12)


def test_the_horizon_can_be_extended_after_the_end():
    clock = Clock(kernels.build("uniform"), 4)
    run(clock, 4)
    clock.set_total_steps(9)
    run(clock, 5)
    np.testing.assert_allclose(clock.trajectory_weights(), 0.1)


def test_state_survives_horizon_changes():
    def clock_at(total):
        return Clock(kernels.build("beta(0.5,0.5)"), total, 3)

    clock = clock_at(20)
    run(clock, 8)
    clock.set_total_steps(31)
    run(clock, 9)
    again = clock_at(31)
    again.check(clock.state())
    again.restore(clock.state())
    np.testing.assert_array_equal(again.trajectory_weights(), clock.trajectory_weights())
    assert run(again, 14) == run(clock, 14)
    np.testing.assert_array_equal(again.trajectory_weights(), clock.trajectory_weights())


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (("uniform", 20, 3), r"written with kernel='beta\(0.5,0.5\)', this teacher has kernel='uniform'"),
        (("beta(0.5,0.5)", 21, 3), "with total_steps=20, this teacher has total_steps=21.*call set_total_steps"),
        (("beta(0.5,0.5)", 20, 1), "written with update_every=3, this teacher has update_every=1"),
    ],
)  # fmt: skip
def test_a_foreign_state_is_refused_by_name(other, message):
    clock = Clock(kernels.build("beta(0.5,0.5)"), 20, 3)
    with pytest.raises(ValueError, match=message):
        Clock(kernels.build(other[0]), *other[1:]).check(clock.state())


def test_a_callable_whose_density_changed_is_noticed():
    def kappa(tau, power=1.0):
        return tau**power

    clock = Clock(kernels.build(kappa), 20)
    run(clock, 5)
    state = clock.state()
    kappa.__defaults__ = (2.0,)
    with pytest.raises(ValueError, match="running mass at step 5 .*its density has changed since"):
        Clock(kernels.build(kappa), 20).check(state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("beta(0.5,0.5)", None), "kernel 'beta.*' needs total_steps, got None: pass the number of optimizer steps"),
        (("ema(0.9,1.0,schedule=cosine)", None), "needs total_steps, got None"),
        (("uniform", 0), "total_steps must be a whole number of at least 1, got 0"),
        (("uniform", 10, 0), "update_every must be a whole number of at least 1, got 0"),
        (("uniform", 10, 1.5), "update_every must be a whole number of at least 1, got 1.5"),
        (("uniform", True), "total_steps must be a whole number of at least 1, got True"),
        (("uniform", 1e3), "total_steps must be a whole number of at least 1, got 1000.0"),
        (("uniform", 10**30), r"total_steps must be at most 2\*\*53, got 10"),
        (("uniform", 10, np.True_), "update_every must be a whole number of at least 1, got np.True_"),
    ],
)  # fmt: skip
def test_bad_arguments_say_what_to_do(arguments, message):
    with pytest.raises(ValueError, match=message):
        Clock(kernels.build(arguments[0]), *arguments[1:])


def test_numpys_integers_are_plain_ones_in_the_state():
    kernel = kernels.Ema(np.float32(0.5), start_step=np.int64(2))
    assert str(kernel) == "ema(0.5,start_step=2)"
    clock, plain = Clock(kernel, np.int32(6), np.int64(2)), Clock(kernels.build(str(kernel)), 6, 2)
    assert clock.state() == plain.state()
    assert all(type(clock.state()[key]) is int for key in ("step", "update_every"))
    assert [clock.tick() for _ in range(6)] == [plain.tick() for _ in range(6)]


@pytest.mark.parametrize("start", [10**6, 1e15])
def test_the_mean_age_of_an_average_that_starts_very_late_takes_no_memory(start):
    """Half of a run of twice the start is averaged."""
    for late, expected in (
        (kernels.Uniform(start_step=start), 0.25),
        (kernels.Ema(0.9, start_step=start), 9 / 2e6),
    ):
        age = Clock(late, None).relative_mean_age()
        assert age == pytest.approx(expected, abs=1e-6, rel=1e-6)
        assert Clock(late, int(2 * start)).relative_mean_age() == age


def test_a_table_that_does_not_fit_into_memory_names_the_horizon():
    with pytest.raises(
        MemoryError, match="fit into memory for total_steps=9007199254740992: check the number"
    ):
        Clock(kernels.Beta(0.5, 0.5), 2**53)


def test_the_horizon_cannot_end_before_now():
    clock = Clock(kernels.build("uniform"), 10)
    run(clock, 6)
    with pytest.raises(ValueError, match="at least the 6 steps already taken, got 5"):
        clock.set_total_steps(5)


@pytest.mark.parametrize(
    ("kernel", "planned", "extended", "expected"),
    [
        ("beta(0.5,0.5)", 2000, None, (0.010, 0.500, 0.507, 0.500)),
        ("beta(0.5,0.5)", 1000, None, (0.014, 0.750, 0.272, 0)),
        ("beta(0.5,0.5)", 1000, 1000, (0.007, 0.467, 0.525, 0.500)),
        ("beta(0.5,0.5)", 1000, 500, (0.010, 0.499, 0.524, 0.500)),
        ("power(exponent=-0.5)", None, None, (0.022, 0.667, 0.345, 0.293)),
    ],
)
@pytest.mark.filterwarnings("ignore:update.. was called after step")
def test_a_run_that_turns_out_twice_as_long_has_the_weights_of_the_kernels_page(
    kernel, planned, extended, expected
):
    clock, steps = Clock(kernels.build(kernel), planned), 2000
    for step in range(steps):
        if step == extended:
            clock.set_total_steps(steps)
        clock.tick()
    weights = np.zeros(steps + 1)
    found = clock.trajectory_weights()
    weights[: len(found)] = found
    age = weights @ np.arange(steps, -1, -1) / steps
    figures = weights[0], age, 1 / (weights @ weights) / steps, weights[steps // 2 + 1 :].sum()
    assert figures == pytest.approx(expected, abs=6e-4)
    shown = " | ".join(f"{figure:.3f}" for figure in figures).removesuffix(".000")
    assert shown in (Path(__file__).parents[1] / "docs/kernels.md").read_text()
