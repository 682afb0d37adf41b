"""Fine-tuning towers by a method: what one step of the training loop is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from wmateacher import WMATeacher
from wmateacher.diagnostics import parameter_gap
from wmateacher.integrations.clip import clocks, micro_batches
from wmateacher.integrations.clip.data import batches
from wmateacher.integrations.clip.data.batches import Batch
from wmateacher.integrations.clip.heads import Classified, Classifier, Prompts, Student, towers_of
from wmateacher.integrations.clip.methods import Method, check_clip_norm
from wmateacher.integrations.clip.model import Towers
from wmateacher.integrations.clip.objective import Objective, needed
from wmateacher.integrations.engine import loop, processes, schedules
from wmateacher.losses import PairedEmbeddings

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


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
        precision: `"fp32"`, or `"bf16"` or `"fp16"` autocast with float32 weights; fp16 with a scaler,
            and a step that it skips does not count for the teacher.
        grad_checkpointing: Compute activations again in the backward pass instead of keeping them.
        micro_batch: Pairs that go through the towers at a time, on each process; the losses see the whole
            batch all the same, by caching embeddings (`cached`), for a second forward. None: all at once.
        compile: Compile the forward of student and teacher by `torch.compile`.
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
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    grad_checkpointing: bool = False
    micro_batch: int | None = None
    compile: bool = False
    seed: int = 0
    checkpoint_every: int = 100
    freeze_text: bool = False

    def __post_init__(self) -> None:
        for name, low in (("steps", 1), ("batch_size", 1), ("warmup", 0), ("checkpoint_every", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}")
        if self.micro_batch is not None and self.micro_batch < 1:
            raise ValueError(f"micro_batch must be at least 1, got {self.micro_batch}: None is all at once")
        check_clip_norm(self.clip_norm)
        if self.precision not in ("fp32", *_AUTOCAST):
            raise ValueError(f"precision must be 'fp32', 'bf16' or 'fp16', got {self.precision!r}")

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of the optimizer step with index `step`, from 0."""
        return schedules.warmup_cosine(step, self.steps, self.warmup, self.learning_rate)


@dataclass
class Fit:
    """A finished run.

    Attributes:
        student: The trained towers, under a linear head where the method has one.
        teacher: None for methods without one.
        series: Everything logged, as `loop.History` has it: losses, terms, the gap `|W - M| / |W|`,
            evaluations.
        seconds: Spent training, over all resumes.
    """

    student: Student
    teacher: WMATeacher | None
    series: Mapping[str, list[tuple[int, float]]]
    seconds: float

    @property
    def losses(self) -> list[float]:
        """The total loss of every step."""
        return [value for _, value in self.series["loss"]]

    @property
    def gaps(self) -> list[float]:
        """The gap after every step; empty without a teacher."""
        return [value for _, value in self.series.get("gap", [])]


def build_student(method: Method, towers: Towers, prompts: Prompts | None = None) -> Student:
    """What a method fine-tunes, or evaluates: the pretrained towers, or a classifier on them.

    Args:
        method: Its head decides.
        towers: As pretrained; they become the student's.
        prompts: The task's classes and templates; needed by a linear head.

    Raises:
        ValueError: A linear head without prompts.
    """
    return Classifier(towers, needed(prompts, method.name)) if method.head == "linear" else towers


def fit(
    student: Student,
    method: Method,
    stream: loop.Stream[Batch],
    settings: Settings,
    *,
    prompts: Prompts | None = None,
    anchors: loop.Stream[Batch] | None = None,
    checkpoint: Path | None = None,
    label: str | None = None,
    progress: bool = True,
    after_step: Callable[[int], None] | None = None,
    after_read: Callable[[int, Mapping[str, float]], None] | None = None,
    evaluate: Callable[[Mapping[str, nn.Module]], Mapping[str, float]] | None = None,
    evaluate_every: int = 0,
) -> Fit:
    """Fine-tune `student` in place by `method`.

    An interrupted run that is started again with the same arguments goes on from its last checkpoint
    and ends, on one device and one version of torch, with the same bits as an uninterrupted one.

    Args:
        student: As `started` gives it, on the device to train on.
        method: What to minimise, with which teacher.
        stream: Batches from a given step on.
        settings: How to optimise.
        prompts: The task's classes and templates; needed by methods with a guidance.
        anchors: Pairs like those of pre-training; needed by methods with anchors.
        checkpoint: File to write checkpoints to, and to go on from where it exists.
        label: Name in the progress bar; the method's by default.
        progress: Show a bar, where there is a terminal.
        after_step: Called with the number of steps done after each one.
        after_read: As in `loop.train`.
        evaluate: Given `"student"`, and `"teacher"` where there is one, every `evaluate_every` steps but the
            last; what it gives is logged.
        evaluate_every: 0: never.

    Raises:
        ValueError: The checkpoint cannot be read, or belongs to another run; a batch cannot be shared out
            to the processes; the method needs what was not given.
        FloatingPointError: The loss is not finite.
    """
    processes.check_batch(settings.batch_size, equal=method.head == "linear")
    task = _FineTuning(student, method, stream, settings, prompts, anchors)
    models: dict[str, nn.Module] = {"student": student}
    if task.teacher is not None:
        models["teacher"] = task.teacher.module
    record = loop.train(
        task, checkpoint=checkpoint, checkpoint_every=settings.checkpoint_every,
        label=label, progress=progress, after_step=after_step, after_read=after_read,
        evaluate=None if evaluate is None else lambda: evaluate(models), evaluate_every=evaluate_every,
    )  # fmt: skip
    processes.same_buffers(student)
    return Fit(student, task.teacher, record.series, record.seconds)


class _FineTuning:
    """A `loop.Task`."""

    def __init__(
        self,
        student: Student,
        method: Method,
        stream: loop.Stream[Batch],
        settings: Settings,
        prompts: Prompts | None,
        anchors: loop.Stream[Batch] | None,
    ):
        if isinstance(student, Classifier) != (method.head == "linear"):
            raise ValueError(
                f"method {method.name!r} has head={method.head!r}, got a {type(student).__name__}: build the "
                "student with build_student(method, towers, prompts)"
            )
        if method.anchors and anchors is None:
            raise ValueError(
                f"method {method.name!r} needs anchor pairs, image-text pairs like those of pre-training: "
                "pass anchors=..., or set the method's anchors to 0"
            )
        torch.manual_seed(settings.seed)
        self.name, self.steps = method.name, settings.steps
        self.student, self.method, self.settings = student, method, settings
        self.device = next(student.parameters()).device
        if settings.freeze_text and isinstance(student, Towers):
            student.freeze_text()
        self.objective = Objective(method, student, prompts, settings.seed).to(self.device)
        self.model = processes.parallel(student)
        self.teacher = None
        if method.kernel is not None:
            kernel, every = clocks.build(method.kernel, method.update_every, method.clock)
            self.teacher = WMATeacher(student, kernel, settings.steps, update_every=every)
        self.parameters = [
            p for p in (*student.parameters(), *self.objective.parameters()) if p.requires_grad
        ]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
        )
        if self.teacher is not None:
            self.teacher.attach(self.optimizer)  # which knows of the steps that the scaler skips
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.precision == "fp16")
        if settings.grad_checkpointing:
            towers_of(student).clip.set_grad_checkpointing()
        if settings.compile:
            student.compile()
            if self.teacher is not None:
                self.teacher.module.compile()
        self.batch = loop.BatchStream(stream)
        self.anchors = loop.BatchStream(anchors) if method.anchors and anchors is not None else None
        self.probing = round(method.probe * settings.steps)
        self.probes = False
        student.train()

    def train_step(self, step: int) -> dict[str, Tensor | float]:
        """One optimizer step."""
        self._enter_phase(step)
        batch = self.batch(step)
        anchors = None if self.anchors is None else self.anchors(step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate_at(step)
        given = batch if anchors is None else batches.joined(batch, anchors)
        parts = self._parts(given)
        shown = parts if given is batch else self._parts(batch)
        labels = None if batch.labels is None else batch.labels.to(self.device, non_blocking=True)
        held = None if len(parts) == 1 else micro_batches.Cached(self.model, parts, self._autocast)
        with self._autocast():
            targets = self._targets(shown)
            answers = self.model(*parts[0][:3]) if held is None else held.answers
            beside = None
            if anchors is not None:
                answers, beside = _split(answers, len(batch.images))
            loss, terms = self.objective(
                self.student, answers, targets, labels=labels, anchors=beside, step=step
            )
        self.scaler.scale(loss).backward()
        if held is not None:
            held.backward()
        clip_norm = self.settings.clip_norm
        clip_norm = self.method.clip_norm if clip_norm is None else clip_norm
        if clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.parameters, clip_norm)
        processes.same_buffers(self.student)  # before the teacher takes them, so that all ranks' are saved
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        logged: dict[str, Tensor | float] = {
            "loss": loss.detach(),
            **terms,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
        }
        logged["logit_scale"] = towers_of(self.student).logit_scale.detach().clone()
        if given.unreadable is not None:
            logged["unreadable"] = processes.all_reduce_sum(given.unreadable, self.device)
        if self.teacher is not None:
            logged["gap"] = parameter_gap(self.teacher)
        return logged

    def learning_rate_at(self, step: int) -> float:
        """Each phase has its own warm-up and decay."""
        settings, method, probing = self.settings, self.method, self.probing
        if step < probing:
            first, length, rate = 0, probing, method.probe_rate
        else:
            first, length, rate = probing, settings.steps - probing, method.rate
        warmup = settings.warmup * length // settings.steps
        return rate * replace(settings, steps=length, warmup=warmup).learning_rate_at(step - first)

    def _enter_phase(self, step: int) -> None:
        """Train the head alone while probing, and all from then on."""
        if self.probes == (step < self.probing) or not isinstance(self.student, Classifier):
            return
        self.probes = step < self.probing
        self.student.probe(self.probes)
        self.model = processes.parallel(self.student)

    def _autocast(self) -> torch.autocast:
        dtype = _AUTOCAST.get(self.settings.precision)
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)

    def _targets(self, parts: list[Batch]) -> PairedEmbeddings | Classified | None:
        """What the teacher gives."""
        if self.teacher is None:
            return None
        return self.teacher(*parts[0][:3]) if len(parts) == 1 else micro_batches.embedded(self.teacher, parts)

    def _parts(self, batch: Batch) -> list[Batch]:
        """What goes through the towers at a time, taken apart on the host and sent to the device."""
        size = self.settings.micro_batch
        parts = [batch] if size is None or size >= len(batch.images) else micro_batches.parts_of(batch, size)
        return [part.to(self.device) for part in parts]

    def stateful(self) -> dict[str, loop.Part]:
        """All that changes."""
        parts: dict[str, loop.Part] = {
            "student": self.student, "objective": self.objective, "optimizer": self.optimizer,
            "scaler": self.scaler,
        }  # fmt: skip
        return parts if self.teacher is None else {**parts, "teacher": self.teacher}

    def run_config(self) -> dict[str, Any]:
        """Method and settings."""
        settings = asdict(self.settings)
        del settings["checkpoint_every"]
        return {**self.method.settings(), **settings}

    def nan_hint(self) -> str:
        """The settings that tame a loss."""
        return f"lower learning_rate ({self.settings.learning_rate}) or clip_norm ({self.settings.clip_norm})"


def _split(embeddings: PairedEmbeddings, count: int) -> tuple[PairedEmbeddings, PairedEmbeddings]:
    image, text, scale = embeddings
    return (
        PairedEmbeddings(image[:count], text[:count], scale),
        PairedEmbeddings(image[count:], text[count:], scale),
    )
