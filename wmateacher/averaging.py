"""Averages of tensors and their update, `average <- average + omega (value - average)`.

No other module writes averaged tensors. An average is held in one of three ways:

- *direct*: in the averaged module's own tensor;
- *wide*: in a tensor of higher precision beside it, which is rounded into the module at each update;
- *split*: in float32, whose upper half is the module's own bfloat16 tensor (rounded to nearest) and whose
  lower half is a 16-bit tensor beside it. The values are exactly float32's, for half the extra memory of
  *wide*.

An `Update` is prepared once and applied at every snapshot, for as long as the tensors stay the same. Values
of another dtype or device pass through a scratch buffer that fits in the cache, several small tensors or one
piece of a large tensor at a time. There is no temporary per tensor, and the number of Python calls does not
grow with the number of tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Average", "Update", "copy_"]

# The tensor that holds an average, the value to move it to, and the module's own tensor if it is a third one.
_Row = tuple[Tensor, ...]

# Small enough for a CPU core's cache between a cast and its use. A GPU has more cache and costlier launches.
_SCRATCH_BYTES = {"cpu": 2**22, "other": 2**24}


@dataclass(frozen=True)
class Average:
    """The average of one tensor, and where it is held.

    Attributes:
        own: The averaged module's tensor, in the dtype of its forward pass.
        beside: None (direct), a tensor of higher precision (wide), or int16 (split).
    """

    own: Tensor
    beside: Tensor | None = None

    @classmethod
    def of(cls, value: Tensor, own: Tensor, *, split: bool = False) -> Average:
        """Return an average that starts at `value` and has its dtype, on the device of `own`."""
        if own.dtype == value.dtype:
            average = cls(own)
        else:
            average = cls(own, torch.empty_like(own, dtype=torch.int16 if split else value.dtype))
        average.write(value)
        return average

    @property
    def held(self) -> Tensor:
        """The tensor that holds the average: `beside`, or `own` if that is None."""
        return self.own.detach() if self.beside is None else self.beside

    @property
    def split(self) -> bool:
        """Whether `held` has only the lower half of the average, and `own` the upper half."""
        return self.held.dtype == torch.int16

    @torch.no_grad()
    def read(self) -> Tensor:
        """Return the average at full precision: the tensor that holds it, or a new one if it is split."""
        if not self.split:
            return self.held
        return self.own.view(torch.int16).int().mul_(2**16).add_(self.held).view(torch.float32)

    @torch.no_grad()
    def write(self, value: Tensor) -> None:
        """Set the average to a value of any dtype and device."""
        if self.split:
            bits = value.to(self.own.device, torch.float32, copy=True).view(torch.int32)
            self.held.copy_(bits)
            self.own.view(torch.int16).copy_(_upper_half_(bits))
        else:
            self.held.copy_(value)
            if self.beside is not None:
                self.own.copy_(self.held)


class Update:
    """The step `average <- average + omega (value - average)`, prepared for a fixed set of tensors."""

    def __init__(self, averages: Sequence[Average], values: Sequence[Tensor]):
        """Group the tensors by dtype and device, cut them into batches and lay out the scratch buffers.

        Args:
            averages: The averages to move.
            values: The tensors to move them towards, of the same shapes and of any dtype and device.
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
        # The next batch is on its way from its device while this one moves.
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
    """One batch of averages, which moves after its values have been fetched."""

    def __init__(self, batch: list[_Row], relay: Tensor | None, scratch: Tensor | None):
        """Give the batch its buffers.

        Args:
            batch: The batch's rows.
            relay: The buffer in which values from another device arrive; None if they are on this one.
            scratch: The buffer in which values are cast; None if they need no cast.
        """
        columns = [list(column) for column in zip(*batch, strict=True)]
        self.held, self.values, self.own = columns[0], columns[1], columns[2] if len(columns) > 2 else []
        self.here = self.values if relay is None else _views(relay, self.held)
        self.cast = self.here if scratch is None else _views(scratch, self.held)
        self.arrived: torch.Event | None = None

    def fetch(self) -> None:
        """Start the transfer of values from another device."""
        if self.here is not self.values:
            torch._foreach_copy_(self.here, self.values, non_blocking=True)
            device = self.values[0].device
            if device.type != "cpu":
                # The copy runs on a stream of the values' device, which need not be the current device.
                self.arrived = torch.Event(device)
                self.arrived.record(torch.accelerator.current_stream(device))

    def move(self, omega: float) -> None:
        """Cast the values, move the averages and round them into the module."""
        if self.arrived is not None:
            self.arrived.synchronize()
        if self.cast is not self.here:
            _copy_(self.cast, self.here)
        _lerp_(self.held, self.cast, omega)
        _copy_(self.own, self.held)


class _SplitStep(_Step):
    """One batch of split averages, which are joined in the scratch buffer, moved there and split again."""

    def __init__(self, batch: list[_Row], relay: Tensor | None, scratch: Tensor | None):
        assert scratch is not None
        numel = sum(row[0].numel() for row in batch)
        self.average, self.value = (half[:numel] for half in scratch.chunk(2))
        super().__init__(batch, relay, self.value)
        self.upper = [own.view(torch.int16) for own in self.own]
        self.bits = self.average.view(torch.int32)
        self.bits_views = _views(self.bits, self.held)
        # The lower halves borrow the values' half of the scratch, before the values are cast into it.
        self.lower = self.value.view(torch.int32)
        self.lower_views = _views(self.lower, self.held)

    def move(self, omega: float) -> None:
        if self.arrived is not None:
            self.arrived.synchronize()
        # Join: float32's bits are the upper half times 2^16 plus the lower half as a signed number, because
        # the upper half was rounded to nearest and lies above the average where the lower half is negative.
        _copy_(self.bits_views, self.upper)
        _copy_(self.lower_views, self.held)
        self.bits.mul_(2**16).add_(self.lower)
        # Move. From here on the values take the place of the lower halves.
        _copy_(self.cast, self.here)
        _lerp_([self.average], [self.value], omega)
        # Split: the copy to int16 keeps the lower 16 bits. It must come first, as rounding to the upper half
        # overwrites the bits.
        _copy_(self.held, self.bits_views)
        _upper_half_(self.bits)
        _copy_(self.upper, self.bits_views)


def _prepare(group: list[tuple[Average, Tensor]]) -> list[_Step]:
    """Return the steps for averages that differ only in shape."""
    average, value = group[0]
    held = average.held
    rows: list[_Row] = [
        (a.held, v) if a.beside is None else (a.held, v, a.own.detach()) for a, v in group if v.numel()
    ]
    # Values from an accelerator arrive in pinned memory, a relay, while the batch before them moves. Values
    # for an accelerator, and values of another dtype, are copied into a scratch buffer beside the average.
    elsewhere = value.device != held.device
    needs_relay = elsewhere and held.device.type == "cpu"
    needs_scratch = average.split or value.dtype != held.dtype or (elsewhere and not needs_relay)
    if not rows or not (needs_relay or needs_scratch):
        return [_Step(rows, None, None)] if rows else []
    dtype = torch.float32 if average.split else held.dtype
    halves = 2 if average.split else 1
    room = _SCRATCH_BYTES["cpu" if held.device.type == "cpu" else "other"] // dtype.itemsize // halves
    batches = list(_batches(rows, room))
    room = max(sum(row[0].numel() for row in batch) for batch in batches)
    scratch = torch.empty(halves * room, dtype=dtype, device=held.device) if needs_scratch else None
    # Two relays alternate: one is filled while the other is read.
    relays = [_relay(value, room) for _ in range(2)] if needs_relay else [None]
    make = _SplitStep if average.split else _Step
    return [make(batch, relays[i % len(relays)], scratch) for i, batch in enumerate(batches)]


def _relay(value: Tensor, numel: int) -> Tensor:
    return torch.empty(numel, dtype=value.dtype, device="cpu", pin_memory=value.device.type == "cuda")


def _batches(rows: Sequence[_Row], room: int) -> Iterator[list[_Row]]:
    """Yield batches of rows, or pieces of rows, with at most `room` elements in total."""
    batch: list[_Row] = []
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


def _pieces(row: _Row, room: int) -> Iterator[_Row]:
    """Yield a row in pieces of at most `room` elements, cut along the outermost dimension in memory."""
    held = row[0]
    if held.numel() <= room:
        yield row
        return
    outermost = max((d for d in range(held.dim()) if held.shape[d] > 1), key=held.stride)
    parts = min(-(-held.numel() // room), held.shape[outermost])
    for piece in zip(*(t.tensor_split(parts, outermost) for t in row), strict=True):
        yield from _pieces(piece, room)


def _views(buffer: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return consecutive parts of a flat buffer with the shapes and memory layouts of `like`."""
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
        _copy_(averages, values)  # lerp would give NaN from infinity
    else:
        torch._foreach_lerp_(averages, values, omega)


def _upper_half_(bits: Tensor) -> Tensor:
    """Round float32 bits to the nearest bfloat16 bits, in place. What is left is the signed lower half."""
    # Rounding a NaN whose bits are all set, as GPUs make them, would overflow into a zero.
    return bits.clamp_(max=0x7FFF7FFF).add_(2**15).bitwise_right_shift_(16)


def __dir__() -> list[str]:
    return __all__
