"""Layers that normalise with the statistics of each batch in train mode, with running ones in eval mode."""

from __future__ import annotations

from collections.abc import Collection
from operator import attrgetter
from typing import Any, Literal

from torch import Tensor, nn

from wmateacher import naming, pairing

__all__ = ["MODES", "Flags", "Mode", "frozen", "layers", "statistics", "use_batches"]

Mode = Literal["eval", "train"]
MODES: tuple[Mode, ...] = ("eval", "train")

_TRAINING = attrgetter("training")


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


class Flags:
    """The flags of a student's layers, looked up once, that say which of them are frozen."""

    def __init__(self, student: nn.Module, key: Any = None):
        """Watch an unwrapped student, whose layers are looked up on first use: it may not be complete yet.

        Args:
            student: The student.
            key: Any object, such as the update plan that these layers are part of. If the caller has another
                one, the layers are to be looked up anew.
        """
        self.student, self.key = student, key
        self._layers: dict[str, nn.Module] | None = None
        self._seen: list[bool] | None = None

    def frozen(self) -> frozenset[str] | None:
        """Return the names of the frozen layers if the flags have changed, and None otherwise.

        A student in eval mode does not tell which layers it keeps in eval mode in training.
        """
        # This runs at every update and forward pass of a teacher.
        if not self.student.training:
            return None
        if self._layers is None:
            self._layers = _switched(self.student)
        flags = list(map(_TRAINING, self._layers.values()))
        if flags == self._seen:
            return None
        self._seen = flags
        return frozenset(n for n, training in zip(self._layers, flags, strict=True) if not training)


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
