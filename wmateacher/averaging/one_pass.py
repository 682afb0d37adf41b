"""The Triton kernel of `fused`: it moves many averages in one pass over the memory.

This module imports Triton. Nothing else may, so that the library can be used without it.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["move"]


@triton.jit
def _read(pointer, inside, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the values at a pointer. A bfloat16 is the upper half of a float32."""
    if dtype == tl.bfloat16:
        values = (tl.load(pointer, mask=inside).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        values = tl.load(pointer, mask=inside)
    return values


@triton.jit
def _round(values, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """Round values to a dtype; to bfloat16 by way of float32, to nearest even, and kept as float32."""
    if dtype == tl.bfloat16:
        single = values.to(tl.float32)
        bits = single.to(tl.int32, bitcast=True)
        bits = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16
        rounded = tl.where(single == single, bits, 0x7FC00000).to(tl.float32, bitcast=True)
    else:
        rounded = values.to(dtype)
    return rounded


@triton.jit
def _write(pointer, values, inside, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """Round values to a dtype and write them."""
    rounded = _round(values, dtype)
    if dtype == tl.bfloat16:
        tl.store(pointer, (rounded.to(tl.int32, bitcast=True) >> 16).to(tl.int16), mask=inside)
    else:
        tl.store(pointer, rounded, mask=inside)


@triton.jit(do_not_specialize=["table", "chunks", "omega_bits", "omega", "mask"])
def move(  # type: ignore[no-untyped-def]
    table,  # int64 [4, chunks]: addresses of the average, the value, the module's tensor; elements
    chunks,
    omega_bits,  # the bits of a float64: other numbers on the host arrive as float32
    omega,  # or a pointer to it
    mask,  # a pointer to a bool; if False, nothing moves
    held_type: tl.constexpr,
    value_type: tl.constexpr,
    own_type: tl.constexpr,
    is_split: tl.constexpr,
    is_beside: tl.constexpr,
    is_masked: tl.constexpr,
    omega_on_device: tl.constexpr,
    is_full: tl.constexpr,  # whether all chunks are of `block` elements
    is_aligned: tl.constexpr,  # whether 16 divides all addresses, so that 16 bytes move at a time
    block: tl.constexpr,
):
    """Move one chunk of one average per program: `average <- average + omega (value - average)`."""
    chunk = tl.program_id(0)
    # Triton's interpreter does not round to bfloat16 as GPUs do, so these are read and written as integers.
    held_memory: tl.constexpr = tl.int16 if held_type == tl.bfloat16 else held_type
    value_memory: tl.constexpr = tl.int16 if value_type == tl.bfloat16 else value_type
    own_memory: tl.constexpr = tl.int16 if own_type == tl.bfloat16 else own_type
    held = tl.load(table + chunk).to(tl.pointer_type(held_memory))
    value = tl.load(table + chunks + chunk).to(tl.pointer_type(value_memory))
    own = tl.load(table + 2 * chunks + chunk).to(tl.pointer_type(own_memory))
    if is_aligned:
        held, value, own = tl.multiple_of(held, 16), tl.multiple_of(value, 16), tl.multiple_of(own, 16)
    offsets = tl.arange(0, block)
    inside = None if is_full else offsets < tl.load(table + 3 * chunks + chunk)
    held, value, own = held + offsets, value + offsets, own + offsets

    precision: tl.constexpr = tl.float64 if held_type == tl.float64 else tl.float32
    if is_split:  # float32's bits are the upper half times 2^16 plus the lower half as a signed number
        upper = tl.load(own, mask=inside).to(tl.int32)
        lower = tl.load(held, mask=inside).to(tl.int32)
        before = ((upper << 16) + lower).to(tl.float32, bitcast=True)
    else:
        before = _read(held, inside, held_type).to(precision)
    target = _read(value, inside, value_type)
    if not is_split:
        target = _round(target, held_type)  # as when it is cast before it is averaged
    target = target.to(precision)

    share = (tl.load(omega) if omega_on_device else omega_bits.to(tl.float64, bitcast=True)).to(precision)
    way = target - before
    after = tl.where(share < 0.5, before + share * way, target - way * (1 - share))  # torch.lerp
    after = tl.where(share == 1, target, after)  # exactly, also if the average is infinite
    if is_masked:
        after = tl.where(tl.load(mask) != 0, after, before)

    if is_split:
        # Rounding a NaN whose upper bits are all set would overflow into a zero.
        bits = tl.where(after == after, after.to(tl.int32, bitcast=True), 0x7FC00000)
        tl.store(held, bits.to(tl.int16), mask=inside)
        tl.store(own, ((bits + 2**15) >> 16).to(tl.int16), mask=inside)
    else:
        after = _round(after, held_type)
        _write(held, after, inside, held_type)
        if is_beside:
            _write(own, after, inside, own_type)


def __dir__() -> list[str]:
    return __all__
