"""Adapter layers that can be merged into the weights of the layers that they adapt, such as peft's LoRA.

Merging writes to frozen weights through `.data`, which leaves no trace in the tensors. The adapter layers say
whether they are merged, in an attribute or property `merged`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from wmateacher import naming

__all__ = ["Pair", "layers", "pairs", "refuse"]

# The name of an adapter layer, the student's layer and the teacher's.
Pair = tuple[str, nn.Module, nn.Module]


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the adapter layers of an unwrapped model by canonical name."""
    modules = naming.modules(model)
    return {name: m for name, m in modules.items() if isinstance(getattr(m, "merged", None), bool)}


def pairs(student: nn.Module, teacher: nn.Module) -> tuple[Pair, ...]:
    """Return the adapter layers that two unwrapped models have under the same name."""
    theirs = layers(teacher)
    return tuple((name, mine, theirs[name]) for name, mine in layers(student).items() if name in theirs)


def refuse(pairs: Iterable[Pair], action: str) -> None:
    """Raise a RuntimeError that names `action` if an adapter is merged in only one of the two models."""
    if torch.compiler.is_compiling():
        return
    for name, student, teacher in pairs:
        if student.merged != teacher.merged:
            merged, other = ("student", "teacher") if student.merged else ("teacher", "student")
            raise RuntimeError(
                f"{action} while the adapter in {name!r} is merged into the {merged}'s weights but not into "
                f"the {other}'s, so that it would count twice or not at all: unmerge the {merged}'s adapters "
                "first (in peft, unmerge_adapter(); in loralib, build the layers with merge_weights=False). "
                "To use a merged model beside the teacher, merge a copy"
            )


def __dir__() -> list[str]:
    return __all__
