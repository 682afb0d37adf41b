"""A teacher of the model that a transformers Trainer trains: a callback, and a Trainer that distils."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from wmateacher import WMATeacher, losses
from wmateacher.attachment import Attachment
from wmateacher.checks import nearest
from wmateacher.files import write_atomically
from wmateacher.integrations import resuming
from wmateacher.kernels import KernelLike
from wmateacher.losses import Criterion

try:
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
except ImportError as error:
    raise ImportError(
        "wmateacher.integrations.huggingface needs transformers and accelerate: "
        "pip install 'wmateacher[huggingface]'"
    ) from error

FILE = "teacher.pt"
"""In a `checkpoint-*` folder."""


class TeacherCallback(TrainerCallback):
    """Keeps the kernel-weighted average of the model that a Trainer trains.

    The average starts at the weights that training starts from, and counts one step after each that the
    optimizer takes: not the batches of an accumulated gradient, nor steps that a gradient scaler skips. It is
    saved to `teacher.pt` in each `checkpoint-*` folder, weights and clock, and goes on from there.

    Example:
        >>> teacher_callback = TeacherCallback("beta(0.5,0.5)")
        >>> trainer = Trainer(model, args, callbacks=[teacher_callback])  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
        >>> teacher_callback.teacher.copy_to(model)  # doctest: +SKIP

    Attributes:
        teacher: The `WMATeacher`; None before training.
        resume_from: The folder that a resumed run takes the teacher from.
    """

    def __init__(
        self,
        kernel: KernelLike = "beta(0.5,0.5)",
        total_steps: int | None = None,
        *,
        resume_from: str | Path | None = None,
        **options: Any,
    ):
        """Describe the teacher; it is built when training begins.

        Args:
            kernel: As `WMATeacher`'s.
            total_steps: Optimizer steps of the run; None: the Trainer's `max_steps`, or what it makes of
                `num_train_epochs`.
            resume_from: The `checkpoint-*` folder of a resumed run; None: the one in `output_dir`. A
                Trainer with `TeacherMixin` knows it.
            **options: More of `WMATeacher`'s: `update_every`, `dtype`, `device`, `buffers`, `frozen`,
                `exclude`.
        """
        self.teacher: WMATeacher | None = None
        self.resume_from = resume_from
        self._kernel, self._total_steps, self._options = kernel, total_steps, options
        self._attachment: Attachment | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Build the teacher, or go on with that of the checkpoint, and count the optimizer's steps.

        Raises:
            FileNotFoundError: The run is resumed, and its checkpoint is not where it was looked for.
        """
        self._detach()
        total_steps = state.max_steps if self._total_steps is None else self._total_steps
        self.teacher = WMATeacher(kwargs["model"], self._kernel, total_steps, **self._options)
        if state.global_step:
            self._resume(self.teacher, args, state.global_step, total_steps)
        self._attachment = self.teacher.attach(kwargs["optimizer"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop counting; say so where the run had another length than the kernel was given."""
        self._detach()
        if self.teacher is not None and state.global_step >= state.max_steps:
            _tell(resuming.shortened(self.teacher))

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the teacher into the checkpoint."""
        if self.teacher is not None and args.should_save:
            folder = _folder(args, state.global_step)
            with write_atomically(folder / FILE) as stream:
                torch.save(resuming.saved(self.teacher), stream)

    def _resume(self, teacher: WMATeacher, args: TrainingArguments, step: int, total_steps: int) -> None:
        folder = _folder(args, step) if self.resume_from is None else Path(self.resume_from)
        if not folder.is_dir():
            raise FileNotFoundError(
                f"the run goes on at step {step}, and there is no folder {folder} to take the teacher from: "
                "pass TeacherCallback(resume_from=CHECKPOINT)"
            )
        file = folder / FILE
        if file.exists():
            state = torch.load(file, map_location="cpu", weights_only=True)
            _tell(resuming.take_over(teacher, state, total_steps))
            return
        _tell(
            f"the checkpoint {folder} has no {FILE}: the teacher starts here, from the student as it is, "
            f"over the {total_steps - step} steps that are left"
        )
        teacher.set_total_steps(max(1, total_steps - step))

    def _detach(self) -> None:
        if self._attachment is not None:
            self._attachment.remove()


class TeacherMixin:
    """A Trainer whose loss has a distillation from the average of its own model, before `Trainer`.

    The teacher sees the batch that the model sees, without dropout and gradient, and their logits are
    compared: `loss + distill_weight * distillation(model(batch).logits, teacher(batch).logits)`. The mean
    of the term, before its weight, is logged as `distillation`.

    Example:
        >>> class MyTrainer(TeacherMixin, Trainer): ...

    Attributes:
        teacher_callback: The callback.
    """

    def __init__(
        self,
        *args: Any,
        teacher_callback: TeacherCallback | None = None,
        distillation: str | Criterion | None = "kl",
        distill_weight: float = 1.0,
        evaluate_with: Literal["student", "teacher"] = "student",
        **kwargs: Any,
    ):
        """Add to the arguments of the Trainer that this stands before.

        Args:
            *args: The Trainer's.
            teacher_callback: The teacher; None: `TeacherCallback()`.
            distillation: A spec of `wmateacher.losses.build` for logits, or what it builds; None: no term.
            distill_weight: Of the term, beside the model's own loss.
            evaluate_with: Whose weights `evaluate` and `predict` use.
            **kwargs: The Trainer's.

        Raises:
            ValueError: `evaluate_with` is neither, the distillation does not compare logits, or the weight
                is no number.
            TypeError: `teacher_callback` is no `TeacherCallback`.
        """
        if evaluate_with not in ("student", "teacher"):
            raise ValueError(
                f"evaluate_with must be 'student' or 'teacher', got {evaluate_with!r}; "
                f"{nearest(str(evaluate_with), ('student', 'teacher'))}"
            )
        if not isinstance(distill_weight, int | float) or distill_weight < 0:
            raise ValueError(f"distill_weight must be a number of at least 0, got {distill_weight!r}")
        if not isinstance(teacher_callback, TeacherCallback | None):
            raise TypeError(
                f"teacher_callback must be a TeacherCallback, got {teacher_callback!r}: "
                "TeacherCallback(kernel=...)"
            )
        built = None if distillation is None else losses.build(distillation)
        if built is not None and built.family not in (None, "logits"):
            raise ValueError(
                f"distillation {distillation!r} takes {built.family}, models of transformers give logits: "
                f"choose from {', '.join(losses.available('logits'))}"
            )
        super().__init__(*args, **kwargs)
        self.teacher_callback = TeacherCallback() if teacher_callback is None else teacher_callback
        self.add_callback(self.teacher_callback)  # type: ignore[attr-defined]
        self._distillation, self._distill_weight, self._evaluate_with = built, distill_weight, evaluate_with
        self._terms: list[Tensor] = []

    @property
    def teacher(self) -> WMATeacher | None:
        """The average; None before training."""
        return self.teacher_callback.teacher

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; the teacher goes on from the same folder."""
        if isinstance(resume_from_checkpoint, str | Path):
            self.teacher_callback.resume_from = resume_from_checkpoint
        return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """The Trainer's loss, with the distillation while training."""
        loss, outputs = super().compute_loss(model, dict(inputs), return_outputs=True, **kwargs)  # type: ignore[misc]
        if self._distillation is not None and self.teacher is not None and model.training:
            term = self._distillation(_logits(outputs), _logits(self.teacher(**inputs)))
            self._terms.append(term.detach())
            loss = loss + self._distill_weight * term / self._micro_batches(kwargs.get("num_items_in_batch"))
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, with the weights asked for; the student has its own again after."""
        if self._evaluate_with == "student" or self.teacher is None:
            return super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]
        with self.teacher.swap():
            return super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As the Trainer's, with the mean of the distillation since the last time."""
        if self._terms and "loss" in logs:
            logs = {**logs, "distillation": torch.stack(self._terms).mean().item()}
            self._terms = []
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _micro_batches(self, items: Any) -> int:
        """What the mean of a micro-batch must be divided by here, because the Trainer does not do it.

        It does not where the model has divided its own loss by the items of the whole batch.
        """
        scaled = getattr(self, "loss_is_scaled_for_ga", None)
        if scaled is None:
            by_model = self.model_accepts_loss_kwargs and items is not None  # type: ignore[attr-defined]
            scaled = by_model or self.compute_loss_func is not None  # type: ignore[attr-defined]
        return self.current_gradient_accumulation_steps if scaled else 1  # type: ignore[attr-defined]


class TeacherTrainer(TeacherMixin, Trainer):  # type: ignore[misc]
    """transformers' Trainer with a teacher: see `TeacherMixin`."""


def _folder(args: TrainingArguments, step: int) -> Path:
    return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def _logits(outputs: Any) -> Tensor:
    return outputs["logits"] if isinstance(outputs, dict) else outputs[1]


def _tell(message: str | None) -> None:
    if message is not None:
        warnings.warn(message, stacklevel=3)
