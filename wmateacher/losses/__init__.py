"""Distillation losses: `build("3.90625*fd + crd")` gives a criterion to call with (student, teacher)."""

from wmateacher.losses import features, logits, paired
from wmateacher.losses.paired import PairedEmbeddings, info_nce, similarity_logits
from wmateacher.losses.registry import Criterion, available, build, register

__all__ = [
    "Criterion",
    "PairedEmbeddings",
    "available",
    "build",
    "features",
    "info_nce",
    "logits",
    "paired",
    "register",
    "similarity_logits",
]


def __dir__() -> list[str]:
    return __all__
