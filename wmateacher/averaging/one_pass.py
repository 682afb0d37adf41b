"""The Triton kernel of `fused`: it moves many averages in one pass over the memory.

This module imports Triton. Nothing else may, so that the library can be used without it.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["move"]


@triton.constexpr_function
def _in_memory(dtype):  # type: ignore[no-untyped-def]
    """Return the dtype to load and store. Triton's interpreter does not round to bfloat16 as GPUs do."""
    return tl.int16 if dtype == tl.bfloat16 else dtype


@triton.constexpr_function
def _precision(dtype):  # type: ignore[no-untyped-def]
    """Return the dtype to compute with for averages of a dtype."""
    return tl.float64 if dtype == tl.float64 else tl.float32


@triton.jit
def _read(pointer, inside, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the values at a pointer. A bfloat16 is the upper half of a float32."""
    if dtype == tl.bfloat16:
        values = (tl.load(pointer, mask=inside).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        values = tl.load(pointer, mask=inside)
    return values


@triton.jit
def _write(pointer, values, inside, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """Round values to a dtype and write them; to bfloat16 by way of float32, to nearest even."""
    if dtype == tl.bfloat16:
        single = values.to(tl.float32)
        bits = single.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        tl.store(pointer, tl.where(single == single, rounded, 0x7FC0).to(tl.int16), mask=inside)
    else:
        tl.store(pointer, values.to(dtype), mask=inside)


@triton.jit(do_not_specialize=["chunks", "omega_bits"])
def move(  # type: ignore[no-untyped-def]
    table,  # int64 [4, chunks]: addresses of the average, the value, the module's tensor; elements
    chunks,
    omega_bits,  # the bits of a float64: other numbers on the host arrive as float32
    omega,  # or a pointer to it
    mask,  # a pointer to a bool; if False, nothing moves
    HELD: tl.constexpr,
    VALUE: tl.constexpr,
    OWN: tl.constexpr,
    SPLIT: tl.constexpr,
    BESIDE: tl.constexpr,
    MASKED: tl.constexpr,
    OMEGA_ON_DEVICE: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Move one chunk of one average per program: `average <- average + omega (value - average)`.

    In a launch of full chunks all addresses are multiples of 16 bytes, so that 16 bytes move at a time.
    """
    chunk = tl.program_id(0)
    held = tl.load(table + chunk).to(tl.pointer_type(_in_memory(HELD)))
    value = tl.load(table + chunks + chunk).to(tl.pointer_type(_in_memory(VALUE)))
    own = tl.load(table + 2 * chunks + chunk).to(tl.pointer_type(_in_memory(OWN)))
    offsets = tl.arange(0, BLOCK)
    if FULL:
        inside = None
        held, value, own = tl.multiple_of(held, 16), tl.multiple_of(value, 16), tl.multiple_of(own, 16)
    else:
        inside = offsets < tl.load(table + 3 * chunks + chunk)
    held, value, own = held + offsets, value + offsets, own + offsets

    precision: tl.constexpr = _precision(HELD)
    if SPLIT:  # float32's bits are the upper half times 2^16 plus the lower half as a signed number
        upper = tl.load(own, mask=inside).to(tl.int32)
        lower = tl.load(held, mask=inside).to(tl.int32)
        before = ((upper << 16) + lower).to(tl.float32, bitcast=True)
    else:
        before = _read(held, inside, HELD).to(precision)
    target = _read(value, inside, VALUE).to(precision)

    share = (tl.load(omega) if OMEGA_ON_DEVICE else omega_bits.to(tl.float64, bitcast=True)).to(precision)
    way = target - before
    after = tl.where(share < 0.5, before + share * way, target - way * (1 - share))  # torch.lerp
    after = tl.where(share == 1, target, after)  # exactly, also if the average is infinite
    if MASKED:
        after = tl.where(tl.load(mask) != 0, after, before)

    if SPLIT:
        bits = after.to(tl.int32, bitcast=True)
        tl.store(held, bits.to(tl.int16), mask=inside)
        # Rounding a NaN whose bits are all set would overflow into a zero.
        tl.store(own, ((tl.minimum(bits, 0x7FFF7FFF) + 2**15) >> 16).to(tl.int16), mask=inside)
    else:
        _write(held, after, inside, HELD)
        if BESIDE:
            # The module's tensor is the stored average, rounded.
            _write(own, after.to(HELD), inside, OWN)


def __dir__() -> list[str]:
    return __all__
