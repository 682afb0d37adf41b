"""The averaged copy of a student: building it, planning updates, moving and casting it, and its state.

The teacher's clock decides how far an update moves the average, and `wmateacher.averaging` moves it. This
module knows which tensors are involved and where their averages are held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wmateacher import averaging, copying, pairing, sharding
from wmateacher.averaging import Average
from wmateacher.pairing import Binding, Roles

__all__ = ["Plan", "Shadow"]


@dataclass(frozen=True)
class Plan:
    """An update of the average, prepared for as long as both modules keep their tensors.

    Attributes:
        student: The student's tensors.
        own: The averaged module's tensors.
        update: The function that moves the averaged tensors.
        copied: The tensors that are copied at every snapshot: targets and sources.
    """

    student: Binding
    own: Binding
    update: averaging.Update
    copied: tuple[Sequence[Tensor], Sequence[Tensor]]

    def fits(self, student: nn.Module) -> bool:
        """Return whether the plan is for this student and both modules still have the same tensors."""
        return self.student.model is student and self.student.is_current() and self.own.is_current()

    def apply(self, omega: float) -> None:
        """Move the average towards the student by the share `omega` in (0, 1]."""
        self.update(omega)
        averaging.copy_(*self.copied)


class Shadow:
    """The averaged copy of a student. Each tensor follows the student's according to its role.

    It is not an `nn.Module` itself. The teacher registers `module` as its own submodule, so that its state
    has the keys of the averaged module under `module.`.

    Attributes:
        module: The averaged module, in eval mode.
        roles: The role of each tensor.
        fully_sharded: The submodules that `fully_shard` was applied to.
    """

    def __init__(
        self,
        student: nn.Module,
        roles: Roles,
        *,
        dtype: pairing.Precision,
        device: torch.device | str | None,
        hooks: copying.Hooks,
        module_factory: Callable[[], nn.Module] | None,
    ):
        """Build the averaged module and start every average at the student.

        The arguments after `roles` are those of `WMATeacher`.

        Raises:
            ValueError: If the student cannot be copied, or the factory's module does not match it.
        """
        self.roles = roles
        self.module = self._build(student, device, hooks, module_factory)
        self.fully_sharded = sharding.fully_sharded(self.module)
        self._precisions: dict[str, torch.dtype] = {}
        self._beside: dict[str, Tensor] = {}  # what `Average` holds beside the module's tensors
        self._plan: Plan | None = None
        self._start_averages(Binding(student).local, dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_plan": None}

    # --- building -----------------------------------------------------------------------------------

    def _build(
        self,
        student: nn.Module,
        device: torch.device | str | None,
        hooks: copying.Hooks,
        factory: Callable[[], nn.Module] | None,
    ) -> nn.Module:
        named, shared = pairing.tensors(student), self.roles.shared
        # A tensor's device has an index, so that "cuda" compares equal to "cuda:0".
        target = None if device is None else torch.empty(0, device=device).device
        if sharding.fully_sharded(student):
            if factory is None:
                raise ValueError(
                    "the student is sharded by fully_shard, which prevents deep copies: pass "
                    "module_factory=FACTORY, a function that builds the module and shards it like the "
                    "student (it may do so on the meta device and leave it there)"
                )
            for name in shared:
                sharding.refuse_uneven(name, named[name])
        if target is not None and any(named[n].device != target for n in shared):
            raise ValueError(
                f"device={device!r} differs from that of the student's frozen parameters, which "
                "frozen='share' uses in place: pass frozen='copy' to give the teacher its own"
            )
        if factory is None:
            module = self._deep_copy(student, named, target, hooks)
        else:
            module = self._call_factory(factory, student, named, target)
        pairing.densify(module)
        module.requires_grad_(False)
        return (module if device is None else module.to(device)).eval()

    def _deep_copy(
        self,
        student: nn.Module,
        named: Mapping[str, Tensor],
        device: torch.device | None,
        hooks: copying.Hooks,
    ) -> nn.Module:
        """Copy the student, straight to `device` if given: its own may have no room for a copy."""
        memo = {id(named[n]): named[n] for n in self.roles.shared}
        if device is not None:
            memo |= {id(named[n]): pairing.clone(named[n], device) for n in self.roles.owned}
        return copying.duplicate(student, memo, hooks)

    def _call_factory(
        self,
        factory: Callable[[], nn.Module],
        student: nn.Module,
        named: Mapping[str, Tensor],
        device: torch.device | None,
    ) -> nn.Module:
        """Build a module with the factory and copy the student's values into it."""
        module, owned = factory(), self.roles.owned
        own = pairing.tensors(module)
        pairing.match(named, own)
        sharding.match(own, named)
        theirs = {id(t) for t in named.values()}
        if any(id(own[n]) in theirs for n in owned):
            raise ValueError(
                "module_factory must build a new module, but what it returned has the student's own tensors"
            )
        pairing.densify(module)
        pairing.share(module, student, self.roles.shared)
        home = next((t.device for t in named.values()), torch.device("cpu"))
        pairing.materialise(module, device or home)
        targets, sources = Binding(module).local, Binding(student).local
        averaging.copy_([targets[n] for n in owned], [sources[n] for n in owned])
        return module

    def _start_averages(self, student: Mapping[str, Tensor], dtype: pairing.Precision) -> None:
        """Start every average at the student's value."""
        own = Binding(self.module).local
        for name in self.roles.averaged:
            wanted = self._precisions[name] = pairing.accumulator_dtype(student[name], dtype)
            split = dtype == "split" and wanted != own[name].dtype
            if split and own[name].dtype != torch.bfloat16:
                raise ValueError(
                    "dtype='split' is for bfloat16 students, whose values are the upper halves of float32, "
                    f"but {name!r} is {own[name].dtype}: use dtype='auto'"
                )
            average = Average.of(student[name].detach().to(wanted), own[name], split=split)
            if average.beside is not None:
                self._beside[name] = average.beside
        if dtype == "split" and not self._beside:
            raise ValueError(
                "dtype='split' is for bfloat16 students, and no averaged tensor of this one is bfloat16: "
                "use dtype='auto', which needs no memory beside the module here"
            )

    # --- updates ------------------------------------------------------------------------------------

    def plan(self, student: nn.Module, is_original: bool) -> Plan:
        """Return the plan for averaging a student in.

        Args:
            student: The unwrapped student.
            is_original: Whether it is the one that frozen parameters are shared with.

        Raises:
            ValueError: If the student's tensors do not match the averaged module's.
        """
        if self._plan is not None and self._plan.fits(student):
            return self._plan
        # A forward pass may have left gathered parameters in place of the shards. Without them the plan
        # may fit again.
        sharding.reshard(sharding.fully_sharded(student))
        own = self.bind()
        if self._plan is None or not self._plan.fits(student):
            self._plan = self._new_plan(student, is_original, own)
        return self._plan

    def _new_plan(self, student: nn.Module, is_original: bool, own: Binding) -> Plan:
        theirs, roles = Binding(student), self.roles
        pairing.match(own.tensors, theirs.tensors)
        sharding.match(own.tensors, theirs.tensors)
        if is_original:
            pairing.check_frozen(theirs.tensors, roles)
            if any(own.tensors[n] is not theirs.tensors[n] for n in roles.shared):
                # The student got new frozen parameters: share those.
                pairing.share(self.module, student, roles.shared)
                own = Binding(self.module)
        averages = [self._average(own, n) for n in roles.averaged]
        # Scratch tensors that were made in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            update = averaging.Update(averages, [theirs.local[n] for n in roles.averaged])
        targets, sources = ([b.local[n] for n in roles.copied] for b in (own, theirs))
        return Plan(theirs, own, update, (targets, sources))

    # --- reading and writing --------------------------------------------------------------------------

    def bind(self) -> Binding:
        """Return the averaged module's tensors, in shards where it is sharded."""
        sharding.reshard(self.fully_sharded)
        return Binding(self.module)

    def read(self, own: Binding, name: str) -> Tensor:
        """Return an averaged tensor at full precision, as a DTensor where it is sharded."""
        return sharding.spread(self._average(own, name).read(), own.tensors[name])

    def write(self, values: Mapping[str, Tensor]) -> None:
        """Set tensors of the averaged module, by canonical name, at full precision."""
        own = self.bind()
        for name, value in values.items():
            local = sharding.local(value).detach()
            if name in self.roles.averaged:
                self._average(own, name).write(local)
            else:
                averaging.copy_([own.local[name]], [local])

    def copy_to(self, model: nn.Module) -> None:
        """Write the averaged weights and buffers into an unwrapped model, by name."""
        targets, sources = self.counterparts(model)
        averaging.copy_([sharding.local(t) for t in targets], sources)

    def counterparts(self, model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        """Return an unwrapped model's tensors and the local averages for them, leaving out shared tensors.

        Raises:
            ValueError: If the model's tensors do not match the averaged module's.
        """
        sharding.reshard(sharding.fully_sharded(model))
        own, theirs = self.bind(), pairing.tensors(model)
        pairing.match(own.tensors, theirs)
        sharding.match(own.tensors, theirs)
        targets, sources = [], []
        for name, tensor in own.tensors.items():
            if tensor is theirs[name]:
                continue
            target = pairing.unexpanded(theirs[name])
            source = self._precise(own, name, target.dtype)
            if source.shape != target.shape:
                # An expanded tensor holds one entry for a whole dimension; the teacher's are all equal.
                source = source[tuple(map(slice, target.shape))]
            targets.append(target)
            sources.append(source)
        return targets, sources

    def averaged_state(self, dtype: torch.dtype | None) -> dict[str, Any]:
        """Return a copy of the averaged module's state.

        Args:
            dtype: The dtype of floating-point tensors; None stands for the module's own.
        """
        own = self.bind()
        names = {id(t): n for n, t in own.tensors.items()}
        # `keep_vars` keeps the tensor objects, by which entries are recognised under any key.
        state: dict[str, Any] = self.module.state_dict(keep_vars=True)
        for key, value in state.items():
            if id(value) in names:
                wanted = dtype if dtype is not None and value.is_floating_point() else value.dtype
                precise = self._precise(own, names[id(value)], wanted)
                state[key] = sharding.spread(precise.to(dtype=wanted, copy=True).contiguous(), value)
        return state

    def _average(self, own: Binding, name: str) -> Average:
        """Return an average, after checking that the module was not cast without its teacher."""
        average = Average(own.local[name], self._beside.get(name))
        needed = torch.bfloat16 if average.split else self._precisions[name]
        if (average.split or average.beside is None) and average.own.dtype != needed:
            raise RuntimeError(
                f"the averaged module's {name!r} was cast to {average.own.dtype}, but it holds the average "
                f"in {needed}: cast the teacher (teacher.to(dtype)), not teacher.module"
            )
        return average

    def _precise(self, own: Binding, name: str, dtype: torch.dtype) -> Tensor:
        """Return a tensor of the averaged module; at full precision if `dtype` is not its own."""
        tensor = own.local[name]
        if tensor.dtype == dtype or name not in self._beside:
            return tensor.detach()
        return self._average(own, name).read()

    # --- moving and casting ---------------------------------------------------------------------------

    @contextmanager
    def moving(self) -> Iterator[None]:
        """Move the averages along with the module inside a `with` block, and keep their precision in a cast.

        Raises:
            RuntimeError: If the module is sharded and shares frozen parameters with the student.
        """
        shared, averaged = self.roles.shared, self.roles.averaged
        if self.fully_sharded and shared:
            raise RuntimeError(
                "a teacher that is sharded by fully_shard and shares frozen parameters with its student "
                "cannot be moved or cast: build it on its device in its dtype, or with frozen='copy'"
            )
        before = self.bind()
        averages = {n: Average(before.local[n].detach(), self._beside.get(n)) for n in averaged}
        # Shared parameters are the student's and move with it.
        with pairing.hidden(self.module, shared):
            yield
        # A cast may change which averages need a tensor beside the module's own: hold each one anew.
        own, self._beside, self._plan = Binding(self.module).local, {}, None
        for name, average in averages.items():
            if own[name].dtype != average.own.dtype:
                average = Average.of(average.read().to(own[name].device), own[name])
            if average.beside is not None:
                self._beside[name] = average.beside.to(own[name].device)

    # --- state --------------------------------------------------------------------------------------

    def complete_state(self, module: nn.Module, state: dict[str, Any], prefix: str) -> None:
        """Put the averages in a state at full precision and take out what belongs to the student.

        Args:
            module: The averaged module as the teacher registers it, possibly wrapped by torch.compile.
            state: The teacher's state, which is changed in place.
            prefix: The prefix of the module's keys in it.
        """
        own, full = Binding(self.module), {}
        for path, name in pairing.state_names(module).items():
            if name in self.roles.shared:
                state.pop(prefix + path, None)
            elif name in self.roles.averaged:
                if name not in full:  # tied keys get one tensor
                    full[name] = self.read(own, name)
                state[prefix + path] = full[name]

    def load_state(self, module: nn.Module, state: dict[str, Any], prefix: str) -> None:
        """Check a teacher's state completely, then read the averages from it.

        Args:
            module: The averaged module as the teacher registers it.
            state: The state to load. Its tensors are replaced by the module's own, so that `nn.Module` has
                nothing left to write.
            prefix: The prefix of the teacher's keys in it.

        Raises:
            ValueError: If the state is of another architecture or is sharded differently.
        """
        own, shared = self.bind(), self.roles.shared
        names = {f"{prefix}module.{path}": n for path, n in pairing.state_names(module).items()}
        known = {f"{prefix}_extra_state", *module.state_dict(prefix=f"{prefix}module."), *names}
        _refuse_difference(
            "the state was written for another architecture",
            missing=[k for k, n in names.items() if k not in state and n not in shared],
            unexpected=[k for k in state if k.startswith(prefix) and k not in known],
            shapes=[
                (k, state[k], own.tensors[n]) for k, n in names.items() if k in state and n not in shared
            ],
        )
        values = {}
        for key, name in names.items():
            tensor = own.tensors[name]
            if name not in shared:
                _check_kind(key, state[key], tensor)
                values[name] = state[key]
            # nn.Module then copies each tensor to itself, or with assign=True assigns it where it is: tied
            # tensors stay tied and every tensor keeps its dtype.
            state[key] = tensor
        self.write(values)

    def match_average(self, average: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Check an average of the student's architecture and return it by canonical name, for `write`.

        Args:
            average: The weights, under the keys of the student's `state_dict`. Buffers may be missing.

        Raises:
            ValueError: If a weight is missing, unknown or of another shape.
        """
        own = self.bind()
        names = {p: n for p, n in pairing.state_names(self.module).items() if n not in self.roles.shared}
        needed = {p for p, n in names.items() if isinstance(own.tensors[n], nn.Parameter)}
        _refuse_difference(
            "average is of another architecture",
            missing=sorted(needed - average.keys()),
            unexpected=[k for k in average if k not in self.module.state_dict()],
            shapes=[(p, average[p], own.tensors[n]) for p, n in names.items() if p in average],
        )
        return {name: average[path] for path, name in names.items() if path in average}


# --- checking -----------------------------------------------------------------------------------------


def _refuse_difference(
    what: str,
    missing: Sequence[str],
    unexpected: Sequence[str],
    shapes: Sequence[tuple[str, Tensor, Tensor]],
) -> None:
    """Raise a ValueError that names what differs between given tensors and the module's own."""
    if missing or unexpected:
        raise ValueError(f"{what}: {pairing.describe_difference(missing, unexpected)}")
    for key, given, own in shapes:
        if given.shape != own.shape:
            raise ValueError(
                f"{what}: {key!r} has shape {tuple(given.shape)} there and {tuple(own.shape)} here"
            )


def _check_kind(key: str, given: Tensor, own: Tensor) -> None:
    if given.is_complex() != own.is_complex():
        raise ValueError(f"the state was written for another architecture: {key!r} is {given.dtype}")
    if not sharding.alike(given, own):
        raise ValueError(
            f"in the state {key!r} is {sharding.describe(given)}, the teacher's is "
            f"{sharding.describe(own)}: read it with torch.distributed.checkpoint, which fits a saved "
            "state to any sharding"
        )


def __dir__() -> list[str]:
    return __all__
