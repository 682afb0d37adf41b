"""Training a backbone by DINO: what one step of the training loop is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from wmateacher import WMATeacher
from wmateacher.diagnostics import parameter_gap
from wmateacher.integrations.dino.loss import MultiCropLoss, koleo
from wmateacher.integrations.dino.model import Head, MultiCrop
from wmateacher.integrations.engine import collapse, loop, processes, schedules
from wmateacher.losses.logits import DINO

PAPER_KERNEL = "ema(0.996,1.0,schedule=cosine)"
"""Retention .996 -> 1 along a cosine (Caron et al. 2021, section 3.2)."""


@dataclass(frozen=True)
class Settings:
    """How DINO is optimised; the defaults without a remark are those of Caron et al. 2021.

    Attributes:
        steps: Optimizer steps T.
        batch_size: Images a step, over all processes.
        warmup: Steps of linear warm-up (10 epochs).
        hold_last: Steps during which the head's last layer stays as it is (1 epoch).
        base_learning_rate: For 256 images; the peak is `base_learning_rate * batch_size / 256`.
        final_learning_rate: At the end of the cosine.
        weight_decay: At the start, on matrices only.
        final_weight_decay: At the end of its cosine.
        clip_norm: Largest gradient norm; None: unclipped.
        outputs: K, width of the head.
        hidden: Width of the head's MLP.
        bottleneck: Width of what the head normalises.
        unit_norm: Keep the rows of the head's last layer at norm 1.
        head_batch_norm: Normalise the hidden layers of the head's MLP over the batch.
        student_temperature: tau_S.
        teacher_temperature: tau_T after its warm-up.
        first_teacher_temperature: tau_T at the start.
        temperature_warmup: Steps until `teacher_temperature` (30 epochs).
        centering: `"mean"`, or `"sinkhorn"` as in DINOv2.
        center_momentum: Of the mean centring.
        koleo: Weight of KoLeo on the student's first global crop; 0.1 in DINOv2.
        precision: `"fp32"`, or `"bf16"` autocast with float32 weights.
        seed: Of initialisation, drop path and data.
        checkpoint_every: Steps between checkpoints.
    """

    steps: int
    batch_size: int
    warmup: int
    hold_last: int
    base_learning_rate: float = 0.0005
    final_learning_rate: float = 1e-6
    weight_decay: float = 0.04
    final_weight_decay: float = 0.4
    clip_norm: float | None = 3.0
    outputs: int = 65536
    hidden: int = 2048
    bottleneck: int = 256
    unit_norm: bool = True
    head_batch_norm: bool = False
    student_temperature: float = 0.1
    teacher_temperature: float = 0.07
    first_teacher_temperature: float = 0.04
    temperature_warmup: int = 0
    centering: str = "mean"
    center_momentum: float = 0.9
    koleo: float = 0.0
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: int = 0
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        lows = {"steps": 1, "batch_size": 2, "warmup": 0, "hold_last": 0, "temperature_warmup": 0,
                "checkpoint_every": 1, "koleo": 0}  # fmt: skip
        for name, low in lows.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        for name in ("base_learning_rate", "first_teacher_temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision must be 'fp32' or 'bf16', got {self.precision!r}")

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of the optimizer step with index `step`, from 0."""
        peak = self.base_learning_rate * self.batch_size / 256
        return schedules.warmup_cosine(step, self.steps, self.warmup, peak, self.final_learning_rate)

    def weight_decay_at(self, step: int) -> float:
        """The weight decay of that step."""
        return schedules.cosine(step, self.steps, self.weight_decay, self.final_weight_decay)

    def teacher_temperature_at(self, step: int) -> float:
        """tau_T of that step."""
        return schedules.linear_then_flat(
            step, self.temperature_warmup, self.first_teacher_temperature, self.teacher_temperature
        )


@dataclass
class Fit:
    """A finished run.

    Attributes:
        student: The trained network.
        teacher: Its average.
        record: Per step `loss`, `gap` (|W - M| / |W|), and from time to time `information` and `used`
            of the teacher's outputs, and what `validate` gave.
        collapsed: What the teacher's outputs had collapsed to at the end, in words; None: they had not.
    """

    student: MultiCrop
    teacher: WMATeacher
    record: loop.History
    collapsed: str | None

    @property
    def average(self) -> MultiCrop:
        """The teacher's network."""
        assert isinstance(self.teacher.module, MultiCrop)
        return self.teacher.module


def fit(
    backbone: nn.Module,
    stream: loop.Stream[list[Tensor]],
    settings: Settings,
    kernel: str = PAPER_KERNEL,
    *,
    checkpoint: Path | None = None,
    label: str | None = None,
    progress: bool = True,
    validate: Callable[[nn.Module], float] | None = None,
    validate_every: int = 100,
    after_step: Callable[[int], None] | None = None,
) -> Fit:
    """Train `backbone` in place by DINO, under a teacher with that kernel.

    An interrupted run that is started again with the same arguments goes on from its last checkpoint
    and ends with the same bits as an uninterrupted one. Under torchrun each process sees its part of every
    batch.

    Args:
        backbone: Images to features, on the device to train on.
        stream: Lists of crops from a given step on, the two global ones first.
        settings: How to optimise.
        kernel: Of the teacher.
        checkpoint: File to write checkpoints to, and to go on from where it exists.
        label: Name in the progress bar; the kernel by default.
        progress: Show a bar, where there is a terminal.
        validate: A score of the teacher's backbone, logged as `validation`.
        validate_every: Steps between them.
        after_step: Called with the number of steps done after each one.

    Raises:
        ValueError: The checkpoint cannot be read, or belongs to another run; a batch has no equal parts for
            all processes.
        FloatingPointError: The loss is not finite.

    Warns:
        CollapseWarning: The teacher's outputs are constant, or hardly any of them are used.
    """
    processes.check_batch(settings.batch_size, equal=True)
    task = _Pretraining(backbone, stream, settings, kernel)
    if validate is not None:
        task.validate, task.validate_every = validate, validate_every
    record = loop.train(
        task, checkpoint=checkpoint, checkpoint_every=settings.checkpoint_every,
        label=label, progress=progress, after_step=after_step, after_read=task.watch.see,
    )  # fmt: skip
    processes.same_buffers(task.student)
    return Fit(task.student, task.teacher, record, task.watch.judge(record))


class _Pretraining:
    """A `loop.Task`."""

    def __init__(
        self, backbone: nn.Module, stream: loop.Stream[list[Tensor]], settings: Settings, kernel: str
    ):
        torch.manual_seed(settings.seed)
        self.name, self.steps, self.settings, self.kernel = kernel, settings.steps, settings, kernel
        self.device = next(backbone.parameters()).device
        head = Head(
            backbone.num_features,  # type: ignore[arg-type]
            settings.outputs, settings.hidden, settings.bottleneck, unit_norm=settings.unit_norm,
            batch_norm=settings.head_batch_norm,
        )  # fmt: skip
        self.student = MultiCrop(backbone, head).to(self.device).train()
        self.model = processes.parallel(self.student)
        self.teacher = WMATeacher(self.student, kernel, settings.steps)
        criterion = DINO(
            settings.outputs, settings.student_temperature, settings.first_teacher_temperature,
            settings.center_momentum, settings.centering,
        )  # fmt: skip
        self.loss = MultiCropLoss(criterion).to(self.device)
        self.monitor = collapse.OutputMonitor(settings.outputs).to(self.device)
        self.watch = collapse.Watch(
            kernel, settings.steps, settings.outputs, min(5.0, 0.05 * settings.outputs),
            f"lower teacher_temperature ({settings.teacher_temperature}) or base_learning_rate "
            f"({settings.base_learning_rate}), or use another kernel",
        )  # fmt: skip
        self.optimizer = torch.optim.AdamW(_groups(self.student), lr=0.0, fused=True)
        self.batch = loop.BatchStream(stream)
        self.validate: Callable[[nn.Module], float] | None = None
        self.validate_every = 1

    def train_step(self, step: int) -> dict[str, Tensor | float]:
        """One optimizer step."""
        settings = self.settings
        crops = [crop.to(self.device, non_blocking=True) for crop in self.batch(step)]
        decayed, plain = self.optimizer.param_groups
        decayed["lr"] = plain["lr"] = settings.learning_rate_at(step)
        decayed["weight_decay"] = settings.weight_decay_at(step)
        self.loss.criterion.teacher_temperature = settings.teacher_temperature_at(step)
        bf16 = settings.precision == "bf16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bf16):
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
        logged.update(self.monitor.update(step, probabilities))
        last = step + 1 == self.steps
        if self.validate is not None and (last or (step + 1) % self.validate_every == 0):
            logged["validation"] = self.validate(self.teacher.module.backbone)  # type: ignore[arg-type]
        return logged

    def stateful(self) -> dict[str, loop.Part]:
        """All that changes."""
        return {
            "student": self.student, "teacher": self.teacher, "loss": self.loss,
            "monitor": self.monitor, "optimizer": self.optimizer,
        }  # fmt: skip

    def run_config(self) -> dict[str, Any]:
        """Kernel and settings."""
        settings = asdict(self.settings)
        del settings["checkpoint_every"]
        return {"kernel": self.kernel, **settings}

    def nan_hint(self) -> str:
        """The settings that tame a loss."""
        return (
            f"lower base_learning_rate ({self.settings.base_learning_rate}) or clip_norm "
            f"({self.settings.clip_norm})"
        )


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    """Matrices, which are decayed, and the rest, which is not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.0},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
