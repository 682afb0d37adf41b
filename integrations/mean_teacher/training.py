"""Semi-supervised training by a method: the consistency and one step of the training loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wmateacher import WMATeacher, losses
from wmateacher.diagnostics import parameter_gap
from wmateacher.integrations.engine import collapse, loop, processes, schedules, training
from wmateacher.integrations.mean_teacher.recipes import Method, Settings

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Agreement", "Consistency", "Labelled", "SemiSupervised", "Unlabelled", "fit"]

Labelled = loop.Stream[tuple[Tensor, Tensor]]
"""Weak views `[B, C, H, W]` and labels `[B]`."""
Unlabelled = loop.Stream[tuple[tuple[Tensor, Tensor], Tensor]]
"""Weak and strong views `[B, C, H, W]`, and labels, which are not used."""


class Agreement(NamedTuple):
    """The result of a consistency loss.

    Attributes:
        loss: The mean over all images, where images that do not count contribute 0; 0-d, with the student's
            gradient.
        kept: The share of images that count, 0-d.
        target: The target's probabilities, shape `[B, C]`.
    """

    loss: Tensor
    kept: Tensor
    target: Tensor


class Consistency(nn.Module):
    """The registry's `mse` or `kl`, or cross-entropy against pseudo-labels, over confident images.

    Args:
        kind: One of `CONSISTENCIES`.
        confidence: Images with a smaller largest target probability contribute 0, as in FixMatch; None for
            all images.
    """

    def __init__(self, kind: str, confidence: float | None = None):
        super().__init__()
        self.confidence = confidence
        self.criterion = None if kind == "pseudo" else losses.build(kind)

    def forward(self, student: Tensor, target: Tensor) -> Agreement:
        """Compare logits.

        Args:
            student: The student's logits on the strong views, shape `[B, C]`.
            target: The target's logits on the weak views, shape `[B, C]`; no gradient reaches them.
        """
        target = target.detach().float()
        probabilities = target.softmax(-1)
        sure, label = probabilities.max(-1)
        kept = torch.ones_like(sure) if self.confidence is None else (sure >= self.confidence).float()
        if self.criterion is None:
            each = F.cross_entropy(student.float(), label, reduction="none")
            return Agreement((kept * each).mean(), kept.mean(), probabilities)
        # Both criteria are 0, with no gradient, for equal inputs: an image that does not count gets the
        # target's logits on both sides.
        student = torch.where(kept[:, None] > 0, student.float(), target)
        return Agreement(self.criterion(student, target), kept.mean(), probabilities)


def fit(
    student: nn.Module,
    method: Method,
    labelled: Labelled,
    unlabelled: Unlabelled,
    settings: Settings,
    *,
    classes: int,
    evaluate: training.Evaluate | None = None,
    **options: Unpack[loop.Options],
) -> training.Fit:
    """Train `student` in place by `method`.

    The history has `loss` and `supervised` of every step; with unlabelled images `consistency` and `kept`
    (the share of images that count); with a teacher `gap`. With several processes, the losses are
    those of the first process's part of every batch.

    Args:
        student: Maps images to logits `[B, classes]`, on the device to train on.
        method: The loss and the teacher.
        labelled: Gives labelled images from a step on.
        unlabelled: Gives unlabelled images from a step on; methods of `distill_weight` 0 do not read it.
        settings: The optimisation.
        classes: The number of classes C.
        evaluate: Called at every evaluation with the networks; returns the values to log.
        **options: Options of `loop.train`, such as `checkpoint`.

    Raises:
        ValueError: If the student has another number of outputs, or the checkpoint cannot be read or belongs
            to another run.
        FloatingPointError: If the loss is not finite.

    Warns:
        CollapseWarning: If the targets are constant, or leave out most classes.
    """
    processes.check_batch(settings.labelled_batch, "labelled_batch", equal=True)
    processes.check_batch(settings.unlabelled_batch, "unlabelled_batch", equal=True)
    return training.fit(
        SemiSupervised(student, method, labelled, unlabelled, settings, classes), evaluate, **options
    )


class SemiSupervised(training.Training):
    """Train a classifier on labelled images and on agreement over unlabelled ones.

    Args:
        student: Maps images to logits `[B, classes]`.
        method: The loss and the teacher.
        labelled: Gives labelled images from a step on.
        unlabelled: Gives unlabelled images from a step on.
        settings: The optimisation.
        classes: The number of classes C.
    """

    settings: Settings
    teacher: WMATeacher | None

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
        student.train()
        self.method, self.classes = method, classes
        self.model = processes.parallel(student)
        teacher = None
        if method.kernel is not None:
            teacher = WMATeacher(
                student, method.kernel, settings.steps, mode=settings.mode, buffers=settings.buffers
            )
        super().__init__(method.name, settings, student, teacher)
        self.consistency = Consistency(method.consistency, method.confidence)
        self.monitor = collapse.OutputMonitor(classes).to(self.device)
        self.watch = collapse.CollapseWatch(
            method.name, settings.steps, classes, 0.5 * classes,
            f"lower distill_weight ({method.distill_weight}) or learning_rate ({settings.learning_rate}), "
            f"or lengthen rampup ({settings.rampup})",
        )  # fmt: skip
        self.optimizer = torch.optim.SGD(
            student.parameters(), lr=settings.learning_rate, momentum=settings.momentum,
            weight_decay=settings.weight_decay, nesterov=settings.momentum > 0,
        )  # fmt: skip
        self.labelled, self.unlabelled = loop.BatchStream(labelled), loop.BatchStream(unlabelled)

    def batch(self, step: int) -> dict[str, Any]:
        """Return the images of a step."""
        return {"labelled": self.labelled(step), "unlabelled": self.unlabelled(step)}

    def train_step(self, step: int) -> dict[str, Tensor | float]:
        """Take one optimizer step."""
        settings = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate_at(step)
        images, labels = self._to_device(self.labelled(step))
        parts = [images]
        if self.method.distill_weight:
            (weak, strong), _ = self.unlabelled(step)
            weak, strong = self._to_device((weak, strong))
            # The student needs its own logits of the weak views only if there is no teacher.
            parts += [strong] if self.teacher is not None else [strong, weak]
        with settings.autocast(self.device):
            # One batch, so that BatchNorm sees labelled and unlabelled images together.
            logits = self.model(torch.cat(parts)).float().split([len(p) for p in parts])
        if logits[0].shape[-1] != self.classes:
            raise ValueError(
                f"the student answers with {logits[0].shape[-1]} logits, but there are {self.classes} "
                f"classes: build it with num_classes={self.classes}"
            )
        supervised = F.cross_entropy(logits[0], labels)
        loss, logged = supervised, {"supervised": supervised.detach()}
        if self.method.distill_weight:
            with settings.autocast(self.device):
                target = logits[2] if self.teacher is None else self.teacher(weak)
            agreement = self.consistency(logits[1], target)
            ramp = schedules.sigmoid_rampup(step, settings.rampup)
            loss = loss + self.method.distill_weight * ramp * agreement.loss
            logged |= {"consistency": agreement.loss.detach(), "kept": agreement.kept}
            logged |= self.monitor.update(step, agreement.target)
        loss.backward()
        if settings.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.student.parameters(), settings.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.teacher is not None:
            self.teacher.update()
            logged["gap"] = parameter_gap(self.teacher)
        return {"loss": loss.detach(), **logged}

    def _to_device(self, tensors: tuple[Tensor, ...] | list[Tensor]) -> tuple[Tensor, ...]:
        return tuple(t.to(self.device, non_blocking=True) for t in tensors)

    def stateful(self) -> dict[str, loop.Part]:
        """Return every object whose state changes during training."""
        parts: dict[str, loop.Part] = {
            "student": self.student, "monitor": self.monitor, "optimizer": self.optimizer,
        }  # fmt: skip
        return parts if self.teacher is None else {**parts, "teacher": self.teacher}

    def run_config(self) -> Mapping[str, Any]:
        """Return the method and the settings."""
        method = asdict(self.method)
        del method["summary"]
        return {**method, **self.settings.run_config()}

    def nan_hint(self) -> str:
        """Return the settings that keep a loss finite."""
        return (
            f"lower learning_rate ({self.settings.learning_rate}) or distill_weight "
            f"({self.method.distill_weight})"
        )
