"""Lending a model another's weights for a while, and nothing but its own getting out of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from wmateacher import averaging

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
    """`targets`, tensors of an unwrapped model, hold the values of `sources` inside.

    They hold their own again after, bit for bit, on whatever way out.

    Raises:
        RuntimeError: Inside, at the model's `state_dict`; at the end, if a parameter was written inside.
    """
    own = [target.detach().clone() for target in targets]
    modules = list(model.modules())
    tables: list[dict[str, Any]] = [table for m in modules for table in (m._parameters, m._buffers)]
    slots = [(table, key, table[key]) for table in tables for key in table]
    guards = [module.register_state_dict_pre_hook(_refuse_state) for module in modules]
    _lent.update(dict.fromkeys(modules, lender))
    written = False
    try:
        averaging.copy_(targets, sources)
        lent = [t._version for t in targets]
        yield
        written = any(
            t._version != v for t, v in zip(targets, lent, strict=True) if isinstance(t, nn.Parameter)
        )
    finally:
        for table, key, tensor in slots:
            if table.get(key) is not tensor:
                written = written or isinstance(tensor, nn.Parameter)
                table[key] = tensor
        averaging.copy_(targets, own)
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
