"""The modules and tensors of a student, without those of teachers that are its submodules.

A student may hold its own teacher as a submodule. The teacher's tensors are averages, not what is trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

__all__ = ["is_teacher", "modules", "named_buffers", "named_modules", "named_parameters", "named_tensors"]


def is_teacher(value: object) -> bool:
    """Return whether an object is a teacher, which marks its class with `_is_wmateacher = True`."""
    return isinstance(value, nn.Module) and getattr(type(value), "_is_wmateacher", False)


def named_modules(model: nn.Module, remove_duplicate: bool = True) -> list[tuple[str, nn.Module]]:
    """Return a model and its submodules by path, leaving out teachers and what is inside them.

    The order and the paths are those of `nn.Module.named_modules`.
    """
    # A swap walks through a model many times, which is why this is one loop without nested generators.
    seen: set[int] = set()
    found: list[tuple[str, nn.Module]] = []
    stack = [("", model)]
    while stack:
        path, module = stack.pop()
        if remove_duplicate:
            if id(module) in seen:
                continue
            seen.add(id(module))
        if module is not model and is_teacher(module):
            continue
        found.append((path, module))
        if children := module._modules:
            prefix = f"{path}." if path else ""
            stack += [(prefix + n, child) for n, child in reversed(children.items()) if child is not None]
    return found


def modules(model: nn.Module) -> list[nn.Module]:
    """Return a model and its submodules, leaving out teachers and what is inside them."""
    return [module for _, module in named_modules(model)]


def named_parameters(model: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield a model's parameters by path, leaving out those of teachers."""
    return _members(named_modules(model, remove_duplicate), "_parameters", remove_duplicate)


def named_buffers(model: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Yield a model's buffers by path, leaving out those of teachers."""
    return _members(named_modules(model, remove_duplicate), "_buffers", remove_duplicate)


def named_tensors(
    model: nn.Module, remove_duplicate: bool = True
) -> tuple[dict[str, nn.Parameter], dict[str, Tensor]]:
    """Return a model's parameters and its buffers by path, leaving out those of teachers."""
    named = named_modules(model, remove_duplicate)
    parameters = dict(_members(named, "_parameters", remove_duplicate))
    return parameters, dict(_members(named, "_buffers", remove_duplicate))


def _members(
    named: list[tuple[str, nn.Module]], table: str, remove_duplicate: bool
) -> Iterator[tuple[str, Any]]:
    seen: set[int] = set()
    for path, module in named:
        for leaf, tensor in getattr(module, table).items():
            if tensor is not None and id(tensor) not in seen:
                if remove_duplicate:
                    seen.add(id(tensor))
                yield (f"{path}.{leaf}" if path else leaf), tensor


def __dir__() -> list[str]:
    return __all__
