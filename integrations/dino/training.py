"""Training a backbone by DINO: one step of the training loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from wmateacher import WMATeacher
from wmateacher.diagnostics import parameter_gap
from wmateacher.integrations.dino.model import Head, MultiCrop, MultiCropLoss, koleo
from wmateacher.integrations.dino.recipes import PAPER_KERNEL, Settings
from wmateacher.integrations.engine import collapse, loop, processes, training
from wmateacher.losses.logits import DINO

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Pretraining", "fit"]


def fit(
    backbone: nn.Module,
    stream: loop.Stream[list[Tensor]],
    settings: Settings,
    kernel: str = PAPER_KERNEL,
    evaluate: training.Evaluate | None = None,
    **options: Unpack[loop.Options],
) -> training.Fit:
    """Train `backbone` in place by DINO, under a teacher with the given kernel.

    The history has `loss` and `gap` (|W - M| / |W|) of every step, and from time to time `information` and
    `used` of the teacher's outputs. Under torchrun each process sees its part of every batch.

    Args:
        backbone: Maps images to features, on the device to train on.
        stream: Gives lists of crops from a step on, the two global crops first.
        settings: The optimisation.
        kernel: The teacher's kernel.
        evaluate: Called at every evaluation with the networks, each a `MultiCrop`; returns the values to log.
        **options: Options of `loop.train`, such as `checkpoint`.

    Raises:
        ValueError: If the checkpoint cannot be read or belongs to another run, or a batch cannot be split
            into equal parts for all processes.
        FloatingPointError: If the loss is not finite.

    Warns:
        CollapseWarning: If the teacher's outputs are constant, or most of them are not used.
    """
    processes.check_batch(settings.batch_size, equal=True)
    return training.fit(Pretraining(backbone, stream, settings, kernel), evaluate, **options)


class Pretraining(training.Training):
    """Train a backbone and a head on crops of unlabelled images.

    Args:
        backbone: Maps images to features.
        stream: Gives lists of crops from a step on, the two global crops first.
        settings: The optimisation.
        kernel: The teacher's kernel.
    """

    settings: Settings
    student: MultiCrop
    teacher: WMATeacher

    def __init__(
        self, backbone: nn.Module, stream: loop.Stream[list[Tensor]], settings: Settings, kernel: str
    ):
        torch.manual_seed(settings.seed)
        head = Head(
            backbone.num_features,  # type: ignore[arg-type]
            settings.outputs, settings.hidden, settings.bottleneck, unit_norm=settings.unit_norm,
            batch_norm=settings.head_batch_norm,
        )  # fmt: skip
        device = next(backbone.parameters()).device
        student = MultiCrop(backbone, head).to(device).train()
        self.model = processes.parallel(student)
        super().__init__(kernel, settings, student, WMATeacher(student, kernel, settings.steps))
        criterion = DINO(
            settings.outputs, settings.student_temperature, settings.first_teacher_temperature,
            settings.center_momentum, settings.centering,
        )  # fmt: skip
        self.loss = MultiCropLoss(criterion).to(self.device)
        self.monitor = collapse.OutputMonitor(settings.outputs).to(self.device)
        self.watch = collapse.CollapseWatch(
            kernel, settings.steps, settings.outputs, min(5.0, 0.05 * settings.outputs),
            f"lower teacher_temperature ({settings.teacher_temperature}) or learning_rate "
            f"({settings.learning_rate}), or use another kernel",
        )  # fmt: skip
        self.optimizer = torch.optim.AdamW(_groups(student), lr=0.0, fused=True)
        self.batch = loop.BatchStream(stream)

    def train_step(self, step: int) -> dict[str, Tensor | float]:
        """Take one optimizer step."""
        settings = self.settings
        crops = [crop.to(self.device, non_blocking=True) for crop in self.batch(step)]
        decayed, plain = self.optimizer.param_groups
        decayed["lr"] = plain["lr"] = settings.learning_rate_at(step)
        decayed["weight_decay"] = settings.weight_decay_at(step)
        self.loss.criterion.teacher_temperature = settings.teacher_temperature_at(step)
        with settings.autocast(self.device):
            target = self.teacher(crops[:2])
            output = self.model(crops)
        loss, probabilities = self.loss(output.logits, target.logits)
        total = loss
        if settings.koleo:
            total = loss + settings.koleo * koleo(output.features[0])
        total.backward()
        if settings.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.student.parameters(), settings.clip_norm)
        if step < settings.hold_last:
            self.student.head.hold_last_layer()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.teacher.update()
        logged: dict[str, Tensor | float] = {"loss": loss.detach(), "gap": parameter_gap(self.teacher)}
        return logged | self.monitor.update(step, probabilities)

    def stateful(self) -> dict[str, loop.Part]:
        """Return every object whose state changes during training."""
        return {
            "student": self.student, "teacher": self.teacher, "loss": self.loss,
            "monitor": self.monitor, "optimizer": self.optimizer,
        }  # fmt: skip

    def run_config(self) -> dict[str, Any]:
        """Return the kernel and the settings."""
        return {"kernel": self.name, **self.settings.run_config()}


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    """Return the parameter groups: matrices, which are decayed, and all others, which are not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.0},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
