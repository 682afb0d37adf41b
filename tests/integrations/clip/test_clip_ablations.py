import math
import re
from dataclasses import replace

import pytest

from wmateacher import kernels
from wmateacher.integrations.clip import ablations, paper, recipes
from wmateacher.integrations.clip.methods import METHODS, TRACER_TERMS

TRACER = METHODS["tracer"]


def results(oods):
    """Records as in results.json, with two seeds each."""
    return {
        "methods": {
            name: {
                "id": 90.0, "ood": ood, "ece": 0.05, "runs": [{"seed": 0}, {"seed": 1}], "std": {"id": 1.0, "ood": 0.5, "ece": 0.01},
            }
            for name, ood in oods.items()
        }
    }  # fmt: skip


@pytest.mark.parametrize("what", ["kernel", "lambda", "terms"])
def test_each_grid_is_the_papers_and_holds_tracer_itself(what):
    made = ablations.variants(what, TRACER, 400)
    assert list(made) == list(paper.ABLATIONS[what])
    assert all(method.name == name for name, method in made.items())
    settings = [method.settings() | {"name": ""} for method in made.values()]
    assert settings.count(TRACER.settings() | {"name": ""}) == 1
    assert len({str(s) for s in settings}) == len(made)


def test_variants_differ_in_what_is_varied_alone():
    variants = ablations.variants("lambda", TRACER, 400).values()
    assert [m.distill_weight for m in variants] == [0.1, 0.5, 0.9, 1, 3, 10]
    terms = ablations.variants("terms", TRACER, 400)
    assert terms["none"].kernel is None
    assert terms["none"].cross_frobenius == TRACER.cross_frobenius
    assert terms["fd+crd"].distillation == "3.90625*fd + crd"
    assert terms["all"].distillation == TRACER_TERMS
    wide = ablations.variants("terms", recipes.get("imagenet-rn50").method("tracer"), 400)
    assert wide["fd+crd"].distillation == "0.1953125*fd + crd"
    with pytest.raises(ValueError, match=r"'fd \+ crd' has no icl: leave --methods.tracer.distillation out"):
        ablations.variants("terms", replace(TRACER, distillation="fd + crd"), 400)
    alphas = ablations.variants("alpha", TRACER, 400, of="tracer")
    assert [m.merge.alpha for m in alphas.values()] == [i / 10 for i in range(11)]
    assert {m.merge.of for m in alphas.values()} == {"tracer"}


def test_intervals_are_as_often_in_the_run_as_the_published_ones():
    full = ablations.variants("interval", TRACER, 25_030)
    assert [m.update_every for m in full.values()] == [1, 500, 500, 2500, 2500]
    assert [m.clock for m in full.values()] == ["steps", *["steps", "published"] * 2]
    short = ablations.variants("interval", TRACER, 400)
    assert list(short) == [
        "every 1", "every 8", "every 8, published clock", "every 40", "every 40, published clock",
    ]  # fmt: skip
    shares = [ablations.start_share(m, 25_030) for m in full.values()]
    assert shares[0] == pytest.approx(kernels.build("beta(0.5,0.5)").profile(25_030)[0])
    assert shares[2] == pytest.approx(0.1013, abs=1e-4)
    assert shares[4] == pytest.approx(0.2140, abs=1e-4)
    assert ablations.start_share(METHODS["flyp"], 10) is None


def test_the_table_stands_beside_the_paper():
    made = ablations.variants("lambda", TRACER, 400)
    figures = dict(zip(made, (61.9, 63.7, 64.0, 64.1, 63.9, 63.3), strict=True))
    text = ablations.table(results(figures), "lambda", made, 400)
    header, *rows, last = text.splitlines()
    assert re.split(r"\s{2,}", header) == [
        "lambda", "ID", "mean OOD", "OOD ECE", "W^0 share", "paper's ID", "OOD", "ECE",
    ]  # fmt: skip
    assert re.split(r"\s{2,}", rows[0])[:4] == ["lambda=0.1", "90.0 ±1.0", "61.9 ±0.5", "0.050 ±0.010"]
    assert re.split(r"\s{2,}", rows[0])[5:] == ["83.25", "61.86", "0.136"]
    assert last == "rank correlation of mean OOD with the paper's: 1.00"
    del figures["lambda=10"]
    assert len(ablations.table(results(figures), "lambda", made, 400).splitlines()) == len(rows) + 1


def test_an_ablation_without_published_figures_shows_its_own(tmp_path):
    made = ablations.variants("alpha", TRACER, 400)
    found = results({name: 90 + i for i, name in enumerate(made)})
    text = ablations.table(found, "alpha", made, 400)
    assert re.split(r"\s{2,}", text.splitlines()[0]) == ["alpha", "ID", "mean OOD", "OOD ECE"]
    assert len(text.splitlines()) == 12
    ablations.picture(found, "alpha", made, tmp_path / "new" / "a.png")
    assert (tmp_path / "new" / "a.png").read_bytes().startswith(b"\x89PNG")


def test_published_figures_are_complete():
    rows = [row for grid in paper.ABLATIONS.values() for row in grid.values()]
    assert len(rows) == 6 + 6 + 7 + 3
    assert paper.ABLATIONS["kernel"]["beta(0.5,0.5)"] == paper.ABLATIONS["lambda"]["lambda=0.9"]
    assert all(50 < ood < 70 and 0 < (ece or 0.1) < 0.2 for _, ood, ece in rows)
    assert all(math.isclose(top, 82, abs_tol=2) for top, *_ in rows)


def test_the_papers_intervals_stand_beside_its_own_clock():
    made = ablations.variants("interval", TRACER, 400)
    text = ablations.table(results({n: 96 + i for i, n in enumerate(made)}), "interval", made, 400)
    rows = [re.split(r"\s{2,}", line)[:1] + re.split(r"\s{2,}", line)[5:] for line in text.splitlines()]
    assert rows == [
        ["interval", "paper's ID", "OOD", "ECE"],
        ["every 1", "82.76", "64.07", "0.073"],
        ["every 8"],
        ["every 8, published clock", "82.13", "64.12"],
        ["every 40"],
        ["every 40, published clock", "81.38", "63.98", "0.068"],
    ]


def test_unknown_ablations_list_what_there_is():
    with pytest.raises(ValueError, match="unknown ablation 'kernal'; did you mean 'kernel'"):
        ablations.variants("kernal", TRACER, 400)
