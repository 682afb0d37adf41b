"""The paper's main recipe, by its own command, on a generated miniature of every data set."""

import csv
import json
import random
import signal
import sys
from pathlib import Path

import programs
import pytest
import torch

from wmateacher.integrations.clip.data import imagenet
from wmateacher.integrations.clip.methods import METHODS

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS / "integrations"))
sys.path.insert(0, str(TESTS.parent / "examples"))

import clip_tracer  # noqa: E402
from miniature import TINY, learnable, picture  # noqa: E402

EXAMPLE = TESTS.parent / "examples" / "clip_tracer.py"
SETS = ("imagenet", *imagenet.SHIFTS)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    learnable(root)
    return root


def arguments(root, *more):
    return [*TINY, *more, "--data-root", str(root), "--device", "cpu"]


def rows(file):
    return list(csv.DictReader(file.read_text().splitlines()))


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_what_can_be_learnt_is_learnt(sets, tmp_path, capsys):
    given = (
        "--finetune.learning-rate", "3e-3", "--methods.ft.rate", "1", "--epochs", "15", "--evaluate-every", "0",
        "--methods", "ft", "zero-shot", "--compare-paper", "--output", str(tmp_path),
    )  # fmt: skip
    clip_tracer.main(arguments(sets, *given))
    methods = json.loads((tmp_path / "results.json").read_text())["methods"]
    # Colours tell the classes apart, so that a classifier of them gets every set right, if each set's
    # folders, subsets and mappings lead to the same classes.
    assert methods["ft"]["id"] == 100
    assert set(methods["ft"]["ood_per_shift"].values()) == {100}
    assert methods["zero-shot"]["id"] < 50
    text = " ".join(capsys.readouterr().out.split())
    assert f"ft difference {100 - 82.83:+.2f} {100 - 72.57:+.2f}" in text


@pytest.mark.slow
def test_methods_leave_tables_and_pictures(sets, tmp_path):
    out, names = tmp_path / "out", ("zero-shot", "ft", "flyp", "tracer")
    given = (
        "--epochs", "2", "--evaluate-every", "4", "--methods", *names, "--compare-paper",
        "--output", str(out),
    )  # fmt: skip
    done = programs.run(EXAMPLE, *arguments(sets, *given))
    assert done.returncode == 0, done.stderr
    results = json.loads((out / "results.json").read_text())
    assert tuple(results["methods"]) == names
    assert results["config"]["finetune"]["steps"] == 8
    for name, record in results["methods"].items():
        assert tuple(record["ood_per_shift"]) == imagenet.SHIFTS, name
        assert (record["teacher"] is not None) == (METHODS[name].kernel is not None)
    watched = rows(out / "epochs/tracer-0.csv")
    assert {(r["step"], r["model"]) for r in watched} == {
        (step, model) for step in ("4", "8") for model in ("student", "teacher")
    }
    assert {r["set"] for r in watched} == set(SETS)
    reliable = rows(out / "reliability/tracer-0.csv")
    assert {(r["model"], r["set"]) for r in reliable} == {
        (m, s) for m in ("student", "teacher") for s in SETS
    }
    for picture_of in ("methods", "reliability", "epochs"):
        assert (out / f"{picture_of}.png").read_bytes().startswith(b"\x89PNG")
    text = " ".join(done.stdout.split())
    assert "method ID imagenet-v2 imagenet-r imagenet-a imagenet-sketch objectnet mean OOD" in text
    assert "teacher of ID mean OOD OOD ECE" in text
    assert "method IN V2 R A Sketch ObjNet Avg Avg of 4 ECE" in text
    assert "tracer paper 82.76 74.14 79.33 54.92 53.69 58.26 64.07 65.52 0.073" in text
    assert "ft difference" in text
    assert "tracer (seed 0), step 4, teacher: imagenet" in text


def without_seconds(results):
    if isinstance(results, dict):
        return {k: without_seconds(v) for k, v in results.items() if k not in ("seconds", "environment")}
    return [without_seconds(v) for v in results] if isinstance(results, list) else results


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_killed_three_times_at_random_steps_a_run_ends_with_the_same_numbers(sets, tmp_path):
    given = (
        "--epochs", "10", "--evaluate-every", "15", "--finetune.checkpoint-every", "7",
        "--finetune.learning-rate", "1e-3", "--methods", "tracer", "--output",
    )  # fmt: skip
    clip_tracer.main(arguments(sets, *given, str(tmp_path / "whole")))
    checkpoint = tmp_path / "killed/checkpoints/tracer-0.pt"
    for target in sorted(random.Random(5).sample(range(8, 28), 3)):
        victim = programs.Program(EXAMPLE, *arguments(sets, *given, str(tmp_path / "killed")))
        victim.until(
            lambda step=target: (
                checkpoint.exists() and torch.load(checkpoint, weights_only=True)["step"] >= step
            )
        )
        victim.kill()
        assert not (tmp_path / "killed/gaps").exists()  # it had not ended
    clip_tracer.main(arguments(sets, *given, str(tmp_path / "killed")))
    results = [json.loads((tmp_path / d / "results.json").read_text()) for d in ("whole", "killed")]
    assert without_seconds(results[0]) == without_seconds(results[1])
    for what in ("gaps", "epochs", "reliability"):
        whole_table, killed_table = (
            (tmp_path / d / what / "tracer-0.csv").read_text() for d in ("whole", "killed")
        )
        assert whole_table == killed_table
    assert len(rows(tmp_path / "killed/gaps/tracer-0.csv")) == 40


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_a_signal_to_the_whole_group_saves_first_also_with_workers(sets, tmp_path):
    given = ("--epochs", "60", "--finetune.checkpoint-every", "10", "--methods", "flyp", "--workers", "2")
    run = programs.Program(EXAMPLE, *arguments(sets, *given, "--output", str(tmp_path / "out")))
    checkpoint = tmp_path / "out/checkpoints/flyp-0.pt"
    run.until(checkpoint.exists)
    error = run.kill(signal.SIGTERM, group=True).stderr
    assert run.returncode == 143, error
    saved = torch.load(checkpoint, weights_only=True)["step"]
    assert f"terminated after step {saved} of 240" in error
    assert "Traceback" not in error


# --- faults ---------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path):
    learnable(tmp_path)
    return tmp_path


def go(root, *more, out=None):
    """Run the program in this process and return its results."""
    out = out or root / "out"
    clip_tracer.main(arguments(root, "--methods", "flyp", "--epochs", "1", *more, "--output", str(out)))
    return json.loads((out / "results.json").read_text())


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("train", ["imagenet-train", pytest.param("anchors.csv", marks=pytest.mark.slow)])
def test_corrupt_images_are_counted_and_lose_nothing(root, train):
    for file in sorted((root / "imagenet/train").rglob("*.JPEG"))[:2]:
        file.write_bytes(file.read_bytes()[:100])
    next((root / "imagenet-r").rglob("*.jpg")).write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="cannot be read: the next image replaces it"),
        pytest.warns(
            UserWarning, match="1 of 6 images cannot be read and are left out, such as .*imagenet-r"
        ),
    ):
        results = go(root, "--train", train, "--epochs", "2")
    assert results["methods"]["flyp"]["runs"][0]["unreadable"] == 4  # two in each epoch


@pytest.mark.usefixtures("undrawn")
def test_wrong_folders_and_tables_are_errors_before_anything_runs(root):
    picture(root / "imagenet/train/n00000000/x.JPEG", 0)
    with pytest.raises(
        ValueError, match="n00000000 is not a class of imagenet-train: .*Move it out of there"
    ):
        go(root)
    (root / "imagenet/train/n00000000").rename(root / "elsewhere")
    table = root / "anchors.csv"
    table.write_text(table.read_text().rstrip() + "\nimagenet/train/cut")
    with pytest.raises(ValueError, match="anchors.csv, line 34: 1 columns where the first line has 2"):
        go(root)
    (root / "sketch").rename(root / "drawings")
    table.write_text("filepath,title\n")
    with pytest.raises(ValueError, match="anchors.csv has no rows"):
        go(root)
    with pytest.raises(
        FileNotFoundError, match="no imagenet-sketch in .*; get https://github.com/HaohanWang"
    ):
        go(root, "--anchors", "None")
    assert not (root / "out").exists()
    results = go(root, "--anchors", "None", "--tests", "imagenet", "objectnet")
    assert list(results["methods"]["flyp"]["ood_per_shift"]) == ["objectnet"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--pretrain-steps", "3"], "--pretrain-steps is for recipes that pre-train, got recipe 'imagenet-vit-b-16'"),
        (["--pretrained", "openai"], "unknown weights 'openai' for 'tiny-vit-16': neither a file nor a tag"),
        (
            ["--tests", "imagenet-r", "imagenet", "--compare-paper"],
            "the first of tests is in-distribution and must be 'imagenet', got",
        ),
        (
            ["--methods", "flyp", "arf", "--anchors", "None"],
            "method 'arf' needs anchor pairs, .*--anchors FILE",
        ),
        (
            ["--train", "anchors.csv", "--methods", "flyp", "wise-ft"],
            "'wise-ft' has a linear head and needs labels, the data has captions only",
        ),
    ],
)  # fmt: skip
def test_bad_options(sets, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        go(sets, *more, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_photographs_need_a_folder():
    with pytest.raises(
        ValueError, match="needs the folder that holds its data sets, got root=None: pass root=DIR"
    ):
        clip_tracer.main([*TINY, "--device", "cpu"])


def test_unknown_values_have_suggestions(capsys):
    with pytest.raises(SystemExit):
        clip_tracer.main([*TINY, "--epoch", "3"])
    assert "--epochs" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_micro_batches_balanced_batches_and_half_precision_by_the_command_line(sets, tmp_path):
    out = tmp_path / "out"
    results = go(
        sets, "--methods", "tracer", "--epochs", "2", "--log-to", "tensorboard", "--evaluate-every", "0",
        "--finetune.micro-batch", "3", "--finetune.grad-checkpointing", "--finetune.precision", "bf16",
        "--sampling", "balanced", "--methods.tracer.distill-weight", "0.5", out=out,
    )  # fmt: skip
    assert results["config"]["methods"]["tracer"]["distill_weight"] == 0.5
    assert results["config"]["sampling"] == "balanced"
    assert not (out / "epochs").exists()
    assert list((out / "tensorboard").glob("tracer*/events*"))


@pytest.mark.slow
def test_an_ablation_goes_by_the_real_length_and_needs_no_shifts(sets, tmp_path, capsys):
    out = tmp_path / "out"
    given = ("--epochs", "8", "--tests", "imagenet", "--evaluate-every", "0", "--ablate", "interval")
    clip_tracer.main(arguments(sets, *given, "--output", str(out)))
    results = json.loads((out / "results.json").read_text())
    names = ["every 1", "every 2", "every 2, published clock", "every 3", "every 3, published clock"]
    assert list(results["methods"]) == names
    assert all(record["ood"] is None for record in results["methods"].values())
    assert (out / "ablation.png").read_bytes().startswith(b"\x89PNG")
    assert "interval ID mean OOD OOD ECE W^0 share" in " ".join(capsys.readouterr().out.split())


def test_a_dry_run_tells_all_and_writes_nothing(sets, tmp_path, capsys):
    out = tmp_path / "out"
    given = ("--methods", "tracer", "--finetune.warmup", "4", "--dry-run", "--output", str(out))
    clip_tracer.main(arguments(sets, *given))
    text = capsys.readouterr().out
    assert "length: 40 optimizer steps of 8: 32 pairs, 4 steps per epoch" in text
    assert "GiB of" in text
    assert not out.exists()
