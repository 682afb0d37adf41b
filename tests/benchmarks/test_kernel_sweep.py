"""The kernel sweep: what it runs, what it leaves, and that nothing is lost when it is killed."""

import csv
import json
import sys
from pathlib import Path

import programs
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import kernel_sweep  # noqa: E402
import sweep_report  # noqa: E402
import sweep_tasks  # noqa: E402

SHORT = ["--steps", "4", "--pretrain-steps", "6", "--jobs", "2"]
FEW = ["--kernels", "none", "beta(0.5, 0.5)", "ema(0.9)"]
KERNELS = [*FEW, "static"]
LOOKED_AT = ["cells.csv", "plane.png", "profiles.png", "gaps.png", "predicted.png", "report.html"]


SCRIPT = ROOT / "benchmarks/kernel_sweep.py"


@pytest.fixture
def sweep(forks):
    return lambda *arguments: programs.run(SCRIPT, *arguments)


def record(kernel, seed, ID, OOD, distill_weight=0.9, gap=0.1):
    return {
        "kernel": kernel, "distill_weight": distill_weight, "seed": seed, "id": ID, "ood": OOD, "ece": 0.01 * seed,
        "final_gap": gap, "gaps": None, "seconds": 1.0,
    }  # fmt: skip


RESULTS = {
    "config": {"total_steps": 99, "task": "clip", "data": "digits"},
    "cells": [
        record("none", 0, 99.0, 90.0, gap=None),
        record("static", 0, 95.0, 97.0),
        record("uniform", 0, 97.0, 96.0),
        record("uniform", 1, 98.0, 94.0),
        record("ema(0.9)", 0, 97.0, 94.0),
    ],
}


def test_rows_are_means_and_deviations_with_the_kernels_numbers():
    none, static, uniform, ema = sweep_report.rows(RESULTS)
    assert (uniform["id"], uniform["ood"], uniform["seeds"]) == (97.5, 95.0, 2)
    assert uniform["id_std"] == pytest.approx(0.5**0.5)
    assert uniform["start_weight"] == pytest.approx(0.01)
    assert uniform["mean_age"] == pytest.approx(0.5)
    assert static["start_weight"] == 1
    assert none["final_gap"] is None
    assert [r["front"] for r in (none, static, uniform, ema)] == [True, True, True, False]
    table = sweep_report.table(RESULTS)
    assert len({len(line.rstrip()) for line in table.splitlines()[2:]}) == 1
    assert "97.5 ±0.7" in table


def test_equal_points_do_not_dominate_each_other():
    one, other, axes = {"id": 1.0, "ood": 2.0}, {"id": 1.0, "ood": 2.0}, ["id", "ood"]
    assert not sweep_report.dominates(one, other, axes)
    assert sweep_report.dominates(one | {"id": 1.5}, other, axes)
    assert not sweep_report.dominates(one | {"id": 1.5, "ood": 1.0}, other, axes)


def test_folders_of_cells_differ_and_are_plain():
    cells = [kernel_sweep.Cell(k, s, 0) for k in kernel_sweep.KERNELS for s in (0.5, 0.9)]
    folders = {cell.folder for cell in cells}
    assert len(folders) == len(cells)
    assert all(f.replace(".", "").replace("-", "").isalnum() for f in folders)


@pytest.mark.slow
def test_a_sweep_leaves_everything_and_runs_nothing_twice(sweep, tmp_path):
    kernels = ["--kernels", "none", "beta(0.5, 0.5)"]
    arguments = [*SHORT, *kernels, "--seeds", 2, "--output", tmp_path / "out", "--cache", tmp_path / "cache"]
    done = sweep(*arguments)
    assert done.returncode == 0, done.stderr
    assert "4 cells, 4 to run, 2 at a time" in done.stdout
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert len(results["cells"]) == 4
    assert sweep_report.table(results).splitlines()[0] in done.stdout
    for name in LOOKED_AT:
        assert (tmp_path / "out" / name).stat().st_size > 100
    page = (tmp_path / "out/report.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert "http://" not in page
    assert "https://" not in page
    assert "beta(0.5,0.5)" in page
    with (tmp_path / "out/cells.csv").open() as stream:
        assert len(list(csv.DictReader(stream))) == 4
    assert not list((tmp_path / "out").rglob("*.pt"))
    again = sweep(*arguments)
    assert "4 cells, 0 to run" in again.stdout
    assert json.loads((tmp_path / "out/results.json").read_text()) == results
    other = sweep(*arguments, "--steps", 5)
    assert other.returncode == 1
    assert "holds another sweep (total_steps=4 there, 5 here): choose another --output" in other.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "cells", "axes"),
    [("dino", 3, ("knn", "linear")), ("mean-teacher", 4, ("accuracy", "student_accuracy"))],
)
def test_other_tasks_are_swept_too(sweep, tmp_path, task, cells, axes):
    done = sweep("--task", task, "--steps", 4, "--quick", *KERNELS, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert len(results["cells"]) == cells
    assert list(results["figures"])[:2] == list(axes)
    assert all(cell[axis] >= 0 for cell in results["cells"] for axis in axes)
    gaps = [cell["gaps"] for cell in results["cells"] if cell["kernel"] != "none"]
    assert all((tmp_path / "out" / file).exists() for file in gaps)
    assert (tmp_path / "out/report.html").read_text().count("data:image/png;base64,") == 3


@pytest.mark.slow
def test_a_killed_sweep_goes_on_where_it_was(sweep, tmp_path):
    arguments = [*SHORT, *FEW, "--jobs", 1, "--cache", tmp_path / "cache", "--output"]
    file = tmp_path / "killed/results.json"
    killed = programs.Program(SCRIPT, *arguments, tmp_path / "killed")
    killed.until(file.exists)
    killed.kill(group=True)
    before = json.loads(file.read_text())["cells"]
    assert 0 < len(before) < 3
    done = sweep(*arguments, tmp_path / "killed")
    assert f"3 cells, {3 - len(before)} to run" in done.stdout
    assert sweep(*arguments, tmp_path / "whole").returncode == 0
    cells, expected = (
        json.loads((tmp_path / folder / "results.json").read_text())["cells"]
        for folder in ("killed", "whole")
    )
    measured = ("kernel", "id", "ood", "ece", "final_gap")
    assert [[c[k] for k in measured] for c in cells] == [[c[k] for k in measured] for c in expected]
    assert cells[: len(before)] == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kernels", "betta(1,1)"], "--kernels: unknown kernel 'betta'; did you mean 'beta'"),
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (
            ["--distill-weights", "0"],
            "--distill-weights must be above 0, got 0.0: --kernels none is no teacher",
        ),
        (["--task", "gan"], "invalid choice: 'gan'"),
        (
            ["--task", "dino", "--kernels", "none", "uniform"],
            "--kernels none: dino has no run without a teacher",
        ),
    ],
)
def test_bad_input(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kernel_sweep.py", *arguments])
    with pytest.raises(SystemExit) as caught:
        kernel_sweep.parsed()
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_missing_data_is_a_line_and_no_traceback(sweep, tmp_path):
    done = sweep("--data", "mnist", "--output", tmp_path / "out", "--cache", tmp_path / "cache")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "mnist" in done.stderr


def test_language_cells_share_their_pretraining(tmp_path):
    task = sweep_tasks.TASKS["lm"]("facts", None, 2, 2, tmp_path, None)
    assert task.prepare(1) == "pre-trained 1 models for 2 steps"
    (pretrained,) = (tmp_path / "cells/pretraining/checkpoints").iterdir()
    written = pretrained.stat().st_mtime_ns
    record = task.run(sweep_tasks.Cell("uniform", 0.5, 0))
    assert {*task.figures} <= set(record)
    assert (tmp_path / record["gaps"]).exists()
    assert pretrained.stat().st_mtime_ns == written
    with pytest.raises(ValueError, match="--distill-weights: sdft has none to change, got 0.5: leave it out"):
        sweep_tasks.TASKS["sdft"]("facts", None, 2, 2, tmp_path, None).run(sweep_tasks.Cell("static", 0.5, 0))
