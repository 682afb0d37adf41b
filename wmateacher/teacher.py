"""`WMATeacher`: a module that is a kernel-weighted average of a student's whole trajectory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from wmateacher import averaging, kernels, pairing, sharding, swapping
from wmateacher.attachment import Attachment
from wmateacher.averaging import Average
from wmateacher.kernels import Array, Kernel, KernelLike
from wmateacher.pairing import Binding
from wmateacher.schedule import Clock

_FORMAT = 1


@dataclass(frozen=True)
class _Plan:
    """Everything that an update needs, as long as both modules keep their tensors."""

    student: Binding
    own: Binding
    average: averaging.Update
    copied: tuple[Sequence[Tensor], Sequence[Tensor]]

    def fits(self, student: nn.Module) -> bool:
        return self.student.model is student and self.student.is_current() and self.own.is_current()


class WMATeacher(nn.Module):
    r"""The kernel-weighted average of every state that the student has passed through.

    After `t` optimizer steps the teacher's weights are

    $$M^t = \sum_{k=0}^{t} w_{k|t} W^k, \qquad M^t = (1 - \omega_t) M^{t-1} + \omega_t W^t,$$

    with `W^0` the student when the teacher was built and `omega_t` the kernel's (TRACER, Definition
    3.3 and eq. 15). Static, EMA, SWA and WMA teachers differ in the kernel alone.

    Example:
        >>> student = nn.Linear(4, 2)
        >>> teacher = WMATeacher(student, kernel="beta(0.5,0.5)", total_steps=100)
        >>> targets = teacher(torch.randn(8, 4))  # eval mode, no gradient
        >>> teacher.update()  # after each optimizer.step()

    Attributes:
        module: The averaged module, in eval mode, in the student's dtype.
        kernel: The kernel.
        omega: The weight that the last counted step applied; 0.0 where no snapshot was due.
    """

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
        module_factory: Callable[[], nn.Module] | None = None,
    ):
        """Start the average at the student as it is now.

        Args:
            model: The student, any module; DDP, DataParallel and torch.compile are seen through.
            kernel: A string, a `Kernel`, a frozen `scipy.stats` distribution or a callable density;
                see `wmateacher.kernels`. Default: Beta(0.5, 0.5), TRACER's.
            total_steps: Optimizer steps of the whole run; may be None for kernels without a horizon.
            update_every: Average every n-th step; the window, in steps, stays the same.
            dtype: Of the average. `"auto"`: float32 for bf16 and fp16 students, else the student's.
                `"split"`: the same float32 average of a bf16 student for 2 bytes a parameter beside
                the module instead of 4, and an update that takes about twice as long; saving it makes
                the float32 tensors. The forward runs in the student's dtype.
            device: Where the teacher lives; None: with the student. `"cpu"` keeps a GPU's memory
                free: updates fetch the student through pinned memory, and wait for it.
            buffers: `"copy"` the student's at each snapshot, `"average"` the floating-point ones, or
                `"keep"` those of the start.
            frozen: `"share"` the student's own tensors for parameters that do not require grad (they
                cost nothing and are not in the state), or `"copy"` them.
            exclude: Name patterns (as in `fnmatch`) of tensors that are copied instead of averaged.
            module_factory: Builds the averaged module where the student cannot be deep-copied, or is
                sharded by `fully_shard`: it shards its module as the student is, and may leave it on the
                meta device. Every process then averages its own shards, without communication.

        Raises:
            ValueError: A parameter out of range, a kernel that needs `total_steps` without it, a
                pattern that matches nothing, a factory whose module differs from the student or is
                sharded otherwise, or a student under FSDP1 (`FullyShardedDataParallel`).
            TypeError: `model` is not a module or a scripted one, or `kernel` is nothing that a kernel is
                made from.
        """
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
        wide = isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1
        if dtype not in ("auto", "split") and not wide:
            raise ValueError(
                "dtype must be 'auto', 'split' or a floating-point torch.dtype of 16 bits or more, got "
                f"{dtype!r}"
            )
        self._clock = Clock(kernels.build(kernel), total_steps, update_every)
        self.omega = 0.0
        student = pairing.unwrap(model)
        if isinstance(student, torch.jit.ScriptModule):
            raise TypeError(
                "model must not be a ScriptModule: build the teacher before scripting the student"
            )
        swapping.refuse(student, "building a teacher")
        sharding.refuse_fsdp1(student)
        sharding.reshard(sharding.fully_sharded(student))
        self._roles = pairing.assign(student, buffers=buffers, frozen=frozen, exclude=exclude)
        self._student = (model,)  # in a tuple, so that it does not become a submodule
        self.module = self._build(student, module_factory, device)
        self._fully_sharded = sharding.fully_sharded(self.module)
        self._precisions: dict[str, torch.dtype] = {}
        self._beside = self._start(Binding(student).local, dtype)
        self._plan: _Plan | None = None
        self._attachment: Attachment | None = None
        self._swapped: tuple[nn.Module, ...] = ()  # a tuple, as above
        self.register_state_dict_pre_hook(_refuse_swapped)
        self.register_state_dict_post_hook(_complete_state)
        self.register_load_state_dict_pre_hook(_check_state)

    # --- what it is ---------------------------------------------------------------------------------

    @property
    def kernel(self) -> Kernel:
        """How much each step of the student counts."""
        return self._clock.kernel

    @property
    def step(self) -> int:
        """Optimizer steps counted so far."""
        return self._clock.step

    @property
    def total_steps(self) -> int | None:
        """The horizon in optimizer steps."""
        return self._clock.total_steps

    def trajectory_weights(self) -> Array:
        """The realised weight of every student state so far.

        Returns:
            float64 `[step + 1]`, summing to 1; entry 0 is the state at construction, and steps that
            `update_every` passes over have weight 0.
        """
        return self._clock.trajectory_weights()

    def averaged_pairs(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(name, student, average) of every averaged tensor, at full precision; for diagnostics.

        Of a sharded tensor both are DTensors.
        """
        plan = self._planned(self._student[0])
        for name in self._roles.averaged:
            average = sharding.spread(self._average(plan.own, name).read(), plan.own.tensors[name])
            yield name, plan.student.tensors[name].detach(), average

    def set_total_steps(self, total_steps: int) -> None:
        """Change the horizon mid-run.

        What is already averaged keeps its proportions and together gets the mass that the kernel over
        the new horizon gives to those steps; later steps get exactly the new horizon's weights.

        Raises:
            ValueError: Not a whole number, or less than the steps already taken.
        """
        self._clock.set_total_steps(total_steps)

    def load_average(self, average: Mapping[str, Tensor] | None, step: int) -> None:
        """Go on from an average that something else has made over the first `step` optimizer steps.

        It keeps its proportions, and together gets the mass that the kernel gives to these steps; later steps
        get exactly their weights. `weights()` then tells what this kernel would have given to all. For the
        states of other libraries see `wmateacher.migration`.

        Args:
            average: Weights by the names of the student's `state_dict`; buffers may be missing, and
                stay as they are. None: the average as it is, for a gap in the count.
            step: Optimizer steps that it is the average of.

        Raises:
            ValueError: A weight is missing, unknown or of another shape, or `step` is no number of steps
                of the run.
            RuntimeError: Inside `swap`.
        """
        _refuse_swapped(self)
        if average is None:
            self._clock.jump(step)
            return
        own, names = self._bind(), pairing.state_names(self.module)
        names = {path: n for path, n in names.items() if n not in self._roles.shared}
        needed = {p for p, n in names.items() if isinstance(own.tensors[n], nn.Parameter)}
        missing = sorted(needed - average.keys())
        unexpected = [k for k in average if k not in self.module.state_dict()]
        if missing or unexpected:
            raise ValueError(
                "average is of another architecture: " + pairing.describe_difference(missing, unexpected)
            )
        for path, name in names.items():
            if path in average and average[path].shape != own.tensors[name].shape:
                raise ValueError(
                    f"average is of another architecture: {path!r} has shape {tuple(average[path].shape)} "
                    f"there and {tuple(own.tensors[name].shape)} here"
                )
        self._clock.jump(step)
        for path, name in names.items():
            if path not in average:
                continue
            value = sharding.local(average[path]).detach()
            if name in self._roles.averaged:
                self._average(own, name).write(value)
            else:
                averaging.copy_([own.local[name]], [value])

    def extra_repr(self) -> str:
        """The clock, for `print(teacher)`."""
        return (
            f"kernel={self.kernel}, step={self.step}, total_steps={self.total_steps}, "
            f"update_every={self._clock.update_every}"
        )

    # --- what it does -------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The averaged module's output, in eval mode and without gradient."""
        with torch.no_grad():
            output = self.module(*args, **kwargs)
        # FSDP2 keeps the root whole for a backward pass, which never comes.
        sharding.reshard(self._fully_sharded)
        return output

    def update(self, model: nn.Module | None = None) -> None:
        """Count one optimizer step and average the student in where a snapshot is due.

        Call it after each `optimizer.step()`, on every rank. A snapshot of weight 0 changes nothing.

        Args:
            model: The student; None: the one that the teacher was built from.

        Raises:
            ValueError: The student's tensors are no longer those that the teacher was built from.
            RuntimeError: Inside `swap`, or while `attach`ed to an optimizer, whose steps count by
                themselves.
        """
        if self._attachment is not None and self._attachment.active:
            raise RuntimeError(
                f"this teacher is attached to {type(self._attachment.optimizer).__name__} and counts its "
                "steps by itself, so that update() would count them twice: drop the call, or remove() "
                "what attach() returned"
            )
        self._advance(model)

    def attach(self, optimizer: Optimizer) -> Attachment:
        """Call `update` after each step that an optimizer takes.

        Steps that a `GradScaler` skips do not count, nor do the micro-batches of an accumulated
        gradient. Where several optimizers train the student, attach to the one whose steps count. With
        a fused optimizer and a `GradScaler`, whether a step was skipped is known to the device alone,
        and counting waits for it.

        Returns:
            A handle with `remove()`, also a context manager.

        Raises:
            TypeError: Not one `torch.optim.Optimizer`.
            ValueError: The optimizer trains none of the student's parameters.
            RuntimeError: The teacher is attached already.
        """
        if self._attachment is not None and self._attachment.active:
            raise RuntimeError(
                f"this teacher is already attached to {type(self._attachment.optimizer).__name__}: of "
                "several optimizers, attach it to the one whose steps count, or remove() the other first"
            )
        self._attachment = Attachment(optimizer, self._student[0].parameters(), self._advance)
        return self._attachment

    @contextmanager
    def swap(self, model: nn.Module | None = None) -> Iterator[nn.Module]:
        """A context in which the student holds the averaged weights, and its own again after.

        Its own come back bit for bit, also after an exception; they wait in a copy, one student's
        memory. Buffers go with the weights; the mode (train or eval) is the caller's. The context may
        be entered again inside. The teacher itself stays as it is and may be called.

        Args:
            model: Who holds them; None: the model that the teacher was built from.

        Yields:
            The model.

        Raises:
            RuntimeError: At `update` or `state_dict` inside (also the student's: a checkpoint would
                mix the two), at swapping a second model inside, and at the end if the student's
                parameters were written inside.
        """
        model = self._student[0] if model is None else model
        student = pairing.unwrap(model)
        if student in self._swapped:
            yield model
            return
        if self._swapped or swapping.owner(student) is not None:
            raise RuntimeError(
                "swap() inside swap(): another model holds this teacher's weights, or this one another "
                "teacher's, already; leave that with block first"
            )
        sharding.reshard(sharding.fully_sharded(student))
        targets, sources = self._counterparts(student)
        self._swapped = (student,)
        try:
            with swapping.lend(student, self, targets, sources):
                yield model
        finally:
            self._swapped = ()

    def copy_to(self, model: nn.Module) -> None:
        """Write the averaged weights and buffers into a model of the student's architecture, by name.

        A model of higher precision than the student's gets the average at full precision.

        Raises:
            ValueError: The model's tensors are not the student's.
            RuntimeError: The model is lent another teacher's weights by `swap`.
        """
        student = pairing.unwrap(model)
        swapping.refuse(student, "copy_to()")
        sharding.reshard(sharding.fully_sharded(student))
        targets, sources = self._counterparts(student)
        averaging.copy_([sharding.local(t) for t in targets], sources)

    def averaged_state_dict(self, dtype: torch.dtype | None = None, *, full: bool = False) -> dict[str, Any]:
        """A copy of the averaged weights and buffers that the student's `load_state_dict` reads.

        Tensors are contiguous and share no memory, as `safetensors.torch.save_file` wants them. What
        resumes a run is `state_dict`, which has the clock.

        Args:
            dtype: Of floating-point tensors, from the average at full precision; None: the student's.
            full: Gather what is sharded, one tensor at a time, for a model in one piece: the whole state on
                the CPU of rank 0 and an empty one elsewhere. A collective: every rank calls it. False:
                sharded tensors stay DTensors.
        """
        own = self._bind()
        names = {id(t): n for n, t in own.tensors.items()}
        state: dict[str, Any] = self.module.state_dict(keep_vars=True)
        for key, value in state.items():
            if id(value) in names:
                wanted = dtype if dtype is not None and value.is_floating_point() else value.dtype
                precise = self._precise(own, names[id(value)], wanted)
                state[key] = sharding.spread(precise.to(dtype=wanted, copy=True).contiguous(), value)
        return sharding.consolidate(state) if full else state

    def train(self, mode: bool = True) -> WMATeacher:
        """Set the flag; the averaged module stays in eval mode."""
        super().train(mode)
        self.module.eval()
        return self

    # --- construction -------------------------------------------------------------------------------

    def _build(
        self,
        student: nn.Module,
        factory: Callable[[], nn.Module] | None,
        device: torch.device | str | None,
    ) -> nn.Module:
        named = pairing.tensors(student)
        target = None if device is None else torch.empty(0, device=device).device
        shared = {id(named[n]): named[n] for n in self._roles.shared}
        if sharding.fully_sharded(student):
            if factory is None:
                raise ValueError(
                    "the student is sharded by fully_shard, which refuses to be deep-copied: pass "
                    "module_factory=FACTORY, the function that builds the module and shards it as the "
                    "student is (it may do so on the meta device and leave it there)"
                )
            for name in self._roles.shared:
                sharding.refuse_uneven(name, named[name])
        if target is not None and any(t.device != target for t in shared.values()):
            raise ValueError(
                f"device={device!r} differs from that of the student's frozen parameters, which "
                "frozen='share' uses in place: pass frozen='copy' to give the teacher its own"
            )
        if factory is None:
            owned = {} if target is None else {id(named[n]): named[n] for n in self._roles.owned}
            away = {i: pairing.clone(t, target) for i, t in owned.items()}  # not first here, then there
            try:
                module = copy.deepcopy(student, {**shared, **pairing.computed(student), **away})
            except (RuntimeError, TypeError, NotImplementedError, AssertionError) as error:
                raise ValueError(
                    f"the student ({type(student).__name__}) cannot be deep-copied ({error}): pass "
                    "module_factory=FACTORY, a function that builds a module of the same architecture"
                ) from error
        else:
            module = factory()
            own = pairing.tensors(module)
            pairing.match(named, own)
            sharding.match(own, named)
            theirs = {id(t) for t in named.values()}
            if any(id(own[n]) in theirs for n in self._roles.owned):
                raise ValueError(
                    "module_factory must build a new module: what the factory returned has the student's own "
                    "tensors"
                )
            pairing.densify(module)
            pairing.share(module, student, self._roles.shared)
            pairing.materialise(module, target or _device(named))
            targets, sources = Binding(module).local, Binding(student).local
            averaging.copy_([targets[n] for n in self._roles.owned], [sources[n] for n in self._roles.owned])
        pairing.densify(module)
        module.requires_grad_(False)
        return (module if device is None else module.to(device)).eval()

    def _start(self, student: dict[str, Tensor], dtype: pairing.Precision) -> dict[str, Tensor]:
        """Begin the averages at the student; what they need beside the module's own tensors."""
        own, beside = Binding(self.module).local, {}
        for name in self._roles.averaged:
            wanted = self._precisions[name] = pairing.accumulator_dtype(student[name], dtype)
            split = dtype == "split" and wanted != own[name].dtype
            if split and own[name].dtype != torch.bfloat16:
                raise ValueError(
                    f"dtype='split' is for bfloat16 students, whose values are the upper halves of float32, "
                    f"but {name!r} is {own[name].dtype}: use dtype='auto'"
                )
            average = Average.of(student[name].detach().to(wanted), own[name], split=split)
            if average.beside is not None:
                beside[name] = average.beside
        if dtype == "split" and not beside:
            raise ValueError(
                "dtype='split' is for bfloat16 students, and no averaged tensor of this one is bfloat16: "
                "use dtype='auto', which needs no memory beside the module here"
            )
        return beside

    # --- what it works on ---------------------------------------------------------------------------

    def _bind(self) -> Binding:
        """The averaged module's tensors, its shards where it is sharded."""
        sharding.reshard(self._fully_sharded)
        return Binding(self.module)

    def _average(self, own: Binding, name: str) -> Average:
        average = Average(own.local[name], self._beside.get(name))
        needed = torch.bfloat16 if average.split else average.held.dtype
        needed = self._precisions[name] if average.beside is None else needed
        if (average.split or average.beside is None) and average.own.dtype != needed:
            raise RuntimeError(
                f"the averaged module's {name!r} was cast to {average.own.dtype}, but it holds the average "
                f"in {needed}: cast the teacher (teacher.to(dtype)), not teacher.module"
            )
        return average

    def _precise(self, own: Binding, name: str, dtype: torch.dtype) -> Tensor:
        """The memory of a tensor of the teacher's, at full precision where `dtype` is not its own."""
        tensor = own.local[name]
        if tensor.dtype == dtype or name not in self._beside:
            return tensor.detach()
        return self._average(own, name).read()

    def _counterparts(self, student: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        """A model's tensors and the teacher's memory for them, without those that are the same."""
        own, theirs = self._bind(), pairing.tensors(student)
        pairing.match(own.tensors, theirs)
        sharding.match(own.tensors, theirs)
        names = [n for n, tensor in own.tensors.items() if tensor is not theirs[n]]
        targets = [pairing.unexpanded(theirs[n]) for n in names]
        sources = [self._precise(own, n, theirs[n].dtype) for n in names]
        # What the student holds once for all of a dimension, the teacher has equal entries of.
        firsts = [s[tuple(map(slice, t.shape))] if s.shape != t.shape else s
                  for s, t in zip(sources, targets, strict=True)]  # fmt: skip
        return targets, firsts

    def _planned(self, model: nn.Module) -> _Plan:
        """The plan for averaging this student in."""
        student = pairing.unwrap(model)
        if self._plan is not None and self._plan.fits(student):
            return self._plan
        sharding.reshard(sharding.fully_sharded(student))  # a forward may have left its parameters whole
        own = self._bind()
        if self._plan is None or not self._plan.fits(student):
            theirs, roles = Binding(student), self._roles
            pairing.match(own.tensors, theirs.tensors)
            sharding.match(own.tensors, theirs.tensors)
            if student is pairing.unwrap(self._student[0]):
                pairing.check_frozen(theirs.tensors, roles)
                if any(own.tensors[n] is not theirs.tensors[n] for n in roles.shared):  # replaced since
                    pairing.share(self.module, student, roles.shared)
                    own = Binding(self.module)
            averages = [self._average(own, n) for n in roles.averaged]
            with torch.inference_mode(False):
                update = averaging.Update(averages, [theirs.local[n] for n in roles.averaged])
            targets, sources = ([b.local[n] for n in roles.copied] for b in (own, theirs))
            self._plan = _Plan(theirs, own, update, (targets, sources))
        return self._plan

    def _advance(self, model: nn.Module | None = None) -> None:
        """Count one step; `update` without its guard."""
        model = self._student[0] if model is None else model
        if self._swapped:
            swapping.refuse(self._swapped[0], "update()")
        swapping.refuse(pairing.unwrap(model), "update()")
        plan, before = self._planned(model), (self._clock.step, self._clock.snapshot)
        omega = self._clock.tick()
        try:
            if omega:
                plan.average(omega)
                averaging.copy_(*plan.copied)
        except BaseException:
            self._clock.step, self._clock.snapshot = before  # what was not averaged does not count
            raise
        self.omega = omega or 0.0

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> WMATeacher:
        """Move or cast the forward; the averages follow a move and keep their precision in a cast."""
        if self._fully_sharded and self._roles.shared:
            raise RuntimeError(
                "a teacher that is sharded by fully_shard and shares frozen parameters with its student "
                "cannot be moved or cast: build it on its device in its dtype, or with frozen='copy'"
            )
        before = self._bind()
        averages = {n: Average(before.local[n].detach(), self._beside.get(n)) for n in self._roles.averaged}
        with pairing.hidden(self.module, self._roles.shared):  # the student's, and moved with it
            super()._apply(fn, recurse)
        own, self._beside, self._plan = Binding(self.module).local, {}, None
        for name, average in averages.items():
            if own[name].dtype != average.own.dtype:
                average = Average.of(average.read().to(own[name].device), own[name])
            if average.beside is not None:
                self._beside[name] = average.beside.to(own[name].device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_plan": None, "_attachment": None, "_swapped": ()}

    # --- state --------------------------------------------------------------------------------------

    def _state_names(self, prefix: str) -> dict[str, str]:
        """The state's keys under `prefix`, each with the canonical name of its tensor."""
        return {f"{prefix}module.{path}": n for path, n in pairing.state_names(self.module).items()}

    def get_extra_state(self) -> dict[str, Any]:
        """The clock; part of `state_dict`."""
        return {"format": _FORMAT, "omega": self.omega, **self._clock.state()}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Restore the clock; part of `load_state_dict`."""
        self._clock.restore(dict(state))
        self.omega = state["omega"]


def _device(tensors: Mapping[str, Tensor]) -> torch.device:
    return next((t.device for t in tensors.values()), torch.device("cpu"))


def _refuse_swapped(teacher: nn.Module, *unused: Any) -> None:
    assert isinstance(teacher, WMATeacher)
    if teacher._swapped:
        swapping.refuse(teacher._swapped[0], "state_dict() of the teacher")
    sharding.reshard(teacher._fully_sharded)


def _complete_state(teacher: nn.Module, state: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """Put the averages in the state at full precision, and leave out what is the student's."""
    assert isinstance(teacher, WMATeacher)
    own, full = Binding(teacher.module), {}
    for key, name in teacher._state_names(prefix).items():
        if name in teacher._roles.shared:
            state.pop(key, None)
        elif name in teacher._roles.averaged:
            if name not in full:  # tied tensors stay one
                full[name] = sharding.spread(teacher._average(own, name).read(), own.tensors[name])
            state[key] = full[name]


def _check_state(teacher: nn.Module, state: dict[str, Any], prefix: str, *unused: Any) -> None:
    """Refuse a state that does not fit before anything is written, then take the averages from it."""
    assert isinstance(teacher, WMATeacher)
    _refuse_swapped(teacher)
    clock = state.get(f"{prefix}_extra_state")
    if not isinstance(clock, Mapping) or "format" not in clock:
        raise ValueError(
            f"no teacher's state under {prefix!r}: it holds no clock. To start an average from plain "
            "weights, load them into the student and build the teacher from it"
        )
    if clock["format"] != _FORMAT:
        raise ValueError(
            f"the state has format {clock['format']!r}, this version reads format {_FORMAT}: load it "
            "with the version of wmateacher that wrote it"
        )
    teacher._clock.check(dict(clock))
    own, names = Binding(teacher.module), teacher._state_names(prefix)
    known = {f"{prefix}_extra_state", *teacher.module.state_dict(prefix=f"{prefix}module."), *names}
    missing = [k for k, n in names.items() if k not in state and n not in teacher._roles.shared]
    extra = [k for k in state if k.startswith(prefix) and k not in known]
    if missing or extra:
        raise ValueError(
            "the state was written for another architecture: " + pairing.describe_difference(missing, extra)
        )
    for key, name in names.items():
        tensor = own.tensors[name]
        if name in teacher._roles.shared:
            state[key] = tensor
        elif state[key].shape != tensor.shape:
            raise ValueError(
                f"the state was written for another architecture: {key!r} has shape "
                f"{tuple(state[key].shape)} there and {tuple(tensor.shape)} here"
            )
        elif state[key].is_complex() != tensor.is_complex():
            raise ValueError(f"the state was written for another architecture: {key!r} is {state[key].dtype}")
        elif not sharding.alike(state[key], tensor):
            raise ValueError(
                f"in the state {key!r} is {sharding.describe(state[key])}, the teacher's is "
                f"{sharding.describe(tensor)}: read it with torch.distributed.checkpoint, which fits a saved "
                "state to any sharding"
            )
    # In place, also with assign=True: tied tensors stay tied and every tensor keeps its dtype.
    for key, name in names.items():
        if name in teacher._roles.averaged:
            teacher._average(own, name).write(sharding.local(state[key]))
        elif name in teacher._roles.owned:
            averaging.copy_([own.local[name]], [sharding.local(state[key])])
        state[key] = own.tensors[name]
