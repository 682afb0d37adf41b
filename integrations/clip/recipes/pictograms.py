"""The recipe on pictograms that several hands have drawn."""

from __future__ import annotations

from dataclasses import dataclass

from wmateacher.integrations.clip.methods import with_batch_statistics
from wmateacher.integrations.clip.recipes.base import FromScratchRecipe, Settings
from wmateacher.integrations.clip.recipes.digits import DIGITS

__all__ = ["EMOJI", "EmojiRecipe"]


@dataclass(frozen=True, kw_only=True)
class EmojiRecipe(FromScratchRecipe):
    """Pre-train a small CLIP on pictograms by several hands, and fine-tune it on those by one of them.

    Attributes:
        style: The style of fine-tuning, which is in-distribution at evaluation.
        shifts: The styles that only pre-training sees.
    """

    style: str
    shifts: tuple[str, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        styles = (self.style, *self.shifts)
        if not self.shifts or len(set(styles)) < len(styles):
            raise ValueError(f"shifts must be styles other than {self.style!r}, each once, got {self.shifts}")


EMOJI = EmojiRecipe(
    name="emoji",
    summary="pictograms by five hands with their names -> the 56 kinds in one hand -> the other four hands",
    model="small-conv-48",
    style="twemoji",
    shifts=("noto", "openmoji", "sketch", "fluent"),
    pretrain=Settings(steps=1500, learning_rate=2e-3, batch_size=128, warmup=100, clip_norm=1.0),
    finetune=Settings(steps=300, learning_rate=1e-3, batch_size=64, warmup=30, clip_norm=1.0),
    methods=with_batch_statistics(DIGITS.methods),
    default=DIGITS.default,
)


def __dir__() -> list[str]:
    return __all__
