import csv
from types import SimpleNamespace

import pytest
from matplotlib.figure import Figure

from wmateacher.integrations.language.experiment import Experiment
from wmateacher.integrations.language.pictures import draw

CURVES = {
    "sft": [[0, 40, 100], [0, 60, 80]],
    "sft-teacher static": [[0, 20, 90], [0, 20, 70]],
    "sdft static": [[0, 10, 50], [0, 30, 52]],
    "sdft ema(0.0)": [[0, 10, 49], [0, 30, 53]],
}


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """A function that draws the courses of some methods and returns the panels by title."""
    run = SimpleNamespace(output=tmp_path, results={"methods": {}}, pretraining=0)
    run.run_name = lambda *given: Experiment.run_name(run, *given)
    run.file = lambda *given: Experiment.file(run, *given)
    for name, seeds in CURVES.items():
        run.results["methods"][name] = {"runs": [{"seed": seed} for seed in range(len(seeds))]}
        for seed, values in enumerate(seeds):
            for what, header in (("curves", ("step", "new", "kept")), ("gaps", ("step", "gap"))):
                file = run.file(what, name, seed)
                file.parent.mkdir(exist_ok=True)
                with file.open("w", newline="") as stream:
                    rows = [(10 * i, *[value] * (len(header) - 1)) for i, value in enumerate(values)]
                    csv.writer(stream).writerows([header, *rows])
        if name == "sft":
            run.file("gaps", name, 0).unlink(), run.file("gaps", name, 1).unlink()
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: figures.append(self))

    def panels(names):
        draw(run, names, tmp_path / "courses.png")
        return {axis.get_title(loc="left"): axis for axis in figures.pop().axes}

    return panels


def test_lines_are_means_over_seeds_from_step_0_and_labelled_at_their_ends(drawn):
    panels = drawn(list(CURVES))
    assert len(panels) == 6
    axis = panels["sft-teacher: what is new (% right)"]
    assert [list(line.get_ydata()) for line in axis.lines] == [[0, 50, 90], [0, 20, 80]]
    assert all(list(line.get_xdata()) == [0, 10, 20] for line in axis.lines)
    low, high = (f(axis.collections[0].get_paths()[0].vertices[:, 1]) for f in (min, max))
    assert (low, high) == pytest.approx((0, 90 + 200**0.5))
    assert [text.get_text() for text in axis.texts] == ["static", "sft"]  # in the order of their heights
    axis = panels["sdft: gap |W - M| / |W|"]
    assert [text.get_text() for text in axis.texts] == ["ema(0.0)", "static"]


def test_labels_of_close_ends_do_not_overlap(drawn):
    axis = drawn(list(CURVES))["sdft: what is kept (% right)"]
    heights = [text.xyann[1] for text in axis.texts]
    assert len(heights) == 3
    assert all(b - a >= 0.15 - 1e-9 for a, b in zip(heights, heights[1:], strict=False))
    assert heights[-1] <= 1


def test_sft_alone_has_no_gap_to_draw(drawn):
    assert list(drawn(["sft"])) == ["sft: what is new (% right)", "sft: what is kept (% right)"]
