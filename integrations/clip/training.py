"""Fine-tune towers by a method: one step of the training loop."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from wmateacher import WMATeacher
from wmateacher.diagnostics import parameter_gap
from wmateacher.integrations.clip import clocks, micro_batches
from wmateacher.integrations.clip.data import batches
from wmateacher.integrations.clip.data.batches import Batch
from wmateacher.integrations.clip.methods import Method
from wmateacher.integrations.clip.model import (
    Classified,
    Classifier,
    Prompts,
    Student,
    Towers,
    towers_of,
)
from wmateacher.integrations.clip.objective import Objective, require_prompts
from wmateacher.integrations.clip.recipes import Settings
from wmateacher.integrations.engine import loop, processes, training
from wmateacher.losses import PairedEmbeddings

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["FineTuning", "build_student", "fit"]


def build_student(method: Method, towers: Towers, prompts: Prompts | None = None) -> Student:
    """Return the model that a method fine-tunes: the towers, or a classifier on them.

    Args:
        method: The method, whose head decides.
        towers: The pretrained towers. They become the student's; pass a copy to keep them.
        prompts: The texts of the task, required by a linear head.

    Raises:
        ValueError: If a linear head has no prompts.
    """
    if method.head == "linear":
        return Classifier(towers, require_prompts(prompts, method.name), method.scale_outside)
    return towers


def fit(
    student: Student,
    method: Method,
    stream: loop.Stream[Batch],
    settings: Settings,
    *,
    prompts: Prompts | None = None,
    anchors: loop.Stream[Batch] | None = None,
    evaluate: training.Evaluate | None = None,
    after_read: loop.AfterRead | None = None,
    **options: Unpack[loop.Options],
) -> training.Fit:
    """Fine-tune `student` in place by `method`.

    The history has the loss, its terms, the learning rate and the logit scale of every step, with a teacher
    the gap |W - M| / |W|, and what `evaluate` returns.

    Args:
        student: The result of `build_student`, on the device to train on.
        method: The method.
        stream: The fine-tuning pairs.
        settings: Settings of the optimisation.
        prompts: The texts of the task, required by methods with a guidance.
        anchors: Pairs like those of pre-training, required by methods with anchors.
        evaluate: Called at every evaluation with the networks; returns the values to log.
        after_read: Called with the logged values, as in `loop.train`.
        **options: Options of `loop.train`, such as `checkpoint`.

    Raises:
        ValueError: If the checkpoint cannot be read or belongs to another run, a batch cannot be divided
            among the processes, or something that the method needs is missing.
        FloatingPointError: If the loss is not finite.
    """
    processes.check_batch(settings.batch_size, equal=method.head == "linear")
    task = FineTuning(student, method, stream, settings, prompts, anchors)
    return training.fit(task, evaluate, after_read, **options)


class FineTuning(training.Training):
    """Train a student on image-text pairs by a method.

    Args:
        student: The result of `build_student`, on the device to train on.
        method: The method.
        stream: The fine-tuning pairs.
        settings: Settings of the optimisation.
        prompts: The texts of the task, or None.
        anchors: Pairs like those of pre-training, or None.

    Raises:
        ValueError: If something that the method needs is missing.
    """

    settings: Settings
    student: Student
    teacher: WMATeacher | None

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
        if settings.freeze_text and isinstance(student, Towers):
            student.freeze_text()
        objective = Objective(method, student, prompts, settings.seed)
        self.model = processes.parallel(student)
        teacher = None
        if method.kernel is not None:
            kernel, every = clocks.build(method.kernel, method.update_every, method.clock)
            mode: Literal["train", "eval"] = "train" if method.batch_norm == "batch" else "eval"
            if mode == "eval":
                # As in the published code, however far the student moves. The teacher warns in its calls.
                warnings.filterwarnings("ignore", "the teacher normalises with the running statistics")
            teacher = WMATeacher(
                student, kernel, settings.steps, update_every=every, mode=mode, buffers="keep"
            )
        super().__init__(method.name, settings, student, teacher)
        self.method, self.objective = method, objective.to(self.device)
        self.parameters = [
            p for p in (*student.parameters(), *self.objective.parameters()) if p.requires_grad
        ]
        decay = settings.weight_decay if method.weight_decay is None else method.weight_decay
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=settings.learning_rate, weight_decay=decay, fused=True
        )
        if self.teacher is not None:
            # The optimizer knows which steps the gradient scaler skips; those must not be averaged.
            self.teacher.attach(self.optimizer)
        self.scaler = settings.grad_scaler(self.device)
        if settings.grad_checkpointing:
            towers_of(student).clip.set_grad_checkpointing()
        if settings.compile:
            student.compile()
            if self.teacher is not None:
                self.teacher.module.compile()
        self.batch = loop.BatchStream(stream)
        self.anchors = loop.BatchStream(anchors) if method.anchors and anchors is not None else None
        self.probe_steps = round(method.probe * settings.steps)
        self.is_probing = False
        student.train()

    def train_step(self, step: int) -> dict[str, Tensor | float]:
        """Take one optimizer step and return the values to log."""
        self._enter_phase(step)
        batch = self.batch(step)
        anchors = None if self.anchors is None else self.anchors(step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate_at(step)
        pairs = batch if anchors is None else batches.join(batch, anchors)
        parts = self._micro_batches(pairs)
        teacher_parts = parts if pairs is batch else self._micro_batches(batch)
        labels = None if batch.labels is None else batch.labels.to(self.device, non_blocking=True)
        cached = None if len(parts) == 1 else micro_batches.Cached(self.model, parts, self._autocast)
        with self._autocast():
            targets = None if step < self.method.distill_from_step else self._targets(teacher_parts)
            answers = self.model(*parts[0][:3]) if cached is None else cached.answers
            anchor_answers = None
            if anchors is not None:
                answers, anchor_answers = _split(answers, len(batch.images))
            loss, terms = self.objective(
                self.student, answers, targets, labels=labels, anchors=anchor_answers, step=step
            )
        self.scaler.scale(loss).backward()
        if cached is not None:
            cached.backward()
        clip_norm = self.settings.clip_norm
        clip_norm = self.method.clip_norm if clip_norm is None else clip_norm
        if clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.parameters, clip_norm)
        # Before the teacher copies the buffers, so that a checkpoint of rank 0 holds those of all ranks.
        processes.same_buffers(self.student)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        logged: dict[str, Tensor | float] = {
            "loss": loss.detach(),
            **terms,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
        }
        logged["logit_scale"] = towers_of(self.student).logit_scale.detach().clone()
        if pairs.unreadable is not None:
            logged["unreadable"] = processes.all_reduce_sum(pairs.unreadable, self.device)
        if self.teacher is not None:
            logged["gap"] = parameter_gap(self.teacher)
        return logged

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of a step; each phase has its own warm-up and decay."""
        settings, method = self.settings, self.method
        if step < self.probe_steps:
            first, length, rate = 0, self.probe_steps, method.probe_rate
        else:
            first, length, rate = self.probe_steps, settings.steps - self.probe_steps, method.rate
        warmup = settings.warmup * length // settings.steps
        return rate * replace(settings, steps=length, warmup=warmup).learning_rate_at(step - first)

    def _enter_phase(self, step: int) -> None:
        """Switch between probing, which trains the head alone, and training everything."""
        if self.is_probing == (step < self.probe_steps) or not isinstance(self.student, Classifier):
            return
        self.is_probing = step < self.probe_steps
        self.student.set_probing(self.is_probing)
        self.model = processes.parallel(self.student)

    def _autocast(self) -> torch.autocast:
        return self.settings.autocast(self.device)

    def _targets(self, parts: list[Batch]) -> PairedEmbeddings | Classified | None:
        """Return the teacher's output, or None without a teacher."""
        if self.teacher is None:
            return None
        return self.teacher(*parts[0][:3]) if len(parts) == 1 else micro_batches.embed(self.teacher, parts)

    def _micro_batches(self, batch: Batch) -> list[Batch]:
        """Split a batch on the host and send the parts to the device."""
        size = self.settings.micro_batch
        parts = [batch] if size is None or size >= len(batch.images) else micro_batches.split(batch, size)
        return [part.to(self.device) for part in parts]

    def stateful(self) -> dict[str, loop.Part]:
        """Return everything that a checkpoint must hold."""
        parts: dict[str, loop.Part] = {
            "student": self.student, "objective": self.objective, "optimizer": self.optimizer,
            "scaler": self.scaler,
        }  # fmt: skip
        return parts if self.teacher is None else {**parts, "teacher": self.teacher}

    def run_config(self) -> dict[str, Any]:
        """Return the settings that must match for a checkpoint to be resumed."""
        return {**self.method.settings(), **self.settings.run_config()}


def _split(embeddings: PairedEmbeddings, count: int) -> tuple[PairedEmbeddings, PairedEmbeddings]:
    image, text, scale = embeddings
    return (
        PairedEmbeddings(image[:count], text[:count], scale),
        PairedEmbeddings(image[count:], text[count:], scale),
    )
