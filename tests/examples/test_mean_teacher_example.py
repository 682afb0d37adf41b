import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "mean_teacher.py"
sys.path.insert(0, str(EXAMPLE.parent))

import mean_teacher  # noqa: E402

from wmateacher.integrations.engine import command as command_line  # noqa: E402

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
SHORT = ("--steps", "20", "--methods", "supervised", "fixmatch", "mean-teacher", "--kernels", "uniform")
METHODS = ["supervised", "fixmatch", "mean-teacher", "uniform"]


def command(*arguments):
    return [sys.executable, "-W", "ignore", str(EXAMPLE), *SHORT, *map(str, arguments)]


def run(*arguments, launch=()):
    first, *rest = command(*arguments)
    return subprocess.run(
        [first, *launch, *(rest[2:] if launch else rest)],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=300,
    )


def measured(file):
    def strip(value):
        if isinstance(value, dict):
            return {k: strip(v) for k, v in value.items() if k not in ("seconds", "environment")}
        return [strip(v) for v in value] if isinstance(value, list) else value

    return strip(json.loads(file.read_text()))


@pytest.mark.slow
def test_a_run_is_a_table_and_curves_and_survives_being_killed(tmp_path):
    done = run("--output", tmp_path / "whole")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "whole/results.json").read_text())
    rows = {line.split("  ")[0]: line for line in done.stdout.splitlines()}
    assert list(results["methods"]) == METHODS
    for name, record in results["methods"].items():
        assert f"{record['accuracy']:.1f}" in rows[name]
    assert (tmp_path / "whole/curves.png").read_bytes().startswith(b"\x89PNG")
    killed, file = tmp_path / "killed", tmp_path / "killed/results.json"
    process = subprocess.Popen(command("--output", killed), stdout=subprocess.DEVNULL, env=ENVIRONMENT)
    while process.poll() is None and not file.exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    again = run("--output", killed)
    assert again.returncode == 0, again.stderr
    assert measured(file) == measured(tmp_path / "whole/results.json")


@pytest.mark.slow
def test_two_processes_train_too(tmp_path):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = run("--output", tmp_path, launch=launch)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("method ") == 1
    assert list(json.loads((tmp_path / "results.json").read_text())["methods"]) == METHODS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "mean-techer"], "unknown method 'mean-techer'; did you mean 'mean-teacher'"),
        (["--kernels", "unifrom"], "unknown kernel 'unifrom'; did you mean 'uniform'"),
        (["--labels", "5"], "labels must be at least one of each of the 10 classes, got 5"),
        (["minst"], "unknown recipe 'minst'; did you mean 'mnist'"),
        (["mnist"], "data 'mnist' needs the folder that holds it"),
        (["cifar10"], "data 'cifar10' needs the folder that holds it"),
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
    ],
)
def test_bad_input_is_named(tmp_path, arguments, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        mean_teacher.main([*arguments, "--output", str(tmp_path / "out")])


def test_a_value_of_a_method_that_cannot_be_is_explained(capsys):
    with pytest.raises(SystemExit):
        mean_teacher.main(["--methods.fixmatch.confidence", "2"])
    assert "confidence must be in [0, 1), got 2.0" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("name", mean_teacher.recipes.RECIPES)
def test_every_recipe_is_the_command_lines_own(name):
    _, recipe = command_line.parse(mean_teacher.Options, mean_teacher.recipes.RECIPES, "digits", [name])
    assert recipe == mean_teacher.recipes.RECIPES[name]


def test_bad_input_is_a_line_on_the_command_line():
    done = run("--seeds", 0)
    assert done.returncode == 1
    assert done.stderr == "error: --seeds must be at least 1, got 0\n"
