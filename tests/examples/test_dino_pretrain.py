import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "dino_pretrain.py"
sys.path.insert(0, str(EXAMPLE.parent))

import dino_pretrain  # noqa: E402

from wmateacher.integrations.engine import command as command_line  # noqa: E402

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
SHORT = ("--steps", "12", "--settings.batch-size", "16", "--kernels", "uniform", "ema(0.9)")


def command(*arguments):
    return [sys.executable, str(EXAMPLE), *SHORT, *map(str, arguments)]


def run(*arguments):
    return subprocess.run(command(*arguments), capture_output=True, text=True, env=ENVIRONMENT)


def measured(file):
    def strip(value):
        if isinstance(value, dict):
            return {k: strip(v) for k, v in value.items() if k not in ("seconds", "environment")}
        return [strip(v) for v in value] if isinstance(value, list) else value

    return strip(json.loads(file.read_text()))


@pytest.mark.slow
def test_a_run_is_a_table_curves_and_maps_and_survives_being_killed(tmp_path):
    done = run("--output", tmp_path / "whole")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "whole/results.json").read_text())
    rows = {line.split("  ")[0]: line for line in done.stdout.splitlines()}
    assert list(results["methods"]) == ["raw pixels", "normalised pixels", "untrained", "uniform", "ema(0.9)"]
    for name, record in results["methods"].items():
        assert f"{record['teacher']['knn']:.1f}" in rows[name]
        assert f"{record['teacher']['linear']:.1f}" in rows[name]
    for picture in ("curves.png", "maps.png"):
        assert (tmp_path / "whole" / picture).read_bytes().startswith(b"\x89PNG")
    killed = tmp_path / "killed"
    process = subprocess.Popen(command("--output", killed), stdout=subprocess.DEVNULL, env=ENVIRONMENT)
    while process.poll() is None and "uniform" not in (
        json.loads((killed / "results.json").read_text())["methods"]
        if (killed / "results.json").exists()
        else ()
    ):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    again = run("--output", killed)
    assert again.returncode == 0, again.stderr
    assert measured(killed / "results.json") == measured(tmp_path / "whole/results.json")


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    run("--output", tmp_path / "one")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, str(EXAMPLE), *SHORT, "--output", str(tmp_path / "two")],
        capture_output=True, text=True, env=ENVIRONMENT, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("k-NN  linear") == 1
    one, two = (json.loads((tmp_path / n / "results.json").read_text())["methods"] for n in ("one", "two"))
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


def test_bad_input_is_a_line_on_the_command_line():
    done = run("--seeds", 0)
    assert done.returncode == 1
    assert done.stderr == "error: --seeds must be at least 1, got 0\n"
