"""Caches of values computed from weights, which become stale when the weights are written to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.utils import parametrize

from wmateacher import walking

__all__ = ["Forget", "apart", "clear"]


def clear() -> None:
    """Drop the weights that autocast has cast and those that `parametrize.cached()` has computed."""
    torch.clear_autocast_cache()
    parametrize._cache.clear()


@contextmanager
def apart() -> Iterator[None]:
    """Hide what `parametrize.cached()` holds inside a `with` block.

    Its entries do not distinguish a module from its deep copies.
    """
    held = dict(parametrize._cache)
    parametrize._cache.clear()
    try:
        yield
    finally:
        parametrize._cache.clear()
        parametrize._cache.update(held)


class Forget:
    """Make a model drop what its modules have cached for evaluation, such as attention biases in timm.

    Modules that cache values computed from their weights clear them in `train(True)`, which they override.
    """

    def __init__(self, model: nn.Module):
        """Look up the modules of a model that override `train`."""
        self._model = model
        self._modules = [m for m in walking.modules(model) if type(m).train is not nn.Module.train]

    def __call__(self) -> None:
        """Switch those that are in eval mode to training and back."""
        if not self._modules:
            return
        flags = [(module, module.training) for module in self._model.modules()]
        for module in self._modules:
            if not module.training:
                module.train(True)
                module.train(False)
        for module, flag in flags:
            module.training = flag


def __dir__() -> list[str]:
    return __all__
