"""A Lightning callback that averages the module while a Trainer trains it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

from torch import nn
from torch.optim import Optimizer

from wmateacher import WMATeacher, checks, kernels
from wmateacher.attachment import Attachment
from wmateacher.integrations import resuming
from wmateacher.integrations.resuming import Weights
from wmateacher.kernels import KernelLike

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.trainer.states import TrainerFn
    from lightning.pytorch.utilities import rank_zero_warn
except ImportError as error:
    raise ImportError(
        "wmateacher.integrations.lightning needs Lightning: pip install 'wmateacher[lightning]'"
    ) from error

__all__ = ["TeacherCallback"]

_STUDENT = "student_state_dict"


class TeacherCallback(Callback):
    """Keep the kernel-weighted average of the module in training, as its attribute `teacher`.

    The average starts at the weights with which `fit` starts, and counts one step each time the optimizer
    takes one: not the other batches of an accumulated gradient, and not the steps that a gradient scaler
    skips. The Trainer's checkpoints hold the average and its step count, and a resumed run continues both.
    In `training_step` the average is `self.teacher`. It is no submodule, so it enters neither
    `parameters()` nor `state_dict()`.

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
        module_factory: Callable[[LightningModule], nn.Module] | None = None,
        **options: Any,
    ):
        """Set the options of the teacher, which `fit` builds.

        Args:
            kernel: The kernel, as for `WMATeacher`.
            total_steps: The optimizer steps of the run. None for the Trainer's estimate from its limits and
                the data, `estimated_stepping_batches`.
            student: The path of the submodule to average, such as `"backbone"`; None for the whole
                LightningModule.
            name: The attribute of the LightningModule that holds the teacher. Several callbacks need
                different names.
            optimizer: The index of the optimizer whose steps count; None for the one that trains the student.
            evaluate_with: The weights that validation, test and prediction use.
            checkpoint: The weights in a checkpoint's `state_dict`, which `load_from_checkpoint` reads. With
                `"teacher"` the checkpoint has the student's weights as well, and a resumed run trains those.
            module_factory: A function that builds the averaged module from the LightningModule, for a
                student that is sharded by `fully_shard`; see `WMATeacher`.
            **options: Further options of `WMATeacher`: `update_every`, `dtype`, `device`, `buffers`,
                `frozen`, `exclude`, `hooks`.

        Raises:
            ValueError: If `evaluate_with` or `checkpoint` is neither "student" nor "teacher".
        """
        for argument, value in (("evaluate_with", evaluate_with), ("checkpoint", checkpoint)):
            checks.one_of(f"weights for {argument}", value, ("student", "teacher"))
        self.teacher: WMATeacher | None = None
        self._kernel, self._total_steps, self._options = kernel, total_steps, options
        self._student, self._name, self._optimizer = student, name, optimizer
        self._evaluate_with, self._checkpoint = evaluate_with, checkpoint
        self._module_factory = module_factory
        self._attachment: Attachment | None = None
        self._restored: Mapping[str, Any] | None = None
        self._horizon: int | None = None
        self._swap = ExitStack()

    @property
    def state_key(self) -> str:
        """The key of this callback in a checkpoint."""
        return self._generate_state_key(name=self._name)

    # --- the run ------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Build the teacher on the student's device, and count the optimizer's steps.

        Raises:
            ValueError: If the Trainer cannot estimate the number of steps, `student` is not a submodule,
                `name` is taken, or not exactly one optimizer trains the student.
        """
        student = self._student_of(pl_module)
        self._horizon = self._estimated(trainer) if self._total_steps is None else self._total_steps
        continues = self.teacher is not None and self.teacher is getattr(pl_module, self._name, None)
        if self._restored is not None:
            self._build(pl_module, student)
            self._restore(self._restored)
        elif continues and trainer.global_step:  # a second `fit` of the same Trainer
            assert self.teacher is not None
            resuming.extend(self.teacher, self._horizon, rank_zero_warn)
        else:
            self._build(pl_module, student)
        assert self.teacher is not None
        self._attachment = self.teacher.attach(self._counted(trainer, student))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """If the checkpoint of a resumed run has no teacher, average over the remaining steps."""
        assert self.teacher is not None
        step, total = trainer.global_step, self.teacher.total_steps
        if self._total_steps is None and total is not None and step and not self.teacher.step:
            missing = f"the checkpoint at step {step} has no {self._name}"
            resuming.start_late(self.teacher, step, total, missing, rank_zero_warn)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if the run was shorter than the kernel's horizon."""
        assert self.teacher is not None
        if not (trainer.should_stop or trainer.interrupted):
            resuming.warn_if_short(self.teacher, rank_zero_warn)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop counting, and move the teacher to the device on which the Trainer leaves the module."""
        self._detach()
        if self.teacher is not None and not resuming.is_sharded(self.teacher):
            self.teacher.to(pl_module.device)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the student its own weights back and stop counting."""
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
        factory = self._module_factory
        self.teacher = WMATeacher(
            student, self._kernel, self._horizon,
            module_factory=None if factory is None else lambda: factory(pl_module), **self._options,
        )  # fmt: skip
        # nn.Module's own __setattr__ would make it a submodule.
        object.__setattr__(pl_module, self._name, self.teacher)

    def _estimated(self, trainer: Trainer) -> int | None:
        """Return the Trainer's number of optimizer steps; None if it is unknown and the kernel needs none."""
        # `max_steps` limits the steps of all optimizers together, so it says nothing about one of several.
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
        submodules = {name: m for name, m in pl_module.named_modules(remove_duplicate=False) if name}
        return checks.lookup("submodule for student", self._student, submodules)

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
        training = [o for o in optimizers if any(id(p) in ours for g in o.param_groups for p in g["params"])]
        if len(training) != 1:
            raise ValueError(
                f"{len(training)} of the module's {len(optimizers)} optimizers train the student: "
                "pass TeacherCallback(optimizer=INDEX), the one whose steps count, or student='...', "
                "the submodule to average"
            )
        return training[0]

    # --- evaluation ---------------------------------------------------------------------------------

    def _swap_in(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._evaluate_with != "teacher":
            return
        if self.teacher is None and self._restored is not None:  # a checkpoint is evaluated without `fit`
            self._horizon = self._restored["total_steps"]
            self._build(pl_module, self._student_of(pl_module))
            self._restore(self._restored)
        if self.teacher is not None:
            self._swap.enter_context(self.teacher.swap())

    def _swap_out(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap.close()

    on_validation_start = on_test_start = on_predict_start = _swap_in
    on_validation_end = on_test_end = on_predict_end = _swap_out

    # --- checkpoints --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the teacher's state in whole tensors; a collective if the teacher is sharded."""
        if self.teacher is None:
            return dict(self._restored or {})
        return resuming.saved_state(self.teacher)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the teacher's state, once there is a teacher."""
        self._restored = state_dict
        # Lightning restores a sharded module, and with it the callbacks, after `on_fit_start`.
        if self._attachment is not None and self._attachment.active:
            self._restore(state_dict)

    def _restore(self, state: Mapping[str, Any]) -> None:
        assert self.teacher is not None
        self._restored = None
        resuming.restore(self.teacher, state, self._horizon, rank_zero_warn)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """With `checkpoint="teacher"`, write the averaged weights as the checkpoint's `state_dict`.

        Raises:
            ValueError: If the teacher is sharded.
        """
        if self._checkpoint != "teacher" or self.teacher is None:
            return
        if resuming.is_sharded(self.teacher):
            raise ValueError(
                "checkpoint='teacher' does not work with a sharded teacher: leave it out, and save "
                "teacher.averaged_state_dict(full=True)"
            )
        checkpoint[_STUDENT] = dict(checkpoint["state_dict"])
        prefix = "" if self._student is None else f"{self._student}."
        averaged = {f"{prefix}{k}": v for k, v in self.teacher.averaged_state_dict().items()}
        checkpoint["state_dict"] = {**checkpoint["state_dict"], **averaged}

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Continue training from the student's weights, also if the `state_dict` has the teacher's."""
        if trainer.state.fn == TrainerFn.FITTING and _STUDENT in checkpoint:
            pl_module.load_state_dict(checkpoint[_STUDENT])
