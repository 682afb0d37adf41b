"""Your own images through the command, as a new user would type it."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import programs
import pytest
import torch
from PIL import Image

from wmateacher.integrations.clip import recipes
from wmateacher.integrations.clip.experiment import Experiment
from wmateacher.integrations.clip.model import build

EXAMPLE = Path(__file__).parents[2] / "examples" / "clip_tracer.py"
sys.path.insert(0, str(EXAMPLE.parent))

import clip_tracer  # noqa: E402

COLOURS = {
    "fire_engine": (220, 20, 20), "green_apple": (20, 200, 20), "sea": (20, 20, 220),
    "sun_flower": (230, 220, 20), "violet": (180, 20, 180), "sky": (20, 200, 220),
}  # fmt: skip
PARTS = {"train": (20, 20), "test": (8, 20), "shifted": (8, 60)}
"""The images of a class, and their noise: 216 in all."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Coloured noise in class folders, and the weights of a tiny CLIP."""
    root, random = tmp_path_factory.mktemp("own"), np.random.default_rng(0)
    for part, (each, noise) in PARTS.items():
        for name, colour in COLOURS.items():
            (root / part / name).mkdir(parents=True)
            for i in range(each):
                pixels = random.normal(colour, noise, (12, 14, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i:02}.png")
    torch.manual_seed(0)
    torch.save(build("tiny-vit-16")[0].clip.state_dict(), root / "clip.pt")
    return root


def arguments(data, *more):
    return [
        "folders", "--train", str(data / "train"), "--tests", "test", str(data / "test"), "shifted", str(data / "shifted"),
        "--model", "tiny-vit-16", "--pretrained", str(data / "clip.pt"), "--device", "cpu", *more,
    ]  # fmt: skip


def results(out):
    return json.loads((out / "results.json").read_text())


SHORT = (
    "--methods", "zero-shot", "tracer", "--steps", "12", "--finetune.learning-rate", "5e-3",
    "--finetune.batch-size", "24", "--finetune.clip-norm", "1", "--templates", "a {}",
)  # fmt: skip


@pytest.mark.usefixtures("undrawn")
def test_own_images_are_learnt_on_one_and_on_two_processes(data, tmp_path, capsys):
    assert len(list(data.rglob("*.png"))) == 216
    clip_tracer.main(arguments(data, *SHORT, "--output", str(tmp_path / "one")))
    text = " ".join(capsys.readouterr().out.split())
    plan, _, ran = text.partition("zero-shot (seed 0): ID")
    for line in (
        f"weights: {data}/clip.pt",
        "6 classes: fire engine, green apple, sea, sky, sun flower, violet",
        "training 108 6 18",
        "validation 12 6 2",
        "test 48 6 8",
        "length: 12 optimizer steps of 24: 108 images, 5 steps per epoch, 2.4 epochs",
        "GiB of student gradients",
    ):
        assert line in plan
    assert "method ID shifted mean OOD OOD ECE seconds" in ran
    done = results(tmp_path / "one")["methods"]
    assert set(done) == {"zero-shot", "tracer"}
    for name, record in done.items():
        assert list(record["ood_per_shift"]) == ["shifted"]
        assert set(record["validation"]) == {"validation"}
        assert (record["teacher"] is None) == (name == "zero-shot")
    assert done["zero-shot"]["id"] < 30
    assert min(done["tracer"]["id"], done["tracer"]["validation"]["validation"]) > 45

    ranks = programs.launch(2, EXAMPLE, *arguments(data, *SHORT, "--output", "two"), cwd=tmp_path)
    assert [rank.returncode for rank in ranks] == [0, 0], ranks[0].stderr + ranks[1].stderr
    assert ranks[0].stdout.count("6 classes: ") == 1
    assert "classes" not in ranks[1].stdout
    two = results(tmp_path / "two")["methods"]
    for name in done:
        for key in ("id", "ood"):  # an image is 2 points
            assert two[name][key] == pytest.approx(done[name][key], abs=7), (name, key)


def test_a_dry_run_only_says_what_it_would_do(data, tmp_path, capsys):
    out = tmp_path / "out"
    more = (
        "--methods",
        "tracer",
        "--shots",
        "3",
        "--sampling",
        "balanced",
        "--templates",
        "openai",
        "--dry-run",
        "--output",
        str(out),
    )
    clip_tracer.main(arguments(data, *more))
    text = " ".join(capsys.readouterr().out.split())
    for line in (
        f"tests 'test' '{data}/test' 'shifted' '{data}/shifted'",
        "length: 200 optimizer steps of 18: 18 images, 1 steps per epoch, 200 epochs instead of 20, "
        "to make min_steps=200",
        "training 18 6 3",
        "80 templates, such as 'a bad photo of a {}.'",
        "GiB of student gradients",
    ):
        assert line in text
    assert not out.exists()
    with pytest.raises(ValueError, match="--train is missing: name a folder of class folders"):
        clip_tracer.main(["folders", "--dry-run"])


def test_without_test_sets_the_held_out_images_are_in_distribution(data, tmp_path):
    """Damaged images are counted, and images of another run do not mix with its results."""
    for name in ("sea", "sky"):
        for i in range(8):
            target = tmp_path / "train" / name / f"{i}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((data / "train" / name / f"0{i}.png").read_bytes())
    recipe = replace(
        recipes.get("folders"), model="tiny-vit-16", pretrained=None, train=str(tmp_path / "train"),
        validation=0.25,
    ).with_steps(2)  # fmt: skip
    experiment = Experiment(recipe, tmp_path / "out", progress=False)
    held, kept = experiment.data.task.validation, experiment.data.task.train
    assert experiment.recipe.finetune.batch_size == len(kept) == 12
    for pairs in (held, kept):
        Path(pairs.name(0)).write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="cannot be read: the next image replaces it"),
        pytest.warns(UserWarning, match="1 of 4 images cannot be read and are left out, such as"),
    ):
        record = experiment.run("flyp")
    assert (record["ood"], record["unreadable"]) == (None, 2)
    assert record["validation"] == {"validation": record["id"]}
    assert clip_tracer.headline(record).startswith(f"ID {record['id']:.1f}, validation")
    assert experiment.data.prompts.classes == ("sea", "sky")
    Path(kept.name(1)).unlink()
    with pytest.raises(ValueError, match=r"another configuration \(different: .*digest\)"):
        Experiment(recipe, tmp_path / "out", progress=False)
