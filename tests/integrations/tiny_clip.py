"""Digits as pairs, for tests that train a tiny CLIP."""

from wmateacher.integrations.clip.data.digits import DigitPairs
from wmateacher.integrations.vision.digits import NARROW, load

SOURCE = load("digits")


def pairs(towers, prompts, domain=NARROW, batch_size=16):
    return DigitPairs(
        SOURCE.val, domain, prompts.classes, prompts.templates, prompts.tokenizer,
        size=towers.image_size, batch_size=batch_size, seed=3,
    )  # fmt: skip
