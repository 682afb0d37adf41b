"""Training of a student under a teacher: what the tasks' `fit` functions share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from torch import nn

from wmateacher.integrations.engine import loop, processes
from wmateacher.integrations.engine.collapse import CollapseWatch
from wmateacher.integrations.engine.settings import Settings

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Evaluate", "Fit", "Teacher", "Training", "fit"]

Evaluate = Callable[[Mapping[str, nn.Module]], Mapping[str, float]]
"""From the networks, `"student"` and with a teacher `"teacher"`, to the values to log."""


class Teacher(Protocol):
    """A teacher, such as a `WMATeacher`."""

    @property
    def module(self) -> nn.Module:
        """The network of the teacher."""
        ...


class Training(loop.Task):
    """A `loop.Task` with a student and perhaps a teacher. A subclass builds them and writes `train_step`.

    Args:
        name: The name in messages.
        settings: Settings of the student's optimisation.
        student: The network to train, on the device to train on.
        teacher: Its average, or None.

    Attributes:
        watch: Warns if the outputs collapse, or None.
    """

    watch: CollapseWatch | None = None

    def __init__(self, name: str, settings: Settings, student: nn.Module, teacher: Teacher | None):
        self.name, self.settings, self.steps = name, settings, settings.steps
        self.student, self.teacher = student, teacher
        self.device = next(student.parameters()).device

    def nan_hint(self) -> str:
        """Return the settings to lower if the loss is not finite."""
        return f"lower learning_rate ({self.settings.learning_rate}) or clip_norm ({self.settings.clip_norm})"


@dataclass
class Fit:
    """A finished run.

    Attributes:
        student: The trained network.
        teacher: Its average; None for methods without one.
        history: The logged values.
        collapsed: A description of the collapse of the outputs at the end; None if they have not collapsed
            or were not watched.
    """

    student: nn.Module
    teacher: Teacher | None = None
    history: loop.History = field(default_factory=loop.History)
    collapsed: str | None = None

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The student, and with a teacher its average, by name."""
        return _networks(self.student, self.teacher)


def fit(
    training: Training,
    evaluate: Evaluate | None = None,
    after_read: loop.AfterRead | None = None,
    **options: Unpack[loop.Options],
) -> Fit:
    """Train the student in place, to the end.

    Args:
        training: The student and its training, in the initial state.
        evaluate: Called with the networks at every evaluation.
        after_read: Called with the logged values, as in `loop.train`.
        **options: Options of `loop.train`.

    Raises:
        ValueError: If the checkpoint cannot be read or belongs to another run.
        FloatingPointError: If the loss is not finite.

    Warns:
        CollapseWarning: If the outputs are constant, or most of them are not used.
    """
    networks, watch = _networks(training.student, training.teacher), training.watch

    def read(step: int, logged: Mapping[str, float]) -> None:
        if watch is not None:
            watch.see(step, logged)
        if after_read is not None:
            after_read(step, logged)

    history = loop.train(
        training,
        checkpoint_every=training.settings.checkpoint_every,
        evaluate=None if evaluate is None else lambda: evaluate(networks),
        after_read=read,
        **options,
    )
    for network in networks.values():
        processes.same_buffers(network)
    fitted = Fit(training.student, training.teacher, history)
    if watch is not None:
        fitted.collapsed = watch.verdict(history.values("information"), history.values("used"))
    return fitted


def _networks(student: nn.Module, teacher: Teacher | None) -> dict[str, nn.Module]:
    return {"student": student} if teacher is None else {"student": student, "teacher": teacher.module}
