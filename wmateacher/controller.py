"""The controller of a teacher whose weights are measured in the run, `kernels.Gap`.

`Distances` measures how far student and average are apart, and how far the student is from its start, and
chooses omega. `MeasuredClock` counts the steps and keeps the weights that were chosen. On an accelerator omega
stays there: the average moves by it at once, and the host reads it when it has arrived.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from wmateacher import averaging, pairing, sharding
from wmateacher.averaging import Average
from wmateacher.kernels import Array, Gap, Kernel, realised_weights
from wmateacher.pairing import Binding
from wmateacher.schedule import Clock
from wmateacher.shadow import Plan, Shadow
from wmateacher.transfers import Transfer

__all__ = ["PREFIX", "Distances", "MeasuredClock", "clock"]

PREFIX = "start."
"""What the names of W^0 begin with in a teacher's state."""


def clock(kernel: Kernel, total_steps: int | None, update_every: int) -> Clock:
    """Return the clock for a kernel."""
    return (MeasuredClock if isinstance(kernel, Gap) else Clock)(kernel, total_steps, update_every)


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
        transfer = Transfer(torch.as_tensor(omega, dtype=None if isinstance(omega, Tensor) else torch.float64))
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
            f"that it has not measured (step={step}): load the state of a teacher with this kernel, build the "
            "teacher from a model with these weights as W^0, or use a kernel without a measurement"
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
    if not (isinstance(measured, Sequence) and len(measured) == 2 and len(measured[0]) == len(measured[1])):
        return False
    steps, weights = measured
    return (
        all(isinstance(s, Integral) and 0 < s <= step for s in steps)
        and all(isinstance(w, Real) and not (w < 0 or w > 1) for w in weights)
        and all(a < b for a, b in zip(steps, steps[1:], strict=False))
        and snapshot == (steps[-1] if steps else 0)
    )


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


class Distances:
    """The student's weights at the start, and the distances to them and to the average.

    Attributes:
        start: W^0, the local shards of every averaged parameter by canonical name.
    """

    def __init__(self, kernel: Gap, shadow: Shadow, student: nn.Module):
        """Keep a copy of the student's present weights on the teacher's device."""
        self._share, self._shadow = kernel.share, shadow
        self.start: dict[str, Tensor] = {}
        self._plan: Plan | None = None
        self._layouts: list[tuple[Tensor, list[_Batch]]] = []
        values = Binding(student)
        own = Binding(shadow.module)
        for name in self._names(own):
            value, device = values.local[name].detach(), own.local[name].device
            self.start[name] = torch.empty_like(value, device=device).copy_(value)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_plan": None, "_layouts": []}

    @torch.no_grad()
    def omega(self, plan: Plan) -> float | Tensor:
        """Return the weight of the student in a due snapshot, as a tensor if the device can act on it alone."""
        if self._plan is not plan:
            with torch.inference_mode(False):
                self._layouts = self._prepare(plan)
            self._plan = plan
        parts = []
        for like, batches in self._layouts:
            home = sharding.local(like).device
            sums = torch.zeros(2, dtype=_precise(home), device=home)
            for batch in batches:
                sums += batch.measure().to(home, non_blocking=True)
            parts.append(sharding.total(sums, like))
        if not parts:
            return 0.0
        apart, moved = sum(p.to(parts[0].device, non_blocking=True) for p in parts).sqrt().unbind()
        # NaN stays NaN: a student that is not finite is treated as with any other kernel.
        omega = (1.0 - self._share * moved / apart).clamp(min=0.0)
        omega = torch.where(apart == 0, 0.0, omega)  # of 0 / 0, if the student has not moved
        return omega if plan.on_device else float(omega)

    def complete(self) -> None:
        """Add the parameters that have begun to be averaged, whose average is their value at the start."""
        own = self._shadow.bind()
        names = self._names(own)
        if names != [*self.start]:
            known = self.start
            self.start = {n: known[n] if n in known else self._value(own, n) for n in names}
            self._plan = None

    def to_device(self) -> None:
        """Follow the averages to their device."""
        own = Binding(self._shadow.module).local
        self.start = {name: value.to(own[name].device) for name, value in self.start.items()}
        self._plan = None

    def state(self) -> dict[str, Tensor]:
        """Return W^0 by the names of a state, as DTensors where the average is sharded."""
        self.complete()
        own = self._shadow.bind().tensors
        return {PREFIX + name: sharding.spread(value, own[name]) for name, value in self.start.items()}

    def check(self, start: Mapping[str, Tensor], shared: Collection[str] | None) -> None:
        """Check that W^0 from a state fits the averages in it.

        Args:
            start: The tensors by their names in the state.
            shared: The names of the parameters that were shared with the student when it was written.

        Raises:
            ValueError: If a tensor is missing, unknown, or of another shape or sharding.
        """
        own = self._shadow.bind().tensors
        roles = self._shadow.roles
        shared = roles.shared if shared is None else shared
        candidates = [n for n in (*roles.averaged, *roles.shared) if n not in shared and n not in roles.excluded]
        needed = {PREFIX + n: own[n] for n in candidates if isinstance(own[n], nn.Parameter)}
        missing, extra = sorted(needed.keys() - start.keys()), sorted(start.keys() - needed.keys())
        if missing or extra:
            raise ValueError(
                "the teacher's state has not the W^0 of its averages: "
                + pairing.describe_difference(missing, extra)
            )
        for key, value in start.items():
            like = needed[key]
            if not isinstance(value, Tensor) or value.shape != like.shape or not sharding.alike(value, like):
                there = f"{tuple(value.shape)}, {sharding.describe(value)}" if isinstance(value, Tensor) else value
                raise ValueError(
                    f"in the state {key!r} is {there}, the teacher's is {tuple(like.shape)}, "
                    f"{sharding.describe(like)}: load the state of a teacher of the same model, sharded alike"
                )

    def load(self, start: Mapping[str, Tensor]) -> None:
        """Take W^0 from a state, after its averages have been loaded."""
        own = self._shadow.bind().local
        found = {key.removeprefix(PREFIX): sharding.local(value).detach() for key, value in start.items()}
        self.start = {n: found[n].to(own[n].device, copy=True) for n in sorted(found)}
        self._plan = None

    def _value(self, own: Binding, name: str) -> Tensor:
        return self._shadow.average(own, name).read().to(own.local[name].dtype, copy=True)

    def _names(self, own: Binding) -> list[str]:
        # Sorted, so that the sums do not depend on the order in which parameters were unfrozen.
        return sorted(n for n in self._shadow.roles.averaged if isinstance(own.tensors[n], nn.Parameter))

    def _prepare(self, plan: Plan) -> list[tuple[Tensor, list[_Batch]]]:
        """Return the batches of each sharding, and a tensor that has it. Every rank has the same shardings."""
        self.complete()
        layouts: dict[Any, tuple[Tensor, dict[Any, list[tuple[Tensor, ...]]]]] = {}
        for name, start in self.start.items():
            whole, average = plan.own.tensors[name], self._shadow.average(plan.own, name)
            row = [average.held, plan.student.local[name].detach(), start]
            row = [torch.view_as_real(t) if t.is_complex() else t for t in row]
            layout = (whole.device_mesh, whole.placements) if sharding.is_sharded(whole) else None
            _, groups = layouts.setdefault(layout, (whole, {}))
            if start.numel():
                key = (average.split, row[0].device, row[0].dtype, row[1].device, row[1].dtype)
                groups.setdefault(key, []).append((*row, *[average.own.detach()] * average.split))
        return [(like, [b for g in groups.values() for b in _batches(g)]) for like, groups in layouts.values()]


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
