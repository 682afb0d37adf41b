from dataclasses import replace

import pytest
import torch

from wmateacher.integrations import digits
from wmateacher.integrations.clip import recipes
from wmateacher.integrations.clip.experiment import Experiment
from wmateacher.integrations.digits import Split


def test_data_larger_than_the_bundled_is_pretrained_on_for_longer():
    recipe = recipes.get("digits")
    assert recipe.with_data("digits") == recipe
    assert recipe.with_data("mnist").data == "mnist"
    assert recipe.with_data("mnist").pretrain.steps == 3000
    assert recipe.with_data("mnist").finetune == recipe.finetune


def test_other_steps_shorten_the_warm_up_in_proportion():
    recipe = recipes.DIGITS.with_pretraining(100).with_steps(20)
    assert (recipe.pretrain.steps, recipe.pretrain.warmup) == (100, 10)
    assert (recipe.finetune.steps, recipe.finetune.warmup) == (20, 2)
    assert recipes.DIGITS.with_pretraining(None).with_steps(None) == recipes.get("digits")


def test_the_toy_experiment_is_the_papers():
    recipe = recipes.get("colored-mnist")
    epochs = recipe.finetune.steps * recipe.finetune.batch_size / recipe.train_images
    assert epochs == pytest.approx(10)
    assert recipe.pretrain.steps == recipe.finetune.steps
    assert recipe.finetune.freeze_text
    static, wma = recipe.method("static-sd"), recipe.method("tracer")
    assert replace(static, name="", summary="", kernel="") == replace(wma, name="", summary="", kernel="")
    assert wma.kernel == "beta(0.5,0.5)"


def test_toy_colours_multiply_normalised_pixels():
    """Channel factors .8/.2/.2 on pixels normalised with MNIST's mean and deviation."""
    grey = torch.rand(64, 1, 28, 28)
    narrow = replace(recipes.get("colored-mnist").narrow, agreement=1.0)
    drawn = narrow.draw(Split(grey, torch.zeros(64, dtype=torch.int64)), 28, torch.Generator())
    mean, std = 0.1307, 0.3081
    factors = torch.tensor([0.8, 0.2, 0.2])[None, :, None, None]
    torch.testing.assert_close((drawn - mean) / std, (grey - mean) / std * factors, rtol=1e-4, atol=1e-5)


def test_unknown_names_list_what_there_is():
    with pytest.raises(ValueError, match="unknown recipe 'mnist-colored'; did you mean 'colored-mnist'"):
        recipes.get("mnist-colored")
    with pytest.raises(ValueError, match="unknown method 'ema'; .*available: flyp, l2-sp, static-sd"):
        recipes.get("colored-mnist").method("ema")


def test_without_names_a_recipe_runs_its_short_list_and_all_runs_everything():
    recipe = recipes.get("digits")
    assert recipe.chosen(()) == list(recipe.default)
    assert recipe.chosen(("all",)) == list(recipe.methods)
    assert recipe.chosen(("flyp", "arf")) == ["flyp", "arf"]
    toy = recipes.get("colored-mnist")
    assert toy.chosen(()) == list(toy.methods)
    with pytest.raises(ValueError, match="unknown method 'flip'; did you mean 'flyp'"):
        recipe.chosen(("flip",))


def test_seeds_of_one_experiment_differ_and_evaluation_does_not(tmp_path):
    recipe = replace(recipes.DIGITS.with_pretraining(4).with_steps(4), model="tiny-vit-16")
    experiment = Experiment(recipe, tmp_path / "out", cache=tmp_path / "cache", progress=False)
    experiment.pretrain()
    for seed in (0, 1):
        experiment.run("zero-shot", seed)
        experiment.run("tracer", seed)
    gaps = [experiment.gap_file("tracer", seed).read_text() for seed in (0, 1)]
    assert gaps[0] != gaps[1]
    assert experiment.results["methods"]["zero-shot"]["std"]["id"] == 0
    once, again = (experiment.evaluate(experiment.towers) for _ in "ab")
    assert set(once) == {"id", *digits.SHIFTS}
    assert once == again
