"""The steps of an update with torch's own operations, on any device.

Values of another dtype or device pass through a scratch buffer that fits in the cache, several small tensors
or one piece of a large tensor at a time. There is no temporary per tensor, and the number of Python calls
does not grow with the number of tensors. Models have as many vectors as matrices, and a vector costs more to
call than to move, so that wide averages of vectors are held end to end (`side_by_side`) and moved as one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from wmateacher.averaging.average import Average, is_vector, upper_half_

__all__ = ["SCRATCH_BYTES", "Row", "Step", "batched", "prepare", "rows_of", "views", "write"]

# The tensor that holds an average, the value to move it to, and the module's own tensor if it is a third one.
Row = tuple[Tensor, ...]

# Small enough for a CPU core's cache between a cast and its use. A GPU has more cache and costlier launches.
SCRATCH_BYTES = {"cpu": 2**22, "other": 2**24}


class Step:
    """One batch of averages, which moves after its values have been fetched."""

    def __init__(
        self, batch: list[Row], relay: Tensor | None, scratch: Tensor | None, spare: Tensor | None = None
    ):
        """Give the batch its buffers.

        Args:
            batch: The batch's rows.
            relay: The buffer in which values from another device arrive; None if they are on this one.
            scratch: The buffer in which values are cast; None if they need no cast.
            spare: A second buffer like `scratch`, for updates with a mask.
        """
        columns = [list(column) for column in zip(*batch, strict=True)]
        self.held, self.values, self.own = columns[0], columns[1], columns[2] if len(columns) > 2 else []
        self.here = self.values if relay is None else views(relay, self.held)
        self.cast = self.here if scratch is None else views(scratch, self.held)
        self.scratch, self.spare = scratch, spare
        self.dtype = self.held[0].dtype
        self.before = [] if spare is None else views(spare, self.held)
        self.arrived: torch.Event | None = None

    def fetch(self) -> None:
        """Start the transfer of values from another device."""
        if self.here is not self.values:
            torch._foreach_copy_(self.here, self.values, non_blocking=True)
            self._record_arrival()

    def _record_arrival(self) -> None:
        device = self.values[0].device
        if device.type != "cpu":
            # The copy runs on a stream of the values' device, which need not be the current device.
            self.arrived = torch.Event(device)
            self.arrived.record(torch.accelerator.current_stream(device))

    def move(self, omega: float | Tensor, mask: Tensor | None) -> None:
        """Cast the values, move the averages and round them into the module."""
        if self.arrived is not None:
            self.arrived.synchronize()
        if self.cast is not self.here:
            write(self.cast, self.here)
        if mask is not None:
            assert self.scratch is not None
            assert self.spare is not None
            write(self.before, self.held)
            _choose_(mask, self.scratch, self.spare)
            if isinstance(omega, Tensor):
                # A call for each tensor would take longer than this pass over all of them.
                torch.lerp(self.spare, self.scratch, omega, out=self.scratch)
                omega = 1.0
        _lerp_(self.held, self.cast, omega)
        write(self.own, self.held)


class _JoinedStep(Step):
    """One batch of vectors whose averages lie end to end, so that one call moves them all."""

    def __init__(
        self, batch: list[Row], relay: Tensor | None, scratch: Tensor | None, spare: Tensor | None = None
    ):
        super().__init__(batch, None, None)
        numel = sum(tensor.numel() for tensor in self.held)
        self.average = self.held[0].as_strided((numel,), (1,))
        self.flat_values = [value.view(-1) for value in self.values]
        self.gathered = self.values[0].new_empty(numel)
        self.flat_here = self.gathered if relay is None else relay[:numel]
        self.flat_cast = self.flat_here if scratch is None else scratch[:numel]

    def fetch(self) -> None:
        torch.cat(self.flat_values, out=self.gathered)
        if self.flat_here is not self.gathered:
            self.flat_here.copy_(self.gathered, non_blocking=True)
            self._record_arrival()

    def move(self, omega: float | Tensor, mask: Tensor | None) -> None:
        if self.arrived is not None:
            self.arrived.synchronize()
        if self.flat_cast is not self.flat_here:
            self.flat_cast.copy_(self.flat_here)
        if mask is not None:
            _choose_(mask, self.flat_cast, self.average)
        _lerp_([self.average], [self.flat_cast], omega)
        write(self.own, self.held)


class _SplitStep(Step):
    """One batch of split averages, which are joined in the scratch buffer, moved there and split again."""

    def __init__(
        self, batch: list[Row], relay: Tensor | None, scratch: Tensor | None, spare: Tensor | None = None
    ):
        assert scratch is not None
        numel = sum(row[0].numel() for row in batch)
        self.average, self.value = (half[:numel] for half in scratch.chunk(2))
        super().__init__(batch, relay, self.value)
        self.dtype = torch.float32
        self.upper = [own.view(torch.int16) for own in self.own]
        self.bits = self.average.view(torch.int32)
        self.bits_views = views(self.bits, self.held)
        # The lower halves borrow the values' half of the scratch, before the values are cast into it.
        self.lower = self.value.view(torch.int32)
        self.lower_views = views(self.lower, self.held)

    def move(self, omega: float | Tensor, mask: Tensor | None) -> None:
        if self.arrived is not None:
            self.arrived.synchronize()
        # Join: float32's bits are the upper half times 2^16 plus the lower half as a signed number, because
        # the upper half was rounded to nearest and lies above the average where the lower half is negative.
        write(self.bits_views, self.upper)
        write(self.lower_views, self.held)
        self.bits.mul_(2**16).add_(self.lower)
        # Move. From here on the values take the place of the lower halves.
        write(self.cast, self.here)
        if mask is not None:
            _choose_(mask, self.value, self.average)
        _lerp_([self.average], [self.value], omega)
        # Split: the copy to int16 keeps the lower 16 bits. It must come first, as rounding to the upper half
        # overwrites the bits.
        write(self.held, self.bits_views)
        upper_half_(self.bits)
        write(self.upper, self.bits_views)


def prepare(group: Sequence[tuple[Average, Tensor]], masked: bool) -> list[Step]:
    """Return the steps for averages that differ only in shape.

    Args:
        group: The averages, and the values to move them towards.
        masked: Whether calls have a mask, or an omega on a device.
    """
    rows = rows_of(group)
    if not rows:
        return []
    average, value = group[0]
    held = average.held
    # Values from an accelerator arrive in pinned memory, a relay, while the batch before them moves. Values
    # for an accelerator, and values of another dtype, are copied into a scratch buffer beside the average.
    elsewhere = value.device != held.device
    needs_relay = elsewhere and held.device.type == "cpu"
    needs_scratch = masked or average.split or value.dtype != held.dtype or (elsewhere and not needs_relay)
    joined = _are_joined(rows)
    if not (needs_relay or needs_scratch or joined):
        return [Step(rows, None, None)]
    dtype = torch.float32 if average.split else held.dtype
    halves = 2 if average.split or masked else 1
    room = SCRATCH_BYTES["cpu" if held.device.type == "cpu" else "other"] // dtype.itemsize // halves
    batches = list(batched(rows, room))
    room = max(sum(row[0].numel() for row in batch) for batch in batches)
    scratch = torch.empty(halves * room, dtype=dtype, device=held.device) if needs_scratch else None
    # Two relays alternate: one is filled while the other is read.
    relays = [_relay(value, room) for _ in range(2)] if needs_relay else [None]
    make = _SplitStep if average.split else _JoinedStep if joined else Step
    if average.split or not masked:
        return [make(batch, relays[i % len(relays)], scratch) for i, batch in enumerate(batches)]
    assert scratch is not None
    halved = scratch.chunk(2)
    return [make(batch, relays[i % len(relays)], *halved) for i, batch in enumerate(batches)]


def rows_of(group: Iterable[tuple[Average, Tensor]]) -> list[Row]:
    """Return the tensors of averages that have elements."""
    return [(a.held, v) if a.beside is None else (a.held, v, a.own.detach()) for a, v in group if v.numel()]


def _are_joined(rows: Sequence[Row]) -> bool:
    """Return whether these are vectors whose averages lie end to end, as `side_by_side` puts them."""
    helds = [row[0] for row in rows]
    ends = [held.storage_offset() + held.numel() for held in helds]
    return (
        len(rows) > 1
        and all(map(is_vector, helds))
        and len({held.untyped_storage().data_ptr() for held in helds}) == 1
        and all(held.storage_offset() == end for held, end in zip(helds[1:], ends[:-1], strict=True))
        and all(type(row[1]) is Tensor for row in rows)  # other types may have no memory to gather
    )


def _relay(value: Tensor, numel: int) -> Tensor:
    return torch.empty(numel, dtype=value.dtype, device="cpu", pin_memory=value.device.type == "cuda")


def batched(rows: Sequence[Row], room: int) -> Iterator[list[Row]]:
    """Yield batches of rows, or pieces of rows, with at most `room` elements in total."""
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
    """Yield a row in pieces of at most `room` elements, cut along the outermost dimension in memory."""
    held = row[0]
    if held.numel() <= room:
        yield row
        return
    outermost = max((d for d in range(held.dim()) if held.shape[d] > 1), key=held.stride)
    parts = min(-(-held.numel() // room), held.shape[outermost])
    for piece in zip(*(t.tensor_split(parts, outermost) for t in row), strict=True):
        yield from _pieces(piece, room)


def views(buffer: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return consecutive parts of a flat buffer with the shapes and memory layouts of `like`."""
    found, offset = [], buffer.storage_offset()
    for tensor in like:
        strides = torch.empty_like(tensor, device="meta").stride()
        found.append(buffer.as_strided(tensor.shape, strides, offset))
        offset += tensor.numel()
    return found


def write(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Write every source into its target, converting dtype and device."""
    if targets:
        torch._foreach_copy_(targets, sources)


def _lerp_(averages: list[Tensor], values: list[Tensor], omega: float | Tensor) -> None:
    if isinstance(omega, Tensor):
        for average, value in zip(averages, values, strict=True):
            average.lerp_(value, omega)
    elif omega == 1.0:
        write(averages, values)  # lerp would give NaN from infinity
    else:
        torch._foreach_lerp_(averages, values, omega)


def _choose_(mask: Tensor, values: Tensor, averages: Tensor) -> None:
    """Where the mask is False, set the values to the averages, which then move towards themselves."""
    torch.where(mask, values[: len(averages)], averages[: len(values)], out=values[: len(averages)])


def __dir__() -> list[str]:
    return __all__
