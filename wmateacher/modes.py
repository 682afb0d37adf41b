"""The modes of the averaged module's layers, and the running statistics that they use.

Layers that normalise with the statistics of each batch do so in a teacher in `mode="train"`, except for those
that the student keeps in eval mode. Everything else is in eval mode.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from wmateacher import normalisation
from wmateacher.normalisation import Flags
from wmateacher.schedule import Clock
from wmateacher.shadow import Shadow
from wmateacher.updating import Plan

__all__ = ["FAR", "Modes"]

# The share of the run above which the mean age of an average counts as far. On small image classifiers a
# teacher that copies its student's statistics loses nothing at 0.11, and more than ten points at 0.25.
FAR = 0.2


class Modes:
    """The modes of the averaged module's layers, which follow those of the student's layers.

    Attributes:
        fixed: The names of the layers that the student keeps in eval mode while it trains.
        collecting: Whether `update_bn()` is recomputing the running statistics.
    """

    def __init__(
        self,
        shadow: Shadow,
        student: nn.Module,
        mode: normalisation.Mode,
        dropout: bool,
        fixed: frozenset[str],
    ):
        """Take the modes of an unwrapped student; the other arguments are those of `WMATeacher`."""
        self._shadow, self._mode, self._dropout = shadow, mode, dropout
        self.fixed = fixed
        self.collecting = False
        self._held: list[tuple[nn.Module, bool]] = []  # the modules' modes, if not all in eval mode
        self._layers = Flags(student)
        self._outgrown = False  # whether the statistics of the start are used for other weights

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": [], "_layers": None, "collecting": False}

    def watch(self, student: nn.Module) -> None:
        """Look up the layers of an unwrapped student."""
        self._layers = Flags(student)

    def set(self, student: nn.Module, training: bool) -> None:
        """Put the layers into train or eval mode, for a teacher with this flag."""
        if self.collecting:
            self._shadow.take_up_statistics()
            self.accept()
        self.collecting = training and self._shadow.statistics_were_reset()
        if self.collecting and self.fixed:
            # What was reset is recomputed, except for frozen layers, which have the student's.
            own = normalisation.statistics(student, without=self.fixed)
            every = normalisation.statistics(student)
            self._shadow.write({n: every[n] for n in every if n not in own})
        self._apply(training)

    def _apply(self, training: bool) -> None:
        module, self._held = self._shadow.module, []
        if training and (self._mode == "train" or self.collecting):
            normalisation.use_batches(module, self.fixed, dropout=self._dropout)
            self._held = [(m, m.training) for m in module.modules()]
        else:
            module.eval()

    def restore(self) -> None:
        """Put the layers into their modes again, if `teacher.module` was evaluated, for example."""
        for module, mode in self._held:
            if module.training != mode:
                module.training = mode

    def follow(self, training: bool, plan: Plan | None = None) -> bool:
        """Treat normalisation layers as the student does; return whether roles have changed by that.

        Args:
            training: The teacher's flag.
            plan: The plan of an update, with which the student's layers are looked up anew if it is new.
        """
        if plan is not None and self._layers.key is not plan:
            self._layers = Flags(plan.student.model, plan)
        student, before = self._layers.student, self.fixed
        now = None if self.collecting else self._layers.frozen()
        if now is None or now == before:
            return False
        self.fixed = now
        if self._mode == "eval":
            return False
        used = normalisation.statistics(student, without=before)
        uses = normalisation.statistics(student, without=now)
        kept = self._shadow.roles.buffers == "keep"
        frozen = {n: t for n, t in used.items() if n not in uses and not kept}
        self._shadow.give(kept=[n for n in uses if n not in used], copied=list(frozen))
        self._shadow.write(frozen)
        self._apply(training)
        return True

    # --- statistics that do not fit -------------------------------------------------------------------

    def check(self, own: Mapping[str, Tensor], clock: Clock) -> None:
        """Warn of running statistics that will not fit the average.

        Args:
            own: The student's running statistics by name, without those of layers in eval mode.
            clock: The clock, which tells how far the average looks back.
        """
        floating = {name for name, tensor in own.items() if tensor.is_floating_point()}
        if self._mode == "train" or not floating:
            return
        roles = self._shadow.roles
        copied, kept = (not floating.isdisjoint(names) for names in (roles.copied, roles.kept))
        age = clock.relative_mean_age() if copied or kept else 0.0
        if copied and age > FAR:
            option = "buffers='copy'" if roles.buffers == "copy" else "exclude="
            warnings.warn(
                f"the student normalises with running statistics, which {option} copies to the teacher, but "
                f"they do not fit weights that kernel {str(clock.kernel)!r} averages over a large part of "
                "the run: pass mode='train', or buffers='keep' and call "
                "wmateacher.recalibrate(teacher, loader) before the teacher is used",
                stacklevel=3,
            )
        # The average of a kernel of age 1 stays at the start, which its statistics fit.
        self._outgrown = kept and age < 1

    def accept(self) -> None:
        """Take the present running statistics as those of the average."""
        self._outgrown = False

    def notice_outgrown(self, clock: Clock) -> None:
        """Warn once if a forward pass uses the statistics of the start for an average that has moved."""
        if not self._outgrown or not clock.snapshot or self.collecting:
            return
        self._outgrown = False
        own = normalisation.statistics(self._layers.student, without=self.fixed)
        if any(name in own for name in self._shadow.roles.kept):
            warnings.warn(
                "the teacher normalises with the running statistics of the start, which buffers='keep' "
                "leaves as they are, but its weights have moved: pass mode='train' if it gives targets, or "
                "call wmateacher.recalibrate(teacher, loader) before it is used",
                stacklevel=5,
            )


def __dir__() -> list[str]:
    return __all__
