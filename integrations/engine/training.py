"""Training of a student under a teacher: what the tasks' `fit` functions share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

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


class Training(ABC):
    """A `loop.Task` with a student and perhaps a teacher. A subclass builds them and writes `train_step`.

    Args:
        name: The name in messages.
        settings: How the student is optimised.
        student: The network to train, on the device to train on.
        teacher: Its average, or None.

    Attributes:
        watch: Warns if the outputs collapse.
    """

    watch: CollapseWatch

    def __init__(self, name: str, settings: Settings, student: nn.Module, teacher: Teacher | None):
        self.name, self.settings, self.steps = name, settings, settings.steps
        self.student, self.teacher = student, teacher
        self.device = next(student.parameters()).device

    @abstractmethod
    def train_step(self, step: int) -> Mapping[str, Tensor | float]:
        """Take the optimizer step with index `step`, from 0, and return what to log."""

    @abstractmethod
    def stateful(self) -> Mapping[str, loop.Part]:
        """Return every object whose state changes during training, by name."""

    @abstractmethod
    def run_config(self) -> Mapping[str, Any]:
        """Return the settings that must match for a checkpoint to be resumed."""

    @abstractmethod
    def nan_hint(self) -> str:
        """Return the advice that ends the error about a loss that is not finite."""


@dataclass
class Fit:
    """A finished run.

    Attributes:
        student: The trained network.
        teacher: Its average; None for methods without one.
        history: The logged values.
        collapsed: A description of the collapse of the outputs at the end; None if they have not collapsed.
    """

    student: nn.Module
    teacher: Teacher | None
    history: loop.History
    collapsed: str | None

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The student, and with a teacher its average, by name."""
        return _networks(self.student, self.teacher)


def fit(training: Training, evaluate: Evaluate | None = None, **options: Unpack[loop.Options]) -> Fit:
    """Train the student in place, to the end.

    Args:
        training: The student, in its initial state, and what trains it.
        evaluate: Called with the networks at every evaluation.
        **options: Options of `loop.train`.

    Raises:
        ValueError: The checkpoint cannot be read or belongs to another run.
        FloatingPointError: The loss is not finite.

    Warns:
        CollapseWarning: The outputs are constant, or most of them are not used.
    """
    networks = _networks(training.student, training.teacher)
    history = loop.train(
        training,
        checkpoint_every=training.settings.checkpoint_every,
        evaluate=None if evaluate is None else lambda: evaluate(networks),
        after_read=training.watch.see,
        **options,
    )
    processes.same_buffers(training.student)
    collapsed = training.watch.verdict(history.values("information"), history.values("used"))
    return Fit(training.student, training.teacher, history, collapsed)


def _networks(student: nn.Module, teacher: Teacher | None) -> dict[str, nn.Module]:
    return {"student": student} if teacher is None else {"student": student, "teacher": teacher.module}
