import csv
import dataclasses
import importlib
import json
import subprocess
import sys
from pathlib import Path

import miniature_pictograms
import programs
import pytest
from torch.distributed.run import get_args_parser

from wmateacher.integrations.clip.methods import METHODS
from wmateacher.integrations.vision import digits

EXAMPLE = Path(__file__).parents[2] / "examples" / "clip_tracer.py"
sys.path.insert(0, str(EXAMPLE.parent))

import clip_tracer  # noqa: E402

SMALL = (
    "--model", "tiny-vit-16", "--device", "cpu", "--pretrain-steps", "20", "--pretrain.batch-size", "32",
    "--finetune.batch-size", "32",
)  # fmt: skip
SHORT = (*SMALL, "--steps", "6")


def without_seconds(results):
    if isinstance(results, dict):
        return {k: without_seconds(v) for k, v in results.items() if k not in ("seconds", "environment")}
    return [without_seconds(v) for v in results] if isinstance(results, list) else results


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """The folder of pretrained towers: each length of pre-training is trained once."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.slow
def test_all_methods_leave_a_table_results_gaps_and_a_picture(tmp_path, cache, capsys):
    out = tmp_path / "out"
    clip_tracer.main([*SHORT, "--methods", "all", "--cache", str(cache), "--output", str(out)])
    header = "method ID gray inverted rotated noisy swapped background mean OOD OOD ECE seconds"
    assert header in " ".join(capsys.readouterr().out.split())
    results = json.loads((out / "results.json").read_text())
    assert set(results) == {"config", "environment", "methods"}
    assert set(results["methods"]) == set(METHODS)
    for name, record in results["methods"].items():
        assert {"id", "ood", "ood_per_shift", "ece", "seconds"} <= set(record)
        assert set(record["ood_per_shift"]) == set(digits.SHIFTS)
        assert record["ood"] == pytest.approx(sum(record["ood_per_shift"].values()) / 6)
        assert 0 <= record["ece"] <= 1, name
    for name in ("static-sd", "ema", "tracer"):
        rows = list(csv.DictReader((out / f"gaps/{name}-0.csv").read_text().splitlines()))
        assert [int(r["step"]) for r in rows] == list(range(1, 7))
        assert all(float(r["gap"]) >= 0 for r in rows)
    assert (out / "methods.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_a_killed_run_goes_on_and_ends_with_the_same_numbers(tmp_path, cache, capsys):
    arguments = [
        *SMALL, "--steps", "16", "--finetune.checkpoint-every", "4", "--seeds", "2",
        "--methods", "zero-shot", "tracer", "--cache", str(cache),
    ]  # fmt: skip
    clip_tracer.main([*arguments, "--output", str(tmp_path / "whole")])
    victim = programs.Program(EXAMPLE, *arguments, "--output", tmp_path / "killed")
    victim.until((tmp_path / "killed/checkpoints/tracer-0.pt").exists)
    victim.kill()
    assert "tracer" not in json.loads((tmp_path / "killed/results.json").read_text())["methods"]
    clip_tracer.main([*arguments, "--output", str(tmp_path / "killed")])
    results = [json.loads((tmp_path / d / "results.json").read_text()) for d in ("whole", "killed")]
    assert without_seconds(results[0]) == without_seconds(results[1])
    for seed in (0, 1):
        gaps = [(tmp_path / d / f"gaps/tracer-{seed}.csv").read_text() for d in ("whole", "killed")]
        assert gaps[0] == gaps[1]
    assert "±" in capsys.readouterr().out


@pytest.mark.usefixtures("undrawn")
def test_options_change_what_they_name(tmp_path, cache):
    arguments = [
        "--pretrain-steps", "3", "--steps", "6", "--model", "tiny-vit-16", "--output", str(tmp_path / "out"),
        "--cache", str(cache), "--methods", "tracer", "--device", "cpu",
    ]  # fmt: skip
    clip_tracer.main(
        [
            *arguments, "--finetune.batch-size", "16", "--methods.l2-sp.l2-sp", "0.5",
            "--methods.tracer.kernel", "ema(0.5)", "--methods.tracer.distill-weight", "0.25",
            "--methods.tracer.distillation", "3.90625*fd + crd", "--methods.tracer.update-every", "3",
            "--methods.tracer.clock", "published",
        ]
    )  # fmt: skip
    config = json.loads((tmp_path / "out/results.json").read_text())["config"]
    tracer = config["methods"]["tracer"]
    assert config["model"] == "tiny-vit-16"
    assert (tracer["kernel"], tracer["distill_weight"]) == ("ema(0.5)", 0.25)
    assert (tracer["distillation"], tracer["update_every"]) == ("3.90625*fd + crd", 3)
    assert tracer["clock"] == "published"
    assert config["methods"]["ema"]["update_every"] == 1
    assert config["methods"]["l2-sp"]["l2_sp"] == 0.5
    assert config["finetune"]["batch_size"] == 16
    assert (config["pretrain"]["steps"], config["finetune"]["steps"]) == (3, 6)
    with pytest.raises(
        ValueError, match=r"of another configuration \(different: .*methods.*\): choose another"
    ):
        clip_tracer.main(arguments)


@pytest.mark.usefixtures("undrawn")
def test_a_quick_run_says_what_it_does_not_show(tmp_path, monkeypatch, capsys):
    """On pictograms that are drawn here, with two steps: the other defaults are those of `--quick`."""
    monkeypatch.chdir(tmp_path)
    root = miniature_pictograms.write(tmp_path / "pictograms")
    clip_tracer.main(
        [
            "emoji", "--quick", "--data-root", str(root), "--model", "tiny-vit-16", "--device", "cpu",
            "--cache", str(tmp_path / "cache"), "--pretrain-steps", "2", "--steps", "2",
            "--pretrain.batch-size", "8", "--finetune.batch-size", "8", "--no-save-models",
        ]
    )  # fmt: skip
    (out,) = (tmp_path / "runs").iterdir()
    assert out.name.startswith("clip_tracer-quick-")
    results = json.loads((out / "results.json").read_text())
    assert list(results["methods"]) == ["zero-shot", "flyp", "static-sd", "ema", "tracer"]
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith(
        "--quick shows that everything runs, and nothing about the methods: 2 steps of pre-training"
    )
    assert last.endswith("it takes 2 steps instead of 300.")


@pytest.mark.slow
def test_an_ablation_leaves_a_table_beside_the_papers_and_a_picture(tmp_path, cache, capsys):
    out = tmp_path / "out"
    options = ("--ablate", "alpha", "--alpha-of", "flyp")
    clip_tracer.main([*SHORT, *options, "--cache", str(cache), "--output", str(out)])
    results = json.loads((out / "results.json").read_text())
    assert list(results["methods"]) == [f"alpha={tenths / 10:g}" for tenths in range(11)]
    assert "alpha ID mean OOD OOD ECE" in " ".join(capsys.readouterr().out.split())
    assert (out / "ablation.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "trcer"], "unknown method 'trcer'; did you mean 'tracer'"),
        (["digit"], "unknown recipe 'digit'; did you mean 'digits'"),
        (
            ["--data", "mnist"],
            r"needs the folder that holds it, got root=None: pass root=DIR \(--data-root DIR\)",
        ),
        (["--data", "mnist", "--data-root", "nowhere"], "no mnist in nowhere/MNIST/raw"),
        (["--data", "svhn"], "unknown data 'svhn'"),
        (["--model", "tiny-conv"], "unknown model 'tiny-conv'; did you mean 'tiny-conv-32'"),
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--steps", "0"], "steps must be at least 1, got 0"),
        (["--device", "gpu"], "device 'gpu' cannot be used"),
        (["--ablate", "kernal"], "unknown ablation 'kernal'; did you mean 'kernel'"),
        (["--ablate", "alpha", "--methods", "ft"], "--ablate alpha runs its own variants: leave out --methods"),
        (
            ["--ablate", "alpha", "--alpha-of", "fd"],
            "unknown trained method in --alpha-of 'fd'; did you mean 'ft'",
        ),
        (["--ablate", "alpha", "--alpha-of", "wise-ft"], "unknown trained method in --alpha-of 'wise-ft'"),
        (["--compare-paper"], "the paper has no table for recipe 'digits'"),
    ],
)  # fmt: skip
def test_bad_input_is_found_before_anything_is_written(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        clip_tracer.main(arguments)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--finetune.lerning-rate", "1"], "--finetune.learning-rate"),
        (["--methods.tracer.kernel", "bta(1,1)"], "unknown kernel 'bta'; did you mean 'beta'"),
        (["--methods.tracer.kernel", "beta(-1,1)"], "a must be a finite number above 0, got -1"),
        (["--methods.tracer.distillation", "fdd"], "unknown loss 'fdd'; did you mean 'fd'"),
        (["--methods.tracer.update-every", "0"], "update_every must be a whole number of at least 1, got 0"),
        (["--finetune.clip-norm", "-1"], "clip_norm must be above 0"),
        (["--log-to", "tensorbord"], "tensorboard"),
    ],
)
def test_bad_values_of_a_recipe_are_explained(arguments, message, capsys):
    with pytest.raises(SystemExit):
        clip_tracer.main(arguments)
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_the_program_says_what_is_wrong_in_one_line(tmp_path):
    command = [sys.executable, str(EXAMPLE), "--methods", "trcer"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: unknown method 'trcer'; did you mean 'tracer'")
    assert "Traceback" not in done.stderr


def test_help_names_every_option_and_fits_a_few_screens(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as ended:
        clip_tracer.main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for name in (
        "methods", "data", "data-root", "seeds", "output", "device", "ablate", "finetune.learning-rate",
        "methods.NAME.kernel",
    ):  # fmt: skip
        assert f"--{name} " in text
    assert "imagenet-vit-b-16: the paper's main experiment" in text
    assert len(text.splitlines()) < 250


@pytest.mark.parametrize("example", ["clip_tracer", "dino_pretrain", "mean_teacher"])
def test_no_option_is_taken_for_one_of_torchruns(example):
    """Its parser completes prefixes of its own options, also behind the name of the program."""
    module = importlib.import_module(example)
    known = get_args_parser()._option_string_actions
    recipe_list = getattr(getattr(module, "recipes", None), "RECIPES", {}).values()
    for owner in (getattr(module, "Options", None) or module.Arguments, *recipe_list):
        for field in dataclasses.fields(owner):
            option = f"--{field.name.replace('_', '-')}"
            assert not [name for name in known if name.startswith((option, option.replace("-", "_")))], option
