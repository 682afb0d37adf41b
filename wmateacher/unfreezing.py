"""Notice parameters that are unfrozen in the middle of a run, before an optimizer changes them.

A teacher uses the student's own tensors for frozen parameters. As long as a parameter is frozen, its value is
also its average, but after the first step that trains it the value is gone. So every step of an optimizer is
preceded by a look at the parameters that teachers share.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from torch.optim.optimizer import register_optimizer_step_pre_hook

__all__ = ["watch"]

_watchers: WeakKeyDictionary[Any, Callable[[Any], None]] = WeakKeyDictionary()
_registered = False


def watch(owner: Any, look: Callable[[Any], None]) -> None:
    """Call `look(owner)` before every step of every `torch.optim.Optimizer`, as long as `owner` exists."""
    global _registered
    _watchers[owner] = look
    if not _registered:
        register_optimizer_step_pre_hook(_before_step)
        _registered = True


def _before_step(*unused: Any) -> None:
    for owner, look in list(_watchers.items()):
        look(owner)


def __dir__() -> list[str]:
    return __all__
