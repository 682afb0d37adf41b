"""Fine-tuning towers by a method: what one step of the training loop is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from wmateacher import WMATeacher
from wmateacher.diagnostics import parameter_gap
from wmateacher.integrations import loop, processes, schedules
from wmateacher.integrations.clip.methods import Method
from wmateacher.integrations.clip.objective import Objective
from wmateacher.integrations.clip.pairs import Batch
from wmateacher.integrations.clip.towers import Towers


@dataclass(frozen=True)
class Settings:
    """How a run is optimised: AdamW, linear warm-up, cosine decay to 0.

    Attributes:
        steps: Optimizer steps T of the run.
        learning_rate: At the end of the warm-up.
        batch_size: Image-text pairs a step.
        weight_decay: On every parameter, in one group, as in the published code.
        warmup: Steps of linear warm-up; 500 in the published recipes.
        clip_norm: Largest gradient norm; None: unclipped.
        precision: `"fp32"`, or `"bf16"` autocast with float32 weights.
        seed: Of initialisation, dropout and data.
        checkpoint_every: Steps between checkpoints.
        freeze_text: Train the image tower and the logit scale only.
    """

    steps: int
    learning_rate: float
    batch_size: int
    weight_decay: float = 0.1
    warmup: int = 500
    clip_norm: float | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: int = 0
    checkpoint_every: int = 100
    freeze_text: bool = False

    def __post_init__(self) -> None:
        for name, low in (("steps", 1), ("batch_size", 1), ("warmup", 0), ("checkpoint_every", 1)):
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
        student: The trained towers.
        teacher: None for methods without one.
        losses: The total loss of every step.
        gaps: `|W - M| / |W|` after every step; empty without a teacher.
        seconds: Spent training, over all resumes.
    """

    student: Towers
    teacher: WMATeacher | None
    losses: list[float]
    gaps: list[float]
    seconds: float


def fit(
    student: Towers,
    method: Method,
    stream: loop.Stream[Batch],
    settings: Settings,
    *,
    checkpoint: Path | None = None,
    label: str | None = None,
    progress: bool = True,
    after_step: Callable[[int], None] | None = None,
) -> Fit:
    """Fine-tune `student` in place by `method`.

    An interrupted run that is started again with the same arguments goes on from its last checkpoint
    and ends, on one device and one version of torch, with the same bits as an uninterrupted one.

    Args:
        student: The pretrained towers, on the device to train on.
        method: What to minimise, with which teacher.
        stream: Batches from a given step on.
        settings: How to optimise.
        checkpoint: File to write checkpoints to, and to go on from where it exists.
        label: Name in the progress bar; the method's by default.
        progress: Show a bar, where there is a terminal.
        after_step: Called with the number of steps done after each one.

    Raises:
        ValueError: The checkpoint cannot be read, or belongs to another run; a batch has fewer pairs
            than there are processes.
        FloatingPointError: The loss is not finite.
    """
    processes.check_batch(settings.batch_size)
    task = _FineTuning(student, method, stream, settings)
    record = loop.train(
        task, checkpoint=checkpoint, checkpoint_every=settings.checkpoint_every,
        label=label, progress=progress, after_step=after_step,
    )  # fmt: skip
    processes.same_buffers(student)
    return Fit(student, task.teacher, record.values("loss"), record.values("gap"), record.seconds)


class _FineTuning:
    """A `loop.Task`."""

    def __init__(self, student: Towers, method: Method, stream: loop.Stream[Batch], settings: Settings):
        torch.manual_seed(settings.seed)
        self.name, self.steps = method.name, settings.steps
        self.student, self.method, self.settings = student, method, settings
        self.device = next(student.parameters()).device
        if settings.freeze_text:
            student.freeze_text()
        self.objective = Objective(method, student).to(self.device)
        self.model = processes.parallel(student)
        self.teacher = None
        if method.kernel is not None:
            self.teacher = WMATeacher(student, method.kernel, settings.steps)
        self.parameters = [
            p for p in (*student.parameters(), *self.objective.parameters()) if p.requires_grad
        ]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
        )
        self.batch = loop.Feed(stream)
        student.train()

    def advance(self, step: int) -> dict[str, Tensor]:
        """One optimizer step."""
        batch = self.batch(step)
        batch = Batch(processes.part(batch.images), batch.tokens, processes.part(batch.caption))
        batch = Batch(*(t.to(self.device, non_blocking=True) for t in batch))
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate_at(step)
        bf16 = self.settings.precision == "bf16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bf16):
            embeddings = self.model(*batch)
            targets = None if self.teacher is None else self.teacher(*batch)
            loss = self.objective(self.student, embeddings, targets).total
        loss.backward()
        if self.settings.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.teacher is None:
            return {"loss": loss.detach()}
        self.teacher.update()
        return {"loss": loss.detach(), "gap": parameter_gap(self.teacher)}

    def parts(self) -> dict[str, loop.Part]:
        """All that changes."""
        parts: dict[str, loop.Part] = {
            "student": self.student, "objective": self.objective, "optimizer": self.optimizer,
        }  # fmt: skip
        return parts if self.teacher is None else {**parts, "teacher": self.teacher}

    def identity(self) -> dict[str, Any]:
        """Method and settings."""
        settings, method = asdict(self.settings), asdict(self.method)
        del settings["checkpoint_every"], method["summary"]
        return {**method, **settings}

    def remedy(self) -> str:
        """The settings that tame a loss."""
        return f"lower learning_rate ({self.settings.learning_rate}) or clip_norm ({self.settings.clip_norm})"
