"""Short forms of the recipes that pre-train: they run in minutes, and show that everything works."""

from __future__ import annotations

from dataclasses import dataclass, replace

from wmateacher.integrations.clip.recipes.base import RECIPES, FromScratchRecipe, Recipe

__all__ = ["QUICK", "Quick", "limits", "shorten"]


@dataclass(frozen=True)
class Quick:
    """The short form of a recipe.

    Attributes:
        pretrain_steps: The optimizer steps of pre-training.
        steps: The optimizer steps of fine-tuning.
        methods: The methods that run by default.
    """

    pretrain_steps: int
    steps: int
    methods: tuple[str, ...] = ("zero-shot", "flyp", "static-sd", "ema", "tracer")


QUICK = {"digits": Quick(200, 60), "emoji": Quick(250, 80)}
"""The short forms by the name of their recipe."""


def shorten(recipe: Recipe) -> FromScratchRecipe:
    """Return the short form of a recipe; a number of steps that was changed on the command line is kept.

    Raises:
        ValueError: If the recipe has no short form.
    """
    if recipe.name not in QUICK or not isinstance(recipe, FromScratchRecipe):
        raise ValueError(
            f"--quick is for recipes {', '.join(QUICK)}, got recipe {recipe.name!r}: pass --steps instead"
        )
    form, before = QUICK[recipe.name], RECIPES[recipe.name]
    assert isinstance(before, FromScratchRecipe)
    short = replace(recipe, default=form.methods)
    if recipe.pretrain.steps == before.pretrain.steps:
        short = short.with_pretraining(form.pretrain_steps)
    return short.with_steps(form.steps) if recipe.finetune.steps == before.finetune.steps else short


def limits(recipe: FromScratchRecipe) -> str:
    """Return in a sentence what a short run does not show."""
    whole = RECIPES[recipe.name]
    assert isinstance(whole, FromScratchRecipe)
    return (
        "--quick shows that everything runs, and nothing about the methods: "
        f"{recipe.pretrain.steps:,} steps of pre-training instead of {whole.pretrain.steps:,} teach little "
        f"that fine-tuning could lose, and it takes {recipe.finetune.steps:,} steps instead of "
        f"{whole.finetune.steps:,}."
    )


def __dir__() -> list[str]:
    return __all__
