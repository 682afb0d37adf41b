"""The callback that keeps the average, saves it beside each checkpoint and resumes it from one."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from wmateacher import WMATeacher, files
from wmateacher.attachment import Attachment
from wmateacher.integrations import pretrained, resuming
from wmateacher.integrations.pretrained import FILE
from wmateacher.kernels import KernelLike

__all__ = ["AVERAGE", "FILE", "CallbackMixin", "TeacherCallback"]

AVERAGE = "average"
"""The name of the folder of the averaged model in a `checkpoint-*` folder."""


class TeacherCallback(TrainerCallback):
    """Keep the kernel-weighted average of the model that a Trainer trains.

    The average starts at the weights with which training starts, and counts one step each time the optimizer
    takes one: not the other batches of an accumulated gradient, and not the steps that a gradient scaler
    skips. Each `checkpoint-*` folder holds the average and its step count in `teacher.pt`, and a resumed run
    continues both.

    Examples:
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
        save_average: bool = False,
        **options: Any,
    ):
        """Set the options of the teacher, which `train` builds.

        Args:
            kernel: The kernel, as for `WMATeacher`.
            total_steps: The optimizer steps of the whole run, from its beginning also if it is resumed. None
                for the Trainer's number, from `max_steps` or `num_train_epochs`.
            resume_from: The `checkpoint-*` folder from which a resumed run loads the teacher; None for the
                one in `output_dir`. A Trainer with `TeacherMixin` sets it.
            save_average: Whether each checkpoint also holds the average as a folder `average` that
                `from_pretrained` reads: the model or the adapter with its configuration, and the tokenizer or
                processor if the Trainer has one.
            **options: Further options of `WMATeacher`: `update_every`, `dtype`, `device`, `buffers`,
                `frozen`, `exclude`, `mode`, `dropout`, `nonfinite`, `hooks`, `module_factory`.

        Raises:
            ValueError: If `total_steps` is out of range, or the kernel or an option is unknown.
            TypeError: If no kernel can be built from `kernel`.
        """
        resuming.check(kernel, total_steps, options)
        self.teacher: WMATeacher | None = None
        self.resume_from = resume_from
        self._kernel, self._total_steps, self._options = kernel, total_steps, options
        self._save_average = save_average
        self._attachment: Attachment | None = None
        self._adapters: frozenset[str] = frozenset()  # the model's own

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note which adapters the model has."""
        self._adapters = _adapters(kwargs.get("model"))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Build the teacher, load it from the checkpoint of a resumed run, and count the optimizer's steps.

        Raises:
            FileNotFoundError: If the folder of the checkpoint does not exist.
        """
        self._detach()
        model: Any = kwargs["model"]
        # A Trainer that resumes with PEFT loads each folder in the checkpoint that holds an adapter.
        if state.global_step and AVERAGE in _adapters(model) - self._adapters:
            model.delete_adapter(AVERAGE)
        total_steps = state.max_steps if self._total_steps is None else self._total_steps
        self.teacher = WMATeacher(model, self._kernel, total_steps, **self._options)
        if state.global_step:
            self._resume(self.teacher, args, state, total_steps)
        self._attachment = self.teacher.attach(kwargs["optimizer"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop counting, and warn if the run was shorter than the kernel's horizon."""
        if self._detach() and self.teacher is not None and state.global_step >= state.max_steps:
            resuming.warn_if_short(self.teacher, warnings.warn)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the teacher into the checkpoint."""
        if self.teacher is None or not (args.should_save or resuming.is_sharded(self.teacher)):
            return
        saved = resuming.saved_state(self.teacher)  # if sharded, every process takes part
        if args.should_save:
            folder = _written(args, state)
            if self._save_average:
                _save_average(self.teacher, folder / AVERAGE, _processing_class(**kwargs))
            with files.write_atomically(folder / FILE) as stream:
                torch.save(saved, stream)

    def load(self, model: nn.Module, folder: str | Path) -> WMATeacher:
        """Set `teacher` to the teacher in a checkpoint, for evaluation without training, and return it.

        Args:
            model: The student, a model of the architecture that was trained.
            folder: The `checkpoint-*` folder.

        Raises:
            FileNotFoundError: If the folder holds no teacher.
            ValueError: If the teacher in it has another kernel, interval or architecture.
        """
        saved = pretrained.read(folder)
        self._detach()
        self.teacher = None  # one at a time in memory
        teacher = WMATeacher(model, self._kernel, saved["total_steps"], **self._options)
        resuming.restore(teacher, saved, None, warnings.warn)
        self.teacher = teacher
        return teacher

    def _resume(
        self, teacher: WMATeacher, args: TrainingArguments, state: TrainerState, total_steps: int
    ) -> None:
        step = state.global_step
        places = _places(args, state) if self.resume_from is None else [Path(self.resume_from)]
        found = [folder for folder in places if folder.is_dir()]
        if len(found) != 1:
            which = ", ".join(map(str, found)) or ", ".join(map(str, places)) or args.output_dir
            raise FileNotFoundError(
                f"the run continues at step {step}, and the teacher is to be loaded from one folder, but "
                f"{'there are ' if found else 'there is no folder '}{which}: pass "
                "TeacherCallback(resume_from=CHECKPOINT)"
            )
        (folder,) = found
        if (folder / FILE).exists():
            resuming.restore(teacher, pretrained.read(folder), total_steps, warnings.warn)
        else:
            missing = f"the checkpoint {folder} has no {FILE}"
            resuming.start_late(teacher, step, total_steps, missing, warnings.warn)

    def _detach(self) -> bool:
        """Stop counting, and return whether steps were counted."""
        attachment, self._attachment = self._attachment, None
        if attachment is not None:
            attachment.remove()
        return attachment is not None


class CallbackMixin:
    """A Trainer with a `TeacherCallback`; a base class before the Trainer's.

    Attributes:
        teacher_callback: The callback.
    """

    def __init__(self, *args: Any, teacher_callback: TeacherCallback | None = None, **kwargs: Any):
        """Create the Trainer, with one argument besides its own.

        Args:
            *args: Arguments of the Trainer.
            teacher_callback: The callback that keeps the teacher; None for `TeacherCallback()`.
            **kwargs: Keyword arguments of the Trainer.

        Raises:
            TypeError: If `teacher_callback` is not a `TeacherCallback`.
        """
        if not isinstance(teacher_callback, TeacherCallback | None):
            raise TypeError(
                f"teacher_callback must be a TeacherCallback, got {teacher_callback!r}: "
                "TeacherCallback(kernel=...)"
            )
        self.teacher_callback = TeacherCallback() if teacher_callback is None else teacher_callback
        super().__init__(*args, **kwargs)
        self.add_callback(self.teacher_callback)  # type: ignore[attr-defined]
        self.teacher_callback.on_init_end(self.args, self.state, self.control, model=self.model)  # type: ignore[attr-defined]

    @property
    def teacher(self) -> WMATeacher | None:
        """The teacher; None before training."""
        return self.teacher_callback.teacher

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as the Trainer does, and resume the teacher from the same folder."""
        if isinstance(resume_from_checkpoint, str | Path):
            self.teacher_callback.resume_from = resume_from_checkpoint
        elif resume_from_checkpoint:  # the last one in output_dir, where the callback looks by itself
            self.teacher_callback.resume_from = None
        return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]


def _adapters(model: Any) -> frozenset[str]:
    """Return the names of a model's adapters."""
    return frozenset(getattr(model, "peft_config", None) or ())


def _save_average(teacher: WMATeacher, folder: Path, processing_class: Any) -> None:
    if hasattr(teacher.module, "save_pretrained"):
        pretrained.save_model(teacher, folder)
    else:  # the file that the Trainer writes of such a model
        files.save(teacher.averaged_state_dict(), folder / "model.safetensors")
    if hasattr(processing_class, "save_pretrained"):
        processing_class.save_pretrained(str(folder))


def _processing_class(processing_class: Any = None, train_dataloader: Any = None, **unused: Any) -> Any:
    """Return the tokenizer or processor that the Trainer saves, its own or the data collator's."""
    collator = getattr(train_dataloader, "collate_fn", None)
    return getattr(collator, "tokenizer", None) if processing_class is None else processing_class


def _places(args: TrainingArguments, state: TrainerState) -> list[Path]:
    """Return the folders that may be the checkpoint of the present step: one, outside of a search."""
    output, name = Path(str(args.output_dir)), f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
    return sorted(output.rglob(name)) if state.is_hyper_param_search else [output / name]


def _written(args: TrainingArguments, state: TrainerState) -> Path:
    """Return the folder of the checkpoint that the Trainer has just written."""
    # The Trainer does not tell its callbacks the folder of the trial that it runs.
    return max(_places(args, state), key=_time)


def _time(folder: Path) -> int:
    file = folder / TRAINER_STATE_NAME
    return file.stat().st_mtime_ns if file.exists() else 0


def __dir__() -> list[str]:
    return __all__
