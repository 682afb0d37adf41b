"""A callback that averages the model while a transformers Trainer trains it, and a Trainer that distils."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wmateacher import WMATeacher, checks, losses
from wmateacher.attachment import Attachment
from wmateacher.files import write_atomically
from wmateacher.integrations import resuming
from wmateacher.integrations.resuming import Weights
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

__all__ = ["FILE", "TeacherCallback", "TeacherMixin", "TeacherTrainer"]

FILE = "teacher.pt"
"""The name of the teacher's file in a `checkpoint-*` folder."""


class TeacherCallback(TrainerCallback):
    """Keep the kernel-weighted average of the model that a Trainer trains.

    The average starts at the weights with which training starts, and counts one step each time the optimizer
    takes one: not the other batches of an accumulated gradient, and not the steps that a gradient scaler
    skips. Each `checkpoint-*` folder holds the average and its step count in `teacher.pt`, and a resumed run
    continues both.

    Example:
        >>> teacher_callback = TeacherCallback("beta(0.5,0.5)")
        >>> trainer = Trainer(model, args, callbacks=[teacher_callback])  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
        >>> teacher_callback.teacher.copy_to(model)  # doctest: +SKIP

    Attributes:
        teacher: The `WMATeacher`; None before training.
        resume_from: The folder from which a resumed run loads the teacher.
    """

    def __init__(
        self,
        kernel: KernelLike = "beta(0.5,0.5)",
        total_steps: int | None = None,
        *,
        resume_from: str | Path | None = None,
        **options: Any,
    ):
        """Set the options of the teacher, which `train` builds.

        Args:
            kernel: The kernel, as for `WMATeacher`.
            total_steps: The optimizer steps of the run. None for the Trainer's number, from `max_steps` or
                `num_train_epochs`.
            resume_from: The `checkpoint-*` folder from which a resumed run loads the teacher; None for the
                one in `output_dir`. A Trainer with `TeacherMixin` sets it.
            **options: Further options of `WMATeacher`: `update_every`, `dtype`, `device`, `buffers`,
                `frozen`, `exclude`, `hooks`.
        """
        self.teacher: WMATeacher | None = None
        self.resume_from = resume_from
        self._kernel, self._total_steps, self._options = kernel, total_steps, options
        self._attachment: Attachment | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Build the teacher, load it from the checkpoint of a resumed run, and count the optimizer's steps.

        Raises:
            FileNotFoundError: If the folder of the checkpoint does not exist.
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
        """Stop counting, and warn if the run was shorter than the kernel's horizon."""
        self._detach()
        if self.teacher is not None and state.global_step >= state.max_steps:
            resuming.warn_if_short(self.teacher, warnings.warn)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the teacher into the checkpoint."""
        if self.teacher is not None and args.should_save:
            folder = _folder(args, state.global_step)
            with write_atomically(folder / FILE) as stream:
                torch.save(resuming.saved_state(self.teacher), stream)

    def _resume(self, teacher: WMATeacher, args: TrainingArguments, step: int, total_steps: int) -> None:
        folder = _folder(args, step) if self.resume_from is None else Path(self.resume_from)
        if not folder.is_dir():
            raise FileNotFoundError(
                f"the run continues at step {step}, and there is no folder {folder} to load the teacher "
                "from: pass TeacherCallback(resume_from=CHECKPOINT)"
            )
        file = folder / FILE
        if file.exists():
            saved = torch.load(file, map_location="cpu", weights_only=True)
            resuming.restore(teacher, saved, total_steps, warnings.warn)
        else:
            missing = f"the checkpoint {folder} has no {FILE}"
            resuming.start_late(teacher, step, total_steps, missing, warnings.warn)

    def _detach(self) -> None:
        if self._attachment is not None:
            self._attachment.remove()


class TeacherMixin:
    """Add distillation from the average of its own model to a Trainer; a base class before the Trainer's.

    The teacher gets the same batch as the model, without dropout and gradient, and the loss is
    `loss + distill_weight * distillation(model(batch).logits, teacher(batch).logits)`. The mean of the
    distillation, before its weight, is logged as `distillation`.

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
        evaluate_with: Weights = "student",
        **kwargs: Any,
    ):
        """Create the Trainer, with these arguments besides its own.

        Args:
            *args: Arguments of the Trainer.
            teacher_callback: The callback that keeps the teacher; None for `TeacherCallback()`.
            distillation: The distillation loss, a criterion for logits or its spec (see
                `wmateacher.losses.build`); None for no distillation.
            distill_weight: The weight of the distillation beside the model's own loss.
            evaluate_with: The weights that `evaluate` and `predict` use.
            **kwargs: Keyword arguments of the Trainer.

        Raises:
            ValueError: If `evaluate_with` is neither "student" nor "teacher", the distillation does not
                compare logits, or `distill_weight` is not a number of at least 0.
            TypeError: If `teacher_callback` is not a `TeacherCallback`.
        """
        checks.one_of("weights for evaluate_with", evaluate_with, ("student", "teacher"))
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
                f"distillation {distillation!r} compares {built.family}, but models of transformers return "
                f"logits: choose from {', '.join(losses.available('logits'))}"
            )
        super().__init__(*args, **kwargs)
        self.teacher_callback = TeacherCallback() if teacher_callback is None else teacher_callback
        self.add_callback(self.teacher_callback)  # type: ignore[attr-defined]
        self._distillation, self._distill_weight, self._evaluate_with = built, distill_weight, evaluate_with
        self._terms: list[Tensor] = []

    @property
    def teacher(self) -> WMATeacher | None:
        """The teacher; None before training."""
        return self.teacher_callback.teacher

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as the Trainer does, and resume the teacher from the same folder."""
        if isinstance(resume_from_checkpoint, str | Path):
            self.teacher_callback.resume_from = resume_from_checkpoint
        return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """Return the Trainer's loss, plus the distillation in training."""
        loss, outputs = super().compute_loss(model, dict(inputs), return_outputs=True, **kwargs)  # type: ignore[misc]
        if self._distillation is not None and self.teacher is not None and model.training:
            term = self._distillation(_logits(outputs), _logits(self.teacher(**inputs)))
            self._terms.append(term.detach())
            loss = loss + self._distill_weight * term / self._micro_batches(kwargs.get("num_items_in_batch"))
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as the Trainer does, with the weights of `evaluate_with`."""
        if self._evaluate_with == "student" or self.teacher is None:
            return super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]
        with self.teacher.swap():
            return super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as the Trainer does, with the mean of the distillation since the last log."""
        if self._terms and "loss" in logs:
            logs = {**logs, "distillation": torch.stack(self._terms).mean().item()}
            self._terms = []
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _micro_batches(self, items: Any) -> int:
        """Return the number of micro-batches to divide the distillation by, or 1 if the Trainer divides.

        The Trainer does not divide if the model has divided its own loss by the items of the whole batch.
        """
        scaled = getattr(self, "loss_is_scaled_for_ga", None)
        if scaled is None:
            by_model = self.model_accepts_loss_kwargs and items is not None  # type: ignore[attr-defined]
            scaled = by_model or self.compute_loss_func is not None  # type: ignore[attr-defined]
        return self.current_gradient_accumulation_steps if scaled else 1  # type: ignore[attr-defined]


class TeacherTrainer(TeacherMixin, Trainer):  # type: ignore[misc]
    """The Trainer of transformers with a teacher; see `TeacherMixin`."""


def _folder(args: TrainingArguments, step: int) -> Path:
    return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def _logits(outputs: Any) -> Tensor:
    return outputs["logits"] if isinstance(outputs, dict) else outputs[1]
