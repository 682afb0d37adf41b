"""Buffers that change their structure while a model runs.

Examples are rotary caches that grow, masks that are None at first, queues that change their length, and what
a module registers in its first forward pass. Here such a buffer is put from one model into another.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from wmateacher import naming, pairing, walking

__all__ = ["differing", "follow", "lent", "resize", "structure"]


def differing(one: nn.Module, other: nn.Module) -> list[str]:
    """Return the canonical names of the buffers that only one of two models has, or that differ in kind.

    Floating-point dtypes are one kind, because a model may have been cast. Buffers of submodules that only
    one model has are left out.
    """
    mine, theirs = _buffers(one), _buffers(other)
    shared = naming.modules(one).keys() & naming.modules(other).keys()
    tied = pairing.tensors(one).keys() ^ pairing.tensors(other).keys()  # a tied tensor has one name
    return [
        name
        for name in dict.fromkeys([*mine, *theirs])
        if name.rpartition(".")[0] in shared
        and (
            (name in mine) != (name in theirs)
            or _kind(mine[name]) != _kind(theirs[name])
            or (name in tied and mine[name] is not None)
        )
    ]


def structure(model: nn.Module) -> dict[str, Any]:
    """Return the kind of every buffer by canonical name."""
    return {name: _kind(buffer) for name, buffer in _buffers(model).items()}


@torch.no_grad()
def follow(target: nn.Module, source: nn.Module, names: Iterable[str]) -> None:
    """Give a model copies of the named buffers of another, or remove them where the other has none.

    The numbers among the attributes of their modules come along: a cache and its length belong together.
    """
    names = list(names)
    if not names:
        return
    to, since = naming.modules(target), naming.modules(source)
    device = next((t.device for t in pairing.tensors(target).values()), None)
    copies: dict[int, Tensor] = {}
    for name in names:
        path, _, leaf = name.rpartition(".")
        into, out_of = to[path], since[path]
        vars(into).update(_numbers(out_of))
        into._non_persistent_buffers_set.discard(leaf)
        if leaf in out_of._non_persistent_buffers_set:
            into._non_persistent_buffers_set.add(leaf)
        if leaf not in out_of._buffers:
            into._buffers.pop(leaf, None)
            continue
        value, old = out_of._buffers[leaf], into._buffers.get(leaf)
        if value is not None and id(value) not in copies:
            where = device if old is None else old.device
            cast = old is not None and old.is_floating_point() and value.is_floating_point()
            copied = pairing.clone(value, where)
            copies[id(value)] = copied.to(old.dtype) if old is not None and cast else copied
        into._buffers[leaf] = None if value is None else copies[id(value)]
    pairing.densify(target)


def resize(model: nn.Module, name: str, like: Tensor | None) -> None:
    """Make room in a model for a buffer of another shape; None takes the buffer away."""
    path, _, leaf = name.rpartition(".")
    module = naming.modules(model)[path]
    old = module._buffers.get(leaf)
    device = next((t.device for t in pairing.tensors(model).values()), None) if old is None else old.device
    if like is None:
        module._buffers[leaf] = None
    elif old is None or _kind(old) != _kind(like):
        module._buffers[leaf] = torch.empty_like(like, device=device)


@contextmanager
def lent(target: nn.Module, source: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Give a model the named buffers of another inside a `with` block, and restore its own after it."""
    before = [
        (m, dict(m._buffers), set(m._non_persistent_buffers_set), _numbers(m))
        for m in walking.modules(target)
    ]
    try:
        follow(target, source, names)
        yield
    finally:
        for module, table, hidden, numbers in before:
            now = module._buffers
            if list(now) != list(table) or any(now[leaf] is not table[leaf] for leaf in table):
                now.clear()
                now.update(table)
                module._non_persistent_buffers_set.clear()
                module._non_persistent_buffers_set.update(hidden)
                vars(module).update(numbers)


def _buffers(model: nn.Module) -> dict[str, Tensor | None]:
    """Return the buffers by canonical name; tied ones under each name, and those that are None."""
    return {
        f"{path}.{leaf}" if path else leaf: buffer
        for path, module in naming.modules(model).items()
        for leaf, buffer in module._buffers.items()
    }


def _kind(buffer: Tensor | None) -> Any:
    if buffer is None:
        return None
    return tuple(buffer.shape), "floating" if buffer.is_floating_point() else buffer.dtype


def _numbers(module: nn.Module) -> dict[str, Any]:
    """Return the plain numbers among a module's attributes."""
    return {k: v for k, v in vars(module).items() if type(v) in (int, float) and not k.startswith("_")}


def __dir__() -> list[str]:
    return __all__
