"""The modules and tensors of a student, without those of teachers that are its submodules.

A student may hold its own teacher as a submodule. The teacher's tensors are averages, not what is trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

__all__ = ["is_teacher", "modules", "named_buffers", "named_modules", "named_parameters"]


def is_teacher(value: object) -> bool:
    """Return whether an object is a teacher, which marks its class with `_is_wmateacher = True`."""
    return isinstance(value, nn.Module) and getattr(type(value), "_is_wmateacher", False)


def named_modules(model: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """Yield a model and its submodules by path, leaving out teachers and what is inside them."""
    # torch skips what is in `memo`, together with its submodules.
    teachers = {m for m in model.modules() if m is not model and is_teacher(m)}
    return model.named_modules(teachers, remove_duplicate=remove_duplicate)


def modules(model: nn.Module) -> list[nn.Module]:
    """Return a model and its submodules, leaving out teachers and what is inside them."""
    return [module for _, module in named_modules(model)]


def named_parameters(model: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield a model's parameters by path, leaving out those of teachers."""
    return _members(model, "_parameters", remove_duplicate)


def named_buffers(model: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Yield a model's buffers by path, leaving out those of teachers."""
    return _members(model, "_buffers", remove_duplicate)


def _members(model: nn.Module, table: str, remove_duplicate: bool) -> Iterator[tuple[str, Any]]:
    seen: set[int] = set()
    for path, module in named_modules(model, remove_duplicate):
        for leaf, tensor in getattr(module, table).items():
            if tensor is not None and id(tensor) not in seen:
                if remove_duplicate:
                    seen.add(id(tensor))
                yield (f"{path}.{leaf}" if path else leaf), tensor


def __dir__() -> list[str]:
    return __all__
