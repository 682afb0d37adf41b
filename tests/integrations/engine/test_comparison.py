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


def runs(**methods):
    """Records of two pre-trainings with three seeds each."""
    return {
        "methods": {
            name: {
                "runs": [
                    {"pretraining": p, "seed": s, "ood": v} for (p, s), v in zip(RUNS, values, strict=True)
                ]
            }
            for name, values in methods.items()
        }
    }


RUNS = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
REFERENCE = [50.0, 51.0, 52.0, 70.0, 71.0, 72.0]
OOD = {"mean OOD": ("ood", 1)}


def test_differences_are_taken_in_each_pretraining_and_shown_for_each():
    """Pre-trainings differ by twenty; seeds alone would pair a run with one of another pre-training."""
    lower = [value - 2 - 0.1 * (i % 2) for i, value in enumerate(REFERENCE)]
    text = comparison.differences(runs(a=lower, b=REFERENCE), OOD, [("a", "b")])
    half = comparison.half_width([-2.0, -2.1, -2.0, -2.1, -2.0, -2.1])
    heading, row = (" ".join(line.split()) for line in text.splitlines())
    assert heading == "difference mean OOD mean OOD in each pre-training"
    assert row == f"a - b -2.0 ±{half:.1f} -2.0 -2.1"
    assert "each pre-training" not in comparison.differences(
        results(a={0: 1.0}, b={0: 2.0}), COLUMNS, [("a", "b")]
    )


def test_findings_say_what_the_intervals_show():
    noise = [0.1, -0.2, 0.3, -0.1, 0.2, -0.3]
    # On average far below, but above in one of the two pre-trainings.
    torn = [value + change for value, change in zip(REFERENCE, [1, 1.1, 1, -9, -9.1, -9], strict=True)]
    both = runs(
        ref=REFERENCE,
        low=[v - 3 + n for v, n in zip(REFERENCE, noise, strict=True)],
        high=[v + 3 + n for v, n in zip(REFERENCE, noise, strict=True)],
        same=[v + n for v, n in zip(REFERENCE, noise, strict=True)],
        torn=torn,
    )
    others = ["low", "high", "same", "torn"]
    assert comparison.findings(both, OOD, "ref", others) == (
        "mean OOD, 6 pairs, 95% intervals: ref is above low; ref is below high; its difference to same and "
        "torn is within the noise."
    )
    assert comparison.findings(both, OOD, "ref", ["same"]).endswith(
        "ref's difference to same is within the noise."
    )
    one = results(a={0: 1.0}, b={0: 2.0})
    assert comparison.findings(one, {"new": ("student.new", 1)}, "a", ["b"]) == (
        "new: one run each, which shows no order; use --seeds."
    )


def test_a_difference_that_is_clear_overall_but_not_in_each_pretraining_is_noise():
    change = [-0.5, -0.4, -0.6, 0.1, 0.05, -0.1]
    both = runs(a=REFERENCE, b=[v + c for v, c in zip(REFERENCE, change, strict=True)])
    low, high = stats.ttest_1samp(change, 0).confidence_interval(0.8)
    assert low < high < 0
    assert "noise" in comparison.findings(both, OOD, "a", ["b"])


@pytest.mark.parametrize(
    ("values", "above"),
    [
        ({(0, 0): 1.0, (0, 1): 1.1, (0, 2): 0.9}, True),
        ({(0, 0): 1.0, (0, 1): -1.1, (0, 2): 0.9}, False),
        ({(0, 0): 1.0}, False),
        # Nearly all differences are alike, but one pre-training says the contrary.
        ({**{(0, s): 1.0 + s / 100 for s in range(30)}, (1, 0): -0.1}, False),
    ],
)
def test_above_noise_excludes_0_and_all_pretrainings_agree(values, above):
    assert comparison.is_above_noise(values) is above
