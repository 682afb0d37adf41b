"""The only file that writes averaged tensors: `average <- average + omega (value - average)`.

An average is held in one of three ways:

- *direct*: in the averaged module's own tensor;
- *wide*: in a tensor of higher precision beside it, rounded into the module at each update;
- *split*: in float32, its upper half being the module's own bfloat16 tensor (rounded to nearest) and
  its lower half 16 bits beside it: float32's exact values for half of *wide*'s extra memory.

An `Update` is prepared once for tensors that stay the same and applied at every snapshot. Values of
another dtype or device go through a scratch that stays in the cache, many small tensors or a piece of a
large one at a time: there is no temporary per tensor, and what runs in Python does not grow with the
number of tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Row = tuple[Tensor, ...]

# What a CPU core keeps in its cache between a cast and its use; a GPU's is larger, its launches dearer.
_SCRATCH_BYTES = {"cpu": 2**22, "other": 2**24}


@dataclass(frozen=True)
class Average:
    """One tensor's average.

    Attributes:
        own: The averaged module's tensor, in the dtype of its forward.
        beside: None (direct), a tensor of higher precision (wide), or int16 (split).
    """

    own: Tensor
    beside: Tensor | None = None

    @classmethod
    def of(cls, value: Tensor, own: Tensor, *, split: bool = False) -> Average:
        """Begin at `value`, averaging in its dtype, on the device of `own`."""
        if own.dtype == value.dtype:
            average = cls(own)
        else:
            average = cls(own, torch.empty_like(own, dtype=torch.int16 if split else value.dtype))
        average.write(value)
        return average

    @property
    def held(self) -> Tensor:
        """The tensor beside the module's own, or that one where there is none."""
        return self.own.detach() if self.beside is None else self.beside

    @property
    def split(self) -> bool:
        """Whether `held` is but the lower half of the average."""
        return self.held.dtype == torch.int16

    @torch.no_grad()
    def read(self) -> Tensor:
        """The average at full precision: the tensor that holds it, or a new one where it is split."""
        if not self.split:
            return self.held
        return self.own.view(torch.int16).int().mul_(2**16).add_(self.held).view(torch.float32)

    @torch.no_grad()
    def write(self, value: Tensor) -> None:
        """Set the average, from any dtype and device."""
        if self.split:
            bits = value.to(self.own.device, torch.float32, copy=True).view(torch.int32)
            self.held.copy_(bits)
            self.own.view(torch.int16).copy_(_upper_half_(bits))
        else:
            self.held.copy_(value)
            if self.beside is not None:
                self.own.copy_(self.held)


class Update:
    """`average <- average + omega (value - average)`, prepared for tensors that stay the same."""

    def __init__(self, averages: Sequence[Average], values: Sequence[Tensor]):
        """Sort the tensors into groups that are alike, cut them to size and lay out the scratch.

        Args:
            averages: Where the averages are held.
            values: What they move towards, of the same shapes; any dtypes and devices.
        """
        groups: dict[tuple[object, ...], list[tuple[Average, Tensor]]] = {}
        for average, value in zip(averages, values, strict=True):
            held = average.held
            key = (average.own.dtype, held.dtype, held.device, value.dtype, value.device)
            groups.setdefault(key, []).append((average, value.detach()))
        self._steps = [step for group in groups.values() for step in _prepare(group)]

    @torch.no_grad()
    def __call__(self, omega: float) -> None:
        """Move every average towards its value by the share `omega` in (0, 1]; 1 copies exactly."""
        for i, step in enumerate(self._steps):
            if i == 0:
                step.fetch()
            if i + 1 < len(self._steps):
                self._steps[i + 1].fetch()
            step.move(omega)


@torch.no_grad()
def copy_(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy every source into its target, converting dtype and device."""
    _copy_(list(targets), list(sources))


class _Step:
    """A batch of averages: its values are fetched one step ahead, then it moves."""

    def __init__(self, batch: list[Row], relay: Tensor | None, scratch: Tensor | None):
        """Lay the batch out.

        Args:
            batch: Held, value, and own where it is rounded into, all of one shape.
            relay: Where values of another device arrive; None: they are here.
            scratch: Where they are cast; None: they need no cast.
        """
        columns = [list(column) for column in zip(*batch, strict=True)]
        self.held, self.values, self.own = columns[0], columns[1], columns[2] if len(columns) > 2 else []
        self.here = self.values if relay is None else _views(relay, self.held)
        self.cast = self.here if scratch is None else _views(scratch, self.held)
        self.arrived: torch.Event | None = None

    def fetch(self) -> None:
        """Start the transfer of values that live on another device."""
        if self.here is not self.values:
            torch._foreach_copy_(self.here, self.values, non_blocking=True)
            if self.values[0].device.type != "cpu":
                self.arrived = torch.Event(self.values[0].device)
                self.arrived.record()

    def move(self, omega: float) -> None:
        """Cast the values, move the averages, round them into the module."""
        if self.arrived is not None:
            self.arrived.synchronize()
        if self.cast is not self.here:
            _copy_(self.cast, self.here)
        _lerp_(self.held, self.cast, omega)
        _copy_(self.own, self.held)


class _SplitStep(_Step):
    """The same for averages that are split: joined in the scratch, moved there, and split again."""

    def __init__(self, batch: list[Row], relay: Tensor | None, scratch: Tensor | None):
        assert scratch is not None
        numel = sum(row[0].numel() for row in batch)
        self.average, self.value = (half[:numel] for half in scratch.chunk(2))
        super().__init__(batch, relay, self.value)
        self.upper = [own.view(torch.int16) for own in self.own]
        self.bits = self.average.view(torch.int32)
        self.bits_views = _views(self.bits, self.held)
        self.lower = self.value.view(torch.int32)  # in the values' place, before they are cast
        self.lower_views = _views(self.lower, self.held)

    def move(self, omega: float) -> None:
        if self.arrived is not None:
            self.arrived.synchronize()
        _copy_(self.bits_views, self.upper)
        _copy_(self.lower_views, self.held)
        self.bits.mul_(2**16).add_(self.lower)
        _copy_(self.cast, self.here)
        _lerp_([self.average], [self.value], omega)
        _copy_(self.held, self.bits_views)
        _upper_half_(self.bits)
        _copy_(self.upper, self.bits_views)


def _prepare(group: list[tuple[Average, Tensor]]) -> list[_Step]:
    """The steps for averages that are alike in everything but shape."""
    average, value = group[0]
    held = average.held
    rows: list[Row] = [
        (a.held, v) if a.beside is None else (a.held, v, a.own.detach()) for a, v in group if v.numel()
    ]
    elsewhere = value.device != held.device
    away = elsewhere and held.device.type == "cpu"
    cast = average.split or value.dtype != held.dtype or (elsewhere and not away)
    if not rows or not (away or cast):
        return [_Step(rows, None, None)] if rows else []
    dtype = torch.float32 if average.split else held.dtype
    halves = 2 if average.split else 1
    room = _SCRATCH_BYTES["cpu" if held.device.type == "cpu" else "other"] // dtype.itemsize // halves
    batches = list(_batches(rows, room))
    room = max(sum(row[0].numel() for row in batch) for batch in batches)
    scratch = torch.empty(halves * room, dtype=dtype, device=held.device) if cast else None
    # Two relays take turns: one is filled while the other is read.
    relays = [_relay(value, room) for _ in range(2)] if away else [None]
    make = _SplitStep if average.split else _Step
    return [make(batch, relays[i % len(relays)], scratch) for i, batch in enumerate(batches)]


def _relay(value: Tensor, numel: int) -> Tensor:
    return torch.empty(numel, dtype=value.dtype, device="cpu", pin_memory=value.device.type == "cuda")


def _batches(rows: Sequence[Row], room: int) -> Iterator[list[Row]]:
    """Rows, or pieces of them, that together have at most `room` elements."""
    batch: list[Row] = []
    free = room
    for row in rows:
        for piece in _pieces(row, room):
            numel = piece[0].numel()
            if numel > free:
                yield batch
                batch, free = [], room
            batch.append(piece)
            free -= numel
    if batch:
        yield batch


def _pieces(row: Row, room: int) -> Iterator[Row]:
    """The row in pieces of at most `room` elements, cut across its outermost dimension in memory."""
    held = row[0]
    if held.numel() <= room:
        yield row
        return
    outermost = max((d for d in range(held.dim()) if held.shape[d] > 1), key=held.stride)
    parts = min(-(-held.numel() // room), held.shape[outermost])
    for piece in zip(*(t.tensor_split(parts, outermost) for t in row), strict=True):
        yield from _pieces(piece, room)


def _views(buffer: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Consecutive parts of a flat buffer with the shapes of `like`, laid out as they are."""
    views, offset = [], buffer.storage_offset()
    for tensor in like:
        strides = torch.empty_like(tensor, device="meta").stride()
        views.append(buffer.as_strided(tensor.shape, strides, offset))
        offset += tensor.numel()
    return views


def _copy_(targets: list[Tensor], sources: list[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources)


def _lerp_(averages: list[Tensor], values: list[Tensor], omega: float) -> None:
    if omega == 1.0:
        _copy_(averages, values)  # exactly, and also from infinity
    else:
        torch._foreach_lerp_(averages, values, omega)


def _upper_half_(bits: Tensor) -> Tensor:
    """The bfloat16 nearest to each float32, both as bits: what int16 lower halves leave over."""
    # A NaN with all bits set (a GPU's) would overflow into a zero.
    return bits.clamp_(max=0x7FFF7FFF).add_(2**15).bitwise_right_shift_(16)
