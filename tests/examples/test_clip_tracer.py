import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from wmateacher.integrations.clip.methods import METHODS

EXAMPLE = Path(__file__).parents[2] / "examples" / "clip_tracer.py"
sys.path.insert(0, str(EXAMPLE.parent))

import clip_tracer  # noqa: E402

SHORT = ("--pretrain-steps", "30", "--steps", "12", "--model", "tiny-vit-16")
SMALL = ("finetune.checkpoint_every=30", "finetune.batch_size=32", "pretrain.batch_size=32")


def command(tmp_path, *arguments, short=SHORT):
    return [sys.executable, str(EXAMPLE), *short, "--cache", str(tmp_path / "cache"), *arguments]


def run(tmp_path, *arguments, short=SHORT):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command(tmp_path, *arguments, short=short),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )


def without_seconds(results):
    if isinstance(results, dict):
        return {k: without_seconds(v) for k, v in results.items() if k not in ("seconds", "environment")}
    return [without_seconds(v) for v in results] if isinstance(results, list) else results


@pytest.mark.slow
def test_all_methods_leave_a_table_results_gaps_and_a_picture(tmp_path):
    done = run(tmp_path, "--methods", "all", "--output", "out")
    assert done.returncode == 0, done.stderr
    header = "method ID gray inverted rotated noisy swapped background mean OOD OOD ECE seconds"
    assert header in " ".join(done.stdout.split())
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert set(results) == {"config", "environment", "methods"}
    assert set(results["methods"]) == set(METHODS)
    assert len(METHODS) == 14
    for name, record in results["methods"].items():
        assert {"id", "ood", "ood_per_shift", "ece", "seconds"} <= set(record)
        assert set(record["ood_per_shift"]) == {
            "gray",
            "inverted",
            "rotated",
            "noisy",
            "swapped",
            "background",
        }
        mean = sum(record["ood_per_shift"].values()) / 6
        assert record["ood"] == pytest.approx(mean)
        assert 0 <= record["ece"] <= 1, name
    for name in ("static-sd", "ema", "tracer"):
        rows = list(csv.DictReader((tmp_path / f"out/gaps/{name}-0.csv").read_text().splitlines()))
        assert [int(r["step"]) for r in rows] == list(range(1, 13))
        assert all(float(r["gap"]) >= 0 for r in rows)
    assert (tmp_path / "out/methods.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_with_the_same_numbers(tmp_path, capsys):
    options = {
        "model": "tiny-vit-16", "pretrain_steps": 30, "steps": 90, "seeds": 2, "cache": tmp_path / "cache",
        "set": SMALL, "methods": ("zero-shot", "tracer"), "device": "cpu",
    }  # fmt: skip
    clip_tracer.main(clip_tracer.Arguments(**options, output=tmp_path / "whole"))
    chosen = (
        "--model", "tiny-vit-16", "--pretrain-steps", "30", "--steps", "90", "--seeds", "2",
        "--set", *SMALL, "--methods", "zero-shot", "tracer",
    )  # fmt: skip
    victim = subprocess.Popen(
        command(tmp_path, *chosen, "--output", "killed", short=()), cwd=tmp_path,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + 300
    while not (tmp_path / "killed/checkpoints/tracer-0.pt").exists():
        assert victim.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert "tracer" not in json.loads((tmp_path / "killed/results.json").read_text())["methods"]
    clip_tracer.main(clip_tracer.Arguments(**options, output=tmp_path / "killed"))
    results = [json.loads((tmp_path / d / "results.json").read_text()) for d in ("whole", "killed")]
    assert without_seconds(results[0]) == without_seconds(results[1])
    for seed in (0, 1):
        gaps = [(tmp_path / d / f"gaps/tracer-{seed}.csv").read_text() for d in ("whole", "killed")]
        assert gaps[0] == gaps[1]
    assert "±" in capsys.readouterr().out


def test_options_change_what_they_name(tmp_path):
    options = {
        "pretrain_steps": 3, "steps": 6, "model": "tiny-resnet-32", "output": tmp_path / "out",
        "cache": tmp_path / "cache", "methods": ("tracer",), "device": "cpu",
    }  # fmt: skip
    clip_tracer.main(
        clip_tracer.Arguments(
            **options, kernel="ema(0.5)", distill_weight=0.25, distillation="3.90625*fd + crd", update_every=3,
            published_clock=True, set=("finetune.batch_size=16", "methods.l2-sp.l2_sp=0.5"),
        )
    )  # fmt: skip
    config = json.loads((tmp_path / "out/results.json").read_text())["config"]
    assert config["model"] == "tiny-resnet-32"
    assert config["methods"]["tracer"]["kernel"] == "ema(0.5)"
    assert config["methods"]["tracer"]["distill_weight"] == 0.25
    assert config["methods"]["tracer"]["distillation"] == "3.90625*fd + crd"
    assert config["methods"]["tracer"]["update_every"] == 3
    assert config["methods"]["tracer"]["clock"] == "published"
    assert config["methods"]["ema"]["update_every"] == 1
    assert config["methods"]["static-sd"]["distill_weight"] == 0.25
    assert config["methods"]["l2-sp"]["l2_sp"] == 0.5
    assert config["finetune"]["batch_size"] == 16
    assert (config["pretrain"]["steps"], config["finetune"]["steps"]) == (3, 6)
    with pytest.raises(
        ValueError, match=r"of another configuration \(different: .*methods.*\): choose another"
    ):
        clip_tracer.main(clip_tracer.Arguments(**options))


@pytest.mark.slow
def test_an_ablation_leaves_a_table_beside_the_papers_and_a_picture(tmp_path):
    done = run(tmp_path, "--output", "out", "--ablate", "alpha", "--alpha-of", "flyp")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert list(results["methods"]) == [f"alpha={tenths / 10:g}" for tenths in range(11)]
    assert "alpha ID mean OOD OOD ECE" in " ".join(done.stdout.split())
    assert (tmp_path / "out/ablation.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ("trcer",)}, "unknown method 'trcer'; did you mean 'tracer'"),
        ({"kernel": "bta(1,1)"}, "unknown kernel 'bta'; did you mean 'beta'"),
        ({"kernel": "beta(-1,1)"}, "beta: a must be a finite number above 0, got -1"),
        ({"recipe": "digit"}, "unknown recipe 'digit'; did you mean 'digits'"),
        (
            {"data": "mnist"},
            r"needs the folder that holds it, got root=None: pass root=DIR \(--data-root DIR\)",
        ),
        ({"data": "mnist", "data_root": Path("nowhere")}, "no mnist in nowhere/MNIST/raw"),
        ({"data": "svhn"}, "unknown data 'svhn'"),
        ({"model": "tiny-conv"}, "unknown model 'tiny-conv'; did you mean 'tiny-conv-32'"),
        ({"seeds": 0}, "--seeds must be at least 1, got 0"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"device": "gpu"}, "device 'gpu' cannot be used"),
        ({"set": ("finetune.rate=1",)}, "unknown setting 'finetune.rate'"),
        ({"log_to": ("tensorbord",)}, "unknown log 'tensorbord'; did you mean 'tensorboard'"),
    ],
)
def test_bad_input_is_found_before_anything_is_written(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        clip_tracer.main(clip_tracer.Arguments(**options))
    assert not (tmp_path / "runs").exists()


def test_bad_input_is_one_clear_line(tmp_path):
    done = run(tmp_path, "--methods", "trcer", short=())
    assert done.returncode == 1
    assert done.stderr.startswith("error: unknown method 'trcer'; did you mean 'tracer'")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distillation": "fdd"}, "unknown loss 'fdd'; did you mean 'fd'"),
        ({"update_every": 0}, "update_every must be a whole number of at least 1, got 0"),
        ({"ablate": "kernal"}, "unknown ablation 'kernal'; did you mean 'kernel'"),
        (
            {"ablate": "alpha", "methods": ("ft",)},
            "--ablate alpha runs its own variants: leave out --methods",
        ),
        ({"ablate": "alpha", "alpha_of": "fd"}, "--alpha-of: no trained method 'fd'; did you mean 'ft'"),
        ({"ablate": "alpha", "alpha_of": "wise-ft"}, "no trained method 'wise-ft'"),
    ],
)
def test_a_method_that_cannot_be_is_found_before_any_training(options, message):
    def asked(arguments):
        return clip_tracer.chosen(arguments, clip_tracer.configured(arguments))

    with pytest.raises(ValueError, match=message):
        asked(clip_tracer.Arguments(**options))


def test_help_names_every_option(tmp_path):
    done = run(tmp_path, "--help", short=())
    assert done.returncode == 0
    for option in (
        "--recipe",
        "--methods",
        "--kernel",
        "--data",
        "--data-root",
        "--seeds",
        "--output",
        "--device",
        "--ablate",
        "--published-clock",
    ):
        assert option in done.stdout
    assert "lambda_SD" in done.stdout


@pytest.mark.parametrize("example", ["clip_tracer", "dino_pretrain", "mean_teacher"])
def test_no_option_is_taken_for_one_of_torchruns(example):
    """Its parser completes what it takes for the beginning of an option of its own, also behind the program."""
    import dataclasses
    import importlib

    from torch.distributed.run import get_args_parser

    known = get_args_parser()._option_string_actions
    for field in dataclasses.fields(importlib.import_module(example).Arguments):
        option = f"--{field.name.replace('_', '-')}"
        assert not [name for name in known if name.startswith((option, option.replace("-", "_")))], option
