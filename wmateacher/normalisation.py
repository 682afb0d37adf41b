"""Layers that normalise with the statistics of each batch in train mode, with running ones in eval mode."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from torch import Tensor, nn

from wmateacher import naming, pairing

__all__ = ["FAR", "MODES", "Mode", "frozen", "layers", "statistics", "use_batches"]

Mode = Literal["eval", "train"]
MODES: tuple[Mode, ...] = ("eval", "train")

# The share of the run above which the mean age of an average counts as far. On small image classifiers a
# teacher that copies its student's statistics loses nothing at 0.11, and more than ten points at 0.25.
FAR = 0.2


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return by canonical name the layers that keep running statistics for eval mode.

    These are batch and instance normalisation, classes derived from them, and others that have a running
    variance and a momentum. Frozen batch normalisation, such as torchvision's, has no momentum.
    """
    return {n: m for n, m in _switched(model).items() if getattr(m, "track_running_stats", True)}


def _switched(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that have running statistics, also those that no longer update them."""
    return {
        name: module
        for name, module in naming.modules(model).items()
        if isinstance(getattr(module, "running_var", None), Tensor) and hasattr(module, "momentum")
    }


def frozen(student: nn.Module) -> frozenset[str]:
    """Return the names of the layers that a student in train mode keeps in eval mode."""
    return frozenset(n for n, layer in _switched(student).items() if student.training and not layer.training)


def statistics(model: nn.Module, without: Collection[str] = ()) -> dict[str, Tensor]:
    """Return by canonical name the running statistics of a model, except for those of some layers."""
    found = {id(b) for n, m in layers(model).items() if n not in without for b in m.buffers(recurse=False)}
    return {name: tensor for name, tensor in pairing.tensors(model).items() if id(tensor) in found}


def use_batches(model: nn.Module, without: Collection[str] = (), *, dropout: bool = False) -> list[nn.Module]:
    """Make a model normalise with the statistics of its batches, and return the layers that update theirs.

    Args:
        model: The model.
        without: The names of layers that stay in eval mode.
        dropout: Whether all other modules are in train mode; in eval mode otherwise.
    """
    model.train(True)  # a module that overrides `train` may keep its layers in eval mode
    switched = _switched(model)
    live = {name: layer for name, layer in switched.items() if layer.training and name not in without}
    if not dropout:
        model.eval()
    # The flags alone: a layer may hold an activation or dropout that stays in its mode.
    for name, layer in switched.items():
        layer.training = name in live
    # A layer may stand under several names.
    return list(dict.fromkeys(layer for name, layer in layers(model).items() if name in live))


def __dir__() -> list[str]:
    return __all__
