import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wmateacher.integrations.engine.collapse import CollapseWarning, CollapseWatch, OutputMonitor, diagnose


def entropy(p):
    return -sum(x * math.log(x) for x in p if x > 0)


@given(st.integers(1, 4), st.integers(1, 5), st.integers(2, 6), st.integers(0, 2**20))
def test_information_and_use_are_their_definitions(window, batch, outputs, seed):
    p = np.random.default_rng(seed).dirichlet(np.full(outputs, 0.3), size=(window, batch))
    monitor = OutputMonitor(outputs, window)
    for round_ in range(2):  # a window leaves nothing to the next
        for i in range(window):
            found = monitor.update(round_ * window + i, torch.tensor(p[i], dtype=torch.float32))
            assert bool(found) == (i == window - 1)
        flat = p.reshape(-1, outputs)
        of_mean = entropy(flat.mean(0))
        assert found["used"].item() == pytest.approx(math.exp(of_mean), rel=1e-3)
        expected = of_mean - np.mean([entropy(row) for row in flat])
        assert found["information"].item() == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_half_a_window_is_kept_in_the_state():
    p = torch.rand(4, 3, 5).softmax(-1)
    whole, first, second = OutputMonitor(5, 4), OutputMonitor(5, 4), OutputMonitor(5, 4)
    for i in range(4):
        expected = whole.update(i, p[i])
    first.update(0, p[0])
    first.update(1, p[1])
    second.load_state_dict(first.state_dict())
    second.update(2, p[2])
    assert second.update(3, p[3]) == expected


def measured(probabilities):
    monitor = OutputMonitor(probabilities.shape[-1], 1)
    return {k: v.item() for k, v in monitor.update(0, probabilities).items()}


@pytest.mark.parametrize(
    ("probabilities", "message"),
    [
        (
            torch.full((8, 10), 0.1),
            "constant output: all inputs give the same mixture of outputs (information",
        ),
        (torch.eye(10)[[3] * 8], "constant output: one output takes all"),
        (torch.eye(10)[[0, 1] * 4], "dead outputs: about 2.0 of 10 are in use (at least 5 expected)"),
        (torch.eye(10), None),
    ],
)
def test_each_kind_is_named(probabilities, message):
    found = diagnose(**measured(probabilities), outputs=10, least_used=5)
    assert found is None if message is None else found.startswith(message)


def test_a_watch_warns_once_a_kind_and_not_in_the_first_tenth():
    dead, constant = measured(torch.eye(10)[[0, 1] * 4]), measured(torch.full((8, 10), 0.1))
    watch = CollapseWatch("mine", 100, 10, 5, "lower it")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step, logged in [
            (10, dead),
            (11, {"loss": 1.0}),
            (20, dead),
            (30, dead),
            (40, constant),
            (50, constant),
        ]:
            watch.see(step, logged)
    assert [str(w.message).partition(", ")[0] for w in caught] == [
        "mine: collapsed at step 20 of 100", "mine: collapsed at step 40 of 100",
    ]  # fmt: skip
    assert {w.category for w in caught} == {CollapseWarning}
    assert str(caught[0].message).endswith(": lower it")


def test_the_verdict_is_on_the_last_window():
    watch = CollapseWatch("mine", 100, 10, 5, "")
    assert watch.verdict([], []) is None
    assert watch.verdict([0.0, 2.0], [1.0, 9.0]) is None
    assert watch.verdict([2.0, 0.0], [9.0, 1.0]).startswith("constant output")
