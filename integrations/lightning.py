"""A Lightning callback that keeps a teacher of the module that a Trainer trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

from wmateacher import WMATeacher, kernels
from wmateacher.attachment import Attachment
from wmateacher.checks import nearest
from wmateacher.integrations import resuming
from wmateacher.kernels import KernelLike

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.trainer.states import TrainerFn
    from lightning.pytorch.utilities import rank_zero_warn
except ImportError as error:
    raise ImportError(
        "wmateacher.integrations.lightning needs Lightning: pip install 'wmateacher[lightning]'"
    ) from error

Weights = Literal["student", "teacher"]
_STUDENT = "student_state_dict"


class TeacherCallback(Callback):
    """Keeps the kernel-weighted average of the module in training, and puts it on the module.

    The average starts at the weights that `fit` starts from, and counts one step after each that the
    optimizer takes: not the batches of an accumulated gradient, nor steps that a gradient scaler skips. It is
    in the Trainer's checkpoints, weights and clock, and goes on from there. In `training_step` it is
    `self.teacher`, which is no submodule: it enters neither `parameters()` nor `state_dict()`.

    Example:
        >>> trainer = Trainer(max_epochs=10, callbacks=[TeacherCallback("beta(0.5,0.5)")])  # doctest: +SKIP
        >>> trainer.fit(module)  # doctest: +SKIP
        >>> module.teacher.copy_to(module)  # doctest: +SKIP

    Attributes:
        teacher: The `WMATeacher`; None before `fit`.
    """

    def __init__(
        self,
        kernel: KernelLike = "beta(0.5,0.5)",
        total_steps: int | None = None,
        *,
        student: str | None = None,
        name: str = "teacher",
        optimizer: int | None = None,
        evaluate_with: Weights = "student",
        checkpoint: Weights = "student",
        module: Callable[[LightningModule], nn.Module] | None = None,
        **options: Any,
    ):
        """Describe the teacher; it is built when `fit` starts.

        Args:
            kernel: As `WMATeacher`'s.
            total_steps: Optimizer steps of the run; None: what the Trainer estimates from its limits and data
                (`estimated_stepping_batches`).
            student: Path of the submodule to average, such as `"backbone"`; None: the whole LightningModule.
            name: Attribute of the module that the teacher is put under; callbacks of different names may
                stand side by side.
            optimizer: Index of the optimizer whose steps count; None: the one that trains the student.
            evaluate_with: Whose weights validation, test and prediction see.
            checkpoint: Whose weights a checkpoint has as its `state_dict`, which
                `load_from_checkpoint` reads. With `"teacher"` the student's are beside them, and resuming
                takes those.
            module: Makes the averaged module, of the LightningModule, where the student is sharded by
                `fully_shard`: see `WMATeacher`.
            **options: More of `WMATeacher`'s: `update_every`, `dtype`, `device`, `buffers`, `frozen`,
                `exclude`.

        Raises:
            ValueError: `evaluate_with` or `checkpoint` is neither.
        """
        for argument, value in (("evaluate_with", evaluate_with), ("checkpoint", checkpoint)):
            if value not in ("student", "teacher"):
                raise ValueError(
                    f"{argument} must be 'student' or 'teacher', got {value!r}; "
                    f"{nearest(str(value), ('student', 'teacher'))}"
                )
        self.teacher: WMATeacher | None = None
        self._kernel, self._total_steps, self._options = kernel, total_steps, options
        self._student, self._name, self._optimizer = student, name, optimizer
        self._evaluate_with, self._checkpoint, self._module = evaluate_with, checkpoint, module
        self._attachment: Attachment | None = None
        self._restored: Mapping[str, Any] | None = None
        self._horizon: int | None = None
        self._swap = ExitStack()

    @property
    def state_key(self) -> str:
        """Of this callback in a checkpoint."""
        return self._generate_state_key(name=self._name)

    # --- the run ------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Build the teacher from the student on its device, and count the optimizer's steps.

        Raises:
            ValueError: The Trainer cannot tell the horizon; the module has an attribute or no submodule of
                the name; no or several optimizers train the student.
        """
        student = self._student_of(pl_module)
        self._horizon = self._estimated(trainer) if self._total_steps is None else self._total_steps
        goes_on = self.teacher is not None and self.teacher is getattr(pl_module, self._name, None)
        if self._restored is not None:
            self._build(pl_module, student)
            self._take_over(self._restored)
        elif goes_on and trainer.global_step:
            assert self.teacher is not None
            _tell(resuming.extend(self.teacher, self._horizon))
        else:
            self._build(pl_module, student)
        assert self.teacher is not None
        self._attachment = self.teacher.attach(self._counted(trainer, student))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Where a run goes on that had no teacher, one that starts here has the steps that are left."""
        assert self.teacher is not None
        done, total = trainer.global_step, self.teacher.total_steps
        if self._total_steps is None and total is not None and done and not self.teacher.step:
            rank_zero_warn(
                f"the checkpoint at step {done} has no {self._name}: it starts here, from the student as it "
                f"is, over the {total - done} steps that are left"
            )
            self.teacher.set_total_steps(max(1, total - done))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so where the run had another length than the kernel was given."""
        assert self.teacher is not None
        if not (trainer.should_stop or trainer.interrupted):
            _tell(resuming.shortened(self.teacher))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop counting, and follow the module to where the Trainer leaves it."""
        self._detach()
        if self.teacher is not None and not resuming.sharded(self.teacher):
            self.teacher.to(pl_module.device)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the student its own weights back, and stop counting."""
        self._swap.close()
        self._detach()

    def _detach(self) -> None:
        if self._attachment is not None:
            self._attachment.remove()

    # --- building -----------------------------------------------------------------------------------

    def _build(self, pl_module: LightningModule, student: nn.Module) -> None:
        old = pl_module.__dict__.pop(self._name, None)
        if not isinstance(old, WMATeacher | None) or hasattr(pl_module, self._name):
            raise ValueError(
                f"{type(pl_module).__name__} has an attribute {self._name!r} of its own: pass another name "
                "for the teacher, TeacherCallback(name=...)"
            )
        make = self._module
        self.teacher = WMATeacher(
            student, self._kernel, self._horizon,
            module_factory=None if make is None else lambda: make(pl_module), **self._options,
        )  # fmt: skip
        # Past nn.Module's own __setattr__, which would make it a submodule.
        object.__setattr__(pl_module, self._name, self.teacher)

    def _estimated(self, trainer: Trainer) -> int | None:
        """The Trainer's number of optimizer steps; None where there is none and the kernel needs none."""
        # Against max_steps the Trainer counts the steps of all optimizers together.
        several = trainer.max_steps != -1 and len(trainer.optimizers) > 1
        steps = math.inf if several else trainer.estimated_stepping_batches
        if math.isfinite(steps) and steps > 0:
            return int(steps)
        if kernels.build(self._kernel).needs_horizon:
            raise ValueError(
                "the Trainer cannot tell how many steps the student's optimizer will take "
                f"(max_epochs={trainer.max_epochs}, max_steps={trainer.max_steps}, "
                f"{len(trainer.optimizers)} optimizers): pass TeacherCallback(total_steps=...)"
            )
        return None

    def _student_of(self, pl_module: LightningModule) -> nn.Module:
        if self._student is None:
            return pl_module
        try:
            return pl_module.get_submodule(self._student)
        except AttributeError:
            children = [name for name, _ in pl_module.named_children()]
            raise ValueError(
                f"student: {type(pl_module).__name__} has no submodule {self._student!r}; "
                f"{nearest(self._student, children)}"
            ) from None

    def _counted(self, trainer: Trainer, student: nn.Module) -> Optimizer:
        optimizers = trainer.optimizers
        if self._optimizer is not None:
            if not 0 <= self._optimizer < len(optimizers):
                raise ValueError(
                    f"optimizer must be an index below {len(optimizers)}, the number of the module's "
                    f"optimizers, got {self._optimizer}"
                )
            return optimizers[self._optimizer]
        ours = {id(p) for p in student.parameters()}
        training = [
            i
            for i, o in enumerate(optimizers)
            if any(id(p) in ours for g in o.param_groups for p in g["params"])
        ]
        if len(training) != 1:
            raise ValueError(
                f"{len(training)} of the module's {len(optimizers)} optimizers train the student: "
                "pass TeacherCallback(optimizer=INDEX), the one whose steps count, or student='...', "
                "the submodule to average"
            )
        return optimizers[training[0]]

    # --- evaluation ---------------------------------------------------------------------------------

    def _lend(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._evaluate_with != "teacher":
            return
        if self.teacher is None and self._restored is not None:  # evaluated from a checkpoint, without fit
            self._horizon = self._restored["total_steps"]
            self._build(pl_module, self._student_of(pl_module))
            self._take_over(self._restored)
        if self.teacher is not None:
            self._swap.enter_context(self.teacher.swap())

    def _take_back(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap.close()

    on_validation_start = on_test_start = on_predict_start = _lend
    on_validation_end = on_test_end = on_predict_end = _take_back

    # --- checkpoints --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The teacher's state, in whole tensors; a collective where it is sharded."""
        if self.teacher is None:
            return dict(self._restored or {})
        return resuming.saved(self.teacher)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the teacher's state, when there is a teacher."""
        self._restored = state_dict
        if self._attachment is not None and self._attachment.active:  # sharded: restored after on_fit_start
            self._take_over(state_dict)

    def _take_over(self, restored: Mapping[str, Any]) -> None:
        assert self.teacher is not None
        self._restored = None
        _tell(resuming.take_over(self.teacher, restored, self._horizon))

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """With `checkpoint="teacher"`, let the averaged weights be the checkpoint's.

        Raises:
            ValueError: The teacher is sharded.
        """
        if self._checkpoint != "teacher" or self.teacher is None:
            return
        if resuming.sharded(self.teacher):
            raise ValueError(
                "checkpoint='teacher' is not for a teacher that is sharded: leave it out, and save "
                "teacher.averaged_state_dict(full=True)"
            )
        checkpoint[_STUDENT] = dict(checkpoint["state_dict"])
        prefix = "" if self._student is None else f"{self._student}."
        averaged = {f"{prefix}{k}": v for k, v in self.teacher.averaged_state_dict().items()}
        checkpoint["state_dict"] = {**checkpoint["state_dict"], **averaged}

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Go on training from the student's weights, whichever the checkpoint's are."""
        if trainer.state.fn == TrainerFn.FITTING and _STUDENT in checkpoint:
            pl_module.load_state_dict(checkpoint[_STUDENT])


def _tell(message: str | None) -> None:
    if message is not None:
        rank_zero_warn(message)
