"""Distillation losses: `build("3.90625*fd + crd")` gives a criterion to call with (student, teacher)."""

from wmateacher.losses import features, logits, paired
from wmateacher.losses.logits import JSD, KL, MSE, ReverseKL
from wmateacher.losses.paired import PairedEmbeddings, info_nce, similarity_logits
from wmateacher.losses.registry import Criterion, available, build, register
from wmateacher.losses.tokens import token_mask

__all__ = [
    "JSD",
    "KL",
    "MSE",
    "Criterion",
    "PairedEmbeddings",
    "ReverseKL",
    "available",
    "build",
    "features",
    "info_nce",
    "logits",
    "paired",
    "register",
    "similarity_logits",
    "token_mask",
]


def __dir__() -> list[str]:
    return __all__
