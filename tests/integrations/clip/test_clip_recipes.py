import math
from dataclasses import replace

import pytest
import torch

from wmateacher.integrations.clip import recipes
from wmateacher.integrations.clip.data import imagenet
from wmateacher.integrations.clip.experiment import Experiment
from wmateacher.integrations.clip.methods import METHODS
from wmateacher.integrations.clip.recipes import quick
from wmateacher.integrations.vision import digits
from wmateacher.integrations.vision.digits import Split


def finetuned(recipe, **changes):
    return replace(recipe, finetune=replace(recipe.finetune, **changes))


def test_data_larger_than_the_bundled_is_pretrained_on_for_longer():
    recipe = recipes.get("digits")
    assert recipe.adjust() == recipe
    mnist = replace(recipe, data="mnist").adjust()
    assert (mnist.data, mnist.pretrain.steps, mnist.pretrain.warmup) == ("mnist", 3000, 300)
    assert mnist.finetune == recipe.finetune
    shorter = replace(recipe, data="mnist", pretrain=replace(recipe.pretrain, steps=77))
    assert shorter.adjust() == shorter
    toy = recipes.get("colored-mnist")
    assert toy.adjust() == toy


def test_other_steps_shorten_the_warm_up_in_proportion():
    recipe = recipes.DIGITS.with_pretraining(100).with_steps(20)
    assert (recipe.pretrain.steps, recipe.pretrain.warmup) == (100, 10)
    assert (recipe.finetune.steps, recipe.finetune.warmup) == (20, 2)
    assert recipes.DIGITS.with_pretraining(None).with_steps(None) == recipes.get("digits")


@pytest.mark.parametrize("name", ["digits", "emoji"])
def test_a_quick_run_has_fewer_steps_and_the_teachers_of_the_comparison(name):
    recipe = recipes.get(name)
    short = quick.shorten(recipe)
    assert short.select(()) == ["zero-shot", "flyp", "static-sd", "ema", "tracer"]
    assert short.pretrain == recipe.pretrain.scaled(quick.QUICK[name].pretrain_steps)
    assert short.finetune == recipe.finetune.scaled(quick.QUICK[name].steps)
    assert short.pretrain.warmup < short.pretrain.steps < recipe.pretrain.steps
    assert short.finetune.warmup < short.finetune.steps < recipe.finetune.steps
    assert (short.model, short.methods, short.adjust()) == (recipe.model, recipe.methods, short)


def test_a_quick_run_keeps_what_was_chosen():
    recipe = recipes.get("emoji")
    chosen = finetuned(recipe.with_pretraining(9), steps=7)
    short = quick.shorten(chosen)
    assert (short.pretrain, short.finetune) == (chosen.pretrain, chosen.finetune)
    assert quick.shorten(finetuned(recipe, learning_rate=1e-5)).finetune.learning_rate == 1e-5
    mnist = quick.shorten(replace(recipes.get("digits"), data="mnist")).adjust()
    assert mnist.pretrain.steps == quick.QUICK["digits"].pretrain_steps
    said = quick.limits(short)
    assert "nothing about the methods: 9 steps of pre-training instead of 1,500 teach little" in said
    assert "takes 7 steps instead of 300." in said


@pytest.mark.parametrize("name", ["folders", "imagenet-rn50", "colored-mnist"])
def test_other_recipes_have_no_quick_form(name):
    with pytest.raises(ValueError, match=f"--quick is for recipes digits, emoji, got recipe '{name}'"):
        quick.shorten(recipes.get(name))


def test_the_toy_experiment_is_the_papers():
    recipe = recipes.get("colored-mnist")
    epochs = recipe.finetune.steps * recipe.finetune.batch_size / recipe.train_images
    assert epochs == pytest.approx(10)
    assert recipe.pretrain.steps == recipe.finetune.steps
    assert recipe.finetune.freeze_text
    static, wma = recipe.method("static-sd"), recipe.method("tracer")
    assert replace(static, name="", summary="", kernel="static") == replace(
        wma, name="", summary="", kernel="static"
    )
    assert wma.kernel == "beta(0.5,0.5)"
    # 1e-3 times the squared distance of everything, beside the weight decay.
    pull = recipe.method("l2-sp")
    assert (pull.l2_sp / 2, pull.l2_sp_of, pull.weight_decay) == (1e-3, "all", None)


def test_toy_colours_multiply_normalised_pixels():
    """Channel factors .8/.2/.2 on pixels normalised with MNIST's mean and deviation."""
    grey = torch.rand(64, 1, 28, 28)
    narrow = replace(recipes.get("colored-mnist").narrow, agreement=1.0)
    drawn = narrow.draw(Split(grey, torch.zeros(64, dtype=torch.int64)), 28, torch.Generator())
    mean, std = 0.1307, 0.3081
    factors = torch.tensor([0.8, 0.2, 0.2])[None, :, None, None]
    torch.testing.assert_close((drawn - mean) / std, (grey - mean) / std * factors, rtol=1e-4, atol=1e-5)


# --- the paper's main experiment ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "model", "rate", "decay", "batch", "steps", "fd", "distill_weight", "c_f"),
    [
        ("imagenet-vit-b-16", "ViT-B-16-quickgelu", 1e-5, 0.1, 512, 25_030, 2000 / 512, 0.9, 0.05),
        ("imagenet-vit-l-14", "ViT-L-14-quickgelu", 1e-5, 0.1, 224, 57_200, 2000 / 768, 0.9, 0.05),
        ("imagenet-rn50", "RN50-quickgelu", 9e-6, 0.02, 512, 25_030, 200 / 1024, 0.01, 0.01),
    ],
)
def test_the_imagenet_recipes_are_the_published_ones(
    name, model, rate, decay, batch, steps, fd, distill_weight, c_f
):
    recipe = recipes.get(name)
    s = recipe.finetune
    assert (recipe.model, recipe.pretrained, recipe.epochs) == (model, "openai", 10)
    assert (s.learning_rate, s.weight_decay, s.batch_size, s.steps) == (rate, decay, batch, steps)
    assert (s.warmup, s.precision, s.clip_norm) == (500, "bf16", None)
    assert recipe.resolve(1_281_167).finetune == s
    assert recipe.resolve(1_281_167).evaluate_every == steps // 10
    assert [s.learning_rate_at(step) for step in (0, 499, 500)] == pytest.approx([rate / 500, rate, rate])
    last = rate / 2 * (1 + math.cos(math.pi * (steps - 501) / (steps - 500)))
    assert s.learning_rate_at(steps - 1) == pytest.approx(last)
    assert recipe.scale == (0.9, 1.0)
    assert recipe.templates == ()
    assert recipe.tests == ("imagenet", *imagenet.SHIFTS)
    tracer = recipe.method("tracer")
    assert tracer.distillation == f"{fd!r}*fd + crd + icl + cross_kd"
    assert (tracer.kernel, tracer.update_every, tracer.orthogonality) == ("beta(0.5,0.5)", 1, 0.0)
    assert (tracer.distill_weight, tracer.cross_frobenius) == (distill_weight, c_f)
    ema, carot, flyp, ft = (recipe.method(m) for m in ("ema", "carot", "flyp", "ft"))
    same = {"name": "", "summary": "", "kernel": "static", "orthogonality": 0.0}
    assert replace(ema, **same) == replace(tracer, **same)
    assert (ema.orthogonality, carot.orthogonality, carot.distill_weight) == (0.2, 0.2, 1.5)
    assert (carot.cross_frobenius, carot.update_every, carot.distillation) == (c_f, 500, "paired_ce")
    assert flyp.settings() == {"name": "flyp"}
    assert ft.rate * 1e-5 == pytest.approx(3e-5)
    assert ft.clip_norm == 1.0
    assert set(recipe.methods) == set(METHODS)


def test_other_pairs_make_other_steps():
    recipe = recipes.get("imagenet-vit-b-16")
    with pytest.raises(
        ValueError, match=r"got 500 of 100 steps \(5,000 pairs in batches of 512\): pass --finetune.warmup 10"
    ):
        recipe.resolve(5_000)
    assert recipe.resolve(500_000).finetune.warmup == 500
    recipe = finetuned(recipe, warmup=9)
    other = recipe.resolve(5_000)
    assert (other.finetune.steps, other.finetune.warmup, other.evaluate_every) == (100, 9, 10)
    assert replace(recipe, evaluate_every=7).resolve(5_000).evaluate_every == 7
    assert replace(recipe, epochs=1).resolve(5_000).finetune.steps == 10
    for fixed in (finetuned(recipe, steps=77).adjust(), recipe.with_steps(77)):
        assert fixed.resolve(5_000).finetune.steps == 77
        assert fixed.resolve(5_000).evaluate_every == 10
    assert recipe.with_steps(None) == recipe
    assert recipes.get("imagenet-vit-b-16").with_steps(2503).resolve(5_000).finetune.warmup == 50
    assert finetuned(recipe, batch_size=256).resolve(1_281_167).finetune.steps == 10 * 5005


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"tests": ("imagenet-v3",)}, "unknown data set 'imagenet-v3'; did you mean 'imagenet-v2'"),
        ({"tests": ()}, "tests must have at least one data set: the first is in-distribution"),
        ({"templates": ("a photo",)}, r"templates must be captions with one {} for the class, got \['a photo'\]"),
        ({"templates": ("a {} {place}",)}, "templates must be captions with one {} for the class, got"),
        ({"scale": (0.9,)}, r"scale must be two shares of an image such as \(0.9, 1.0\), got \(0.9,\)"),
        ({"sampling": "balance"}, "unknown sampling 'balance'; did you mean 'balanced'"),
        ({"published": "vit-b"}, "unknown published 'vit-b'; did you mean 'vit-b-16'"),
        ({"evaluation_batch": 0}, "evaluation_batch must be at least 1, got 0"),
        ({"flip": 2.0}, "flip must be a probability, got 2.0"),
        ({"evaluate_every": -1}, "evaluate_every must be at least 0, got -1: 0 is at the end only"),
    ],
)  # fmt: skip
def test_bad_values_of_photo_recipes(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(recipes.get("imagenet-vit-b-16"), **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip_norm": -1.0}, "clip_norm must be above 0, or None for no clipping, got -1.0"),
        ({"precision": "fp8"}, "precision must be 'fp32', 'bf16' or 'fp16', got 'fp8'"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        finetuned(recipes.DIGITS, **changes)


def test_unknown_names_list_what_there_is():
    with pytest.raises(ValueError, match="unknown recipe 'mnist-colored'; did you mean 'colored-mnist'"):
        recipes.get("mnist-colored")
    with pytest.raises(ValueError, match="unknown method 'ema'; .*available: flyp, l2-sp, static-sd"):
        recipes.get("colored-mnist").method("ema")


def test_without_names_a_recipe_runs_its_short_list_and_all_runs_everything():
    recipe = recipes.get("digits")
    assert recipe.select(()) == list(recipe.default)
    assert recipe.select(("all",)) == list(recipe.methods)
    assert recipe.select(("flyp", "arf")) == ["flyp", "arf"]
    toy = recipes.get("colored-mnist")
    assert toy.select(()) == list(toy.methods)
    with pytest.raises(ValueError, match="unknown method 'flip'; did you mean 'flyp'"):
        recipe.select(("flip",))


@pytest.mark.slow
def test_seeds_of_one_experiment_differ_and_evaluation_does_not(tmp_path):
    recipe = replace(recipes.DIGITS.with_pretraining(4).with_steps(4), model="tiny-vit-16")
    experiment = Experiment(recipe, tmp_path / "out", cache=tmp_path / "cache", progress=False)
    experiment.pretrain()
    for seed in (0, 1):
        experiment.run("zero-shot", seed)
        experiment.run("tracer", seed)
    gaps = [experiment.file("gaps", "tracer", seed).read_text() for seed in (0, 1)]
    assert gaps[0] != gaps[1]
    assert experiment.results["methods"]["zero-shot"]["std"]["id"] == 0
    once, again = (experiment.evaluate(experiment.towers) for _ in "ab")
    assert set(once) == {"id", *digits.SHIFTS}
    assert once == again


def own(**changes):
    return replace(recipes.get("folders"), **changes)


def test_the_length_of_a_run_on_own_images_follows_from_them():
    few = own().resolve(150, 512, "x")
    assert (few.finetune.batch_size, few.finetune.steps, few.finetune.warmup) == (64, 200, 20)
    many = own(warmup_share=0.2).resolve(10_000, 512, "x")
    assert (many.finetune.steps, many.finetune.warmup) == (20 * 157, 628)
    assert many.evaluate_every == 0
    assert own(evaluate_every=None).resolve(10_000, 512, "x").evaluate_every == 157
    tiny = own().resolve(7, 512, "x", processes=2)
    assert (tiny.finetune.batch_size, tiny.finetune.steps) == (6, 200)
    # What is given is kept, the default numbers included.
    given = finetuned(own(), steps=200, warmup=0).resolve(10_000, 512, "x").finetune
    assert (given.steps, given.warmup) == (200, 0)
    assert own().with_steps(50).resolve(10_000, 512, "x").finetune.steps == 50
    assert own().with_steps(None) == own()
    assert own().resolve(10, 512, "this").digest == "this"


def test_methods_on_own_images_follow_from_the_towers_and_the_length():
    wide, narrow = (own().with_steps(1000).resolve(500, width, "x") for width in (768, 512))
    assert wide.method("tracer").distillation == f"{2000 / 768!r}*fd + crd + icl + cross_kd"
    assert narrow.method("tracer") == replace(METHODS["tracer"], batch_norm="batch")
    assert narrow.method("carot").update_every == 20
    changed = replace(METHODS["tracer"], distillation="fd")
    kept = own(methods={**METHODS, "tracer": changed}).resolve(500, 768, "x")
    assert kept.method("tracer") == changed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shots": 0}, "shots must be at least 1, got 0"),
        ({"validation": 1.0}, r"validation must be a share of the images in \[0, 1\), got 1.0"),
        ({"warmup_share": 1.0}, r"warmup_share must be a share of the steps in \[0, 1\), got 1.0"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"sampling": "even"}, "unknown sampling 'even'"),
    ],
)
def test_values_for_own_images_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        own(**changes)


def test_a_run_on_own_images_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"warmup must be shorter than the run, got 9 of 5 steps"):
        finetuned(own(), steps=5, warmup=9).resolve(100, 512, "x")
    with pytest.raises(ValueError, match="3 training images are too few for 4 processes: start fewer"):
        own().resolve(3, 512, "x", processes=4)
    with pytest.raises(ValueError, match="steps must be at least 0, got -1"):
        own().with_steps(-1)
