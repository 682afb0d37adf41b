"""Semi-supervised training by a method: what one step of the training loop is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wmateacher import WMATeacher
from wmateacher.diagnostics import parameter_gap
from wmateacher.integrations.engine import collapse, loop, processes, schedules
from wmateacher.integrations.mean_teacher.consistency import Consistency
from wmateacher.integrations.mean_teacher.methods import Method

Labelled = loop.Stream[tuple[Tensor, Tensor]]
"""Weak views `[B, C, H, W]` and labels `[B]`."""
Unlabelled = loop.Stream[tuple[tuple[Tensor, Tensor], Tensor]]
"""Weak and strong views `[B, C, H, W]`, and labels that nobody looks at."""


@dataclass(frozen=True)
class Settings:
    """How a run is optimised: SGD with Nesterov momentum, linear warm-up, cosine decay to 0.

    Attributes:
        steps: Optimizer steps T.
        learning_rate: At the end of the warm-up.
        labelled_batch: Labelled images a step.
        unlabelled_batch: Unlabelled images a step.
        momentum: Of SGD.
        weight_decay: On every parameter.
        warmup: Steps of linear warm-up.
        rampup: Steps until the consistency has its full weight, along a sigmoid.
        buffers: What the teacher does with BatchNorm's statistics: `"copy"` the student's,
            `"average"` them like weights, or `"keep"` the first.
        precision: `"fp32"`, or `"bf16"` autocast with float32 weights.
        seed: Of initialisation, dropout, data, and which images are labelled.
        checkpoint_every: Steps between checkpoints.
    """

    steps: int
    learning_rate: float
    labelled_batch: int
    unlabelled_batch: int
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: int = 0
    rampup: int = 0
    buffers: Literal["copy", "average", "keep"] = "copy"
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: int = 0
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        lows = {"steps": 1, "labelled_batch": 1, "unlabelled_batch": 1, "warmup": 0, "rampup": 0,
                "checkpoint_every": 1}  # fmt: skip
        for name, low in lows.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}")
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision must be 'fp32' or 'bf16', got {self.precision!r}")

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of the optimizer step with index `step`, from 0."""
        return schedules.warmup_cosine(step, self.steps, self.warmup, self.learning_rate)


@dataclass
class Fit:
    """A finished run.

    Attributes:
        student: The trained classifier.
        teacher: Its average; None for methods without one.
        record: Per step `loss`, `supervised`, and where unlabelled images are used `consistency`, `kept`
            (the share of images that counted); `gap` with a teacher; `validation` from time to time.
        collapsed: What the targets had collapsed to at the end, in words; None: they had not.
    """

    student: nn.Module
    teacher: WMATeacher | None
    record: loop.History
    collapsed: str | None


def fit(
    student: nn.Module,
    method: Method,
    labelled: Labelled,
    unlabelled: Unlabelled,
    settings: Settings,
    *,
    classes: int,
    checkpoint: Path | None = None,
    label: str | None = None,
    progress: bool = True,
    validate: Callable[[nn.Module], float] | None = None,
    validate_every: int = 100,
    after_step: Callable[[int], None] | None = None,
) -> Fit:
    """Train `student` in place by `method`.

    An interrupted run that is started again with the same arguments goes on from its last checkpoint
    and ends with the same bits as an uninterrupted one.

    Args:
        student: Images to logits `[B, classes]`, on the device to train on.
        method: What to minimise, with which teacher.
        labelled: Labelled images from a given step on.
        unlabelled: Unlabelled ones; not read by methods of weight 0.
        settings: How to optimise.
        classes: C.
        checkpoint: File to write checkpoints to, and to go on from where it exists.
        label: Name in the progress bar; the method's by default.
        progress: Show a bar, where there is a terminal.
        validate: A score of the teacher, or of the student where there is none, logged as `validation`.
        validate_every: Steps between them.
        after_step: Called with the number of steps done after each one.

    Raises:
        ValueError: The student's answers have another width, or the checkpoint cannot be read or
            belongs to another run.
        FloatingPointError: The loss is not finite.

    Warns:
        CollapseWarning: The targets are constant, or leave out most classes.
    """
    processes.check_batch(settings.labelled_batch, "labelled_batch", equal=True)
    processes.check_batch(settings.unlabelled_batch, "unlabelled_batch", equal=True)
    task = _SemiSupervised(student, method, labelled, unlabelled, settings, classes)
    if validate is not None:
        task.validate, task.validate_every = validate, validate_every
    record = loop.train(
        task, checkpoint=checkpoint, checkpoint_every=settings.checkpoint_every,
        label=label, progress=progress, after_step=after_step, after_read=task.watch.see,
    )  # fmt: skip
    processes.same_buffers(student)
    return Fit(student, task.teacher, record, task.watch.judge(record))


class _SemiSupervised:
    """A `loop.Task`."""

    def __init__(
        self,
        student: nn.Module,
        method: Method,
        labelled: Labelled,
        unlabelled: Unlabelled,
        settings: Settings,
        classes: int,
    ):
        torch.manual_seed(settings.seed)
        self.name, self.steps = method.name, settings.steps
        self.student, self.method, self.settings = student.train(), method, settings
        self.model = processes.parallel(student)
        self.classes = classes
        self.device = next(student.parameters()).device
        self.teacher = None
        if method.kernel is not None:
            self.teacher = WMATeacher(student, method.kernel, settings.steps, buffers=settings.buffers)
        self.consistency = Consistency(method.consistency, method.confidence)
        self.monitor = collapse.OutputMonitor(classes).to(self.device)
        self.watch = collapse.Watch(
            method.name, settings.steps, classes, 0.5 * classes,
            f"lower weight ({method.weight}) or learning_rate ({settings.learning_rate}), or lengthen "
            f"rampup ({settings.rampup})",
        )  # fmt: skip
        self.optimizer = torch.optim.SGD(
            student.parameters(), lr=settings.learning_rate, momentum=settings.momentum,
            weight_decay=settings.weight_decay, nesterov=settings.momentum > 0,
        )  # fmt: skip
        self.labelled, self.unlabelled = loop.BatchStream(labelled), loop.BatchStream(unlabelled)
        self.validate: Callable[[nn.Module], float] | None = None
        self.validate_every = 1

    def batch(self, step: int) -> dict[str, Any]:
        """What a step sees."""
        return {"labelled": self.labelled(step), "unlabelled": self.unlabelled(step)}

    def train_step(self, step: int) -> dict[str, Tensor | float]:
        """One optimizer step."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate_at(step)
        images, labels = self._here(self.labelled(step))
        parts = [images]
        if self.method.weight:
            (weak, strong), _ = self.unlabelled(step)
            weak, strong = self._here((weak, strong))
            # The student answers weak views itself only where nobody else does.
            parts += [strong] if self.teacher is not None else [strong, weak]
        bf16 = self.settings.precision == "bf16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bf16):
            # One batch, so that BatchNorm sees labelled and unlabelled images together.
            answers = self.model(torch.cat(parts)).float().split([len(p) for p in parts])
        if answers[0].shape[-1] != self.classes:
            raise ValueError(
                f"the student answers with {answers[0].shape[-1]} logits, but there are {self.classes} "
                f"classes: build it with num_classes={self.classes}"
            )
        supervised = F.cross_entropy(answers[0], labels)
        loss, logged = supervised, {"supervised": supervised.detach()}
        if self.method.weight:
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bf16):
                target = answers[2] if self.teacher is None else self.teacher(weak)
            agreement = self.consistency(answers[1], target)
            ramp = schedules.sigmoid_rampup(step, self.settings.rampup)
            loss = loss + self.method.weight * ramp * agreement.loss
            logged |= {"consistency": agreement.loss.detach(), "kept": agreement.kept}
            logged |= self.monitor.update(step, agreement.target)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.teacher is not None:
            self.teacher.update()
            logged["gap"] = parameter_gap(self.teacher)
        found: dict[str, Tensor | float] = {"loss": loss.detach(), **logged}
        last = step + 1 == self.steps
        if self.validate is not None and (last or (step + 1) % self.validate_every == 0):
            found["validation"] = self.validate(self.student if self.teacher is None else self.teacher.module)
        return found

    def _here(self, tensors: tuple[Tensor, ...] | list[Tensor]) -> tuple[Tensor, ...]:
        return tuple(t.to(self.device, non_blocking=True) for t in tensors)

    def stateful(self) -> dict[str, loop.Part]:
        """All that changes."""
        parts: dict[str, loop.Part] = {
            "student": self.student, "monitor": self.monitor, "optimizer": self.optimizer,
        }  # fmt: skip
        return parts if self.teacher is None else {**parts, "teacher": self.teacher}

    def run_config(self) -> Mapping[str, Any]:
        """Method and settings."""
        settings, method = asdict(self.settings), asdict(self.method)
        del settings["checkpoint_every"], method["summary"]
        return {**method, **settings}

    def nan_hint(self) -> str:
        """The settings that tame a loss."""
        return f"lower learning_rate ({self.settings.learning_rate}) or weight ({self.method.weight})"
