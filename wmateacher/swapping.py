"""Lend a model other weights for a while. Its own are always restored, and the lent ones are never saved."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from wmateacher import averaging, sharding, walking

__all__ = ["lend", "owner", "refuse"]

_VERSION = attrgetter("_version")

# Every module that holds lent weights now, submodules included, with the lender.
_lent: WeakKeyDictionary[nn.Module, object] = WeakKeyDictionary()


def owner(model: nn.Module) -> object | None:
    """Return the lender of the weights that an unwrapped model holds, or None if they are its own."""
    return _lent.get(model)


def refuse(model: nn.Module, action: str) -> None:
    """Raise a RuntimeError that names `action` if an unwrapped model holds lent weights."""
    if model in _lent:
        raise RuntimeError(
            f"{action} inside swap(): the student holds a teacher's averaged weights there, not its own. "
            "Do it after the with block; teacher.averaged_state_dict() returns the averaged weights"
        )


@contextmanager
def lend(
    model: nn.Module, lender: object, targets: Sequence[Tensor], sources: Sequence[Tensor]
) -> Iterator[None]:
    """Give an unwrapped model other values inside a `with` block, and restore its own bit for bit afterwards.

    Args:
        model: The model.
        lender: The owner of the values, which `owner` returns.
        targets: The model's tensors to write.
        sources: Their values inside the block; shards for sharded targets.

    Raises:
        RuntimeError: If the model's `state_dict` is called inside, and at the end of the block if a
            parameter was written inside.
    """
    memory = [sharding.local(target) for target in targets]
    own = [tensor.detach().clone() for tensor in memory]
    # Writing to a DTensor raises its version counter, writing to its shard raises the shard's: watch both.
    watched = [
        t for pair in zip(targets, memory, strict=True) for t in pair if isinstance(pair[0], nn.Parameter)
    ]
    modules, fully_sharded = walking.modules(model), sharding.fully_sharded(model)
    tables: list[dict[str, Any]] = [table for m in modules for table in (m._parameters, m._buffers)]
    slots = [(table, key, table[key]) for table in tables for key in table]
    guards = [module.register_state_dict_pre_hook(_refuse_state) for module in modules]
    _lent.update(dict.fromkeys(modules, lender))
    written = False
    try:
        averaging.copy_(memory, sources)
        lent = list(map(_VERSION, watched))
        yield
        written = lent != list(map(_VERSION, watched))
    finally:
        sharding.reshard(fully_sharded)  # a forward pass inside may have left the lent weights gathered
        for table, key, tensor in slots:
            if table.get(key) is not tensor:
                written = written or isinstance(tensor, nn.Parameter)
                table[key] = tensor
        averaging.copy_(memory, own)
        for guard in guards:
            guard.remove()
        for module in modules:
            del _lent[module]
    if written:
        raise RuntimeError(
            "the student's parameters were written inside swap(), by an optimizer step or by loading "
            "weights. The student has its own weights again and what was written is lost: train and load "
            "weights after the with block"
        )


def _refuse_state(model: nn.Module, *unused: Any) -> None:
    refuse(model, "state_dict() of the student")


def __dir__() -> list[str]:
    return __all__
