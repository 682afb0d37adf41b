"""The page that explores sweeps: its numbers are the results', it needs no network, and a browser draws it."""

import json
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from scipy.stats import t

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import sweep_explorer  # noqa: E402
import sweep_report  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def embedded(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def sweep_of(*runs, **about):
    """Results of runs (kernel, distill_weight, pre-training, seed, ID, OOD)."""
    cells = [
        {"kernel": kernel, "distill_weight": weight, "pretraining": pretraining, "seed": seed, "id": ID, "ood": OOD,
         "ece": 0.1, "final_gap": None, "gaps": None}
        for kernel, weight, pretraining, seed, ID, OOD in runs
    ]  # fmt: skip
    return {"config": {"task": "clip", "data": "digits", "total_steps": 99, **about}, "cells": cells}


def test_every_number_is_the_results():
    sweeps = sweep_explorer.recorded()
    assert {"kernel-sweep-digits", "kernel-sweep-mnist"} <= set(sweeps)
    shown = embedded(sweep_explorer.page(sweeps))["sweeps"]
    assert [sweep["folder"] for sweep in shown] == list(sweeps)
    for sweep, results in zip(shown, sweeps.values(), strict=True):
        keys = [figure["key"] for figure in sweep["figures"]]
        assert keys == list(sweep_report.figures(results))
        assert sum(len(point["runs"]) for point in sweep["points"]) == len(results["cells"])
        for point in sweep["points"]:
            cells = [
                cell
                for cell in results["cells"]
                if cell["kernel"] == point["kernel"]
                and point["distill_weight"] in (None, cell["distill_weight"])
            ]
            assert (point["distill_weight"] is None) == (point["kernel"] == "none")
            for key in keys:
                values = [cell[key] for cell in cells]
                assert [run[key] for run in point["runs"]] == values
                found = point["values"][key]
                if None in values:
                    assert found == {"mean": None, "half": None}
                    continue
                assert found["mean"] == pytest.approx(statistics.fmean(values))
                if len(values) == 1:
                    assert found["half"] is None
                    continue
                width = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
                assert found["half"] == pytest.approx(width, abs=1e-12)


def test_differences_are_those_of_pairs():
    base = "beta(0.5,0.5)"
    runs = [(base, 0.9, p, s, 90.0 + p, 80.0) for p in (0, 1) for s in (0, 1)]
    runs += [("uniform", 0.9, p, s, 91.0 + p + 0.1 * s, 81.0 - 2 * p) for p in (0, 1) for s in (0, 1, 2)]
    of_base, of_uniform = embedded(sweep_explorer.page({"one": sweep_of(*runs)}))["sweeps"][0]["points"]
    assert of_base["differences"] == {}
    found = of_uniform["differences"]
    assert found["id"]["mean"] == pytest.approx(1.05)
    assert (found["id"]["pairs"], found["id"]["clear"]) == (4, True)
    assert (found["ood"]["mean"], found["ood"]["clear"]) == (0.0, False)
    other = embedded(sweep_explorer.page({"one": sweep_of(*runs)}, "uniform"))["sweeps"][0]["points"]
    assert other[0]["differences"]["id"]["mean"] == pytest.approx(-1.05)
    assert other[1]["differences"] == {}


def test_kernels_look_alike_in_every_sweep_and_differ_from_each_other():
    styles = embedded(sweep_explorer.page(sweep_explorer.recorded()))["kernels"]
    assert len({tuple(style.values()) for style in styles.values()}) == len(styles) > 16
    assert styles["beta(0.2,0.2)"]["colour"] == styles["beta(0.5,0.5)"]["colour"]


def test_the_page_needs_no_other_host_and_no_data_can_leave_its_script():
    folder = "</script><script>alert(1)</script><!--&amp;"
    results = sweep_of(("uniform", 0.9, 0, 0, 1.0, 2.0), data="<b>\u2028")
    page = sweep_explorer.page({folder: results})
    assert page.count("</script") == 2
    assert "alert(1)<" not in page
    sweep = embedded(page)["sweeps"][0]
    assert (sweep["folder"], sweep["title"]) == (folder, "clip on <b>\u2028")
    assert set(re.findall(r"https?://[^\"'\s]+", page)) == {
        "http://www.w3.org/2000/svg"
    }  # a name, not a place
    assert not re.search(r"\b(src|href|srcset)=|@import|url\(|fetch\(|innerHTML", page)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_draws_every_point_and_the_front(tmp_path):
    results = sweep_explorer.recorded()["kernel-sweep-digits"]
    file = tmp_path / "explorer.html"
    file.write_text(sweep_explorer.page({"<i>": results}), "utf-8")
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        f"--user-data-dir={tmp_path}",
    ]
    done = subprocess.run(
        [CHROMIUM, *options, "--dump-dom", file.as_uri()], capture_output=True, text=True, timeout=300
    )
    assert "CONSOLE" not in done.stderr, done.stderr
    points = re.findall(r'role="option"[^>]*aria-label="([^"]*)"', done.stdout)
    rows = sweep_report.rows(results)
    assert len(points) == len(rows)
    static = next(
        point
        for point in embedded(file.read_text("utf-8"))["sweeps"][0]["points"]
        if point["kernel"] == "static"
    )
    ID, OOD = (static["values"][key] for key in ("id", "ood"))
    label = f"static: ID {ID['mean']:.1f} ±{ID['half']:.1f}, OOD {OOD['mean']:.1f} ±{OOD['half']:.1f}, "
    assert f"{label}{len(static['runs'])} runs: 3 pre-trainings, 3 seeds" in points
    assert {p.partition(":")[0] for p in points if p.endswith("on the Pareto front")} == {
        row["kernel"] for row in rows if row["front"]
    }
    assert "<i>" not in done.stdout.replace("\\u003ci>", "")
    assert done.stdout.count("<tr") == len(rows) + 1


def test_the_command_writes_one_page_of_several_folders(tmp_path, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["sweep_explorer.py", *map(str, arguments)])
        return sweep_explorer.main()

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(
            json.dumps(sweep_of((name := "uniform", 0.9, 0, 0, 1.0, 2.0)))
        )
    page = tmp_path / "page.html"
    assert run(tmp_path / "a", tmp_path / "b", "--output", page) == 0
    assert "with 2 sweeps" in capsys.readouterr().out
    assert len(embedded(page.read_text("utf-8"))["sweeps"]) == 2
    (tmp_path / "b/results.json").write_text('{"config": {}, "methods": {}}')
    for folder, message in (("b", "is no kernel sweep"), ("c", "does not exist")):
        with pytest.raises(SystemExit):
            run(tmp_path / folder, "--output", page)
        assert f"{message}: pass folders that kernel_sweep.py has written" in capsys.readouterr().err
