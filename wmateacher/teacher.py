"""`WMATeacher`: a module whose weights are a kernel-weighted average of a student's whole trajectory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from wmateacher import checks, copying, kernels, pairing, sharding, swapping, walking
from wmateacher.attachment import Attachment
from wmateacher.kernels import Array, Kernel, KernelLike
from wmateacher.schedule import Clock
from wmateacher.shadow import Shadow

__all__ = ["WMATeacher"]

_FORMAT = 1


class WMATeacher(nn.Module):
    r"""A teacher whose weights are the kernel-weighted average of every state the student has passed through.

    After `t` optimizer steps its weights are

    $$M^t = \sum_{k=0}^{t} w_{k|t} W^k, \qquad M^t = (1 - \omega_t) M^{t-1} + \omega_t W^t,$$

    where `W^0` is the student at construction and the kernel determines `omega_t` (TRACER, Definition 3.3
    and eq. 15). Static, EMA, SWA and WMA teachers differ only in the kernel.

    Example:
        >>> student = nn.Linear(4, 2)
        >>> teacher = WMATeacher(student, kernel="beta(0.5,0.5)", total_steps=100)
        >>> targets = teacher(torch.randn(8, 4))  # eval mode, no gradient
        >>> teacher.update()  # after each optimizer.step()

    Attributes:
        module: The averaged module, in eval mode and in the student's dtype.
        omega: The weight that the last step gave to the student; 0.0 if no snapshot was due.
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
        hooks: copying.Hooks = "drop",
        module_factory: Callable[[], nn.Module] | None = None,
    ):
        """Build the teacher. Its average starts at the student's present weights.

        Args:
            model: The student. DDP, DataParallel and torch.compile wrappers are unwrapped.
            kernel: The weighting of the student's states: a string, a `Kernel`, a frozen `scipy.stats`
                distribution or a callable density; see `wmateacher.kernels`. The default, Beta(0.5, 0.5),
                is TRACER's.
            total_steps: The number of optimizer steps in the whole run. Optional for kernels without a
                horizon.
            update_every: The number of optimizer steps between two snapshots. The window, measured in
                steps, does not depend on it.
            dtype: The precision of the average. `"auto"` averages bf16 and fp16 students in float32 and
                other students in their own dtype. `"split"` keeps the same float32 average of a bf16
                student in 2 extra bytes per parameter instead of 4, at about twice the time per update;
                saving it allocates the float32 tensors. The forward pass always runs in the student's
                dtype.
            device: The teacher's device; None stands for the student's. `"cpu"` frees GPU memory, but
                every update then copies the student through pinned memory and waits for the copy.
            buffers: `"copy"` takes the student's buffers at every snapshot, `"average"` averages the
                floating-point ones, and `"keep"` leaves them as they were at construction.
            frozen: `"share"` uses the student's own tensors for parameters that do not require grad, so
                that they cost no memory and are not saved; `"copy"` gives the teacher its own.
            exclude: `fnmatch` patterns for the names of tensors to copy instead of averaging.
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

        Raises:
            ValueError: If an argument is out of range, the kernel needs `total_steps` and none is given, a
                pattern in `exclude` matches nothing, the factory's module differs from the student in its
                tensors or its sharding, the student is wrapped in FSDP1 (`FullyShardedDataParallel`), or it
                holds itself in a way that a copy would compute with it (a patched `forward`, for example).
            TypeError: If `model` is not a module, is a teacher or contains a scripted module, or no kernel
                can be built from `kernel`.
        """
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
        pairing.check_precision(dtype)
        self._clock = Clock(kernels.build(kernel), total_steps, update_every)
        self.omega = 0.0
        checks.one_of("hooks policy", hooks, copying.HOOKS)
        student = pairing.unwrap(model)
        if walking.is_teacher(student):
            raise TypeError("model must be the student, got a WMATeacher: pass its module, teacher.module")
        copying.refuse_scripted(student)
        swapping.refuse(student, "building a teacher")
        sharding.refuse_fsdp1(student)
        sharding.reshard(sharding.fully_sharded(student))
        roles = pairing.assign(student, buffers=buffers, frozen=frozen, exclude=exclude)
        self._shadow = Shadow(
            student, roles, dtype=dtype, device=device, hooks=hooks, module_factory=module_factory
        )
        self.module = self._shadow.module
        # Tuples hide the models in them from nn.Module, which would register them as submodules.
        self._student = (model,)
        self._swapped: tuple[nn.Module, ...] = ()
        self._attachment: Attachment | None = None
        self.register_state_dict_pre_hook(_prepare_state)
        self.register_state_dict_post_hook(_complete_state)
        self.register_load_state_dict_pre_hook(_load_state)

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
    def total_steps(self) -> int | None:
        """The horizon in optimizer steps."""
        return self._clock.total_steps

    @property
    def student(self) -> nn.Module:
        """The model that the teacher was built from, without DDP, DataParallel and torch.compile wrappers."""
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
        return self._clock.trajectory_weights()

    def averaged_pairs(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield the name, the student's tensor and the full-precision average of every averaged tensor.

        Sharded tensors are DTensors. Meant for diagnostics.
        """
        plan = self._shadow.plan(self.student, is_original=True)
        for name in self.roles.averaged:
            yield name, plan.student.tensors[name].detach(), self._shadow.read(plan.own, name)

    def extra_repr(self) -> str:
        """Return the kernel and the step count for `print(teacher)`."""
        return (
            f"kernel={self.kernel}, step={self.step}, total_steps={self.total_steps}, "
            f"update_every={self._clock.update_every}"
        )

    # --- averaging ----------------------------------------------------------------------------------

    def update(self, model: nn.Module | None = None) -> None:
        """Count one optimizer step and, if a snapshot is due, move the average towards the student.

        Call it after every `optimizer.step()`, on every rank. A snapshot of weight 0 changes nothing.

        Args:
            model: The student; None stands for the one that the teacher was built from.

        Raises:
            ValueError: If the student no longer has the tensors that the teacher was built from.
            RuntimeError: If called inside `swap`, or while the teacher is attached to an optimizer, which
                counts its steps already.
        """
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
        self._refuse_swapped("update()")
        swapping.refuse(student, "update()")
        plan = self._shadow.plan(student, is_original=student is original)
        before = self._clock.step, self._clock.snapshot
        omega = self._clock.tick()
        try:
            if omega:
                plan.apply(omega)
        except BaseException:
            self._clock.step, self._clock.snapshot = before  # a step that was not averaged must not count
            raise
        self.omega = omega or 0.0

    def attach(self, optimizer: Optimizer | Sequence[Optimizer]) -> Attachment:
        """Call `update` automatically after every step of one optimizer, or of several together.

        One outermost `step` counts as one step, also if it calls `super().step()` or steps another optimizer,
        as SAM does. Steps that a `GradScaler` skips, the micro-batches of gradient accumulation, and the step
        that torch's distributed checkpoints take to create an optimizer's state do not count. With a fused
        optimizer and a `GradScaler`, only the device knows whether a step was skipped, so counting waits for
        it.

        Args:
            optimizer: The optimizer that trains the student, or a list of several in the order in which they
                step. These count one step once the last one has stepped.

        Returns:
            A handle with a `remove()` method, which is also a context manager.

        Raises:
            TypeError: If `optimizer` is neither a `torch.optim.Optimizer` nor a list of them.
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
        self._clock.set_total_steps(total_steps)

    def load_average(self, average: Mapping[str, Tensor] | None, step: int) -> None:
        """Continue an average of the first `step` optimizer steps that was made elsewhere.

        The average keeps its proportions. As a whole it gets the mass that the kernel gives to these steps,
        and every later step gets exactly its weight. `trajectory_weights` then reports the weights that
        this kernel would have given to all steps. For the checkpoints of other libraries, see
        `wmateacher.migration`.

        Args:
            average: The averaged weights, under the keys of the student's `state_dict`. Buffers that are
                missing do not change. None keeps the present average and only sets the step count, for
                example to make up for steps that were not counted.
            step: The number of optimizer steps that the average covers.

        Raises:
            ValueError: If a weight is missing, unknown or of another shape, or `step` is not a whole number
                within the run.
            RuntimeError: If called inside `swap`.
        """
        self._refuse_swapped("load_average()")
        if average is None:
            self._clock.jump(step)
            return
        values = self._shadow.match_average(average)
        self._clock.jump(step)
        self._shadow.write(values)

    # --- using the average --------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the averaged module in eval mode and without gradient."""
        with torch.no_grad():
            output = self.module(*args, **kwargs)
        # FSDP2 leaves the root's parameters gathered for a backward pass, which never comes.
        sharding.reshard(self._shadow.fully_sharded)
        return output

    def train(self, mode: bool = True) -> WMATeacher:
        """Set the training flag of the teacher; the averaged module stays in eval mode."""
        super().train(mode)
        self.module.eval()
        return self

    @contextmanager
    def swap(self, model: nn.Module | None = None) -> Iterator[nn.Module]:
        """Give the student the averaged weights and buffers inside a `with` block.

        The student's own tensors are kept in a copy, which takes the memory of one student. They are restored
        bit for bit at the end, even after an exception. The mode (train or eval) does not change. Blocks for
        the same model may be nested, and the teacher may be called inside.

        Args:
            model: The model that gets the averaged weights; None stands for the model that the teacher was
                built from.

        Yields:
            The model.

        Raises:
            RuntimeError: If another model is swapped inside the block, or one of these is called there:
                `update`, or `state_dict` of the teacher or the student (a checkpoint would mix the two).
                Also raised at the end of the block if the student's parameters were written inside.
        """
        model = self._student[0] if model is None else model
        student = pairing.unwrap(model)
        if student in self._swapped:
            yield model
            return
        if self._swapped or swapping.owner(student) is not None:
            raise RuntimeError(
                "swap() inside swap(): another model already holds this teacher's weights, or this model "
                "holds another teacher's; leave that with block first"
            )
        targets, sources = self._shadow.counterparts(student)
        self._swapped = (student,)
        try:
            with swapping.lend(student, self, targets, sources):
                yield model
        finally:
            self._swapped = ()

    def copy_to(self, model: nn.Module) -> None:
        """Write the averaged weights and buffers into a model of the student's architecture, by name.

        A model of higher precision than the student gets the average at full precision.

        Raises:
            ValueError: If the model's tensors are not the student's.
            RuntimeError: If the model holds another teacher's weights inside `swap`.
        """
        student = pairing.unwrap(model)
        swapping.refuse(student, "copy_to()")
        self._shadow.copy_to(student)

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
        state = self._shadow.averaged_state(dtype)
        return sharding.consolidate(state) if full else state

    # --- state --------------------------------------------------------------------------------------

    def get_extra_state(self) -> dict[str, Any]:
        """Return the step count, kernel and horizon, which `state_dict` includes."""
        return {"format": _FORMAT, "omega": self.omega, **self._clock.state()}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `get_extra_state` returned; `load_state_dict` calls it."""
        self._clock.restore(dict(state))
        self.omega = state["omega"]

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the teacher is not attached to the optimizer of the original.
        return {**super().__getstate__(), "_attachment": None, "_swapped": ()}

    def __deepcopy__(self, memo: dict[int, Any]) -> WMATeacher:
        twin = memo[id(self)] = type(self).__new__(type(self))
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        copying.rebind(self._shadow.module, twin._shadow.module, memo)
        return twin

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> WMATeacher:
        """Move or cast the averaged module; the averages move along and keep their precision."""
        with self._shadow.moving():
            super()._apply(fn, recurse)
        return self

    def _refuse_swapped(self, action: str) -> None:
        for student in self._swapped:
            swapping.refuse(student, action)


def _prepare_state(teacher: nn.Module, *unused: Any) -> None:
    assert isinstance(teacher, WMATeacher)
    teacher._refuse_swapped("state_dict() of the teacher")
    sharding.reshard(teacher._shadow.fully_sharded)


def _complete_state(teacher: nn.Module, state: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    assert isinstance(teacher, WMATeacher)
    teacher._shadow.complete_state(teacher.module, state, f"{prefix}module.")


def _load_state(teacher: nn.Module, state: dict[str, Any], prefix: str, *unused: Any) -> None:
    """Check the whole state before any of it is written, then load the averages."""
    assert isinstance(teacher, WMATeacher)
    teacher._refuse_swapped("load_state_dict() of the teacher")
    clock = state.get(f"{prefix}_extra_state")
    if not isinstance(clock, Mapping) or "format" not in clock:
        raise ValueError(
            f"there is no teacher state under the prefix {prefix!r}: it holds no clock. To start an average "
            "from plain weights, load them into the student and build the teacher from it"
        )
    if clock["format"] != _FORMAT:
        raise ValueError(
            f"the state has format {clock['format']!r}, but this version reads format {_FORMAT}: load it "
            "with the version of wmateacher that wrote it"
        )
    teacher._clock.check(dict(clock))
    teacher._shadow.load_state(teacher.module, state, prefix)


def __dir__() -> list[str]:
    return __all__
