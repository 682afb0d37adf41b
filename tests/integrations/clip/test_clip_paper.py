import re

import pytest

from wmateacher.integrations.clip import recipes
from wmateacher.integrations.clip.methods import METHODS
from wmateacher.integrations.clip.paper import (
    FORGETTING,
    PUBLISHED,
    TABLE_2,
    compare,
    compare_forgetting,
    measured,
)

SHIFTS = {
    "imagenet-v2": 70.0,
    "imagenet-r": 72.0,
    "imagenet-a": 50.0,
    "imagenet-sketch": 52.0,
    "objectnet": 56.0,
}


def one(change, shifts, ece=0.1):
    values = {name: value + change for name, value in shifts.items()}
    mean = sum(values.values()) / len(values)
    return {"id": 82.0 + change, "ood": mean, "ood_per_shift": values, "ece": 0.01, "ece_per_batch": ece}


def record(*changes, shifts=SHIFTS):
    """Of as many seeds as changes."""
    return {"runs": [one(change, shifts, 0.1 + change / 100) for change in changes or (0.0,)]}


def cells(line):
    return re.split(r"\s{2,}", line.strip())


def test_the_published_averages_are_those_of_their_rows():
    for method, row in PUBLISHED["vit-b-16"].items():
        shifts = [v for k, v in row.items() if k.startswith("imagenet") or k == "objectnet"]
        if "ood" in row:
            assert row["ood"] == pytest.approx(sum(shifts) / 5, abs=0.02), method  # rounding of its own
        assert row["ood4"] == pytest.approx(sum(shifts[:4]) / 4, abs=0.015), method
    for method, row in TABLE_2["vit-b-16"].items():
        assert row["ood4"] == pytest.approx(sum(list(row.values())[1:5]) / 4, abs=0.011), method
    for row in (r for rows in PUBLISHED.values() for r in rows.values()):
        assert all(30 < v < 90 for k, v in row.items() if k != "ece")
        assert "ece" not in row or 0 < row["ece"] < 0.3
    assert set(PUBLISHED["vit-b-16"]) == set(METHODS) - {"ema", "wise-ft"}
    assert {r.published for r in recipes.RECIPES.values()} == {None, *PUBLISHED, *FORGETTING}


def test_forgetting_is_the_accuracy_lost_since_pre_training():
    methods = {
        name: {"ood_per_shift": {"original": accuracy}}
        for name, accuracy in {"zero-shot": 98.0, "flyp": 60.5, "ema": 97.0}.items()
    }
    rows = [cells(line) for line in compare_forgetting({"methods": methods}, "colored-mnist").splitlines()]
    assert rows == [
        ["method", "accuracy on original", "forgetting", "published"],
        ["zero-shot", "98.0"],
        ["flyp", "60.5", "37.5", "37.9"],
        ["ema", "97.0", "1.0"],
    ]
    del methods["zero-shot"]
    assert "forgetting needs the zero-shot method's result" in compare_forgetting(
        {"methods": methods}, "colored-mnist"
    )


def test_figures_stand_under_the_papers_and_their_difference():
    results = {"methods": {"tracer": record(), "ema": record()}}
    header, ours, theirs, difference, second, none = compare(results, "vit-b-16").splitlines()
    assert cells(header) == ["method", "IN", "V2", "R", "A", "Sketch", "ObjNet", "Avg", "Avg of 4", "ECE"]
    assert cells(ours) == [
        "tracer", "measured", "82.00", "70.00", "72.00", "50.00", "52.00", "56.00", "60.00", "61.00", "0.100",
    ]  # fmt: skip
    assert cells(theirs)[2:] == [
        "82.76", "74.14", "79.33", "54.92", "53.69", "58.26", "64.07", "65.52", "0.073",
    ]  # fmt: skip
    assert cells(difference)[2:] == [
        "-0.76", "-4.14", "-7.33", "-4.92", "-1.69", "-2.26", "-4.07", "-4.52", "+0.027",
    ]  # fmt: skip
    assert cells(second) == ["tracer", "Table 2", "82.76", "74.12", "79.30", "54.72", "53.69", "65.46"]
    assert cells(none) == ["ema", "the paper has no figures"]


def test_several_seeds_have_deviations():
    text = compare({"methods": {"flyp": record(0.0, 1.0, 2.0)}}, "vit-b-16")
    row = cells(text.splitlines()[1])
    assert row[2:5] == ["83.00 ±1.00", "71.00 ±1.00", "73.00 ±1.00"]
    assert row[-3:] == ["61.00 ±1.00", "62.00 ±1.00", "0.110 ±0.010"]


def test_parts_of_the_shifts_are_averaged_over_none_that_are_missing():
    two = {name: SHIFTS[name] for name in ("imagenet-v2", "imagenet-r")}
    assert {"ood", "ood4", "ece"}.isdisjoint(measured(record(shifts=two)))
    four = {name: value for name, value in SHIFTS.items() if name != "objectnet"}
    found = measured(record(shifts=four))
    assert found["ood4"] == (61.0, None)
    assert "ood" not in found


@pytest.mark.parametrize("model", ["vit-l-14", "rn50"])
def test_other_models_have_their_averages(model):
    text = compare({"methods": {"tracer": record()}}, model)
    assert f"{PUBLISHED[model]['tracer']['ood']:.2f}" in text
