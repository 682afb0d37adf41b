"""The averaged copy of a student: planning its updates, reading and writing it, moving and casting it.

The teacher's clock decides how far an update moves the average, and `wmateacher.averaging` moves it. This
module knows which tensors are involved and where their averages are held.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from wmateacher import (
    averaging,
    buffers,
    building,
    caches,
    copying,
    normalisation,
    pairing,
    sharding,
    updating,
)
from wmateacher.averaging import Average
from wmateacher.finiteness import Detector, Nonfinite, Verdict
from wmateacher.pairing import Binding, Roles
from wmateacher.rewriting import Watch, renormalised
from wmateacher.unfreezing import Lent
from wmateacher.updating import Plan

__all__ = ["Shadow"]


class Shadow:
    """The averaged copy of a student. Each tensor follows the student's according to its role.

    It is not an `nn.Module` itself. The teacher registers `module` as its own submodule, so that its state
    has the keys of the averaged module under `module.`.

    Attributes:
        module: The averaged module.
        roles: The role of each tensor.
        fully_sharded: The submodules that `fully_shard` was applied to.
        shares: Whether it shares frozen parameters with the student.
        unfrozen: The step after which each parameter that was shared at first has been trained, by name.
    """

    def __init__(
        self,
        student: nn.Module,
        roles: Roles,
        *,
        dtype: pairing.Precision,
        device: torch.device | str | None,
        frozen: pairing.Frozen,
        hooks: copying.Hooks,
        module_factory: Callable[[], nn.Module] | None,
        nonfinite: Nonfinite = "warn",
        measured: bool = False,
        fused: bool = True,
    ):
        """Build the averaged module and start every average at the student.

        The arguments after `roles` are those of `WMATeacher`; `measured` says whether the device computes how
        far an update moves the average.

        Raises:
            ValueError: If the student cannot be copied, the factory's module does not match it, or an average
                that must stay finite would start at NaN.
        """
        self.roles = roles
        self._detects, self._measured, self._fused = nonfinite != "warn", measured, fused
        self._ignored = self._infinite_from_the_start(Binding(student)) if self._detects else frozenset()
        self.module = building.build(student, roles, device, hooks, module_factory)
        self.fully_sharded = sharding.fully_sharded(self.module)
        self.unfrozen: dict[str, int] = {}
        self.shares = frozen == "share"
        self._dtype = dtype
        self._built = buffers.structure(self.module)
        self._precisions: dict[str, torch.dtype] = {}
        self._beside: dict[str, Tensor] = {}  # what `Average` holds beside the module's tensors
        self._renormalised = renormalised(self.module)
        self._plan: Plan | None = None
        self._statistics = Watch({})
        self._lent = Lent({})  # the shared parameters
        self._start_averages(Binding(student), self.roles.averaged)
        own = pairing.tensors(self.module)
        if dtype == "split" and not any(own[n].dtype == torch.bfloat16 for n in self.roles.averaged):
            raise ValueError(
                "dtype='split' is for bfloat16 students, and no averaged tensor of this one is bfloat16: "
                "use dtype='auto', which needs no memory beside the module here"
            )
        self._look_up_shared()

    def __getstate__(self) -> dict[str, Any]:
        return {
            **self.__dict__,
            "_plan": None,
            "_watches": (),
            "_statistics": None,
            "_lent": None,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._watch(Binding(self.module))
        self._look_up_shared()

    # --- averages ----------------------------------------------------------------------------------

    def _start_averages(self, values: Binding, names: Sequence[str]) -> None:
        """Start the named averages at the values of these names."""
        own = Binding(self.module).local
        averages = {name: Average(own[name], beside) for name, beside in self._beside.items()}
        for name in names:
            target = own[name]
            # The shape of the whole tensor decides: all ranks must hold its shards alike.
            wanted = pairing.accumulator_dtype(values.tensors[name], self._dtype, target.device)
            apart = name in self._renormalised
            split = self._dtype == "split" and wanted == torch.float32 != target.dtype and not apart
            if split and target.dtype != torch.bfloat16:
                raise ValueError(
                    "dtype='split' is for bfloat16 students, whose values are the upper halves of float32, "
                    f"but {name!r} is {target.dtype}: use dtype='auto'"
                )
            self._precisions[name] = wanted
            value = values.local[name].detach().to(wanted)
            averages[name] = Average.of(value, target, split=split, apart=apart)
        self._hold(averages)

    def _hold(self, averages: Mapping[str, Average]) -> None:
        """Keep what the averages hold beside the module's tensors."""
        held = averaging.side_by_side(averages)
        self._beside = {name: a.beside for name, a in held.items() if a.beside is not None}
        self._watch(Binding(self.module))

    # --- frozen parameters --------------------------------------------------------------------------

    def take_up(self, names: Collection[str], step: int) -> None:
        """Average parameters that were shared until now, since `step`, from their present values on.

        While a parameter was frozen it had one value, so that its average is that value for any kernel.
        """
        if not names:
            return
        sharding.reshard(self.fully_sharded)
        shared = Binding(self.module).tensors
        # In inference mode the copies would be tensors that cannot be written outside of it.
        with torch.inference_mode(False):
            own = {name: pairing.clone(shared[name], None) for name in names}
            pairing.put(self.module, own)
            if self.fully_sharded:
                self.module._apply(lambda tensor: tensor)  # FSDP2 looks its parameters up anew
            self.roles = self.roles.unfreeze(own)
            self._start_averages(Binding(self.module), [n for n in names if n in self.roles.averaged])
        self.unfrozen.update(dict.fromkeys(names, step))
        self._look_up_shared()

    def release(self, student: nn.Module, names: Collection[str]) -> None:
        """Share parameters with the student that have been the teacher's own."""
        if not names:
            return
        pairing.share(self.module, student, names)
        if self.fully_sharded:
            self.module._apply(lambda tensor: tensor)
        self.roles = self.roles.share(names)
        self._beside = {n: t for n, t in self._beside.items() if n not in names}
        self._watch(Binding(self.module))
        self._look_up_shared()

    def give(self, kept: Collection[str], copied: Collection[str]) -> None:
        """Keep some buffers as they are from now on, and copy others at every snapshot."""
        self.roles = self.roles.give(kept, copied)
        self._beside = {n: t for n, t in self._beside.items() if n in self.roles.averaged}
        self._watch(Binding(self.module))
        self._plan = None

    def take_up_different(self, values: Mapping[str, Tensor], step: int) -> None:
        """Take up the shared parameters whose average is given and is not the student's value."""
        own = self.bind()
        shared = [name for name in self.roles.shared if name in values]
        self.take_up([n for n in shared if not _equal(own.local[n], values[n])], step)

    def take_up_unfrozen(self, step: int, *, trained: bool = False) -> None:
        """Take up the shared parameters that now require grad.

        This runs before every step of an optimizer and before every forward pass of the teacher.

        Args:
            step: The number of steps counted so far.
            trained: Whether a step was taken since the parameters were last looked at, as in an update.

        Raises:
            RuntimeError: If such a parameter was written in that step, and its average is lost.
        """
        if names := self._lent.unfrozen(trained):
            self.take_up(names, step)

    def note_values(self) -> None:
        """Accept the present values of shared parameters and running statistics.

        `take_up_unfrozen` and `statistics_were_reset` look for writes after this.
        """
        self._lent.settle()
        self._statistics.settle()

    def _look_up_shared(self) -> None:
        own = pairing.tensors(self.module)
        self._lent = Lent({name: own[name] for name in self.roles.shared})
        self._plan = None

    # --- updates ------------------------------------------------------------------------------------

    def plan(self, student: nn.Module, is_original: bool, step: int) -> Plan:
        """Return the plan for averaging a student in.

        Args:
            student: The unwrapped student.
            is_original: Whether it is the one that frozen parameters are shared with.
            step: The number of steps counted so far.

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
            self._plan = self._new_plan(student, is_original, step, own)
        return self._plan

    def _new_plan(self, student: nn.Module, is_original: bool, step: int, own: Binding) -> Plan:
        theirs = Binding(student)
        differing = self._match(student, own, theirs.tensors)
        replaced = [n for n in self.roles.shared if own.tensors[n] is not theirs.tensors[n]]
        if replaced:
            self._follow_replaced(student, replaced, own, theirs, is_original, step)
            own = Binding(self.module)
        self._watch(own)
        averages = {n: self.average(own, n) for n in self.roles.averaged}
        changed = [n for n in differing if self._role_of_buffer(n) == "copied"]
        self._ignored |= frozenset(changed)  # such buffers are made for the forward pass, often with -inf
        copied = [n for n in own.tensors if n not in differing and self._role_of_buffer(n) == "copied"]
        detector = self._detector(theirs) if self._detects else None
        return updating.prepare(
            theirs, own, averages, copied, changed, detector, measured=self._measured, fuse=self._fused
        )

    def _match(self, model: nn.Module, own: Binding, theirs: Mapping[str, Tensor]) -> Sequence[str]:
        """Check that a model has the averaged module's tensors; return the buffers that may differ and do.

        Raises:
            ValueError: If other tensors differ.
        """
        differing = buffers.differing(self.module, model)
        for name in differing:
            if name in self.roles.excluded:
                continue
            owner = model if name in theirs else self.module
            new = name not in self.roles.owned and name in pairing.state_names(owner).values()
            floating = name in theirs and theirs[name].is_floating_point()
            if name in self.roles.averaged or (self.roles.buffers == "average" and new and floating):
                raise ValueError(
                    f"the student's buffer {name!r} has appeared, vanished or changed its shape since the "
                    "teacher was built, so that it has no average: leave it out with "
                    f"exclude=[{name!r}], or build the teacher with buffers='copy', which follows the student"
                )
        ours = {n: t for n, t in own.tensors.items() if n not in differing}
        theirs = {n: t for n, t in theirs.items() if n not in differing}
        pairing.match(ours, theirs)
        sharding.match(ours, theirs)
        return differing

    def _role_of_buffer(self, name: str) -> str:
        """Return the role of a tensor, also of a buffer that was not there when the teacher was built."""
        roles = self.roles
        for role in ("averaged", "copied", "kept", "shared"):
            if name in getattr(roles, role):
                return role
        return "kept" if roles.buffers == "keep" else "copied"

    def _detector(self, student: Binding) -> Detector:
        """Return what looks for NaN in the student's tensors that the teacher takes in."""
        names = (*self.roles.averaged, *self.roles.copied)
        watched = {n: student.local[n] for n in names if n in student.local and n not in self._ignored}
        return Detector(watched, everywhere=any(map(sharding.is_sharded, student.tensors.values())))

    def _infinite_from_the_start(self, student: Binding) -> frozenset[str]:
        """Return the copied tensors that are not finite by design, such as attention masks with -inf."""
        self._ignored = frozenset()
        detector = self._detector(student)
        found = Verdict(detector.names, detector()).nonfinite()
        averaged = [n for n in found if n in self.roles.averaged]
        if averaged:
            raise ValueError(
                f"the student has NaN or infinite values in {pairing.few(averaged)}, and every average would "
                "begin with them: build the teacher from a finite student, or leave these tensors out with "
                "exclude="
            )
        return frozenset(found)

    def _follow_replaced(
        self,
        student: nn.Module,
        replaced: Sequence[str],
        own: Binding,
        theirs: Binding,
        is_original: bool,
        step: int,
    ) -> None:
        """Treat shared parameters in whose place the student has other tensors.

        Other values are averaged with those that were shared until now. Equal ones, also if they were moved
        or cast, are shared anew if the student is the original one.
        """
        changed = [
            n for n in replaced if theirs.tensors[n].requires_grad or _differ(own.local[n], theirs.local[n])
        ]
        self.take_up(changed, step)
        if is_original:
            pairing.share(self.module, student, [n for n in replaced if n not in changed])
            self._look_up_shared()

    # --- reading and writing --------------------------------------------------------------------------

    def nonfinite(self) -> list[str]:
        """Return the names of the averages that have NaN or infinite values, which waits for the device."""
        own = self.bind()
        averages = {name: self.average(own, name) for name in self.roles.averaged}
        detector = Detector({n: a.own if a.split else a.held for n, a in averages.items()})
        return Verdict(detector.names, detector()).nonfinite()

    def bind(self) -> Binding:
        """Return the averaged module's tensors, in shards where it is sharded."""
        sharding.reshard(self.fully_sharded)
        pairing.densify(self.module)  # a forward pass may have made new buffers
        return Binding(self.module)

    def _watch(self, own: Binding) -> None:
        """Watch the tensors that hold averages, and the parameters that averages are rounded into."""
        averages = {n: Average(own.local[n], self._beside.get(n)) for n in self.roles.averaged}
        holding = {n: a.own for n, a in averages.items() if a.beside is None or a.split}
        # Running statistics that are recalibrated for the average may stay until the next update.
        rounded = {n for n in averages.keys() - holding.keys() if isinstance(own.tensors[n], nn.Parameter)}
        self._watches = Watch(holding), Watch({n: own.local[n] for n in averages if n in rounded})
        names = normalisation.statistics(self.module)
        self._statistics = Watch({n: own.local[n] for n in names})

    def statistics_were_reset(self) -> bool:
        """Return whether running statistics were reset from outside, as `update_bn` does at its start."""
        own = pairing.tensors(self.module)
        return bool(names := self._statistics.written()) and all(
            # A variance starts at 1, a mean and a counter at 0.
            bool((sharding.local(own[n]) == n.endswith("running_var")).all())
            for n in names
        )

    def take_up_statistics(self) -> None:
        """Let averages of running statistics go on from what the module has in their place."""
        found = normalisation.statistics(self.module)
        self.write({n: found[n].clone() for n in self.roles.averaged if n in found})

    @contextmanager
    def guarding(self, free: Collection[str] = ()) -> Iterator[None]:
        """Undo what a forward pass inside a `with` block writes to the module's weights.

        Args:
            free: The names of the averages that it may write.

        Raises:
            RuntimeError: If it wrote to another tensor that holds an average itself.
        """
        holding, rounded = self._watches
        holding.settle()
        rounded.settle()
        try:
            yield
        finally:
            # FSDP2 leaves the root's parameters gathered for a backward pass, which never comes.
            sharding.reshard(self.fully_sharded)
            names = rounded.written()
            if names:
                own = Binding(self.module)
                for name in names:
                    self.average(own, name).restore()
        names = [name for name in holding.written() if name not in free]
        if names:
            raise RuntimeError(
                f"the averaged module's {pairing.few(names)} held the average itself and was written by its "
                "forward pass, so that the average is lost. Build the teacher with dtype=torch.float64, "
                "which holds averages beside the module (for float64 models leave them out with exclude=), "
                "or load a saved state"
            )

    def read(self, own: Binding, name: str) -> Tensor:
        """Return an averaged tensor at full precision, as a DTensor where it is sharded."""
        return sharding.spread(self.average(own, name).read(), own.tensors[name])

    def write(self, values: Mapping[str, Tensor]) -> None:
        """Set tensors of the averaged module, by canonical name, at full precision."""
        own = self.bind()
        for name, value in values.items():
            local = sharding.local(value).detach()
            if name in self.roles.shared:
                continue  # the student's own, with this value
            if name in self.roles.averaged:
                self.average(own, name).write(local)
            else:
                averaging.copy_([own.local[name]], [local])
        self._watch(own)
        caches.Forget(self.module)()

    def copy_to(self, model: nn.Module) -> None:
        """Write the averaged weights and buffers into an unwrapped model, by name."""
        targets, sources, differing = self.counterparts(model)
        averaging.copy_([sharding.local(t) for t in targets], sources)
        buffers.follow(model, self.module, differing)
        caches.Forget(model)()

    def counterparts(self, model: nn.Module) -> tuple[list[Tensor], list[Tensor], Sequence[str]]:
        """Return an unwrapped model's tensors and the local averages for them, leaving out shared tensors.

        The names of the buffers whose structure differs come third.

        Raises:
            ValueError: If the model's tensors do not match the averaged module's.
        """
        sharding.reshard(sharding.fully_sharded(model))
        own, theirs = self.bind(), pairing.tensors(model)
        differing = self._match(model, own, theirs)
        targets, sources = [], []
        for name, tensor in own.tensors.items():
            if name in differing or tensor is theirs[name]:
                continue
            target = pairing.unexpanded(theirs[name])
            source = self.precise(own, name, target.dtype)
            if source.shape != target.shape:
                # An expanded tensor holds one entry for a whole dimension; the teacher's are all equal.
                source = source[tuple(map(slice, target.shape))]
            targets.append(target)
            sources.append(source)
        return targets, sources, differing

    def average(self, own: Binding, name: str) -> Average:
        """Return an average, after checking that the module was not cast without its teacher."""
        average = Average(own.local[name], self._beside.get(name))
        needed = torch.bfloat16 if average.split else self._precisions[name]
        if (average.split or average.beside is None) and average.own.dtype != needed:
            raise RuntimeError(
                f"the averaged module's {name!r} was cast to {average.own.dtype}, but it holds the average "
                f"in {needed}: cast the teacher (teacher.to(dtype)), not teacher.module"
            )
        return average

    def precise(self, own: Binding, name: str, dtype: torch.dtype) -> Tensor:
        """Return a tensor of the averaged module; at full precision if `dtype` is not its own."""
        tensor = own.local[name]
        rounded = tensor.dtype == dtype and name not in self._renormalised
        if rounded or name not in self._beside:
            return tensor.detach()
        return self.average(own, name).read()

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
        own, self._plan = Binding(self.module).local, None
        for name, average in averages.items():
            target = own[name]
            # MPS has no float64.
            narrow = target.device.type == "mps" and self._precisions[name] == torch.float64
            if narrow:
                self._precisions[name] = torch.float32
            if narrow or target.dtype != average.own.dtype:
                value = average.read().to(self._precisions[name]).to(target.device)
                averages[name] = Average.of(value, target, apart=name in self._renormalised)
            else:
                beside = average.beside
                averages[name] = Average(target, None if beside is None else beside.to(target.device))
        self._hold(averages)

    # --- state --------------------------------------------------------------------------------------

    def changed_buffers(self) -> list[str]:
        """Return the names of the buffers whose structure is not what it was when the teacher was built."""
        now = buffers.structure(self.module)
        return sorted(n for n in now.keys() | self._built if now.get(n) != self._built.get(n))


# --- frozen tensors -----------------------------------------------------------------------------------


def _equal(own: Tensor, given: Tensor) -> bool:
    """Whether a given tensor, of any dtype and device, has a tensor's values."""
    given = sharding.local(given).detach()
    if type(own.detach()) is not Tensor or type(given) is not Tensor:
        return own is given
    return torch.equal(own.detach(), given.to(own.device, own.dtype))


def _differ(one: Tensor, other: Tensor) -> bool:
    """Whether tensors of one dtype and device have different values, which are read from the device."""
    alike = one.dtype == other.dtype and one.device == other.device
    plain = type(one.detach()) is Tensor and type(other.detach()) is Tensor
    return alike and plain and not torch.equal(one, other)


def __dir__() -> list[str]:
    return __all__
