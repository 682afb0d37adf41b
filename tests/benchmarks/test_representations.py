import json
from pathlib import Path

import programs
import pytest
import torch
from PIL import Image

from wmateacher.integrations.clip import export
from wmateacher.integrations.clip.model import Prompts, build
from wmateacher.integrations.engine.results import write_json

PROGRAM = Path(__file__).parents[2] / "benchmarks/representations.py"


def saved_run(folder, changes):
    """Write the folder of a run whose methods add noise of some size to the pretrained weights."""
    for method, seed, size in changes:
        torch.manual_seed(0)
        towers, tokenizer = build("tiny-vit-16")
        with torch.no_grad():
            for weight in towers.clip.visual.parameters():
                weight += size * weight.std().nan_to_num() * torch.randn_like(weight)
        export.save(towers, folder / f"models/{method}-{seed}/student", Prompts(["a"], ["a {}."], tokenizer))
    runs = {method: {"runs": [{"seed": s} for m, s, _ in changes if m == method]} for method, *_ in changes}
    write_json({"methods": runs}, folder / "results.json")


def test_students_are_compared_with_the_models_that_they_started_from(tmp_path):
    saved_run(tmp_path / "run", [("zero-shot", 0, 0), ("flyp", 0, 0.3), ("tracer", 0, 0.1), ("same", 0, 0)])
    (tmp_path / "images").mkdir()
    pixels = torch.randint(0, 256, (8, 16, 16, 3), dtype=torch.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image.numpy()).save(tmp_path / f"images/{i}.png")
    arguments = [tmp_path / "run", tmp_path / "images", "--output", tmp_path / "out"]
    done = programs.run(PROGRAM, *arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    methods = json.loads((tmp_path / "out/results.json").read_text())["methods"]
    assert list(methods) == ["flyp", "tracer", "same"]
    assert methods["same"]["lowest"] == pytest.approx(1, abs=1e-5)
    assert methods["flyp"]["embedding"] < methods["tracer"]["embedding"] < 1
    layers = methods["flyp"]["layers"]
    assert methods["flyp"]["lowest"] == pytest.approx(min(layers.values()))
    assert any("attn" in name or "mlp" in name for name in layers)
    assert "tracer - flyp" in done.stdout
    assert (tmp_path / "out/cka.png").exists()


def test_a_run_without_its_pretrained_models_is_refused(tmp_path):
    saved_run(tmp_path, [("flyp", 0, 0.3)])
    done = programs.run(PROGRAM, tmp_path, tmp_path)
    assert done.returncode == 2
    assert "has no runs of zero-shot, whose models are the start: add it to --methods" in done.stderr
