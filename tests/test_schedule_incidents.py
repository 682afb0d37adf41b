"""Runs with incidents: averages that join, snapshots that are skipped, new horizons, resumed and damaged states."""

import json
import math

import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wmateacher import kernels
from wmateacher.schedule import Clock

NAN = float("nan")


def clock_of(kernel, total=20, every=4):
    return Clock(kernels.build(kernel), total, every)


def run(clock, steps):
    return [clock.tick() for _ in range(steps)]


def resumed(clock):
    again = Clock(clock.kernel, clock.total_steps, clock.update_every)
    state = json.loads(json.dumps(clock.state()))
    again.check(state)
    again.restore(state)
    return again


@given(
    kernel=st.sampled_from(oracle.KERNELS),
    total=st.integers(1, 40),
    every=st.sampled_from([1, 2, 3, 4, 7]),
    randoms=st.randoms(use_true_random=False),
)
@settings(max_examples=60, deadline=None)
def test_whatever_happens_in_a_run_every_state_has_its_weight(kernel, total, every, randoms):
    clock, events, due = clock_of(kernel, total, every), [], None
    for _ in range(randoms.randint(1, 50)):
        incident = randoms.random()
        if incident < 0.05:
            events.append(("jump", randoms.randint(0, clock.total_steps)))
            clock.jump(events[-1][1])
            due = None
        elif incident < 0.1:
            events.append(("horizon", max(1, clock.step) + randoms.randint(0, 20)))
            clock.set_total_steps(events[-1][1])
        elif incident < 0.2:
            clock, due = resumed(clock), None
        elif clock.step < clock.total_steps:
            due = len(events) if clock.tick() is not None else due
            events.append("step")
        # The snapshot may turn out to be skipped at once, or later.
        if due is not None and randoms.random() < 0.15:
            clock.skip()
            events[due], due = "skip", None
    weights = clock.trajectory_weights()
    np.testing.assert_allclose(
        weights, oracle.after_events(kernel, every, total, events), rtol=1e-9, atol=1e-12
    )
    assert weights.sum() == pytest.approx(1.0)


@pytest.mark.parametrize("every", [1, 4, 7, 30])
@pytest.mark.parametrize("joined", [1, 7, 8, 19])
def test_states_after_an_average_that_joined_have_their_weights(joined, every):
    clock = clock_of("uniform", 20, every)
    clock.jump(joined)
    run(clock, 20 - joined)
    weights = clock.trajectory_weights()
    np.testing.assert_allclose(weights[: joined + 1], 1 / 21, rtol=1e-12)
    assert weights[joined + 1 :].sum() == pytest.approx((20 - joined) / 21, rel=1e-12)


def test_the_states_of_an_average_that_joined_share_its_mass_as_the_kernel_shares_it():
    clock, kernel = clock_of("beta(0.5,0.5)"), kernels.build("beta(0.5,0.5)")
    clock.jump(7)
    profile = kernel.profile(20)
    np.testing.assert_allclose(clock.trajectory_weights(), profile[:8] / profile[:8].sum(), rtol=1e-12)
    run(clock, 13)
    np.testing.assert_allclose(clock.trajectory_weights()[:8], profile[:8], rtol=1e-12)


def test_an_average_of_no_step_is_a_new_start():
    clock, fresh = clock_of("beta(0.5,0.5)"), clock_of("beta(0.5,0.5)")
    run(clock, 9)
    clock.jump(0)
    assert clock.state() == fresh.state()
    assert run(clock, 20) == run(fresh, 20)


def test_the_mass_of_a_skipped_snapshot_goes_to_the_next():
    clock = clock_of("uniform")
    assert run(clock, 8)[3::4] == pytest.approx([4 / 6, 4 / 10])
    clock.skip()
    assert clock.covered == 5
    assert run(clock, 4)[3] == pytest.approx(8 / 14)
    np.testing.assert_allclose(clock.trajectory_weights()[[0, 4, 8, 12]], np.array([2, 4, 0, 8]) / 14)


def test_without_its_last_snapshot_a_run_shares_the_rest():
    clock = clock_of("uniform")
    run(clock, 20)
    clock.skip()
    np.testing.assert_allclose(clock.trajectory_weights()[::4], np.array([2, 4, 4, 4, 4, 0]) / 18)
    clock.set_total_steps(24)  # it goes on after all, and the mass of its last steps is not lost
    run(clock, 4)
    np.testing.assert_allclose(clock.trajectory_weights()[::4], np.array([2, 4, 4, 4, 4, 0, 7]) / 25)


def test_a_snapshot_can_be_skipped_until_the_next_is_due():
    early, late = clock_of("beta(0.5,0.5)"), clock_of("beta(0.5,0.5)")
    run(early, 4)
    early.skip()
    run(early, 3)
    run(late, 7)
    late.skip()
    assert early.state() == late.state()
    assert early.tick() == late.tick()


def test_there_must_be_a_snapshot_to_skip():
    clock = clock_of("uniform")
    for incident in (
        lambda: None,
        lambda: run(clock, 3),
        lambda: (run(clock, 1), clock.skip()),
        lambda: (run(clock, 4), clock.jump(6)),
    ):
        incident()
        before = clock.state()
        with pytest.raises(RuntimeError, match=r"no snapshot to skip: call skip\(\) after a tick\(\) that"):
            clock.skip()
        assert clock.state() == before
    run(clock, 2)
    clock.step, clock.snapshot = 7, 6  # a tick whose snapshot failed is taken back
    with pytest.raises(RuntimeError, match="no snapshot to skip"):
        clock.skip()


def test_a_state_without_the_newer_fields_goes_on_as_it_always_did():
    clock = clock_of("beta(0.5,0.5)")
    run(clock, 9)
    old = clock.state()
    del old["joined"], old["skipped"]
    again = clock_of("beta(0.5,0.5)")
    again.check(old)
    again.restore(old)
    assert run(again, 11) == run(clock, 11)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        *(
            (lambda s, f=field: s.pop(f), f"lacks {field}")
            for field in ("kernel", "update_every", "horizons", "step", "snapshot", "joined", "skipped", "mass")
        ),
        (lambda s: s.update(kernel=3), "kernel=3, which no run leads to"),
        (lambda s: s.update(update_every=0), "update_every=0"),
        (lambda s: s.update(update_every=True), "update_every=True"),
        (lambda s: s.update(step=NAN), "step=nan"),
        (lambda s: s.update(step="9"), "step='9'"),
        (lambda s: s.update(step=32), "step=32"),
        (lambda s: s.update(step=7), "step=7"),
        (lambda s: s.update(step=-1), "step=-1"),
        (lambda s: s.update(snapshot=10), "snapshot=10"),
        (lambda s: s.update(snapshot=None), "snapshot=None"),
        (lambda s: s.update(joined=9), "joined=9"),
        (lambda s: s.update(skipped=4), "skipped=4"),
        (lambda s: s.update(skipped=[6, 5]), r"skipped=\[6, 5\]"),
        (lambda s: s.update(skipped=[8]), r"skipped=\[8\]"),
        (lambda s: s.update(skipped=[12]), r"skipped=\[12\]"),
        (lambda s: s.update(skipped=["4"]), r"skipped=\['4'\]"),
        (lambda s: s.update(mass=NAN), "mass=nan"),
        (lambda s: s.update(mass="half"), "mass='half'"),
        (lambda s: s.update(horizons=[]), r"horizons=\[\]"),
        (lambda s: s.update(horizons="ab"), "horizons='ab'"),
        (lambda s: s.update(horizons=[[8, 20], [0, 31]]), r"horizons=\[\[8, 20\], \[0, 31\]\]"),
        (lambda s: s.update(horizons=[[0, 20], [21, 31]]), "horizons="),
        (lambda s: s.update(horizons=[[0, 20], [8]]), "horizons="),
        (lambda s: s.update(horizons=[[0, NAN]]), "horizons="),
        (lambda s: s.update(horizons=[[0, 20.0]]), "horizons="),
    ],
)  # fmt: skip
def test_a_damaged_state_is_named_and_changes_nothing(damage, message):
    def clock_at_step_9():
        clock = clock_of("beta(0.5,0.5)")
        run(clock, 8)
        clock.set_total_steps(31)
        run(clock, 1)
        return clock

    clock = clock_at_step_9()
    state = clock.state()
    damage(state)
    before = clock.state()
    for read in (clock.check, Clock.resumed):
        with pytest.raises(
            ValueError, match=f"the state of the teacher's clock (lacks|has) .*{message}|{message}"
        ):
            read(state)
    assert clock.state() == before
    assert Clock.resumed(before).state() == before


# --- what a long run costs ----------------------------------------------------------------------------

STEPWISE = [
    "uniform", "power(sigma_rel=0.1)", "static", "ema(0.999)", "ema(0.996,1.0,schedule=cosine)",
    "ema(0.05,0.9,schedule=linear,warmup=0.2)", "tail(0.25)", "tail(1.0)", "tail(0.333)",
]  # fmt: skip


@pytest.mark.parametrize("text", STEPWISE)
def test_steps_asked_for_one_by_one_are_those_of_the_whole_run(text):
    kernel, total = kernels.build(text), 997
    assert kernel.stepwise
    whole = kernel.retention(np.arange(total + 1), total)
    single = [kernel.retention(np.arange(j, j + 1), total)[0] for j in range(total + 1)]
    np.testing.assert_allclose(single, whole, rtol=1e-15, atol=0)


@pytest.mark.parametrize("fraction", [0.003, 0.1, 1 / 3, 0.25, 0.7, 1.0])
@pytest.mark.parametrize("total", [1, 7, 63, 400])
def test_the_closed_form_of_a_tail_is_the_sum_of_its_density(fraction, total):
    tail, steps = kernels.Tail(fraction), np.arange(total + 1)
    if tail.density((steps + 0.5) / (total + 1)).any():
        expected = kernels.Density.retention(tail, steps, total)
        np.testing.assert_array_equal(tail.retention(steps, total), expected)
    else:
        with pytest.raises(ValueError, match="has no mass on any of the"):
            clock_of(tail, total)


class Counting(kernels.Uniform):
    """A kernel that counts the steps which it is asked for."""

    def retention(self, steps, total_steps):
        object.__setattr__(self, "asked", getattr(self, "asked", 0) + len(steps))
        return super().retention(steps, total_steps)


def test_a_long_run_asks_only_for_the_steps_that_it_needs():
    kernel = Counting()
    clock = Clock(kernel, 10**12, 100)
    run(clock, 400)
    clock.set_total_steps(2 * 10**12)
    clock.check(clock.state())
    assert kernel.asked < 600
    assert math.isclose(clock.trajectory_weights().sum(), 1.0)


def test_the_exponent_of_a_power_function_is_found_once(monkeypatch):
    calls, roots = [], np.roots
    monkeypatch.setattr(np, "roots", lambda p: calls.append(p) or roots(p))
    run(clock_of("power(sigma_rel=0.1)", None, 1), 50)
    assert len(calls) == 1
