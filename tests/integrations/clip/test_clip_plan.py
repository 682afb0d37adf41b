import math
import re
from dataclasses import replace

import pytest
import torch
from miniature import learnable

from wmateacher.integrations.clip import plan, recipes
from wmateacher.integrations.clip.model import build
from wmateacher.integrations.clip.recipes import Settings

SETTINGS = Settings(steps=1, learning_rate=1e-3, batch_size=24)


def describe(recipe, names, root=None):
    return plan.describe(recipe, lambda final: (final, names), root)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", ["tiny-vit-16", "tiny-resnet-32", "tiny-conv-32"])
def test_activations_are_what_a_forward_keeps(model, precision):
    towers = build(model)[0].train()
    own = {p.untyped_storage().data_ptr() for p in (*towers.parameters(), *towers.buffers())}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    images = torch.randn(24, 3, towers.image_size, towers.image_size)
    tokens = torch.zeros(24, towers.clip.context_length, dtype=torch.int64)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
    ):
        given = towers.encode_image(images), towers.encode_text(tokens)
    real = sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in own)
    found = plan.memory(model, replace(SETTINGS, precision=precision), teacher=True)
    assert found.activations == pytest.approx(real, rel=0.1)
    del given
    size = 4 * sum(p.numel() for p in towers.parameters())
    assert (found.student, found.gradients, found.optimizer, found.teacher) == (size, size, 2 * size, size)
    assert found.total == 5 * size + found.activations


@pytest.mark.slow
def test_memory_falls_with_what_saves_it():
    whole = plan.memory("ViT-B-16-quickgelu", replace(SETTINGS, precision="bf16", batch_size=512), True)
    assert 40 * plan.GIB < whole.activations < 50 * plan.GIB
    parts = replace(SETTINGS, precision="bf16", batch_size=512, micro_batch=64)
    eighth = plan.memory("ViT-B-16-quickgelu", parts, True)
    assert eighth.activations == pytest.approx(whole.activations / 8, rel=0.1)
    assert plan.memory("ViT-B-16-quickgelu", parts, True, processes=16).activations < eighth.activations
    again = plan.memory("ViT-B-16-quickgelu", replace(parts, grad_checkpointing=True), True)
    assert again.activations < eighth.activations / 3
    pulled = plan.memory("ViT-B-16-quickgelu", parts, pull=True)
    assert (pulled.teacher, pulled.start) == (0, pulled.gradients)
    linear = plan.memory("ViT-B-16-quickgelu", parts, head="linear")
    assert linear.teacher == 0
    assert linear.gradients == pytest.approx(4 * 86.19e6, rel=0.01)  # the image tower's
    assert linear.activations < eighth.activations


@pytest.mark.parametrize(
    ("name", "steps", "each"),
    [
        ("imagenet-vit-b-16", "25,030", "2,503"),
        pytest.param("imagenet-vit-l-14", "57,200", "5,720", marks=pytest.mark.slow),
        pytest.param("imagenet-rn50", "25,030", "2,503", marks=pytest.mark.slow),
    ],
)
def test_without_data_the_published_length_and_what_is_needed(name, steps, each):
    text = describe(recipes.get(name), ["zero-shot", "flyp", "tracer"])
    assert f"length: {steps} optimizer steps of" in text
    assert f"1,281,167 pairs, {each} steps per epoch" in text
    assert "data: --data-root is missing; it should hold" in text
    assert "ILSVRC2012_img_train.tar from https://image-net.org" in text
    assert "objectnet-1.0.zip" in text
    assert "  finetune.learning-rate " in text
    assert "  tests 'imagenet' 'imagenet-v2'" in text
    assert "  tracer: kernel=beta(0.5,0.5), distillation=" in text
    assert "  flyp: nothing" in text


def test_what_lies_there_and_what_is_missing(tmp_path):
    learnable(tmp_path)
    (tmp_path / "sketch").rename(tmp_path / "elsewhere")
    recipe = recipes.get("imagenet-vit-b-16")
    recipe = replace(recipe, anchors="anchors.csv", model="tiny-vit-16")
    recipe = replace(recipe, finetune=replace(recipe.finetune, warmup=4))
    eight = replace(recipe, finetune=replace(recipe.finetune, batch_size=8))
    text = describe(eight, ["tracer"], tmp_path)
    assert "length: 40 optimizer steps of 8: 32 pairs, 4 steps per epoch" in text
    assert "  imagenet-sketch: no imagenet-sketch in" in text
    assert re.search(r"anchors.csv +32 +ok", text)
    few = describe(replace(recipe, anchors="none.csv"), ["tracer"], tmp_path)
    assert (
        "32 pairs, 1 steps per epoch; batch_size 512 is larger than the data, so training would fail" in few
    )
    assert "none.csv: no table of captions" in few
    table = describe(replace(recipe, train="anchors.csv"), ["zero-shot"], tmp_path)
    assert "32 pairs" in table
    missing = describe(replace(recipe, train="none.csv"), ["zero-shot"], tmp_path)
    assert (
        "length: 25,030 optimizer steps of 512, but the number of pairs decides: those of none.csv are missing"
        in missing
    )
    assert "memory: nothing is trained" in table
    impossible = describe(
        replace(recipe, anchors=None, train="anchors.csv"), ["arf", "wise-ft", "flyp"], tmp_path
    )
    assert impossible.count("cannot run: ") == 2
    assert "cannot run: method 'arf' needs anchor pairs" in impossible
    assert "cannot run: method 'wise-ft' has a linear head and needs labels" in impossible
    assert "cannot run" not in text
    with pytest.raises(ValueError, match=r"no folder .*nowhere: give the one that holds the data sets"):
        describe(recipe, ["tracer"], tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["digits", "colored-mnist"])
def test_recipes_of_digits_have_a_plan_too(name):
    recipe = recipes.get(name)
    text = describe(recipe, list(recipe.methods), None)
    assert f"length: {recipe.finetune.steps:,} optimizer steps of 128" in text
    assert "finetune.steps " in text


def test_learning_rates_of_the_published_run():
    text = describe(recipes.get("imagenet-vit-b-16"), ["zero-shot"])
    last = 0.5e-5 * (1 + math.cos(math.pi * (25_029 - 500) / (25_030 - 500)))
    expected = f"2e-08 at step 0, 1e-05 at step 499, 1e-05 at step 500, {last:.4g} at step 25029"
    assert f"learning rate: {expected}" in text
