"""`WMATeacher`: a module whose weights are a kernel-weighted average of a student's whole trajectory."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from wmateacher import (
    adapters,
    caches,
    checks,
    controller,
    copying,
    kernels,
    normalisation,
    pairing,
    sharding,
    states,
    swapping,
    unfreezing,
    walking,
    zero,
)
from wmateacher import buffers as changing
from wmateacher.attachment import Attachment
from wmateacher.finiteness import NONFINITE, Nonfinite, Verdict
from wmateacher.kernels import Array, Kernel, KernelLike
from wmateacher.modes import Modes
from wmateacher.shadow import Shadow
from wmateacher.transfers import Transfer

__all__ = ["WMATeacher"]


class WMATeacher(nn.Module):
    r"""A teacher whose weights are the kernel-weighted average of every state the student has passed through.

    After `t` optimizer steps its weights are

    $$M^t = \sum_{k=0}^{t} w_{k|t} W^k, \qquad M^t = (1 - \omega_t) M^{t-1} + \omega_t W^t,$$

    where `W^0` is the student at construction and the kernel determines `omega_t` (TRACER, Definition 3.3
    and eq. 15). Static, EMA, SWA and WMA teachers differ only in the kernel.

    Examples:
        >>> student = nn.Linear(4, 2)
        >>> teacher = WMATeacher(student, kernel="beta(0.5,0.5)", total_steps=100)
        >>> targets = teacher(torch.randn(8, 4))  # eval mode, no gradient
        >>> teacher.update()  # after each optimizer.step()

    Attributes:
        module: The averaged module, in the student's dtype.
        start: The student's weights at construction, if the kernel measures distances to them (`gap`).
    """

    # `walking` recognises teachers by it, so that a teacher may be a submodule of its own student.
    _is_wmateacher = True

    def __init__(
        self,
        model: nn.Module,
        kernel: KernelLike = "beta(0.5,0.5)",
        total_steps: int | None = None,
        *,
        update_every: int = 1,
        dtype: pairing.Precision = "auto",
        device: torch.device | str | None = None,
        buffers: pairing.Buffers = "copy",
        frozen: pairing.Frozen = "share",
        exclude: Sequence[str] = (),
        mode: normalisation.Mode = "eval",
        dropout: bool = False,
        nonfinite: Nonfinite = "warn",
        hooks: copying.Hooks = "drop",
        module_factory: Callable[[], nn.Module] | None = None,
        fused: bool = True,
    ):
        """Build the teacher. Its average starts at the student's present weights.

        Args:
            model: The student. Wrappers of DDP, DataParallel, torch.compile, activation checkpointing and
                Lightning Fabric are unwrapped.
            kernel: The weighting of the student's states: a string, a `Kernel`, a frozen `scipy.stats`
                distribution or a callable density; see `wmateacher.kernels`. The default, Beta(0.5, 0.5),
                is TRACER's.
            total_steps: The number of optimizer steps in the whole run. Optional for kernels without a
                horizon.
            update_every: The number of optimizer steps between two snapshots. The window, measured in
                steps, does not depend on it.
            dtype: The precision of the average. `"auto"` averages bf16 and fp16 students in float32 and
                other students in their own dtype, but vectors and scalars, such as norm gains, in float64
                where the device has it: float32 would swallow the small updates of a long run. `"split"`
                keeps the same float32 average of a bf16 student in 2 extra bytes per parameter instead of 4,
                at about twice the time per update; saving it allocates the float32 tensors. The forward pass
                always runs in the student's dtype.
            device: The teacher's device; None stands for the student's. `"cpu"` frees GPU memory, but
                every update then copies the student through pinned memory and waits for the copy, and the
                teacher takes inputs on the CPU.
            buffers: `"copy"` takes the student's buffers at every snapshot, whatever their shapes are by
                then, `"average"` averages the floating-point ones, which must keep their shapes, and `"keep"`
                leaves the teacher's own. The running statistics of batch normalisation are the teacher's own
                in any case if `mode="train"`.
            frozen: `"share"` uses the student's own tensors for parameters that do not require grad, so
                that they cost no memory and are not saved. One that is unfrozen later is averaged from the
                value that it had until then. `"copy"` gives the teacher its own.
            exclude: `fnmatch` patterns for the names of tensors to copy instead of averaging.
            mode: `"eval"` normalises with running statistics. `"train"` normalises with the statistics of the
                teacher's own batch, as the student does and as in mean teacher (Tarvainen & Valpola 2017),
                and collects running statistics of the teacher's own, which `teacher.eval()`, `swap`,
                `copy_to` and saved states use. It makes a difference to batch normalisation, and to instance
                normalisation that tracks statistics. Layers that a student in train mode holds in eval mode,
                at any time, are in eval mode in the teacher, too, with the student's statistics. What is
                averaged does not depend on the mode. Under DDP each process has its own running statistics,
                as in the student; `wmateacher.recalibrate` makes them equal.
            dropout: Whether a teacher in `mode="train"` runs dropout and everything else in train mode, too,
                with random numbers of the global generators. With False only the normalisation layers are in
                train mode.
            nonfinite: The policy for students with NaN or infinite values. `"warn"` averages them, and warns
                when the average is saved, swapped in or copied. `"skip"` leaves such a snapshot out of the
                average, warns once and lists its step in `skipped`. `"raise"` leaves it out too, and raises a
                RuntimeError at the latest in the next `update` or when the teacher's state is read; the run
                may go on from there. Both check every tensor that the teacher averages or copies, unless it
                was infinite from the start, at about two thirds of an update's own time. On an accelerator
                the host never waits for the check of the current step, but for the one before. With sharded
                students the check takes a collective, so that every rank decides alike.
            hooks: Whether the student's forward and backward hooks are left out of the teacher (`"drop"`) or
                run there as well (`"copy"`), rebound to the teacher's modules. With `"copy"`, a hook that
                records into a list outside of the model records the teacher's values, too. Hooks that the
                model computes with are always kept: methods of the model itself, and those of weight and
                spectral norm, pruning, quantisation and tensor parallelism. A module from `module_factory`
                has the hooks that the function gives it.
            module_factory: A function that builds the averaged module, for students that cannot be
                deep-copied or are sharded by `fully_shard`. It must shard its module like the student and
                may leave it on the meta device. Each process then averages its own shards without
                communication.
            fused: Whether one Triton kernel moves all averages that are on a CUDA device beside their
                student, in one pass over the memory. With False, or without Triton, torch's own operations
                do, in several passes; the averages agree up to rounding. Each process tries the kernel
                against them once for each combination of dtypes, which compiles it.

        Raises:
            ValueError: If an argument is out of range, the kernel needs `total_steps` and none is given, a
                pattern in `exclude` matches nothing, the factory's module differs from the student in its
                tensors or its sharding, the student is wrapped in FSDP1 (`FullyShardedDataParallel`), or it
                holds itself in a way that a copy would compute with it (a patched `forward`, for example).
            TypeError: If `model` is not a module, is a teacher or contains a scripted module, or no kernel
                can be built from `kernel`.

        Warns:
            UserWarning: If the student's running statistics would be copied for a kernel that looks far back.
                Later, if the teacher is called with the statistics of the start that `buffers="keep"` left,
                or in the first update if the fused kernel does not work on this machine and is not used.
        """
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
        pairing.check_precision(dtype)
        checks.one_of("nonfinite policy", nonfinite, NONFINITE)
        checks.one_of("mode", mode, normalisation.MODES)
        if dropout and mode == "eval":
            raise ValueError("dropout=True needs mode='train', got mode='eval', in which dropout is off")
        self._clock = controller.clock(kernels.build(kernel), total_steps, update_every)
        checks.one_of("hooks policy", hooks, copying.HOOKS)
        self._omega: float | Transfer = 0.0
        self._nonfinite: Nonfinite = nonfinite
        self._verdict: Verdict | None = None  # of the last snapshot, until the host knows it
        self._reported: list[str] = []  # the averages that a warning has named
        student = pairing.unwrap(model)
        if walking.is_teacher(student):
            raise TypeError("model must be the student, got a WMATeacher: pass its module, teacher.module")
        copying.refuse_scripted(student)
        swapping.refuse(student, "building a teacher")
        sharding.refuse_fsdp1(student)
        zero.refuse_partitioned(dict(walking.named_parameters(student)))
        sharding.reshard(sharding.fully_sharded(student))
        fixed = normalisation.frozen(student)
        own = normalisation.statistics(student, without=fixed)
        roles = pairing.assign(
            student, buffers=buffers, frozen=frozen, exclude=exclude, keep=own if mode == "train" else ()
        )
        # Tensors that are made in inference mode could not be averaged outside of it.
        with torch.inference_mode(False), torch.no_grad():
            self._shadow = Shadow(
                student,
                roles,
                dtype=dtype,
                device=device,
                frozen=frozen,
                hooks=hooks,
                module_factory=module_factory,
                nonfinite=nonfinite,
                measured=isinstance(self.kernel, kernels.Gap),
                fused=fused,
            )
            self._distances = controller.distances(self.kernel, self._shadow, student)
        self.module = self._shadow.module
        if self._distances is not None:
            self.start = self._distances.start
        self._modes = Modes(self._shadow, student, mode, dropout, fixed)
        # Tuples hide the models in them from nn.Module, which would register them as submodules.
        self._student = (model,)
        self._adapters = adapters.pairs(student, self.module)
        self._lending: swapping.Lending | None = None
        self._attachment: Attachment | None = None
        try:
            self._refuse_merged("building a teacher")
        except RuntimeError:
            self.module.train()  # layers that merge themselves in eval mode have done so in shared weights
            raise
        self._modes.set(student, self.training)
        self._modes.check(own, self._clock)
        self.register_state_dict_pre_hook(_prepare_state)
        self.register_state_dict_post_hook(_complete_state)
        self.register_load_state_dict_pre_hook(_load_state)
        unfreezing.watch(self, _take_up_unfrozen)

    # --- properties ---------------------------------------------------------------------------------

    @property
    def kernel(self) -> Kernel:
        """The kernel, which determines how much each step of the student counts."""
        return self._clock.kernel

    @property
    def step(self) -> int:
        """The number of optimizer steps counted so far."""
        return self._clock.step

    @property
    def omega(self) -> float:
        """The weight that the last step gave to the student; 0.0 if no snapshot was due or it was skipped."""
        self._settle()
        return float(self._omega)

    @property
    def skipped(self) -> tuple[int, ...]:
        """The steps whose snapshots `nonfinite` kept out of the average."""
        self._settle()
        return tuple(self._clock.skipped)

    @property
    def total_steps(self) -> int | None:
        """The horizon in optimizer steps."""
        return self._clock.total_steps

    @property
    def student(self) -> nn.Module:
        """The model that the teacher was built from, without wrappers such as DDP and torch.compile."""
        return pairing.unwrap(self._student[0])

    @property
    def roles(self) -> pairing.Roles:
        """The names of the tensors that are averaged, copied, kept and shared with the student."""
        return self._shadow.roles

    def trajectory_weights(self) -> Array:
        """Return the weight of every student state in the current average.

        Returns:
            A float64 array of shape `[step + 1]` that sums to 1. Entry 0 is the state at construction.
                Steps that `update_every` skips have weight 0.
        """
        self._settle()
        return self._clock.trajectory_weights()

    def averaged_pairs(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield the name, the student's tensor and the full-precision average of every averaged tensor.

        Sharded tensors are DTensors. Meant for diagnostics.

        Raises:
            RuntimeError: If called inside `swap`.
        """
        self._refuse_lent("averaged_pairs()")
        plan = self._shadow.plan(self.student, is_original=True, step=self.step)
        for name in self.roles.averaged:
            yield name, plan.student.tensors[name].detach(), self._shadow.read(plan.own, name)

    def extra_repr(self) -> str:
        """Return the kernel and the step count for `print(teacher)`."""
        return (
            f"kernel={self.kernel}, step={self.step}, total_steps={self.total_steps}, "
            f"update_every={self._clock.update_every}"
        )

    @property
    def _is_accelerate_prepared(self) -> bool:
        """False; Accelerate's `prepare` sets it to True on the models that it has prepared."""
        return False

    @_is_accelerate_prepared.setter
    def _is_accelerate_prepared(self, value: bool) -> None:
        raise RuntimeError(
            "accelerator.prepare() got the teacher, which is not trained and whose clock save_state() cannot "
            "write as a model's weights: leave it out of prepare(), and call "
            "accelerator.register_for_checkpointing(teacher)"
        )

    # --- averaging ----------------------------------------------------------------------------------

    def update(self, model: nn.Module | None = None) -> None:
        """Count one optimizer step and, if a snapshot is due, move the average towards the student.

        Call it after every `optimizer.step()`, on every rank. A snapshot of weight 0 changes nothing.

        Args:
            model: The student; None stands for the one that the teacher was built from.

        Raises:
            ValueError: If the student no longer has the tensors that the teacher was built from.
            RuntimeError: If called inside `swap`, while adapters are merged into the student's weights, or
                while the teacher is attached to an optimizer, which counts its steps already. With
                `nonfinite="raise"` also if this student or the one before is not finite.
        """
        if torch.compiler.is_dynamo_compiling():
            _update_uncompiled(self, model)
            return
        if self._attachment is not None and self._attachment.active:
            raise RuntimeError(
                f"this teacher is attached to {self._attachment}, which already "
                "counts its steps, so that update() would count them twice: drop the call, or remove() the "
                "handle that attach() returned"
            )
        self._advance(model)

    def _advance(self, model: nn.Module | None = None) -> None:
        """Do the work of `update`, without its check for an attached optimizer."""
        original = self.student
        student = original if model is None else pairing.unwrap(model)
        self._refuse_lent("update()")
        swapping.refuse(student, "update()")
        adapters.refuse(self._adapters_of(student), "update()")
        if self._modes.collecting:
            self._modes.set(original, self.training)
        refused: RuntimeError | None = None
        try:
            self._settle()
        except RuntimeError as error:
            refused = error  # the last student was refused; this one counts before that is said
        step = self._clock.step
        self._shadow.take_up_unfrozen(step, trained=True)
        plan = self._shadow.plan(student, is_original=student is original, step=step)
        if self._modes.follow(self.training, plan):
            plan = self._shadow.plan(student, is_original=student is original, step=step)
        before = self._clock.step, self._clock.snapshot
        omega: float | Tensor | None = self._clock.tick()
        try:
            if omega is not None and self._distances is not None:
                omega = self._distances.omega(plan)
            if isinstance(omega, Tensor) or omega:
                self._verdict = plan.apply(omega)
        except BaseException:
            self._clock.step, self._clock.snapshot = before  # a step that was not averaged must not count
            raise
        if omega is not None and isinstance(self._clock, controller.MeasuredClock):
            self._omega = self._clock.record(omega)
        else:
            assert not isinstance(omega, Tensor)
            self._omega = omega or 0.0
        self._shadow.note_values()
        if self._verdict is not None and self._verdict.has_arrived():
            self._settle()
        if refused is not None:
            raise refused

    def _settle(self) -> None:
        """Act on what is known of the last snapshot: a student that was not finite is not in the average."""
        verdict, self._verdict = self._verdict, None
        names = [] if verdict is None else verdict.nonfinite()
        if not names:
            return
        step, is_first = self._clock.snapshot, not self._clock.skipped
        self._clock.skip()
        self._omega = 0.0
        message = (
            f"the student has NaN or infinite values at step {step} in {pairing.few(names)}, and was not "
            "averaged: its weight goes to the next snapshot"
        )
        if self._nonfinite == "raise":
            raise RuntimeError(f"{message}. Restore the student or stop the run; the teacher is unharmed")
        if is_first:
            warnings.warn(f"{message}. Later ones are listed in teacher.skipped", stacklevel=2)

    def _report_nonfinite(self) -> None:
        """Warn about averages that are not finite, once for the same ones."""
        names = self._shadow.nonfinite()
        if names and names != self._reported:
            warnings.warn(
                f"the average has NaN or infinite values in {pairing.few(names)}: a student that had them "
                "was averaged, and no later one makes up for it. Load an earlier state, and build the "
                "teacher with nonfinite='skip'",
                stacklevel=3,
            )
        self._reported = names

    def attach(self, optimizer: Optimizer | Sequence[Optimizer]) -> Attachment:
        """Call `update` automatically after every step of one optimizer, or of several together.

        One outermost `step` counts as one step, also if it calls `super().step()` or steps another optimizer,
        as SAM does. Steps that a `GradScaler` skips, the micro-batches of gradient accumulation, and the step
        that torch's distributed checkpoints take to create an optimizer's state do not count. With a fused
        optimizer and a `GradScaler`, only the device knows whether a step was skipped, so counting waits for
        it.

        Args:
            optimizer: The optimizer that trains the student, or a list of several in the order in which they
                step. These count one step once the last one has stepped, or when one of them steps again
                before that, as after a step that a `GradScaler` skipped. With DeepSpeed, the engine or its
                optimizer.

        Returns:
            A handle with a `remove()` method, which is also a context manager.

        Raises:
            TypeError: If `optimizer` is neither a `torch.optim.Optimizer` nor a list of them, nor from
                DeepSpeed.
            ValueError: If one of the optimizers trains none of the student's parameters.
            RuntimeError: If the teacher is attached already; and later, in the first step, if the optimizers
                step in another order.
        """
        if self._attachment is not None and self._attachment.active:
            raise RuntimeError(
                f"this teacher is already attached to {self._attachment}: if several optimizers train the "
                "student, attach it to a list of them, or remove() the other attachment first"
            )
        parameters = [p for _, p in walking.named_parameters(self.student)]
        self._attachment = Attachment(optimizer, parameters, self._advance)
        return self._attachment

    def set_total_steps(self, total_steps: int) -> None:
        """Change the horizon in the middle of a run.

        The states averaged so far keep their proportions. Together they get the mass that the kernel over
        the new horizon gives to their steps, and every later step gets exactly its weight under the new
        horizon.

        Raises:
            ValueError: If `total_steps` is not a whole number, or less than the number of steps taken.
        """
        self._settle()
        self._clock.set_total_steps(total_steps)

    def load_average(self, average: Mapping[str, Tensor] | None, step: int) -> None:
        """Continue an average of the first `step` optimizer steps that was made elsewhere.

        The average keeps its proportions. As a whole it gets the mass that the kernel gives to these steps,
        and every later step gets exactly its weight, also if `step` lies between two snapshots.
        `trajectory_weights` then reports the weights that this kernel gives to all steps. For the
        checkpoints of other libraries, see `wmateacher.migration`.

        Args:
            average: The averaged weights, under the keys of the student's `state_dict`, with or without
                those of wrappers. Buffers that are missing do not change. None keeps the present average and
                only sets the step count, for example to make up for steps that were not counted.
            step: The number of optimizer steps that the average covers.

        Raises:
            ValueError: If a weight is missing, unknown or of another shape, or `step` is not a whole number
                within the run.
            RuntimeError: If called inside `swap`.
        """
        self._refuse_lent("load_average()")
        self._settle()
        if average is None:
            self._clock.jump(step)
            return
        values = states.match_average(self._shadow, average)
        infinite = [n for n, v in values.items() if self._nonfinite != "warn" and not v.isfinite().all()]
        if infinite:
            raise ValueError(
                f"average has NaN or infinite values in {pairing.few(infinite)}, which "
                f"nonfinite={self._nonfinite!r} keeps out of the average: pass a finite one"
            )
        self._clock.jump(step)
        self._shadow.take_up_different(values, step)
        self._shadow.write(values)
        if not values.keys().isdisjoint(self.roles.kept):
            self._modes.accept()

    # --- using the average --------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the averaged module in the teacher's mode and without gradient.

        Raises:
            RuntimeError: If the student's adapters are merged into frozen weights that the teacher shares,
                the teacher's tensors hold lent weights, or the forward pass writes to weights that hold the
                average itself. Embeddings with `max_norm`, and averages in higher precision than the
                module's, are kept apart from it.
        """
        swapping.refuse(self.module, "the teacher's forward pass")
        self._refuse_merged("the teacher's forward pass")
        self._shadow.take_up_unfrozen(self.step)
        if not torch.compiler.is_dynamo_compiling():
            self._modes.follow(self.training)
            self._modes.notice_outgrown(self._clock)
        self._modes.restore()
        free = self.roles.averaged if self._modes.collecting else ()
        guard = nullcontext() if torch.compiler.is_dynamo_compiling() else self._shadow.guarding(free)
        with guard, torch.no_grad(), caches.apart():
            return self.module(*args, **kwargs)

    def train(self, mode: bool = True) -> WMATeacher:
        """Set the training flag of the teacher, which a teacher in `mode="eval"` ignores.

        In `mode="train"`, `train()` normalises with each batch's statistics, as a new teacher does, and
        `eval()` with the running ones. Running statistics that have been reset, as by
        `torch.optim.swa_utils.update_bn`, are recomputed by the forward passes between `train()` and the next
        call of `train` or `eval`.
        """
        super().train(mode)
        self._modes.set(self.student, self.training)
        return self

    @contextmanager
    def _recalibrating(self) -> Iterator[tuple[nn.Module, Collection[str], Callable[..., None]]]:
        """Lend `recalibrate` the averaged module, the layers that it leaves out, and what writes averages."""
        self._refuse_lent("recalibrate()")
        self._refuse_merged("recalibrate()")
        self._shadow.take_up_unfrozen(self.step)
        self._modes.follow(self.training)
        with self._shadow.guarding(self.roles.averaged):
            yield self._shadow.module, self._modes.fixed, self._shadow.write
        self._modes.accept()

    @contextmanager
    def swap(self, model: nn.Module | None = None) -> Iterator[nn.Module]:
        """Give the student the averaged weights and buffers inside a `with` block.

        The student's own tensors are kept in a copy, which takes the memory of one student. They are restored
        bit for bit at the end, even after an exception. The mode (train or eval) does not change. The teacher
        may be called inside. Blocks for the same model may be nested; the student's own weights return when
        the last of them ends.

        Frozen parameters that the teacher shares are neither copied nor written. To notice writing to them
        inside, a checksum is taken at both ends of the block, which takes about 0.3 s per GB on one CPU core.

        Args:
            model: The model that gets the averaged weights; None stands for the model that the teacher was
                built from.

        Yields:
            The model.

        Raises:
            RuntimeError: If any of the model's tensors holds lent weights already, in this thread or another,
                or its adapters are merged. Inside the block, `update`, saving, pickling or copying the
                student, saving the teacher, merging adapters and swapping an overlapping model raise it, for
                every teacher and in every thread. It is also raised at the end of the block if the student's
                parameters were written inside.
        """
        model = self._student[0] if model is None else model
        student, lending = pairing.unwrap(model), self._lending
        if lending is None or not lending.covers(student):
            swapping.refuse(student, "swap()")
            if lending is not None:
                lending.refuse("swap() of another model")
            adapters.refuse(self._adapters_of(student), "swap()")
            self._report_nonfinite()
            targets, sources, differing = self._shadow.counterparts(student)
            replaced = changing.lent(student, self.module, differing)
            lending = swapping.Lending(student, targets, sources, replaced)
        try:
            with lending:
                self._lending = lending
                yield model
        finally:
            if self._lending is lending and not lending.depth:
                self._lending = None

    def copy_to(self, model: nn.Module) -> None:
        """Write the averaged weights and buffers into a model of the student's architecture, by name.

        A model of higher precision than the student gets the average at full precision.

        Raises:
            ValueError: If the model's tensors are not the student's.
            RuntimeError: If any of the model's tensors holds lent weights inside `swap`, or adapters are
                merged into its weights.
        """
        student = pairing.unwrap(model)
        swapping.refuse(student, "copy_to()")
        swapping.refuse(self.module, "copy_to()")
        adapters.refuse(self._adapters_of(student), "copy_to()")
        self._report_nonfinite()
        self._shadow.copy_to(student)
        zero.refresh_masters(model)

    def averaged_state_dict(self, dtype: torch.dtype | None = None, *, full: bool = False) -> dict[str, Any]:
        """Return a copy of the averaged weights and buffers that the student's `load_state_dict` reads.

        The tensors are contiguous and share no memory, as `safetensors.torch.save_file` requires. To resume
        a run, save `state_dict` instead, which also has the step count.

        Args:
            dtype: The dtype of floating-point tensors, converted from the average at full precision; None
                stands for the student's.
            full: Whether to gather sharded tensors, one at a time. Rank 0 then gets the whole state on the
                CPU and the other ranks an empty one. This is a collective, which every rank must call. With
                False, sharded tensors stay DTensors.
        """
        swapping.refuse(self.module, "averaged_state_dict()")
        self._refuse_merged("averaged_state_dict()")
        self._report_nonfinite()
        with torch.inference_mode(False), torch.no_grad():
            state = states.averaged(self._shadow, self.student, dtype)
        return sharding.consolidate(state) if full else state

    # --- state --------------------------------------------------------------------------------------

    def get_extra_state(self) -> dict[str, Any]:
        """Return the step count, kernel and horizon, which `state_dict` includes."""
        self._settle()
        state = {
            "format": states.FORMAT,
            "omega": float(self._omega),
            **self._clock.state(),
            "shared": list(self.roles.shared),
            "unfrozen": [[name, step] for name, step in self._shadow.unfrozen.items()],
        }
        changed = self._shadow.changed_buffers()
        return {**state, "changed_buffers": changed} if changed else state

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `get_extra_state` returned; `load_state_dict` calls it."""
        self._clock.restore(state)
        self._omega, self._verdict = state["omega"], None

    def __getstate__(self) -> dict[str, Any]:
        self._settle()
        # A copy of the teacher is not attached to the optimizer of the original.
        return {
            **super().__getstate__(),
            "_omega": float(self._omega),
            "_attachment": None,
            "_lending": None,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._modes.watch(self.student)
        self._modes.set(self.student, self.training)
        unfreezing.watch(self, _take_up_unfrozen)

    def __deepcopy__(self, memo: dict[int, Any]) -> WMATeacher:
        twin = memo[id(self)] = type(self).__new__(type(self))
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        copying.rebind(self._shadow.module, twin._shadow.module, memo)
        return twin

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> WMATeacher:
        """Move or cast the averaged module; the averages move along and keep their precision."""
        with torch.inference_mode(False), torch.no_grad(), self._shadow.moving():
            super()._apply(fn, recurse)
        return self

    def _refuse_lent(self, action: str) -> None:
        """Refuse `action` if this teacher lends its weights, or its student or its module has lent ones."""
        if self._lending is not None:
            self._lending.refuse(action)
        swapping.refuse(self.student, action)
        swapping.refuse(self.module, action)

    def _refuse_merged(self, action: str) -> None:
        """Refuse `action` if adapters are merged into the frozen weights that student and teacher share."""
        if self.roles.shared:
            adapters.refuse(self._adapters, action)

    def _adapters_of(self, student: nn.Module) -> tuple[adapters.Pair, ...]:
        return self._adapters if student is self.student else adapters.pairs(student, self.module)


def _take_up_unfrozen(teacher: WMATeacher) -> None:
    teacher._shadow.take_up_unfrozen(teacher.step)


def _prepare_state(teacher: nn.Module, *unused: Any) -> None:
    assert isinstance(teacher, WMATeacher)
    teacher._refuse_lent("state_dict() of the teacher")
    teacher._settle()
    teacher._report_nonfinite()
    if teacher._distances is not None:
        teacher._distances.complete()
    sharding.reshard(teacher._shadow.fully_sharded)


def _complete_state(teacher: nn.Module, state: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    assert isinstance(teacher, WMATeacher)
    states.complete(teacher._shadow, teacher.module, state, f"{prefix}module.")


def _load_state(teacher: nn.Module, state: dict[str, Any], prefix: str, *unused: Any) -> None:
    """Check the whole state before any of it is written, then load the averages."""
    assert isinstance(teacher, WMATeacher)
    teacher._refuse_lent("load_state_dict() of the teacher")
    header = states.read_header(state, prefix, teacher._clock)
    distances = teacher._distances
    start = {} if distances is None else distances.take(state, prefix, header.get("shared"))
    states.load(teacher._shadow, teacher.module, state, prefix, teacher.student, header)
    teacher._modes.accept()
    if distances is not None:
        state.update({prefix + key: value for key, value in distances.load(start).items()})


# For compiled training steps: a graph does not see what a kernel writes through addresses, and it would be
# compiled again for each step count. `update` is not decorated with it, because the decorator's frames would
# hide the caller's line in warnings.
_update_uncompiled = torch._disable_dynamo(WMATeacher.update)


def __dir__() -> list[str]:
    return __all__
