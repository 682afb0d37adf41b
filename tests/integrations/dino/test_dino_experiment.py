import json
from dataclasses import replace

import pytest
import torch

from wmateacher.integrations.dino import pictures, recipes
from wmateacher.integrations.dino.experiment import BASELINES, COLUMNS, PIXELS, UNTRAINED, Experiment
from wmateacher.integrations.dino.recipes import Crops
from wmateacher.integrations.engine.tables import draw_curves, table
from wmateacher.integrations.vision import backbones, images


def recipe(**changes):
    short = recipes.drawn(steps=4)
    settings = replace(short.settings, batch_size=8, checkpoint_every=2)
    return replace(short, settings=settings, train_images=40, bank_images=60, **changes)


def test_a_run_leaves_results_and_curves_and_is_not_repeated(tmp_path):
    experiment = Experiment(recipe(), tmp_path, progress=False)
    assert experiment.baselines == BASELINES
    for name in (*BASELINES, "uniform"):
        experiment.run(name)
    experiment.run("uniform", 1)
    content = json.loads((tmp_path / "results.json").read_text())
    assert set(content) == {"config", "environment", "methods"}
    assert list(content["methods"]) == [*BASELINES, "uniform"]
    record = content["methods"]["uniform"]
    assert [r["seed"] for r in record["runs"]] == [0, 1]
    assert set(record["teacher"]) == set(record["student"]) == {"knn", "linear"}
    assert record["std"]["teacher"]["knn"] >= 0
    assert content["methods"][PIXELS]["student"] is None
    text = table(content, COLUMNS)
    assert f"{record['teacher']['knn']:.1f} ±" in text
    assert len((tmp_path / "gaps/uniform-0.csv").read_text().splitlines()) == 5
    again = Experiment(recipe(), tmp_path, progress=False)
    for part in (again, experiment):
        part._backbone = None  # would be called by anything that is run
    assert again.run("uniform", 1) == record["runs"][1]
    files = {"uniform": again.file("curves", "uniform", 0)}
    draw_curves(files, {"untrained": 10.0}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_seeds_differ_and_evaluation_does_not(tmp_path):
    experiment = Experiment(recipe(), tmp_path, progress=False)
    assert experiment.run(PIXELS, 0)["teacher"] == experiment.run(PIXELS, 1)["teacher"]
    one, other = (experiment._backbone(seed).state_dict() for seed in (0, 1))
    assert any(not torch.equal(one[k], other[k]) for k in one)
    steps = [experiment._stream(seed).batch(0)[0] for seed in (0, 1)]
    assert not torch.equal(*steps)


def test_crops_that_do_not_fit_are_found_before_anything_is_run(tmp_path):
    with pytest.raises(ValueError, match="crops of 64 pixels are larger than the images of 24"):
        Experiment(recipe(crops=Crops(64, 8)), tmp_path, progress=False)
    with pytest.raises(ValueError, match="batch_size must be between 1 and the 5 training images, got 8"):
        Experiment(replace(recipe(), train_images=5), tmp_path, progress=False)


def test_a_backbone_that_does_not_fit_is_found_before_anything_is_run(tmp_path):
    vit = "vit_tiny_patch16_224(patch_size=4,depth=1)"
    message = (
        r"crops of 22 pixels do not go .*VisionTransformer.*22.*4.*choose a size that its patches divide"
    )
    with pytest.raises(ValueError, match=message):
        Experiment(recipe(backbone=vit, crops=Crops(22, 8)), tmp_path, progress=False)
    short = recipe()
    with pytest.raises(ValueError, match="masks the patches of a vision transformer of timm.*or ibot=0"):
        Experiment(replace(short, settings=replace(short.settings, ibot=1.0)), tmp_path, progress=False)
    assert not (tmp_path / "results.json").exists()


def test_photographs_in_folders(tmp_path):
    from PIL import Image

    random = torch.Generator().manual_seed(0)
    for part, count in (("train", 15), ("val", 3)):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(0, 256, (40, 48, 3), dtype=torch.uint8, generator=random).numpy()
                Image.fromarray(pixels).save(tmp_path / part / name / f"{i}.png")
    data = f"imagefolder:{tmp_path}"
    count = len(images.load(data).labels)
    assert count == 29
    short = recipes.photographs(data, count, "test_efficientnet_gn", epochs=2, batch_size=8)
    assert short.settings.steps == 6
    assert short.settings.hold_last == 3
    short = replace(
        short,
        image_size=32,
        crops=Crops(32, 16, 2),
        settings=replace(short.settings, outputs=16, hidden=8, bottleneck=4),
    )
    experiment = Experiment(short, tmp_path / "out", progress=False)
    assert experiment.baselines == (UNTRAINED,)
    record = experiment.run("ema(0.5)")
    assert 0 <= record["teacher"]["knn"] <= 100


def test_the_papers_recipe():
    paper = recipes.photographs("imagefolder:x", 1_281_167)
    epoch = 1_281_167 // 1024
    assert paper.settings.steps == 100 * epoch
    assert paper.settings.warmup == 10 * epoch
    assert paper.settings.hold_last == epoch
    assert paper.settings.temperature_warmup == 30 * epoch
    assert paper.settings.learning_rate_at(10 * epoch) == pytest.approx(0.002)
    assert paper.settings.outputs == 65536
    assert paper.crops == Crops(224, 96, 8, (0.4, 1.0), (0.05, 0.4))


def test_a_number_of_epochs_makes_the_steps_for_the_data():
    recipe = replace(recipes.RECIPES["imagefolder"], epochs=50)
    found = recipe.resolve(100 * 1024 + 5).settings
    assert (found.steps, found.warmup, found.hold_last, found.temperature_warmup) == (5000, 500, 100, 1500)
    assert replace(recipe, epochs=None).resolve(102_400).settings == recipe.settings
    assert recipe.with_steps(200).resolve(102_400).settings.steps == 200


def test_maps_of_a_vit_are_its_heads_attention():
    vit = backbones.build("vit_tiny_patch16_224(patch_size=4,embed_dim=16,depth=2,num_heads=4)", 16)
    seen = torch.randn(3, 3, 16, 16)
    before = {k: v.clone() for k, v in vit.state_dict().items()}
    words, maps = pictures.attention_maps(vit, seen)
    assert "attention" in words
    assert maps.shape == (3, 4, 16, 16)
    assert vit.training
    assert all(torch.equal(before[k], v) for k, v in vit.state_dict().items())
    # An oracle: the last block's softmax over the tokens, of the class token, without its own share.
    vit.eval()
    tokens = {}
    hook = vit.blocks[-1].attn.register_forward_pre_hook(lambda _, x: tokens.update(x=x[0]))
    vit(seen)
    hook.remove()
    attention = vit.blocks[-1].attn
    q, k, _ = attention.qkv(tokens["x"]).reshape(3, 17, 3, 4, 4).permute(2, 0, 3, 1, 4)
    weights = (q @ k.mT / 2).softmax(-1)[:, :, 0, 1:].reshape(3, 4, 4, 4)
    expected = torch.nn.functional.interpolate(weights, (16, 16), mode="bilinear")
    torch.testing.assert_close(maps, expected.detach(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("spec", ["test_efficientnet_gn", "test_convnext", "test_resnet"])
def test_maps_of_a_convnet_are_activations(spec, tmp_path):
    network, seen = backbones.build(spec, 64), torch.randn(2, 3, 64, 64)
    words, maps = pictures.attention_maps(network, seen)
    assert words == "norm of the last feature map"
    assert maps.shape == (2, 1, 64, 64)
    pictures.draw_maps(network, seen, tmp_path / "maps.png")
    assert (tmp_path / "maps.png").read_bytes().startswith(b"\x89PNG")
