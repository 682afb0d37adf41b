"""`WMATeacher`: a module that is a kernel-weighted average of a student's whole trajectory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from wmateacher import averaging, kernels, pairing
from wmateacher.kernels import Array, Kernel
from wmateacher.schedule import Clock

_FORMAT = 1


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
        kernel: str | Kernel | Callable[..., Any] = "beta(0.5,0.5)",
        total_steps: int | None = None,
        *,
        update_every: int = 1,
        dtype: torch.dtype | Literal["auto"] = "auto",
        device: torch.device | str | None = None,
        buffers: pairing.Buffers = "copy",
        frozen: pairing.Frozen = "share",
        exclude: Sequence[str] = (),
        module: Callable[[], nn.Module] | None = None,
    ):
        """Start the average at the student as it is now.

        Args:
            model: The student, any module; DDP, DataParallel and torch.compile are seen through.
            kernel: A string, a `Kernel`, a frozen `scipy.stats` distribution or a callable density;
                see `wmateacher.kernels`. Default: Beta(0.5, 0.5), TRACER's.
            total_steps: Optimizer steps of the whole run; may be None for kernels without a horizon.
            update_every: Average every n-th step; the window, in steps, stays the same.
            dtype: Of the average. `"auto"`: float32 for bf16 and fp16 students, else the student's.
                The forward runs in the student's dtype.
            device: Where the teacher lives; None: with the student.
            buffers: `"copy"` the student's at each snapshot, `"average"` the floating-point ones, or
                `"keep"` those of the start.
            frozen: `"share"` the student's own tensors for parameters that do not require grad (they
                cost nothing and are not in the state), or `"copy"` them.
            exclude: Name patterns (as in `fnmatch`) of tensors that are copied instead of averaged.
            module: Builds the averaged module where the student cannot be deep-copied.

        Raises:
            ValueError: A parameter out of range, a kernel that needs `total_steps` without it, a
                pattern that matches nothing, or a factory whose module differs from the student.
            TypeError: `model` is not a module, or `kernel` is nothing that a kernel is made from.
        """
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
        if dtype != "auto" and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"dtype must be 'auto' or a floating-point torch.dtype, got {dtype!r}")
        self._clock = Clock(kernels.build(kernel), total_steps, update_every)
        self.omega = 0.0
        student = pairing.unwrap(model)
        self._roles = pairing.assign(student, buffers=buffers, frozen=frozen, exclude=exclude)
        self._dtype = dtype
        self._student = (model,)  # in a tuple, so that it does not become a submodule
        self.module = self._build(student, module, device)
        self._accumulators = self._make_accumulators(pairing.tensors(student))
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

    def weights(self) -> Array:
        """The realised weight of every student state so far.

        Returns:
            float64 `[step + 1]`, summing to 1; entry 0 is the state at construction, and steps that
            `update_every` passes over have weight 0.
        """
        return self._clock.weights()

    def averaged_pairs(self) -> list[tuple[Tensor, Tensor]]:
        """(student, average) of every averaged tensor, the average at full precision; for diagnostics."""
        ours = self._averages()
        theirs = pairing.match(ours, self._student[0], self._roles)
        return [(theirs[n].detach(), ours[n].detach()) for n in self._roles.averaged]

    def set_total_steps(self, total_steps: int) -> None:
        """Change the horizon mid-run.

        What is already averaged keeps its proportions and together gets the mass that the kernel over
        the new horizon gives to those steps; later steps get exactly the new horizon's weights.

        Raises:
            ValueError: Not a whole number, or less than the steps already taken.
        """
        self._clock.set_total_steps(total_steps)

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
            return self.module(*args, **kwargs)

    def update(self, model: nn.Module | None = None) -> None:
        """Count one optimizer step and average the student in where a snapshot is due.

        Call it after each `optimizer.step()`, on every rank. A snapshot of weight 0 changes nothing.

        Args:
            model: The student; None: the one that the teacher was built from.

        Raises:
            ValueError: The student's tensors are no longer those that the teacher was built from.
        """
        ours = self._averages()
        theirs = pairing.match(ours, self._student[0] if model is None else model, self._roles)
        omega = self._clock.tick()
        self.omega = omega or 0.0
        if not omega:
            return
        averaged, copied = self._roles.averaged, self._roles.copied
        averaging.lerp_([ours[n] for n in averaged], [theirs[n] for n in averaged], omega)
        averaging.copy_([ours[n] for n in copied], [theirs[n] for n in copied])
        self._refresh()

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
        shared = {id(named[n]): named[n] for n in self._roles.shared}
        target = None if device is None else torch.empty(0, device=device).device
        if target is not None and any(t.device != target for t in shared.values()):
            raise ValueError(
                f"device={device!r} differs from that of the student's frozen parameters, which "
                "frozen='share' uses in place: pass frozen='copy' to give the teacher its own"
            )
        if factory is None:
            try:
                module = copy.deepcopy(student, dict(shared))
            except (RuntimeError, TypeError, NotImplementedError) as error:
                raise ValueError(
                    f"the student ({type(student).__name__}) cannot be deep-copied ({error}): pass "
                    "module=FACTORY, a function that builds a module of the same architecture"
                ) from error
        else:
            module = factory()
            pairing.match(named, module, _without_shared(self._roles))
            pairing.share(module, student, self._roles.shared)
            own = pairing.tensors(module)
            averaging.copy_([own[n] for n in self._roles.owned], [named[n] for n in self._roles.owned])
        module.requires_grad_(False)
        return (module if device is None else module.to(device)).eval()

    def _make_accumulators(self, student: dict[str, Tensor]) -> dict[str, Tensor]:
        """Higher-precision averages, where the module's own tensors cannot hold them."""
        own = pairing.tensors(self.module)
        wanted = {n: pairing.accumulator_dtype(student[n], self._dtype) for n in self._roles.averaged}
        return {
            n: own[n].detach().to(dtype=dtype, copy=True)
            for n, dtype in wanted.items()
            if own[n].dtype != dtype
        }

    def _averages(self) -> dict[str, Tensor]:
        """The tensors that hold the average, by name."""
        return pairing.tensors(self.module) | self._accumulators

    def _refresh(self) -> None:
        """Round the accumulators into the module that runs the forward."""
        if self._accumulators:
            own = pairing.tensors(self.module)
            averaging.copy_([own[n] for n in self._accumulators], list(self._accumulators.values()))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> WMATeacher:
        super()._apply(fn, recurse)
        own = pairing.tensors(self.module)
        # A move follows the module; a cast of the module leaves the accumulators' precision alone.
        self._accumulators = {n: a.to(own[n].device) for n, a in self._accumulators.items()}
        return self

    # --- state --------------------------------------------------------------------------------------

    def _state_names(self, prefix: str) -> dict[str, str]:
        """The state's keys under `prefix`, each with the canonical name of its tensor."""
        names = {id(t): n for n, t in pairing.tensors(self.module).items()}
        state = self.module.state_dict(prefix=f"{prefix}module.", keep_vars=True)
        return {key: names[id(value)] for key, value in state.items() if id(value) in names}

    def get_extra_state(self) -> dict[str, Any]:
        """The clock; part of `state_dict`."""
        return {"format": _FORMAT, "omega": self.omega, **self._clock.state()}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Restore the clock; part of `load_state_dict`."""
        self._clock.restore(dict(state))
        self.omega = state["omega"]


def _without_shared(roles: pairing.Roles) -> pairing.Roles:
    """Roles under which a fresh module is checked: it need not be frozen yet."""
    return pairing.Roles(roles.owned + roles.shared, (), (), ())


def _complete_state(teacher: nn.Module, state: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """Put the averages in the state at full precision, and leave out what is the student's."""
    assert isinstance(teacher, WMATeacher)
    for key, name in teacher._state_names(prefix).items():
        if name in teacher._roles.shared:
            state.pop(key, None)
        elif name in teacher._accumulators:
            state[key] = teacher._accumulators[name]


def _check_state(teacher: nn.Module, state: dict[str, Any], prefix: str, *unused: Any) -> None:
    """Refuse a state that does not fit before anything is written, then take the averages from it."""
    assert isinstance(teacher, WMATeacher)
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
    own, names = pairing.tensors(teacher.module), teacher._state_names(prefix)
    missing = [k for k, n in names.items() if k not in state and n not in teacher._roles.shared]
    extra = [k for k in state if k.startswith(f"{prefix}module.") and k not in names]
    if missing or extra:
        raise ValueError(
            "the state was written for another architecture: " + pairing.describe_difference(missing, extra)
        )
    for key, name in names.items():
        if name in teacher._roles.shared:
            state[key] = own[name]
        elif state[key].shape != own[name].shape:
            raise ValueError(
                f"the state was written for another architecture: {key!r} has shape "
                f"{tuple(state[key].shape)} there and {tuple(own[name].shape)} here"
            )
    for key, name in names.items():
        if name in teacher._accumulators:
            averaging.copy_([teacher._accumulators[name]], [state[key]])
            state[key] = state[key].to(own[name].dtype)
