import json
import subprocess
import sys
from pathlib import Path

import programs
import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "dino_pretrain.py"
sys.path.insert(0, str(EXAMPLE.parent))

import dino_pretrain  # noqa: E402

from wmateacher.integrations.dino import experiment  # noqa: E402, F401 - once for all programs
from wmateacher.integrations.engine import command as command_line  # noqa: E402

SHORT = (
    "--steps", "6", "--settings.batch-size", "16", "--train-images", "300", "--bank-images", "200",
    "--kernels", "uniform", "ema(0.9)",
)  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder and the output of a run on one process."""
    folder = tmp_path_factory.mktemp("whole")
    done = programs.run(EXAMPLE, *SHORT, "--output", folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.mark.slow
def test_a_run_is_a_table_curves_and_maps_and_survives_being_killed(whole, tmp_path):
    folder, printed = whole
    results = json.loads((folder / "results.json").read_text())
    rows = {line.split("  ")[0]: line for line in printed.splitlines()}
    assert list(results["methods"]) == ["raw pixels", "normalised pixels", "untrained", "uniform", "ema(0.9)"]
    for name, record in results["methods"].items():
        assert f"{record['teacher']['knn']:.1f}" in rows[name]
        assert f"{record['teacher']['linear']:.1f}" in rows[name]
    for picture in ("curves.png", "maps.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    file = tmp_path / "results.json"
    victim = programs.Program(EXAMPLE, *SHORT, "--output", tmp_path)
    victim.until(lambda: file.exists() and "uniform" in json.loads(file.read_text())["methods"])
    victim.kill()
    assert "ema(0.9)" not in json.loads(file.read_text())["methods"]
    again = programs.run(EXAMPLE, *SHORT, "--output", tmp_path)
    assert again.returncode == 0, again.stderr
    assert programs.measured(file) == programs.measured(folder / "results.json")


@pytest.mark.slow
def test_two_processes_train_as_one(whole, tmp_path):
    done, other = programs.launch(2, EXAMPLE, *SHORT, "--output", tmp_path)
    assert done.returncode == other.returncode == 0, done.stderr + other.stderr
    assert done.stdout.count("k-NN  linear") == 1
    assert not other.stdout
    one, two = (json.loads((f / "results.json").read_text())["methods"] for f in (whole[0], tmp_path))
    for kernel in ("uniform", "ema(0.9)"):
        assert two[kernel]["teacher"]["knn"] == pytest.approx(one[kernel]["teacher"]["knn"], abs=3)
        assert two[kernel]["final_gap"] == pytest.approx(one[kernel]["final_gap"], rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kernels", "betta(1,1)"], "unknown kernel 'betta'; did you mean 'beta'"),
        (["cifar100"], "unknown recipe 'cifar100'; did you mean 'cifar10'"),
        (["mnist"], "data 'mnist' needs the folder that holds it"),
        (["imagefolder", "--data", "imagefolder:/nowhere"], "no folder /nowhere/train"),
        (
            ["--settings.batch-size", "5000"],
            "batch_size must be between 1 and the 1097 training images, got 5000",
        ),
        (["--backbone", "resnet19"], "unknown backbone 'resnet19'"),
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--device", "cuda:77"], "device 'cuda:77' cannot be used"),
    ],
)
def test_bad_input_is_named(tmp_path, arguments, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        dino_pretrain.main([*arguments, "--output", str(tmp_path / "out")])


@pytest.mark.parametrize("name", dino_pretrain.recipes.RECIPES)
def test_every_recipe_is_the_command_lines_own(name):
    _, recipe = command_line.parse(dino_pretrain.Options, dino_pretrain.recipes.RECIPES, "digits", [name])
    assert recipe == dino_pretrain.recipes.RECIPES[name]
    short = name in ("digits", "mnist", "fashion-mnist")
    assert recipe.kernel == ("ema(0.97)" if short else "ema(0.996,1.0,schedule=cosine)")


def test_bad_input_is_a_line_on_the_command_line():
    command = [sys.executable, str(EXAMPLE), "--seeds", "0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "error: --seeds must be at least 1, got 0\n"
