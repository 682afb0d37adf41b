import math

import pytest
from scipy import stats

from wmateacher.integrations.engine import comparison

COLUMNS = {"new": ("student.new", 1), "gap": ("gap", 2)}


def results(**methods):
    return {
        "methods": {
            name: {"runs": [{"seed": s, "student": {"new": v}, "gap": None} for s, v in values.items()]}
            for name, values in methods.items()
        }
    }


def test_the_interval_is_scipys():
    values = [3.0, 5.5, 4.0, 9.0]
    low, high = stats.ttest_1samp(values, 0).confidence_interval()
    assert comparison.half_width(values) == pytest.approx((high - low) / 2)
    assert comparison.half_width([1.0]) == math.inf


def test_differences_are_taken_seed_by_seed_over_the_seeds_of_both():
    """Seeds differ by tens and the methods by one, so intervals that are not paired would hide it."""
    both = results(a={2: 31.5, 0: 11.0, 1: 21.25, 3: 99.0}, b={0: 10.0, 1: 20.0, 2: 30.0})
    text = comparison.differences(both, COLUMNS, [("a", "b"), ("b", "a")])
    low, high = stats.ttest_rel([11.0, 21.25, 31.5], [10.0, 20.0, 30.0]).confidence_interval()
    first, second = (" ".join(line.split()) for line in text.splitlines()[1:])
    assert first == f"a - b +1.2 ±{(high - low) / 2:.1f}"
    assert second.startswith("b - a -1.2 ±")


def test_a_single_seed_has_no_interval():
    text = comparison.differences(results(a={0: 3.0}, b={0: 1.0, 1: 2.0}), COLUMNS, [("a", "b")])
    assert text.splitlines()[1].split() == ["a", "-", "b", "+2.0", "(1", "seed)"]


def test_without_pairs_there_is_no_table():
    assert comparison.differences(results(a={0: 3.0, 1: 2.0}), COLUMNS, []) == ""
