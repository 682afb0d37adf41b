"""A Lightning callback that averages the module while a Trainer trains it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from wmateacher import WMATeacher, checks, kernels
from wmateacher.attachment import Attachment
from wmateacher.integrations import resuming
from wmateacher.integrations.lightning import steps
from wmateacher.integrations.lightning.saving import STUDENT, AveragedIO
from wmateacher.integrations.resuming import Weights
from wmateacher.kernels import KernelLike

__all__ = ["TeacherCallback"]

_TUNERS = (BatchSizeFinder, LearningRateFinder)


class TeacherCallback(Callback):
    """Keep the kernel-weighted average of the module in training, as its attribute `teacher`.

    The average starts at the weights with which `fit` starts, and counts one step each time the optimizer
    takes one: not the other batches of an accumulated gradient, and not the steps that a gradient scaler
    skips. The Trainer's checkpoints hold the average and its step count, and a resumed run continues both.
    In `training_step` the average is `self.teacher`. It is no submodule, so it enters neither
    `parameters()` nor `state_dict()`.

    Examples:
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
        optimizer: int | Sequence[int] | None = None,
        update_every: int | Literal["epoch"] = 1,
        evaluate_with: Weights = "student",
        finish_with: Weights = "student",
        checkpoint: Weights = "student",
        save_averaged: bool = False,
        module_factory: Callable[[LightningModule], nn.Module] | None = None,
        **options: Any,
    ):
        """Set the options of the teacher, which `fit` builds.

        Args:
            kernel: The kernel, as for `WMATeacher`.
            total_steps: The optimizer steps of the whole run, from its beginning also if it is resumed. None
                for the Trainer's estimate from its limits, the data and the gradient accumulation.
            student: The path of the submodule to average, such as `"backbone"`; None for the whole
                LightningModule.
            name: The attribute of the LightningModule that holds the teacher. Several callbacks need
                different names.
            optimizer: The index of the optimizer whose steps count; None for the one that trains the student.
                The steps of several count as one if they are a list, in the order in which they step, as for
                `WMATeacher.attach`.
            update_every: The number of optimizer steps between two snapshots, or `"epoch"` for one at the end
                of each epoch. The horizon and the window remain in optimizer steps.
            evaluate_with: The weights that validation, test and prediction use. With `ckpt_path`, they are
                that checkpoint's.
            finish_with: The weights of the module after `fit`. With `"teacher"` the average is copied into
                it at the end, as `EMAWeightAveraging` does.
            checkpoint: The weights in a checkpoint's `state_dict`, which `load_from_checkpoint` reads. With
                `"teacher"` the checkpoint has the student's weights as well, and a resumed run trains those.
            save_averaged: Whether to write a second file beside each checkpoint, `averaged/NAME.ckpt` in the
                same folder. Its `state_dict` has the averaged weights, and it has no state of the training.
            module_factory: A function that builds the averaged module from the LightningModule, for a
                student that is sharded by `fully_shard`; see `WMATeacher`.
            **options: Further options of `WMATeacher`: `dtype`, `device`, `buffers`, `frozen`, `exclude`,
                `nonfinite`, `hooks`.

        Raises:
            ValueError: If an argument is out of range, or an option is unknown.
            TypeError: If no kernel can be built from `kernel`.
        """
        for argument, value in (
            ("evaluate_with", evaluate_with), ("finish_with", finish_with), ("checkpoint", checkpoint),
        ):  # fmt: skip
            checks.one_of(f"weights for {argument}", value, ("student", "teacher"))
        resuming.check(kernel, total_steps, options)
        if not (isinstance(name, str) and name.isidentifier()):
            raise ValueError(f"name must be the name of an attribute, got {name!r}")
        if update_every != "epoch":
            checks.positive_int("update_every, if it is not 'epoch',", update_every)
        self.teacher: WMATeacher | None = None
        self._kernel, self._total_steps, self._every, self._options = (
            kernel,
            total_steps,
            update_every,
            options,
        )
        self._student, self._name, self._optimizer = student, name, optimizer
        self._evaluate_with, self._finish_with = evaluate_with, finish_with
        self._checkpoint, self._save_averaged = checkpoint, save_averaged
        self._module_factory = module_factory
        self._attachment: Attachment | None = None
        self._restored: Mapping[str, Any] | None = None  # a loaded state that no teacher has yet
        self._fitting = False
        self._plan: tuple[int | None, int] = (None, 1)  # the horizon and the interval of the present run
        self._lent = ExitStack()  # what an evaluation gives back at its end

    @property
    def state_key(self) -> str:
        """The key of this callback in a checkpoint."""
        return self._generate_state_key(name=self._name)

    # --- the run ------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take a place before Lightning's tuners, whose trials need the teacher."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        tuners = [i for i, callback in enumerate(callbacks) if isinstance(callback, _TUNERS)]
        if stage == "fit" and tuners and tuners[0] < callbacks.index(self):
            others = [c for c in callbacks if c is not self]
            trainer.callbacks = [*others[: tuners[0]], self, *others[tuners[0] :]]  # type: ignore[attr-defined]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Build the teacher on the student's device.

        Raises:
            ValueError: If the Trainer cannot estimate the number of steps, `student` is not a submodule, or
                `name` is taken.
        """
        self._plan = self._planned(trainer)
        continues = self.teacher is not None and self.teacher is getattr(pl_module, self._name, None)
        if self._restored is not None:
            self._start(pl_module)
            self._restore(self._restored)
        elif continues and trainer.global_step:  # a second `fit` of the same Trainer
            assert self.teacher is not None
            self._follow(pl_module)
            resuming.extend(self.teacher, self._plan[0], rank_zero_warn)
        else:
            self._start(pl_module)
        self._fitting = True
        self._write_averages(trainer)
        if self._finish_with == "student" and isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
            rank_zero_warn(
                "this strategy trains in processes of its own, and the teacher stays there: to have the "
                "average as the module's weights after fit, pass TeacherCallback(finish_with='teacher'), or "
                "read it from a checkpoint"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the optimizer's steps from here on: what a tuner has tried before does not count.

        If the checkpoint of a resumed run has no teacher, average over the remaining steps.

        Raises:
            ValueError: If not exactly one optimizer trains the student and `optimizer` names none.
        """
        assert self.teacher is not None
        plan = self._planned(trainer)
        if plan != self._plan:  # a tuner has changed the batch size
            self._plan = plan
            if self.teacher.step:
                resuming.extend(self.teacher, plan[0], rank_zero_warn)
            else:
                self._start(pl_module)
        self._attachment = self.teacher.attach(self._counted(trainer, self._student_of(pl_module)))
        step = steps.taken(trainer)
        if step and not self.teacher.step:
            missing = f"the checkpoint at step {step} has no {self._name}"
            resuming.start_late(self.teacher, step, plan[0], missing, rank_zero_warn)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if the run was shorter than the kernel's horizon."""
        assert self.teacher is not None
        if not (trainer.should_stop or trainer.interrupted):
            resuming.warn_if_short(self.teacher, rank_zero_warn)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop counting, and leave teacher and module on one device, with the weights of `finish_with`."""
        self._stop()
        assert self.teacher is not None
        self._follow(pl_module)
        if self._finish_with == "teacher":
            self.teacher.copy_to(self._student_of(pl_module))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the student its own weights back and stop counting."""
        self._stop()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget what belonged to this run alone: a loaded state, and the teacher of a tuner's trials."""
        if self._fitting and self.teacher is not None and not self.teacher.step:
            del pl_module.__dict__[self._name]
            self.teacher = None
        self._stop()
        self._follow(pl_module)

    def _follow(self, pl_module: LightningModule) -> None:
        """Move the teacher to the device to which Lightning moves the module, for each run and after it."""
        if self.teacher is not None and not resuming.is_sharded(self.teacher):
            own = next(self.teacher.module.parameters(), None)
            if own is not None and own.device != pl_module.device and "device" not in self._options:
                self.teacher.to(pl_module.device)

    def _stop(self) -> None:
        self._lent.close()
        if self._attachment is not None:
            self._attachment.remove()
        self._restored, self._fitting = None, False

    # --- building -----------------------------------------------------------------------------------

    def _start(self, pl_module: LightningModule) -> None:
        """Begin a new average of the student as it is."""
        self.teacher = self._build(pl_module, *self._plan)

    def _build(self, pl_module: LightningModule, total_steps: int | None, update_every: int) -> WMATeacher:
        """Build a teacher as the module's attribute."""
        old = pl_module.__dict__.pop(self._name, None)
        if not isinstance(old, WMATeacher | None) or hasattr(pl_module, self._name):
            raise ValueError(
                f"{type(pl_module).__name__} has an attribute {self._name!r} of its own: pass another name "
                "for the teacher, TeacherCallback(name=...)"
            )
        factory = self._module_factory
        teacher = WMATeacher(
            self._student_of(pl_module), self._kernel, total_steps, update_every=update_every,
            module_factory=None if factory is None else lambda: factory(pl_module), **self._options,
        )  # fmt: skip
        # nn.Module's own __setattr__ would make it a submodule.
        object.__setattr__(pl_module, self._name, teacher)
        return teacher

    def _planned(self, trainer: Trainer) -> tuple[int | None, int]:
        """Return the horizon, None if it is unknown and the kernel needs none, and the interval."""
        every = steps.steps_per_epoch(trainer) if self._every == "epoch" else self._every
        total = steps.total_steps(trainer) if self._total_steps is None else self._total_steps
        if total is None and kernels.build(self._kernel).needs_horizon:
            raise ValueError(
                "the Trainer cannot tell how many steps the student's optimizer will take "
                f"(max_epochs={trainer.max_epochs}, max_steps={trainer.max_steps}, "
                f"{len(trainer.optimizers)} optimizers): pass TeacherCallback(total_steps=...)"
            )
        return total, every

    def _student_of(self, pl_module: LightningModule) -> nn.Module:
        if self._student is None:
            return pl_module
        submodules = {name: m for name, m in pl_module.named_modules(remove_duplicate=False) if name}
        return checks.lookup("submodule for student", self._student, submodules)

    def _counted(self, trainer: Trainer, student: nn.Module) -> Optimizer | list[Optimizer]:
        optimizers = trainer.optimizers
        if self._optimizer is not None:
            given: Any = self._optimizer
            chosen = given if isinstance(given, list | tuple) else [given]
            if not all(type(index) is int and 0 <= index < len(optimizers) for index in chosen):
                raise ValueError(
                    f"optimizer must be an index below {len(optimizers)}, the number of the module's "
                    f"optimizers, or a list of such, got {self._optimizer!r}"
                )
            return [optimizers[index] for index in chosen]
        ours = {id(p) for p in student.parameters()}
        training = [o for o in optimizers if any(id(p) in ours for g in o.param_groups for p in g["params"])]
        if len(training) != 1:
            raise ValueError(
                f"{len(training)} of the module's {len(optimizers)} optimizers train the student: "
                "pass TeacherCallback(optimizer=INDEX), the one whose steps count, optimizer=[INDEX, INDEX], "
                "those whose steps together count as one, or student='...', the submodule to average"
            )
        return training[0]

    # --- evaluation ---------------------------------------------------------------------------------

    def _lend(self, trainer: Trainer, pl_module: LightningModule) -> None:
        fitting = trainer.state.fn == TrainerFn.FITTING
        teacher = self.teacher if fitting else self._to_evaluate(trainer, pl_module)
        if not fitting:
            self._follow(pl_module)
        if self._evaluate_with == "teacher" and teacher is not None:
            self._lent.enter_context(teacher.swap())

    def _to_evaluate(self, trainer: Trainer, pl_module: LightningModule) -> WMATeacher | None:
        """Return the teacher of the checkpoint or, without one, of the module that is evaluated."""
        own = pl_module.__dict__.get(self._name)
        path, state = trainer.ckpt_path, self._restored
        if path is None:
            if self.teacher is not None and own is self.teacher:
                return self.teacher
            if self._evaluate_with == "teacher":
                rank_zero_warn(
                    f"this {type(pl_module).__name__} has no {self._name} yet, and its own weights are "
                    "evaluated: pass ckpt_path=... to evaluate a checkpoint's"
                )
            return None
        if isinstance(own, WMATeacher):  # of a run that goes on after the evaluation
            del pl_module.__dict__[self._name]
        self._lent.callback(self._put_back, pl_module, own)
        if state:
            every = (
                state["teacher"]["_extra_state"]["update_every"] if self._every == "epoch" else self._every
            )
            teacher = self._build(pl_module, state["total_steps"], every)
            resuming.restore(teacher, state, None, rank_zero_warn)
            return teacher
        if self._evaluate_with == "teacher":
            raise ValueError(
                f"{path} has no {self._name} to evaluate: a checkpoint has one if this callback was there "
                "when it was saved, and save_weights_only was not set; for the weights in its state_dict, "
                "averaged or not, pass TeacherCallback(evaluate_with='student')"
            )
        return None

    def _put_back(self, pl_module: LightningModule, own: Any) -> None:
        if isinstance(pl_module.__dict__.get(self._name), WMATeacher):
            del pl_module.__dict__[self._name]
        if own is not None:
            object.__setattr__(pl_module, self._name, own)

    def _take_back(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._lent.close()

    on_validation_start = on_test_start = on_predict_start = _lend
    on_validation_end = on_test_end = on_predict_end = _take_back

    # --- checkpoints --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the teacher's state in whole tensors; a collective if the teacher is sharded."""
        if self.teacher is None:
            return dict(self._restored or {})
        return resuming.saved_state(self.teacher)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the teacher's state, once there is a teacher."""
        self._restored = state_dict
        # Lightning restores a sharded module, and with it the callbacks, after `on_fit_start`. So do tuners.
        if self._fitting:
            self._restore(state_dict)

    def _restore(self, state: Mapping[str, Any]) -> None:
        assert self.teacher is not None
        self._restored = None
        resuming.restore(self.teacher, state, self._plan[0], rank_zero_warn)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Load the student's weights into the module, also if the `state_dict` has the teacher's."""
        if STUDENT in checkpoint:
            pl_module.load_state_dict(checkpoint[STUDENT], strict=pl_module.strict_loading)

    def _write_averages(self, trainer: Trainer) -> None:
        """Give the Trainer's checkpoints averaged weights, if they are to have them."""
        if self._checkpoint == "student" and not self._save_averaged:
            return
        assert self.teacher is not None
        strategy = trainer.strategy
        if (
            resuming.is_sharded(self.teacher)
            or type(strategy).save_checkpoint is not Strategy.save_checkpoint
        ):
            raise ValueError(
                f"checkpoint='teacher' and save_averaged=True do not work with {type(strategy).__name__}, "
                "which writes files of its own: leave them out, and save "
                "teacher.averaged_state_dict(full=True)"
            )
        io = strategy.checkpoint_io
        while isinstance(io, AveragedIO):
            if io.owner is self:
                return
            io = io.inner
        strategy.checkpoint_io = AveragedIO(
            strategy.checkpoint_io,
            self,
            self._averaged,
            replace=self._checkpoint == "teacher",
            beside=self._save_averaged,
        )

    def _averaged(self) -> dict[str, Any] | None:
        if self.teacher is None:
            return None
        prefix = "" if self._student is None else f"{self._student}."
        return {f"{prefix}{key}": value for key, value in self.teacher.averaged_state_dict().items()}
