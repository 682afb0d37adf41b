"""torch's caches of values computed from weights, which become stale when the weights are written to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.utils import parametrize

__all__ = ["apart", "clear"]


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


def __dir__() -> list[str]:
    return __all__
