"""The steps of an update on a CUDA device: one launch of a kernel moves all averages of a kind.

The kernel (`one_pass`, in Triton) reads every average and value once and writes once, with no scratch
between casting, moving and rounding, and finds the tensors in a table of addresses. Before a process first
uses it for a kind of average, it compares the kernel with torch's own operations (`steps`) on this device. If
they differ, or if there is no Triton, `steps` moves the averages.

With `TRITON_INTERPRET=1` in the environment, Triton interprets the kernel, slowly, for tensors on a CPU too.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wmateacher.averaging import steps
from wmateacher.averaging.average import Average
from wmateacher.averaging.steps import Row

__all__ = ["BLOCK", "WARPS", "FusedStep", "Kind", "constants", "differs", "take"]

# Elements of a chunk, which one program of the kernel moves: 16 for each of its threads.
BLOCK = 4096
WARPS = 8

_NAMES = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.int16: "int16",
}


@dataclass(frozen=True)
class Kind:
    """What averages must have in common for one launch of the kernel.

    Attributes:
        held: The dtype of the tensor that holds the average; int16 if it is split.
        value: The dtype of the value.
        own: The dtype of the averaged module's tensor.
        beside: Whether the average is held beside the module's tensor.
    """

    held: torch.dtype
    value: torch.dtype
    own: torch.dtype
    beside: bool

    @property
    def split(self) -> bool:
        """Whether the average is split between both tensors."""
        return self.held == torch.int16

    @classmethod
    def of(cls, average: Average, value: Tensor) -> Kind:
        """Return the kind of an average."""
        return cls(average.held.dtype, value.dtype, average.own.dtype, average.beside is not None)


def take(
    group: Sequence[tuple[Average, Tensor]], masked: bool
) -> tuple[list[FusedStep], list[tuple[Average, Tensor]]]:
    """Return steps for those averages that the kernel can move, and the other averages.

    Args:
        group: Averages that differ only in shape, and the values to move them towards.
        masked: Whether calls have a mask, or an omega on a device.
    """
    kind, device = Kind.of(*group[0]), group[0][0].held.device
    floats = {kind.value, kind.own, *({kind.held} - {torch.int16})}
    if not _is_available(device) or not floats <= _NAMES.keys() - {torch.int16}:
        return [], list(group)
    fitting: list[tuple[Average, Tensor]] = []
    rest: list[tuple[Average, Tensor]] = []
    for pair in group:
        (fitting if _fits(*pair) else rest).append(pair)
    if not fitting:
        return [], rest
    if (reason := differs(kind, device, masked)) is not None:
        warnings.warn(
            f"the fused update does not work on {device} and is not used ({reason}): torch's own operations "
            "compute the same averages, but more slowly. Pass fused=False to silence this warning",
            stacklevel=2,
        )
        return [], list(group)
    return [FusedStep(steps.rows_of(fitting), kind)], rest


class FusedStep:
    """A step for any number of averages of one kind, which have the memory layouts of their values."""

    def __init__(self, rows: Sequence[Row], kind: Kind):
        """Put the addresses of the rows into tables on their device.

        Args:
            rows: The tensors, which are kept alive.
            kind: Their kind.
        """
        from wmateacher.averaging.one_pass import move

        self._kernel = move
        self.held, self.values = [row[0] for row in rows], [row[1] for row in rows]
        self.own = [row[-1] if kind.beside else row[0] for row in rows]
        self.dtype = torch.float32 if kind.split else kind.held
        self._kind, self._device = kind, self.held[0].device
        chunks = torch.cat([_chunks(*row) for row in zip(self.held, self.values, self.own, strict=True)])
        full, aligned = chunks[:, 3] == BLOCK, (chunks[:, :3] % 16 == 0).all(1)
        # Whether the chunks are full, and whether 16 divides their addresses.
        sets = {(True, True): full & aligned, (True, False): full & ~aligned, (False, False): ~full}
        self._tables = [
            (*which, _sent(chunks[rows].T.contiguous(), self._device))
            for which, rows in sets.items()
            if rows.any()
        ]
        self._stream = None if self._device.type == "cpu" else torch.accelerator.current_stream(self._device)

    def fetch(self) -> None:
        """Do nothing: the values are on the averages' device."""

    def move(self, omega: float | Tensor, mask: Tensor | None) -> None:
        """Move the averages and round them into the module."""
        on_device = isinstance(omega, Tensor)
        # Triton would pass the bits of a smaller omega as a 32-bit integer. It would move no average anyway.
        bits = 0 if on_device else struct.unpack("<q", struct.pack("<d", max(omega, 1e-300)))[0]
        with _current(self._device):
            self._follow_stream()
            for is_full, is_aligned, table in self._tables:
                self._kernel[(table.shape[1],)](
                    table,
                    table.shape[1],
                    bits,
                    omega if on_device else table,
                    table if mask is None else mask,
                    **constants(
                        self._kind,
                        full=is_full,
                        aligned=is_aligned,
                        masked=mask is not None,
                        omega_on_device=on_device,
                    ),
                    num_warps=WARPS,
                )
        # A graph may have saved the module's tensors, and autograd must notice that they have changed.
        torch.autograd.graph.increment_version(self.own)

    def _follow_stream(self) -> None:
        """Make the current stream wait for the one that used the tables last, if it is another one."""
        if self._stream is None or torch.cuda.is_current_stream_capturing():
            return  # whoever captures a graph has waited for all streams before
        stream = torch.accelerator.current_stream(self._device)
        if stream != self._stream:
            stream.wait_stream(self._stream)
            for *_, table in self._tables:
                table.record_stream(stream)
            self._stream = stream


def _chunks(held: Tensor, value: Tensor, own: Tensor) -> Tensor:
    """Return the chunks of a row, int64 `[chunks, 4]`: three addresses and the number of elements."""
    starts = torch.arange(0, held.numel(), BLOCK, device="cpu")
    addresses = [t.data_ptr() + starts * t.itemsize for t in (held, value, own)]
    return torch.stack([*addresses, (held.numel() - starts).clamp(max=BLOCK)], 1)


def _sent(table: Tensor, device: torch.device) -> Tensor:
    return table if device.type == "cpu" else table.pin_memory().to(device, non_blocking=True)


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which Triton launches on a device."""
    return nullcontext() if device.type == "cpu" else torch.cuda.device(device)


def _fits(average: Average, value: Tensor) -> bool:
    """Return whether the kernel may go through a row's tensors element by element as they lie in memory."""
    tensors = (average.held, value, average.own.detach())
    return (
        value.numel() > 0
        and all(type(t) is Tensor and t.device == average.held.device for t in tensors)
        and not (value.is_neg() or any(t.is_inference() for t in tensors))
        and len({t.stride() for t in tensors}) == 1
        # Only what is dense and does not overlap keeps its strides.
        and torch.empty_like(value, device="meta").stride() == value.stride()
    )


def _is_available(device: torch.device) -> bool:
    """Return whether the kernel can run on a device: compiled on a GPU, interpreted on a CPU."""
    if device.type not in ("cpu", "cuda") or importlib.util.find_spec("triton") is None:
        return False
    # The interpreter would read a GPU's addresses on the host.
    return _interprets() == (device.type == "cpu") and not (
        # The first comparison waits for the device, which a graph in capture must not.
        device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    )


def _interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


@functools.cache
def constants(
    kind: Kind, *, full: bool, aligned: bool, masked: bool, omega_on_device: bool = False
) -> dict[str, Any]:
    """Return what the kernel is compiled for, by the names of its parameters.

    Args:
        kind: The kind of the averages.
        full: Whether all chunks have `BLOCK` elements.
        aligned: Whether 16 divides all addresses.
        masked: Whether a mask is given.
        omega_on_device: Whether omega is a tensor.
    """
    import triton.language as tl

    held, value, own = (getattr(tl, _NAMES[dtype]) for dtype in (kind.held, kind.value, kind.own))
    return {
        "held_type": held, "value_type": value, "own_type": own, "is_split": kind.split,
        "is_beside": kind.beside, "is_masked": masked, "omega_on_device": omega_on_device, "is_full": full,
        "is_aligned": aligned, "block": BLOCK,
    }  # fmt: skip


# --- the trial ------------------------------------------------------------------------------------------


@functools.cache
def differs(kind: Kind, device: torch.device, masked: bool) -> str | None:
    """Return why the kernel cannot be used for a kind of average, or None if it can.

    It is tried on full chunks, one of them at an odd address, and on the rest of one.
    """
    try:
        with _may_wait(device):
            for omega, moves in ((0.3, True), (0.7, True), (1.0, True), (0.3, False))[: 4 if masked else 3]:
                for on_device in (False, True) if masked else (False,):
                    _compare(kind, device, omega, moves if masked else None, on_device)
    except Exception as error:  # compilers and drivers raise errors of their own
        return " ".join([f"{type(error).__name__}:", *str(error).strip().splitlines()[:1]])
    return None


def _compare(kind: Kind, device: torch.device, omega: float, moves: bool | None, on_device: bool) -> None:
    ours, plain = _sample(kind, device), _sample(kind, device)
    share: float | Tensor = omega
    mask = None if moves is None else torch.tensor(moves, device=device)
    step = FusedStep(steps.rows_of(ours), kind)
    if on_device:
        share = torch.tensor(omega, dtype=step.dtype, device=device)
    step.move(share, mask)
    for other in steps.prepare(plain, moves is not None):
        other.fetch()
        other.move(share, mask)
    # The kernel and torch's operations round in different orders. The values lie in [-1, 1].
    close = 2 * torch.finfo(step.dtype).eps
    for (found, _), (expected, _) in zip(ours, plain, strict=True):
        torch.testing.assert_close(found.read(), expected.read(), rtol=close, atol=close)
        if found.beside is not None:
            near = max(close, torch.finfo(kind.own).eps)
            torch.testing.assert_close(found.own, expected.read().to(kind.own), rtol=near, atol=close)


def _sample(kind: Kind, device: torch.device) -> list[tuple[Average, Tensor]]:
    # Numbers that need no random generator, whose state belongs to the user's run.
    first, size = BLOCK + 37, 2 * BLOCK + 40
    numbers = torch.sin(torch.arange(2 * size, device=device, dtype=torch.float64) ** 2)
    starts, values = numbers.chunk(2)
    wide = torch.float32 if kind.split else kind.held
    own = starts.to(kind.own)
    value = values.to(kind.value)
    pairs = []
    for part in (slice(0, first), slice(first, None)):
        average = Average.of(starts[part].to(wide), own[part], split=kind.split, apart=kind.beside)
        pairs.append((average, value[part]))
    return pairs


@contextmanager
def _may_wait(device: torch.device) -> Iterator[None]:
    """Allow the host to wait for a device, once per process, where the user has forbidden it in a step."""
    mode = 0 if device.type == "cpu" else torch.cuda.get_sync_debug_mode()
    if mode == 0:  # setting it warns
        yield
        return
    torch.cuda.set_sync_debug_mode(0)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def __dir__() -> list[str]:
    return __all__
