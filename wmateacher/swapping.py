"""Lending a model another's weights for a while, and nothing but its own getting out of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from wmateacher import averaging, sharding

_VERSION = attrgetter("_version")

# Models that hold borrowed weights now, and their submodules, each with whose they are.
_lent: WeakKeyDictionary[nn.Module, object] = WeakKeyDictionary()


def owner(model: nn.Module) -> object | None:
    """Whose weights an unwrapped model holds now; None: its own."""
    return _lent.get(model)


def refuse(model: nn.Module, action: str) -> None:
    """Raise a RuntimeError if an unwrapped model holds borrowed weights."""
    if model in _lent:
        raise RuntimeError(
            f"{action} inside swap(): the student holds a teacher's averaged weights there, not its own. "
            "Do it after the with block; the averaged weights are teacher.averaged_state_dict()"
        )


@contextmanager
def lend(
    model: nn.Module, lender: object, targets: Sequence[Tensor], sources: Sequence[Tensor]
) -> Iterator[None]:
    """`targets`, tensors of an unwrapped model, hold the values of `sources` inside, local where sharded.

    They hold their own again after, bit for bit, on whatever way out.

    Raises:
        RuntimeError: Inside, at the model's `state_dict`; at the end, if a parameter was written inside.
    """
    memory = [sharding.local(target) for target in targets]
    own = [tensor.detach().clone() for tensor in memory]
    # A write to a DTensor counts in itself, one to its shard in the shard.
    watched = [
        t for pair in zip(targets, memory, strict=True) for t in pair if isinstance(pair[0], nn.Parameter)
    ]
    modules, fully_sharded = list(model.modules()), sharding.fully_sharded(model)
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
        sharding.reshard(fully_sharded)  # a forward inside may have left the borrowed weights gathered
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
            "weights: what was written is lost, the student has its own weights again. Train and load "
            "after the with block"
        )


def _refuse_state(model: nn.Module, *unused: Any) -> None:
    refuse(model, "state_dict() of the student")
