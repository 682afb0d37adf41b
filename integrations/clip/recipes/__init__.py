"""The recipes of fine-tuning CLIP: towers, images, methods and optimisation."""

from wmateacher.checks import lookup
from wmateacher.integrations.clip.recipes.base import RECIPES, FromScratchRecipe, Recipe, Settings
from wmateacher.integrations.clip.recipes.digits import COLORED_MNIST, DIGITS, DigitsRecipe
from wmateacher.integrations.clip.recipes.files import FileRecipe
from wmateacher.integrations.clip.recipes.own import FOLDERS, FolderRecipe, OwnSettings
from wmateacher.integrations.clip.recipes.photographs import IMAGENET, PhotoRecipe
from wmateacher.integrations.clip.recipes.pictograms import EMOJI, EmojiRecipe

__all__ = [
    "COLORED_MNIST",
    "DIGITS",
    "EMOJI",
    "FOLDERS",
    "IMAGENET",
    "RECIPES",
    "DigitsRecipe",
    "EmojiRecipe",
    "FileRecipe",
    "FolderRecipe",
    "FromScratchRecipe",
    "OwnSettings",
    "PhotoRecipe",
    "Recipe",
    "Settings",
    "get",
]

RECIPES.update((recipe.name, recipe) for recipe in (DIGITS, COLORED_MNIST, EMOJI, *IMAGENET, FOLDERS))


def get(name: str) -> Recipe:
    """Return the recipe of that name.

    Raises:
        ValueError: If there is no such recipe; the message lists the recipes.
    """
    return lookup("recipe", name, RECIPES)


def __dir__() -> list[str]:
    return __all__
