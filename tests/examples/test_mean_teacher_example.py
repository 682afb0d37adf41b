import json
import subprocess
import sys
from pathlib import Path

import programs
import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "mean_teacher.py"
sys.path.insert(0, str(EXAMPLE.parent))

import mean_teacher  # noqa: E402

from wmateacher.integrations.engine import command as command_line  # noqa: E402
from wmateacher.integrations.mean_teacher import experiment  # noqa: E402, F401 - once for all programs

SHORT = (
    "--steps",
    "6",
    "--settings.unlabelled-batch",
    "16",
    "--methods",
    "supervised",
    "fixmatch",
    "mean-teacher",
    "--kernels",
    "uniform",
)
METHODS = ["supervised", "fixmatch", "mean-teacher", "uniform"]


@pytest.mark.slow
def test_a_run_is_a_table_and_curves_and_survives_being_killed(tmp_path):
    done = programs.run(EXAMPLE, *SHORT, "--output", tmp_path / "whole")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "whole/results.json").read_text())
    rows = {line.split("  ")[0]: line for line in done.stdout.splitlines()}
    assert list(results["methods"]) == METHODS
    for name, record in results["methods"].items():
        assert f"{record['accuracy']:.1f}" in rows[name]
    assert (tmp_path / "whole/curves.png").read_bytes().startswith(b"\x89PNG")
    killed, file = tmp_path / "killed", tmp_path / "killed/results.json"
    victim = programs.Program(EXAMPLE, *SHORT, "--output", killed)
    victim.until(file.exists)
    victim.kill()
    assert len(json.loads(file.read_text())["methods"]) < len(METHODS)
    again = programs.run(EXAMPLE, *SHORT, "--output", killed)
    assert again.returncode == 0, again.stderr
    assert programs.measured(file) == programs.measured(tmp_path / "whole/results.json")


@pytest.mark.slow
def test_two_processes_train_too(tmp_path):
    done, other = programs.launch(2, EXAMPLE, *SHORT, "--output", tmp_path)
    assert done.returncode == other.returncode == 0, done.stderr + other.stderr
    assert done.stdout.count("method ") == 1
    assert not other.stdout
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
    command = [sys.executable, "-W", "ignore", str(EXAMPLE), "--seeds", "0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "error: --seeds must be at least 1, got 0\n"
