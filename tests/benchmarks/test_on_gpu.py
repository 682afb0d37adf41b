"""The command for a GPU, on a CPU with tiny sizes: all sections, and none that loses the others."""

import json
import os
import signal
import subprocess
import sys
import time
import types
import warnings
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import on_gpu  # noqa: E402
from gpu import cells, correct, losses, record, report, shapes, step, tracer, update  # noqa: E402

from wmateacher.integrations.clip import recipes  # noqa: E402


@pytest.fixture
def command(forks, tmp_path, monkeypatch):
    """Run the command in this process and return its exit code; sections are forks of it."""

    def run(*arguments):
        monkeypatch.chdir(tmp_path)
        argv = ["on_gpu.py", "--device", "cpu", "--quick", "--output", "out", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", argv)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a section is a program, for which warnings are no errors
            return on_gpu.main()

    return run


@pytest.fixture
def section(monkeypatch):
    """Add a section whose measurement is a function."""

    def add(name, measure):
        module = types.ModuleType(f"gpu.{name}")
        module.measure, module.table = measure, lambda results: " ".join(results)
        monkeypatch.setitem(sys.modules, f"gpu.{name}", module)
        monkeypatch.setitem(on_gpu.SHARES, name, 1.0)
        monkeypatch.setitem(report.TITLES, name, f"the section {name}")

    return add


def content(name):
    return json.loads(Path(f"out/{name}.json").read_text())


def check(names, out):
    """What the named sections left and printed."""
    for name in names:
        found = content(name)
        assert (found["section"], found["state"], found["errors"]) == (name, "finished", {})
        assert found["results"]
        assert found["quick"]
        assert found["command"].startswith("python on_gpu.py --device cpu")
        assert found["environment"]["packages"]["torch"] == torch.__version__.partition("+")[0]
        assert {"commit", "date", "seconds"} <= set(found)
        assert f"[{name}] finished" in out
        assert f"## {name}: {report.TITLES[name]}" in out
    assert Path("out/summary.md").read_text() in out
    # Few files in one folder, which any machine can send back.
    assert {p.name for p in Path("out").iterdir()} == {*(f"{name}.json" for name in names), "summary.md"}


def test_the_library_alone_is_measured(command, capfd):
    assert command("--sections", "update", "losses", "--minutes", 2) == 0
    check(("update", "losses"), capfd.readouterr().out)
    ours = content("update")["results"]["small, bf16: wmateacher, split"]
    assert {"milliseconds", "floor_milliseconds", "host_milliseconds", "share_of_copy_bandwidth"} <= set(ours)


# What the library can be used with, and its tests are run with.
BESIDE = {
    *("PIL", "accelerate", "datasets", "deepspeed", "diffusers", "ema_pytorch", "huggingface_hub"),
    *("hypothesis", "lightning", "matplotlib", "open_clip", "peft", "safetensors", "sklearn", "timm"),
    *("torch_ema", "torchmetrics", "torchvision", "tqdm", "transformers", "triton", "trl", "tyro", "wandb"),
    *("webdataset",),
}


@pytest.mark.slow
def test_the_library_is_tested_where_little_is_installed(tmp_path):
    """A machine with a GPU may have nothing of what these tests are written with."""
    absent = dict.fromkeys(BESIDE)  # None: importing them fails
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules.update({absent})\n")
    command = [sys.executable, ROOT / "benchmarks/on_gpu.py", "--device", "cpu", "--quick", "--sections"]
    ran = subprocess.run(
        [*command, "correct", "--output", tmp_path / "out"],
        env=os.environ | {"PYTHONPATH": str(tmp_path), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = json.loads((tmp_path / "out/correct.json").read_text())
    assert (found["state"], found["errors"], found["skipped"]) == ("finished", {}, {})
    assert {r["outcome"] for r in found["results"].values()} == {"passed"}


def test_what_stops_pytest_is_kept(command, tmp_path, monkeypatch):
    file = tmp_path / "test_far_away.py"
    file.write_text("import no_such_package")
    monkeypatch.setattr(correct, "TESTS", file)
    assert command("--sections", "correct", "--minutes", 1) == 1
    assert "unrecognized arguments: --device" in content("correct")["errors"]["pytest"]
    kept = record.Record("correct", record.Options("cpu", True, tmp_path, tmp_path, "command", "", ""))
    pytest.main([str(file), "-q", "-p", "no:cacheprovider"], plugins=[correct.Outcomes(kept)])
    assert list(kept.content["errors"].values()) == [
        "E   ModuleNotFoundError: No module named 'no_such_package'"
    ]


@pytest.mark.slow
def test_training_is_measured_and_run(command, capfd):
    # Imported here, so that no section has to.
    import wmateacher.integrations.clip.experiment
    import wmateacher.integrations.dino.experiment
    import wmateacher.integrations.mean_teacher.experiment  # noqa: F401

    names = ("step", "tracer", "backbones")
    assert command("--sections", *names, "--minutes", 3, "--jobs", 2) == 0
    check(names, capfd.readouterr().out)
    assert set(content("step")["results"]) == {m + c for m in ("flyp", "tracer") for c in ("", ", compiled")}
    assert {name.partition(": ")[2] for name in content("tracer")["results"]} == {"tracer, seed 0"}


def broken(record, options):
    record.add("first", 1)
    record.attempt("second", lambda: 1 / 0)
    record.attempt("third", lambda: __import__("no_such_package"))
    record.attempt("fourth", lambda: 4)
    record.attempt("fifth", lambda: 5, needs=1e6)
    raise RuntimeError("the rest is lost")


def test_a_failing_section_keeps_what_it_has_and_stops_nothing(command, section, capfd):
    section("broken", broken)
    section("crash", lambda record, options: (record.add("before", 1), os.kill(os.getpid(), signal.SIGKILL)))
    section("whole", lambda record, options: record.add("result", 2))
    section("missing", lambda record, options: __import__("no_such_package"))
    assert command("--sections", "broken", "crash", "missing", "whole", "--minutes", 1) == 1
    found = content("broken")
    assert found["state"] == "failed"
    assert found["results"] == {"first": 1, "fourth": 4}
    assert found["errors"] == {
        "second": "ZeroDivisionError: division by zero",
        "broken": "RuntimeError: the rest is lost",
    }
    assert found["skipped"] == {
        "third": "ModuleNotFoundError: No module named 'no_such_package'",
        "fifth": "no time left",
    }
    assert (content("crash")["state"], content("crash")["results"]) == ("ended with code -9", {"before": 1})
    assert content("missing")["state"] == "skipped"
    assert (content("whole")["state"], content("whole")["results"]) == ("finished", {"result": 2})
    page = capfd.readouterr().out
    assert "| crash | ended with code -9 |" in page
    assert "third: ModuleNotFoundError: No module named 'no_such_package'" in page


def hang(record, options):
    record.add("before", os.getpid())
    time.sleep(600)


def test_a_section_past_its_limit_is_stopped_and_later_ones_run(command, section, monkeypatch):
    monkeypatch.setattr(on_gpu, "LEAST", 0.5)
    section("hang", hang)
    section("whole", lambda record, options: record.add("left", record.remaining()))
    began = time.monotonic()
    assert command("--sections", "hang", "whole", "--minutes", 4 / 60) == 1
    assert time.monotonic() - began < 8
    assert content("hang")["state"] == "stopped at its limit of 2 s"
    with pytest.raises(ProcessLookupError):
        os.kill(content("hang")["results"]["before"], 0)
    assert content("whole")["state"] == "finished"
    assert 0 < content("whole")["results"]["left"] < 2


def interrupt(record, options):
    record.add("before", os.getpid())
    os.kill(os.getppid(), signal.SIGINT)
    time.sleep(600)


def test_a_section_ends_when_the_command_is_interrupted(command, section):
    section("interrupt", interrupt)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore the signal
    with pytest.raises(KeyboardInterrupt):
        command("--sections", "interrupt", "--minutes", 1)
    with pytest.raises(ProcessLookupError):
        os.kill(content("interrupt")["results"]["before"], 0)


def leave(record, options):
    child = os.fork()
    if not child:
        time.sleep(30)
        os._exit(0)
    record.add("child", child)
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_crashed_section_started_ends_with_it(command, section):
    section("leave", leave)
    assert command("--sections", "leave", "--minutes", 1) == 1
    gone = Path(f"/proc/{content('leave')['results']['child']}/stat")
    end = time.monotonic() + 10
    while gone.exists() and gone.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < end, "the child is still there"
        time.sleep(0.05)


def test_a_section_without_time_is_named_and_leaves_earlier_results(command, section, monkeypatch):
    section("whole", lambda record, options: record.add("result", 2))
    section("other", lambda record, options: record.add("result", 3))
    assert command("--sections", "whole", "--minutes", 1) == 0
    assert command("--sections", "whole", "other", "--minutes", 0.05) == 0
    assert content("whole")["results"] == {"result": 2}
    assert content("other")["skipped"] == {"other": "no time left"}


def test_results_of_an_earlier_run_are_not_taken_for_those_of_a_crash(command, section):
    section("whole", lambda record, options: record.add("result", 2))
    assert command("--sections", "whole", "--minutes", 1) == 0
    file = Path("out/whole.json")
    file.write_text(json.dumps({**content("whole"), "date": "2000-01-01"}))
    section("whole", lambda record, options: None)
    original = record.work
    try:
        record.work = lambda *unused: os.kill(os.getpid(), signal.SIGKILL)
        assert command("--sections", "whole", "--minutes", 1) == 1
    finally:
        record.work = original
    assert (content("whole")["state"], content("whole")["results"]) == ("ended with code -9", {})


class Experiment:
    """An experiment that only notes what it is asked."""

    def __init__(self, folder):
        self.folder = folder

    def train(self, method, seed):
        if method == "bad":
            raise ValueError("a bad method")
        with Path("trained").open("a") as stream:
            stream.write(f"{method}{seed}\n")
        return types.SimpleNamespace(record={"id": 10.0 + seed, "teacher": None, "seconds": 0.1})


def opened(recipe, options, folder):
    return Experiment(folder)


def runs(record, options):
    recipe = recipes.get("digits").method("flyp")
    study = cells.Study("study", opened, recipe, ("late", "a", "bad"), 2, later=("late",))
    cells.measure([study], record, options)


def test_runs_that_are_there_are_not_repeated(command, section):
    section("runs", runs)
    assert command("--sections", "runs", "--minutes", 1, "--jobs", 1) == 1
    assert Path("trained").read_text().split() == ["a0", "a1", "late0", "late1"]
    found = content("runs")
    assert len(found["results"]) == 4
    assert set(found["errors"].values()) == {"ValueError: a bad method"}
    table = cells.table(found["results"], tracer.COLUMNS)
    assert [line.split()[:4] for line in table.splitlines()[2:]] == [
        ["a", "2", "10.5", "±0.7"],
        ["late", "2", "10.5", "±0.7"],
    ]
    assert next(iter(found["recipes"].values()))["name"] == "flyp"
    Path("trained").unlink()
    assert command("--sections", "runs", "--minutes", 1, "--jobs", 1) == 1
    assert not Path("trained").exists()
    assert content("runs")["results"] == found["results"]


class Slow(Experiment):
    """An experiment that takes too long."""

    def train(self, method, seed):
        time.sleep(600)


def slow(recipe, options, folder):
    return Slow(folder)


def slow_runs(record, options):
    recipe = recipes.get("digits").method("flyp")
    quick = cells.Study("quick", opened, recipe, ("a",), 1)
    cells.measure([quick, cells.Study("slow", slow, recipe, ("a", "b"), 2)], record, options)


def test_runs_that_do_not_end_in_time_are_counted(command, section, monkeypatch):
    monkeypatch.setattr(on_gpu, "LEAST", 0.5)
    section("runs", slow_runs)
    assert command("--sections", "runs", "--minutes", 3 / 60, "--jobs", 2) == 0
    found = content("runs")
    assert found["state"] == "finished"
    assert found["skipped"] == {"slow": "no time left for 4 of 4 runs"}
    assert len(found["results"]) == 1


def test_the_page_says_plainly_whether_there_are_results(tmp_path):
    assert report.page(tmp_path) == "## Results\n\nThere are no results yet.\n"
    folder = ROOT / "benchmarks/results/gpu"
    none = "**Nothing here has been run on a GPU yet.**" in (folder / "README.md").read_text()
    assert none == (report.page(folder) == report.page(tmp_path))


def test_the_readme_names_every_section():
    readme = (ROOT / "benchmarks/results/gpu/README.md").read_text()
    assert list(on_gpu.SHARES) == list(report.TITLES)
    assert [line.split("`")[1] for line in readme.splitlines() if line.startswith("| `")] == list(
        on_gpu.SHARES
    )


def test_the_tables_show_the_targets():
    row = {"batch": 512, "seconds": {"step": 0.2, "forward+backward": 0.19, "optimizer": 0.01}}
    slower = {"batch": 512, "seconds": {"step": 0.25}, "peak_gib": 61.25}
    table = step.table({"flyp": row, "tracer": slower})
    assert "TRACER / FLYP: 1.250 (target: at most 1.30)" in table
    assert "2,560" in table
    assert "61.2" in table
    assert "at least 90% of the copy bandwidth" in update.table({"copy bandwidth, GB/s": 3000.0})
    cost = {"milliseconds": 3.0, "host_milliseconds": 1.0, "floor_milliseconds": 2.0}
    assert losses.table({"kl": cost}).splitlines()[1].split() == ["kl", "3.00", "2.00", "1.00"]
    assert "1 of 2" in correct.table({"test_x[1]": {"outcome": "passed"}, "test_x[2]": {"outcome": "failed"}})


def test_shapes_are_those_of_the_networks():
    def count(made):
        return sum(torch.Size(shape).numel() for shape in made)

    # CLIP's ViT-B/16 has 149,620,737 parameters, ViT-L/14 427,616,513; Llama 3.2's smallest 1,235,814,400.
    assert count(shapes.clip(16, 768, 12, 512, 512)) == pytest.approx(149_620_737, rel=1e-4)
    assert count(shapes.clip(14, 1024, 24, 768, 768)) == pytest.approx(427_616_513, rel=1e-4)
    assert count(shapes.language_model()) == 1_235_814_400
    assert len(shapes.many(3000)) == 3000
    student = shapes.lora(32, 2, 4)
    assert sum(p.requires_grad for p in student.parameters()) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "0"], "--minutes must be above 0, got 0.0"),
        (["--jobs", "0"], "--jobs must be at least 1, got 0"),
        (["--sections", "speed"], "invalid choice: 'speed'"),
    ],
)
def test_bad_input(command, arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        command(*arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_sections_are_listed_in_order(command, capsys):
    with pytest.raises(SystemExit):
        command("--list")
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(on_gpu.SHARES)
