"""Notice parameters that are unfrozen in the middle of a run, before an optimizer changes them.

A teacher uses the student's own tensors for frozen parameters. As long as a parameter is frozen, its value is
also its average, but after the first step that trains it the value is gone. So every step of an optimizer is
preceded by a look at the parameters that teachers share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from wmateacher import pairing
from wmateacher.rewriting import Watch

__all__ = ["Lent", "watch"]

_REQUIRES_GRAD = attrgetter("requires_grad")

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


class Lent:
    """The student's frozen parameters that the averaged module uses as its own, since the last update."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        """Look at parameters by name."""
        self._names, self._tensors = list(tensors), list(tensors.values())
        self._watch = Watch(tensors)
        self._lost: list[str] = []  # those that were unfrozen and whose value is lost

    def settle(self) -> None:
        """Accept the present values."""
        self._watch.settle()

    def unfrozen(self, trained: bool) -> list[str]:
        """Return the names of the parameters that now require grad.

        Args:
            trained: Whether a step was taken since the parameters were last looked at.

        Raises:
            RuntimeError: If such a parameter was written in that step, and its average is lost.
        """
        # This runs at every update and forward pass.
        if not any(map(_REQUIRES_GRAD, self._tensors)):
            return []
        names = [n for n, t in zip(self._names, self._tensors, strict=True) if t.requires_grad]
        if trained and not self._lost:
            self._lost = [name for name in self._watch.written() if name in names]
        if self._lost:
            raise RuntimeError(
                f"the student's {pairing.few(self._lost)} was unfrozen and written before the teacher could "
                "keep the value that it had while it was frozen: its optimizer runs no hooks. Unfreeze it "
                "before building the teacher, build the teacher with frozen='copy', or call the teacher or "
                "teacher.update between unfreezing and the first step"
            )
        return names


def __dir__() -> list[str]:
    return __all__
