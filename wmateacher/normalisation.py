"""Layers that normalise with the statistics of each batch in train mode, with running ones in eval mode."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import numpy as np
from torch import Tensor, nn

from wmateacher import naming, pairing
from wmateacher.kernels import Kernel

__all__ = ["MODES", "Mode", "frozen", "layers", "looks_far_back", "statistics", "use_batches"]

Mode = Literal["eval", "train"]
MODES: tuple[Mode, ...] = ("eval", "train")

# The share of the run above which a kernel's mean age counts as far. On small image classifiers a teacher
# that copies its student's statistics loses nothing at 0.11, and more than ten points at 0.25.
_FAR = 0.2
# The longest run that is looked at. Of kernels that stretch with the run, a shorter one says the same.
_LONGEST, _LONGEST_STEPWISE = 100_000, 1_000_000


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return by canonical name the layers that keep running statistics for eval mode.

    These are batch and instance normalisation, classes derived from them, and others that have running
    statistics and a momentum. Frozen batch normalisation, such as torchvision's, has no momentum.
    """
    return {
        name: module
        for name, module in naming.modules(model).items()
        if isinstance(getattr(module, "running_mean", None), Tensor)
        and isinstance(getattr(module, "running_var", None), Tensor)
        and hasattr(module, "momentum")
        and getattr(module, "track_running_stats", True)
    }


def frozen(student: nn.Module) -> frozenset[str]:
    """Return the names of the layers that a student in train mode keeps in eval mode."""
    return frozenset(n for n, layer in layers(student).items() if student.training and not layer.training)


def statistics(model: nn.Module, without: Collection[str] = ()) -> dict[str, Tensor]:
    """Return by canonical name the running statistics of a model, except for those of some layers."""
    found = {id(b) for n, m in layers(model).items() if n not in without for b in m.buffers(recurse=False)}
    return {name: tensor for name, tensor in pairing.tensors(model).items() if id(tensor) in found}


def use_batches(model: nn.Module, without: Collection[str] = (), *, dropout: bool = False) -> list[nn.Module]:
    """Make a model normalise with the statistics of its batches, and return the layers that do.

    Args:
        model: The model.
        without: The names of layers that stay in eval mode.
        dropout: Whether all other modules are in train mode; in eval mode otherwise.
    """
    model.train(True)  # a module that overrides `train` may keep its layers in eval mode
    live = [layer for name, layer in layers(model).items() if layer.training and name not in without]
    if not dropout:
        model.eval()
    # The flags alone: a layer may hold an activation or dropout that stays in its mode.
    for layer in layers(model).values():
        layer.training = False
    for layer in live:
        layer.training = True
    return live


def looks_far_back(kernel: Kernel, total_steps: int | None) -> bool:
    """Return whether the mean age of the states in a finished average is more than a fifth of the run.

    Args:
        kernel: The kernel.
        total_steps: The number of steps in the run; None stands for a long one.
    """
    late = 2 * getattr(kernel, "start_step", 0)  # enough for an average that starts late
    longest = _LONGEST_STEPWISE if kernel.stepwise else _LONGEST
    horizon = min(total_steps or max(_LONGEST, late), max(longest, late))
    weights = kernel.profile(horizon)
    return float(weights @ np.arange(horizon, -1, -1)) > _FAR * horizon


def __dir__() -> list[str]:
    return __all__
