import pytest

from wmateacher.integrations.clip import plots


def record(*runs):
    return {"runs": [{"pretraining": p, "seed": s} for p, s in runs]}


def test_a_picture_says_what_its_points_are():
    one = {"methods": {"a": record((0, 0))}}
    assert plots.meaning(one) == "A point: a method, one run"
    seeds = {"methods": {"a": {"runs": [{"seed": s} for s in range(3)]}}}
    assert plots.meaning(seeds) == "A point: a method's mean over 3 seeds; bars: sample deviation"
    starts = {"methods": {"a": record(*((p, s) for p in range(2) for s in range(3)))}}
    assert "over 3 seeds x 2 pre-trainings; bars" in plots.meaning(starts)


def test_bins_of_several_sets_are_pooled_by_their_share_and_rare_ones_left_out():
    def row(test, confidence, accuracy, share):
        return {"set": test, "confidence": str(confidence), "accuracy": str(accuracy), "share": str(share)}

    rows = [
        row("x", 0.92, 0.5, 0.3), row("y", 0.98, 1.0, 0.1), row("x", 0.31, 0.25, 0.7), row("y", 0.33, 0.35, 0.89),
        row("y", 1.0, 0.0, 0.002), row("x", 0.05, 1.0, 0.001),
    ]  # fmt: skip
    low, high = plots._pooled(rows)
    share = 0.7 + 0.89
    assert low == pytest.approx(((0.31 * 0.7 + 0.33 * 0.89) / share, (0.25 * 0.7 + 0.35 * 0.89) / share))
    share = 0.3 + 0.1 + 0.002
    assert high == pytest.approx(((0.92 * 0.3 + 0.98 * 0.1 + 0.002) / share, (0.15 + 0.1) / share))


def test_reliability_has_a_panel_for_each_method(tmp_path):
    files = {}
    for name in ("flyp", "tracer"):
        files[name] = tmp_path / f"{name}.csv"
        files[name].write_text(
            "model,set,confidence,accuracy,share\n"
            "student,id,0.9,0.8,1.0\nstudent,gray,0.5,0.4,1.0\nteacher,gray,0.1,0.9,1.0\n"
        )
    plots.reliability(files, "id", tmp_path / "reliability.png")
    assert (tmp_path / "reliability.png").read_bytes().startswith(b"\x89PNG")
