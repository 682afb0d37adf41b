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
grow with the number of tensors. Models have as many vectors as matrices, and a vector costs more to call than
to move, so that wide averages of vectors are held end to end (`side_by_side`) and moved as one tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wmateacher import caches
from wmateacher.transfers import moved

__all__ = ["SCRATCH_BYTES", "Average", "Update", "batched", "copy_", "is_vector", "side_by_side", "views"]

# The tensor that holds an average, the value to move it to, and the module's own tensor if it is a third one.
_Row = tuple[Tensor, ...]

# Small enough for a CPU core's cache between a cast and its use. A GPU has more cache and costlier launches.
SCRATCH_BYTES = {"cpu": 2**22, "other": 2**24}

# A longer vector is worth a call of its own.
_SHORT = 2**16


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
    def of(cls, value: Tensor, own: Tensor, *, split: bool = False, apart: bool = False) -> Average:
        """Return an average that starts at `value` and has its dtype, on the device of `own`.

        Args:
            value: The value.
            own: The averaged module's tensor.
            split: Whether to hold only the lower half beside the module.
            apart: Whether to hold the average beside the module even if the module has its dtype.
        """
        if own.dtype == value.dtype and not apart:
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
            self.restore()

    @torch.no_grad()
    def restore(self) -> None:
        """Round the average into the module again, if it is held beside it and not split."""
        if self.beside is not None and not self.split:
            self.own.copy_(self.beside)


class Update:
    """The step `average <- average + omega (value - average)`, prepared for a fixed set of tensors."""

    def __init__(self, averages: Sequence[Average], values: Sequence[Tensor], *, masked: bool = False):
        """Group the tensors by dtype and device, cut them into batches and lay out the scratch buffers.

        Args:
            averages: The averages to move.
            values: The tensors to move them towards, of the same shapes and of any dtype and device.
            masked: Whether calls have a mask, or an omega on a device, which needs room for a second value of
                each average.
        """
        groups: dict[tuple[object, ...], list[tuple[Average, Tensor]]] = {}
        for average, value in zip(averages, values, strict=True):
            held = average.held
            is_direct = average.beside is None
            key = (is_direct, average.own.dtype, held.dtype, held.device, value.dtype, value.device)
            groups.setdefault(key, []).append((average, value.detach()))
        self._steps = [step for group in groups.values() for step in _prepare(group, masked)]

    @torch.no_grad()
    def __call__(self, omega: float | Tensor, mask: Tensor | None = None) -> None:
        """Move every average towards its value.

        Args:
            omega: The share in (0, 1] by which it moves; 1 copies exactly. A 0-d tensor on any device is
                allowed together with a mask, and the host does not wait for it.
            mask: A 0-d bool tensor on any device: with False, no average changes. The host does not wait for
                it.
        """
        arrived: dict[Any, Tensor] = {}

        def there(value: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
            key = (id(value), device, dtype)
            if key not in arrived:
                arrived[key] = moved(value, device, dtype)
            return arrived[key]

        # The next batch is on its way from its device while this one moves.
        for i, step in enumerate(self._steps):
            if i == 0:
                step.fetch()
            if i + 1 < len(self._steps):
                self._steps[i + 1].fetch()
            if mask is None:
                assert not isinstance(omega, Tensor)
                step.move(omega, None)
            else:
                device = step.held[0].device
                share = there(omega, device, step.dtype) if isinstance(omega, Tensor) else omega
                step.move(share, there(mask, device, mask.dtype))


@torch.no_grad()
def side_by_side(averages: Mapping[str, Average]) -> dict[str, Average]:
    """Return the same averages, with the short vectors among the wide ones held end to end in memory."""
    result = dict(averages)
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, average in averages.items():
        held = average.held
        if average.beside is not None and not average.split and held.numel() <= _SHORT and is_vector(held):
            groups.setdefault((average.own.dtype, held.dtype, held.device), []).append(name)
    for names in groups.values():
        parts = [averages[name].held.reshape(-1) for name in names]
        for name, part in zip(names, torch.cat(parts).split([p.numel() for p in parts]), strict=True):
            own = averages[name].own
            result[name] = Average(own, part.view(own.shape))
    return result


@torch.no_grad()
def copy_(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy every source into its target, converting dtype and device, and clear torch's caches of weights."""
    # Buffers that a forward pass has made in inference mode can only be written to in inference mode.
    with torch.inference_mode() if any(map(Tensor.is_inference, targets)) else nullcontext():
        _copy_(list(targets), list(sources))
    caches.clear()


class _Step:
    """One batch of averages, which moves after its values have been fetched."""

    def __init__(
        self, batch: list[_Row], relay: Tensor | None, scratch: Tensor | None, spare: Tensor | None = None
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
            _copy_(self.cast, self.here)
        if mask is not None:
            assert self.scratch is not None
            assert self.spare is not None
            _copy_(self.before, self.held)
            _choose_(mask, self.scratch, self.spare)
            if isinstance(omega, Tensor):
                # A call for each tensor would take longer than this pass over all of them.
                torch.lerp(self.spare, self.scratch, omega, out=self.scratch)
                omega = 1.0
        _lerp_(self.held, self.cast, omega)
        _copy_(self.own, self.held)


class _JoinedStep(_Step):
    """One batch of vectors whose averages lie end to end, so that one call moves them all."""

    def __init__(
        self, batch: list[_Row], relay: Tensor | None, scratch: Tensor | None, spare: Tensor | None = None
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
        _copy_(self.own, self.held)


class _SplitStep(_Step):
    """One batch of split averages, which are joined in the scratch buffer, moved there and split again."""

    def __init__(
        self, batch: list[_Row], relay: Tensor | None, scratch: Tensor | None, spare: Tensor | None = None
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
        _copy_(self.bits_views, self.upper)
        _copy_(self.lower_views, self.held)
        self.bits.mul_(2**16).add_(self.lower)
        # Move. From here on the values take the place of the lower halves.
        _copy_(self.cast, self.here)
        if mask is not None:
            _choose_(mask, self.value, self.average)
        _lerp_([self.average], [self.value], omega)
        # Split: the copy to int16 keeps the lower 16 bits. It must come first, as rounding to the upper half
        # overwrites the bits.
        _copy_(self.held, self.bits_views)
        _upper_half_(self.bits)
        _copy_(self.upper, self.bits_views)


def _prepare(group: list[tuple[Average, Tensor]], masked: bool) -> list[_Step]:
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
    needs_scratch = masked or average.split or value.dtype != held.dtype or (elsewhere and not needs_relay)
    joined = _are_joined(rows)
    if not rows or not (needs_relay or needs_scratch or joined):
        return [_Step(rows, None, None)] if rows else []
    dtype = torch.float32 if average.split else held.dtype
    halves = 2 if average.split or masked else 1
    room = SCRATCH_BYTES["cpu" if held.device.type == "cpu" else "other"] // dtype.itemsize // halves
    batches = list(batched(rows, room))
    room = max(sum(row[0].numel() for row in batch) for batch in batches)
    scratch = torch.empty(halves * room, dtype=dtype, device=held.device) if needs_scratch else None
    # Two relays alternate: one is filled while the other is read.
    relays = [_relay(value, room) for _ in range(2)] if needs_relay else [None]
    make = _SplitStep if average.split else _JoinedStep if joined else _Step
    if average.split or not masked:
        return [make(batch, relays[i % len(relays)], scratch) for i, batch in enumerate(batches)]
    assert scratch is not None
    halved = scratch.chunk(2)
    return [make(batch, relays[i % len(relays)], *halved) for i, batch in enumerate(batches)]


def is_vector(tensor: Tensor) -> bool:
    """Return whether at most one dimension is longer than 1, as in norm gains, biases and logit scales."""
    return sum(length > 1 for length in tensor.shape) <= 1


def _are_joined(rows: Sequence[_Row]) -> bool:
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


def batched(rows: Sequence[_Row], room: int) -> Iterator[list[_Row]]:
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


def views(buffer: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return consecutive parts of a flat buffer with the shapes and memory layouts of `like`."""
    found, offset = [], buffer.storage_offset()
    for tensor in like:
        strides = torch.empty_like(tensor, device="meta").stride()
        found.append(buffer.as_strided(tensor.shape, strides, offset))
        offset += tensor.numel()
    return found


def _copy_(targets: list[Tensor], sources: list[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources)


def _lerp_(averages: list[Tensor], values: list[Tensor], omega: float | Tensor) -> None:
    if isinstance(omega, Tensor):
        for average, value in zip(averages, values, strict=True):
            average.lerp_(value, omega)
    elif omega == 1.0:
        _copy_(averages, values)  # lerp would give NaN from infinity
    else:
        torch._foreach_lerp_(averages, values, omega)


def _choose_(mask: Tensor, values: Tensor, averages: Tensor) -> None:
    """Where the mask is False, set the values to the averages, which then move towards themselves."""
    torch.where(mask, values[: len(averages)], averages[: len(values)], out=values[: len(averages)])


def _upper_half_(bits: Tensor) -> Tensor:
    """Round float32 bits to the nearest bfloat16 bits, in place. What is left is the signed lower half."""
    # Rounding a NaN whose bits are all set, as GPUs make them, would overflow into a zero.
    return bits.clamp_(max=0x7FFF7FFF).add_(2**15).bitwise_right_shift_(16)


def __dir__() -> list[str]:
    return __all__
