"""The controller of a teacher whose weights are measured in the run, `kernels.Gap`.

`Distances` measures how far student and average are apart, and how far the student is from its start, and
chooses omega. `MeasuredClock` counts the steps and keeps the weights that were chosen. On an accelerator
omega stays there: the average moves by it at once, and the host reads it when it has arrived.
"""

from __future__ import annotations

import itertools
from array import array
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from wmateacher import averaging, pairing, sharding, transfers
from wmateacher.averaging import Average
from wmateacher.kernels import Array, Gap, Kernel, realised_weights
from wmateacher.pairing import Binding
from wmateacher.schedule import Clock
from wmateacher.shadow import Shadow
from wmateacher.transfers import Transfer
from wmateacher.updating import Plan

__all__ = ["Distances", "MeasuredClock", "clock", "distances"]

_START = "start."
"""What the names of W^0 begin with in a teacher's state."""


def clock(kernel: Kernel, total_steps: int | None, update_every: int) -> Clock:
    """Return the clock for a kernel."""
    return (MeasuredClock if isinstance(kernel, Gap) else Clock)(kernel, total_steps, update_every)


def distances(kernel: Kernel, shadow: Shadow, student: nn.Module) -> Distances | None:
    """Return what measures the distances that the kernel asks for, if it asks for any."""
    return Distances(kernel, shadow, student) if isinstance(kernel, Gap) else None


class MeasuredClock(Clock):
    """A clock that is told the weight of each snapshot, instead of asking the kernel for it."""

    def __init__(self, kernel: Kernel, total_steps: int | None = None, update_every: int = 1):
        super().__init__(kernel, total_steps, update_every)
        self._steps = array("q")  # the snapshots in the average
        self._weights = array("d")  # the omegas of the first of them
        self._arriving: deque[Transfer] = deque()  # and those of the others

    def relative_mean_age(self) -> float:
        """Return the mean age of the average's states as a share of the run: on a straight way, the gap's."""
        assert isinstance(self.kernel, Gap)
        return self.kernel.share

    def record(self, omega: float | Tensor) -> Transfer:
        """Keep the weight of the snapshot that the last `tick` announced."""
        transfer = Transfer(
            torch.as_tensor(omega, dtype=None if isinstance(omega, Tensor) else torch.float64)
        )
        self._steps.append(self.snapshot)
        self._arriving.append(transfer)
        self._settle()
        return transfer

    def skip(self) -> None:  # noqa: D102
        super().skip()
        self._steps.pop()
        (self._arriving or self._weights).pop()

    def trajectory_weights(self) -> Array:  # noqa: D102
        self._settle(wait=True)
        weights = np.zeros(self.step + 1)
        weights[[0, *self._steps]] = realised_weights(np.array([1.0, *self._weights]))
        return weights

    def jump(self, step: int) -> None:
        """Refuse: of an average that was made elsewhere, neither the weights nor W^0 are known."""
        raise ValueError(
            f"kernel {str(self.kernel)!r} cannot continue an average that was made elsewhere, or count steps "
            f"that it has not measured (step={step}): load the state of a teacher with this kernel, build "
            "the teacher from a model with these weights as W^0, or use a kernel without a measurement"
        )

    def state(self) -> dict[str, Any]:  # noqa: D102
        self._settle(wait=True)
        return {**super().state(), "measured": [list(self._steps), list(self._weights)]}

    def check(self, state: Mapping[str, Any]) -> None:  # noqa: D102
        super().check(state)
        if not _sound(state.get("measured"), state["step"], state["snapshot"]):
            raise ValueError(
                "the state of the teacher's clock has no measured weight for each of its snapshots: it is "
                "damaged; load another checkpoint"
            )

    def restore(self, state: Mapping[str, Any]) -> None:  # noqa: D102
        super().restore(state)
        steps, weights = state["measured"]
        self._steps, self._weights = array("q", steps), array("d", weights)
        self._arriving.clear()

    def __getstate__(self) -> dict[str, Any]:
        self._settle(wait=True)
        return self.__dict__

    def _settle(self, *, wait: bool = False) -> None:
        while self._arriving and (wait or self._arriving[0].has_arrived()):
            self._weights.append(float(self._arriving.popleft()))

    def _omegas(self, chain: NDArray[np.int64], total_steps: int | None) -> Array:
        return np.ones(len(chain) - 1)  # a snapshot is due; its weight is measured


def _sound(measured: Any, step: int, snapshot: int) -> bool:
    """Return whether these are the steps of snapshots up to the last one, and a weight for each."""
    if not (_is_list(measured) and len(measured) == 2 and all(map(_is_list, measured))):
        return False
    steps, weights = measured
    return (
        len(steps) == len(weights)
        and all(isinstance(s, int) and 0 < s <= step for s in steps)
        and all(isinstance(w, int | float) and not (w < 0 or w > 1) for w in weights)
        and all(a < b for a, b in itertools.pairwise(steps))
        and snapshot == (steps[-1] if steps else 0)
    )


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


class _Batch:
    """Tensors of one dtype, device and sharding that are measured together."""

    def __init__(self, rows: Sequence[tuple[Tensor, ...]], scratch: tuple[Tensor, Tensor]):
        """Lay out a batch.

        Args:
            rows: The average, the student and the start of each tensor, and the module's own tensor if the
                average is split.
            scratch: Two buffers that hold the batch.
        """
        self._held, self._student, self._start, *own = (list(column) for column in zip(*rows, strict=True))
        self._split = [Average(*pair) for pair in zip(*own, self._held, strict=True)] if own else []
        self._views = [averaging.views(buffer, self._held) for buffer in scratch]
        numel = sum(tensor.numel() for tensor in self._held)
        self._mine, self._other = (buffer[:numel] for buffer in scratch)

    def measure(self) -> Tensor:
        """Return |M - W|^2 and |W^0 - W|^2 over the batch, in float64 where the device has it: `[2]`."""
        mine, other = self._views
        torch._foreach_copy_(mine, self._student)
        norms = []
        for values in ([a.read() for a in self._split] or self._held, self._start):
            torch._foreach_copy_(other, values)
            norms.append(torch.linalg.vector_norm(self._other.sub_(self._mine)))
        return torch.stack(norms).to(_precise(self._mine.device)).square_()


def _precise(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


class Start(nn.Module):
    """W^0: a tree of buffers with the names of the averaged parameters, in the student's dtype."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by canonical name."""
        return dict(self.named_buffers(remove_duplicate=False))

    def hold(self, tensors: Mapping[str, Tensor]) -> None:
        """Hold these tensors and no others."""
        self._modules.clear()
        self._buffers.clear()
        for name, tensor in tensors.items():
            *path, last = name.split(".")
            module: nn.Module = self
            for key in path:
                if key not in module._modules:
                    module.add_module(key, nn.Module())
                module = module._modules[key]  # type: ignore[assignment]
            module.register_buffer(last, tensor)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Start:
        """Move the tensors, but do not cast them: W^0 keeps its precision."""
        self.hold({name: tensor.to(fn(tensor).device) for name, tensor in self.tensors().items()})
        return self


class Distances:
    """The distances from the student to its start and to its average, and the weight that follows from them.

    Attributes:
        start: W^0, which the teacher registers as its own submodule, so that its state has it.
    """

    def __init__(self, kernel: Gap, shadow: Shadow, student: nn.Module):
        """Keep a copy of the student's present weights on the teacher's device."""
        self._kernel, self._shadow = kernel, shadow
        self.start = Start()
        self._plan: Plan | None = None
        self._layouts: list[tuple[Tensor, list[_Batch]]] = []
        values, own = Binding(student).local, Binding(shadow.module)
        self.start.hold(
            {
                name: sharding.spread(
                    pairing.clone(values[name].detach(), own.local[name].device), own.tensors[name]
                )
                for name in self._names(own)
            }
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_plan": None, "_layouts": []}

    @torch.no_grad()
    def omega(self, plan: Plan) -> float | Tensor:
        """Return the weight of the student in a snapshot, as a tensor if the device can act on it alone."""
        if self._plan is not plan:
            with torch.inference_mode(False):
                self._layouts = self._prepare(plan)
            self._plan = plan
        parts = []
        for like, batches in self._layouts:
            home = sharding.local(like).device
            sums = torch.zeros(2, dtype=_precise(home), device=home)
            for batch in batches:
                sums += transfers.moved(batch.measure(), home)
            parts.append(sharding.total(sums, like))
        if not parts:
            return 0.0
        home = parts[0].device
        apart, moved = torch.stack([transfers.moved(p, home) for p in parts]).sum(0).sqrt().unbind()
        # NaN stays NaN: a student that is not finite is treated as with any other kernel.
        omega = self._kernel.omega(apart, moved)
        omega = torch.where(apart == 0, 0.0, omega)  # of 0 / 0, if the student has not moved
        return omega if plan.on_device else float(omega)

    def complete(self) -> None:
        """Add the parameters that have begun to be averaged, whose average is their value at the start."""
        own, known = self._shadow.bind(), self.start.tensors()
        names = self._names(own)
        if names != sorted(known):
            self.start.hold({n: known[n] if n in known else self._value(own, n) for n in names})
            self._plan = None

    def take(self, state: dict[str, Any], prefix: str, shared: Collection[str] | None) -> dict[str, Tensor]:
        """Take W^0 out of a teacher's state, and check that it fits the averages in it.

        Args:
            state: The state, from which its entries are removed.
            prefix: The prefix of the teacher's keys in it.
            shared: The names of the parameters that were shared with the student when it was written.

        Raises:
            ValueError: If a tensor is missing, unknown, or of another shape, kind or sharding.
        """
        keys = [key for key in state if key.startswith(prefix + _START)]
        found = {key.removeprefix(prefix + _START): state.pop(key) for key in keys}
        roles, own = self._shadow.roles, self._shadow.bind().tensors
        candidates = {*roles.averaged, *roles.shared} - {*roles.excluded} - {*(shared or ())}
        needed = {n for n in candidates if isinstance(own[n], nn.Parameter) and _is_continuous(own[n])}
        if found.keys() != needed:
            difference = pairing.describe_difference(
                sorted(needed - found.keys()), sorted(found.keys() - needed)
            )
            raise ValueError(
                f"the state must hold W^0 for each of its averages, under {prefix + _START!r}: {difference}"
            )
        for name, value in found.items():
            like = own[name]
            fits = isinstance(value, Tensor) and value.shape == like.shape and _is_continuous(value)
            if not (fits and sharding.alike(value, like)):
                there = type(value).__name__
                if isinstance(value, Tensor):
                    there = f"{value.dtype}, {tuple(value.shape)}, {sharding.describe(value)}"
                raise ValueError(
                    f"in the state {prefix + _START + name!r} is {there}, the teacher's is {like.dtype}, "
                    f"{tuple(like.shape)}, {sharding.describe(like)}: load the state of a teacher of this "
                    "model, sharded alike"
                )
        return found

    def load(self, start: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Take over W^0 from a state, and return the tensors that hold it by their names in a state."""
        own = self._shadow.bind()
        held = {}
        for name in sorted(start):
            local = sharding.local(start[name]).detach()
            held[name] = sharding.spread(pairing.clone(local, own.local[name].device), own.tensors[name])
        self.start.hold(held)
        self._plan = None
        return {_START + name: value for name, value in held.items()}

    def _value(self, own: Binding, name: str) -> Tensor:
        value = self._shadow.average(own, name).read().to(own.local[name].dtype, copy=True)
        return sharding.spread(value, own.tensors[name])

    def _names(self, own: Binding) -> list[str]:
        # Sorted, so that the sums do not depend on the order in which parameters were unfrozen.
        return sorted(n for n in self._shadow.roles.averaged if isinstance(own.tensors[n], nn.Parameter))

    def _prepare(self, plan: Plan) -> list[tuple[Tensor, list[_Batch]]]:
        """Return a tensor of each sharding, and its batches. Every rank has the same shardings."""
        self.complete()
        layouts: dict[Any, tuple[Tensor, dict[Any, list[tuple[Tensor, ...]]]]] = {}
        for name, start in self.start.tensors().items():
            whole, average = plan.own.tensors[name], self._shadow.average(plan.own, name)
            row = [average.held, plan.student.local[name].detach(), sharding.local(start)]
            row = [torch.view_as_real(t) if t.is_complex() else t for t in row]
            layout = (whole.device_mesh, whole.placements) if sharding.is_sharded(whole) else None
            _, groups = layouts.setdefault(layout, (whole, {}))
            if row[0].numel():
                key = (average.split, row[0].device, row[0].dtype, row[1].device, row[1].dtype)
                groups.setdefault(key, []).append((*row, *[average.own.detach()] * average.split))
        return [
            (like, [b for g in groups.values() for b in _batches(g)]) for like, groups in layouts.values()
        ]


def _is_continuous(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _batches(rows: Sequence[tuple[Tensor, ...]]) -> list[_Batch]:
    """Cut rows that differ only in shape into batches, with the scratch buffers for all of them."""
    held, student = rows[0][:2]
    # The difference between float32 and float64 is measured with float32's precision.
    dtype = pairing.at_least_float32(student.dtype)
    room = averaging.SCRATCH_BYTES["cpu" if held.device.type == "cpu" else "other"] // dtype.itemsize // 2
    batches = list(averaging.batched(rows, room))
    room = max(sum(row[0].numel() for row in batch) for batch in batches)
    first, second = torch.empty(2, room, dtype=dtype, device=held.device)
    return [_Batch(batch, (first, second)) for batch in batches]


def __dir__() -> list[str]:
    return __all__
