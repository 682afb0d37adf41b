"""The kernel sweep: what it runs, what it leaves, and that nothing is lost when it is killed."""

import csv
import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from unittest.mock import Mock

import programs
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import kernel_sweep  # noqa: E402
import sweep_report  # noqa: E402
import sweep_tasks  # noqa: E402

from wmateacher.integrations.engine.signals import Terminated  # noqa: E402

SHORT = ["--steps", "4", "--pretrain-steps", "6", "--jobs", "2"]
FEW = ["--kernels", "none", "beta(0.5, 0.5)", "ema(0.9)"]
KERNELS = [*FEW, "static"]
PICTURES = ["plane", "profiles", "gaps", "predicted", "differences"]
LOOKED_AT = [
    "cells.csv",
    "explorer.html",
    "report.html",
    *(f"{p}{e}.png" for p in PICTURES for e in ("", "-dark")),
]


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


def sweep_of(*runs):
    """Results of runs (kernel, pre-training, seed, ID, OOD)."""
    cells = [{**record(kernel, seed, *accuracies), "pretraining": pretraining}
             for kernel, pretraining, seed, *accuracies in runs]  # fmt: skip
    return {**RESULTS, "environment": {"packages": {}, "processor": "one"}, "cells": cells}


def test_differences_are_taken_between_runs_of_the_same_pretraining_and_seed():
    base = "beta(0.5,0.5)"
    runs = [(base, p, s, 90 + 3 * p + s, 80.0) for p in (0, 1) for s in (0, 1)]
    runs += [("uniform", p, s, 92 + 3 * p + s + 0.1 * (p == s), 80 + s - 0.5) for p in (0, 1) for s in (0, 1)]
    runs += [("static", 1, 0, 90.0, 90.0), ("static", 2, 0, 0.0, 0.0)]
    results = sweep_of(*runs)
    uniform = next(row for row in sweep_report.rows(results) if row["kernel"] == "uniform")
    found = sweep_report.paired(results, uniform, base, "id")
    assert found == {(0, 0): pytest.approx(2.1), (0, 1): pytest.approx(2.0), (1, 0): pytest.approx(2.0), (1, 1): pytest.approx(2.1)}  # fmt: skip
    lines = sweep_report.differences(results).splitlines()
    heading = f"minus {base} pairs ID OOD OOD ECE final gap"
    by_pretraining = [f"{name} in each pre-training" for name in ("ID", "OOD")]
    assert lines[0].split() == " ".join([heading, *by_pretraining]).split()
    assert lines[1].split()[-4:] == ["+2.0", "+2.0", "+0.0", "+0.0"]
    # 3.18 is the quantile of Student's t with three degrees of freedom.
    width = 3.18245 * 0.0577350 / 2
    assert f"+2.0 ±{width:.1f}!" in lines[1] or f"+2.1 ±{width:.1f}!" in lines[1]
    assert "+0.0 ±0.9 " in lines[1]
    assert lines[2].split()[:2] == ["static", "1"]
    assert sweep_report.differences(results, "ema(0.9)") == "No run of ema(0.9) to compare with."


def test_one_run_each_shows_no_order():
    results = sweep_of(("beta(0.5,0.5)", 0, 0, 90, 80), ("uniform", 0, 0, 99, 99))
    assert sweep_report.differences(results).startswith("One run of each kernel, which shows no order")


def test_the_theory_is_compared_by_rank():
    runs = [("static", 0, 0, 1.0, 5.0), ("beta(0.5,0.5)", 0, 0, 2.0, 4.0), ("uniform", 0, 0, 3.0, 3.0)]
    lines = sweep_report.correlations(sweep_of(*runs)).splitlines()
    assert lines[0].startswith("3 kernels")
    assert lines[1].split()[2:4] == ["-1.00", "+1.00"]  # less bias, more accuracy


def test_pictures_fit_a_telephone_and_nothing_overlaps(tmp_path):
    specs = list(kernel_sweep.KERNELS)
    runs = [(k, 0, s, 90.0 + i % 5 + 0.1 * s * (i % 3), 80.0 + i % 7 - 0.1 * s) for i, k in enumerate(specs) for s in (0, 1, 2)]  # fmt: skip
    results = sweep_of(*runs)
    found = sweep_report.rows(results)
    drawn = [
        sweep_report.plane(found, sweep_report.figures(results)),
        sweep_report.difference_picture(results, "beta(0.5,0.5)"),
        sweep_report.predicted(found, 99),
    ]
    for figure in drawn:
        figure.draw_without_rendering()
        assert figure.get_figwidth() * 90 == pytest.approx(390, abs=1)
        whole, axes = figure.bbox, [axis.get_tightbbox() for axis in figure.axes]
        for box in axes:
            assert whole.x0 <= box.x0
            assert box.x1 <= whole.x1 + 1
            assert whole.y0 <= box.y0
            assert box.y1 <= whole.y1 + 1
        for legend in figure.legends:
            box = legend.get_window_extent()
            assert whole.x0 <= box.x0
            assert box.x1 <= whole.x1
            assert all(box.y1 <= axis.y0 + 1 for axis in axes)
        for axis in figure.axes:
            for ticks, low, high in (
                (axis.get_yticklabels(), "y0", "y1"),
                (axis.get_xticklabels(), "x0", "x1"),
            ):
                boxes = [t.get_window_extent() for t in ticks if t.get_text() and t.get_visible()]
                boxes.sort(key=lambda box: getattr(box, low))
                assert all(
                    getattr(a, high) <= getattr(b, low) for a, b in zip(boxes, boxes[1:], strict=False)
                )
    sweep_report.write(results, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert page.count("prefers-color-scheme: dark") == 4
    assert "ID: accuracy on the domain of fine-tuning" in page
    assert (tmp_path / "cells.csv").read_text().startswith("kernel,distill_weight,pretraining,seed,")


def test_cells_of_other_pretrainings_start_from_other_towers(tmp_path):
    task = sweep_tasks.TASKS["clip"]("digits", None, 4, 6, tmp_path, tmp_path)
    cells = [sweep_tasks.Cell("uniform", 0.9, 0, pretraining) for pretraining in (0, 2)]
    assert [task.recipe(cell).pretrain.seed for cell in cells] == [0, 2]
    assert cells[0].folder == sweep_tasks.Cell("uniform", 0.9, 0).folder != cells[1].folder
    results = {"cells": [record("uniform", 0, 1.0, 1.0)]}  # of a sweep that had one pre-training
    assert [kernel_sweep.record_of(results, cell) is None for cell in cells] == [False, True]


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
    arguments = [
        *SHORT,
        *kernels,
        "--pretrainings",
        2,
        "--output",
        tmp_path / "out",
        "--cache",
        tmp_path / "cache",
    ]
    done = sweep(*arguments)
    assert done.returncode == 0, done.stderr
    assert "4 cells, 4 to run, 2 at a time" in done.stdout
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert len(results["cells"]) == 4
    assert sweep_report.table(results).splitlines()[0] in done.stdout
    for name in LOOKED_AT:
        assert (tmp_path / "out" / name).stat().st_size > 100
    page = (tmp_path / "out/report.html").read_text()
    assert page.count("data:image/png;base64,") == 10
    assert "One run of each kernel" not in page
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
    page = (tmp_path / "out/report.html").read_text()
    assert page.count("data:image/png;base64,") == 6
    assert "One run of each kernel, which shows no order" in page
    assert "--quick shows that everything runs. After 4 steps" in done.stdout


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


def ended_cell(futures):
    """A worker has had the signal, too, and has saved its cell first."""
    (future,) = futures
    future.result.side_effect = Terminated("cell: terminated after step 3")
    yield future


@pytest.mark.parametrize("ended", [lambda _: [os.kill(os.getpid(), signal.SIGTERM)], ended_cell])
def test_a_terminated_sweep_ends_its_workers(ended, monkeypatch, tmp_path, capsys):
    """As a scheduler or `timeout` ends it; each worker that stays behind holds a gigabyte."""
    worker = Mock()
    # `timeout` sends the signal twice.
    worker.terminate.side_effect = lambda: os.kill(os.getpid(), signal.SIGTERM)
    pool = Mock(_processes={0: worker})
    monkeypatch.setattr(kernel_sweep, "ProcessPoolExecutor", lambda *args, **options: pool)
    monkeypatch.setattr(kernel_sweep, "as_completed", ended)
    before = signal.signal(signal.SIGTERM, lambda *unused: None)
    try:
        with pytest.raises(SystemExit) as caught:
            kernel_sweep.run_cells(Mock(), [sweep_tasks.Cell("static", 1.0, 0, 0)], 1, {}, tmp_path)
        assert signal.getsignal(signal.SIGTERM) not in (signal.default_int_handler, signal.SIG_DFL)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert caught.value.code == 130
    assert "the same command with --output" in capsys.readouterr().err
    worker.terminate.assert_called_once_with()
    pool.shutdown.assert_called_once_with(wait=True, cancel_futures=True)


def test_a_worker_begins_no_cell_after_the_end(monkeypatch):
    ending, task = multiprocessing.Event(), Mock()
    monkeypatch.setattr(kernel_sweep, "_ending", ending, raising=False)
    cell = sweep_tasks.Cell("static", 1.0, 0)
    assert kernel_sweep.run_cell(task, cell) is task.run.return_value
    ending.set()
    with pytest.raises(Terminated, match="the sweep has ended"):
        kernel_sweep.run_cell(task, cell)
    task.run.assert_called_once_with(cell)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kernels", "betta(1,1)"], "--kernels: unknown kernel 'betta'; did you mean 'beta'"),
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (
            ["--distill-weights", "0"],
            "--distill-weights must be above 0, got 0.0: --kernels none is no teacher",
        ),
        (["--baseline", "betta(1,1)"], "--baseline: unknown kernel 'betta'"),
        (["--baseline", "beta(3,3)"], "--baseline beta(3.0,3.0) is not swept: add it to --kernels"),
        (
            ["--task", "lm", "--pretrainings", "2"],
            "--pretrainings: lm has none to choose, got 2: use --seeds",
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


@pytest.mark.parametrize(
    ("kernel", "norm"), [("uniform", "batch"), ("static", "pretrained"), ("none", "pretrained")]
)
def test_pictograms_have_their_own_recipe(kernel, norm, tmp_path):
    task = sweep_tasks.TASKS["clip"]("emoji", None, None, 7, tmp_path, None)
    recipe = task.recipe(sweep_tasks.Cell(kernel, 0.5, 0, pretraining=2))
    assert (recipe.name, recipe.pretrain.steps, recipe.pretrain.seed) == ("emoji", 7, 2)
    method = recipe.method("cell")
    assert (method.kernel, method.batch_norm) == (None if kernel == "none" else kernel, norm)


def test_unknown_data_is_named_with_all_that_the_sweep_knows(tmp_path):
    task = sweep_tasks.TASKS["clip"]("emojis", None, None, None, tmp_path, None)
    with pytest.raises(ValueError, match="unknown data 'emojis'; did you mean 'emoji'.*mnist"):
        task.recipe()


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
