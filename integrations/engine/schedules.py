"""Schedules: values that change over a run, as functions of the step."""

from __future__ import annotations

import math

__all__ = ["cosine", "linear_then_flat", "sigmoid_rampup", "warmup_cosine"]


def cosine(step: int, steps: int, start: float, end: float) -> float:
    """Go from `start` at step 0 to `end` at step `steps`, along half a cosine."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(step / max(1, steps), 1.0)))


def warmup_cosine(step: int, steps: int, warmup: int, peak: float, end: float = 0.0) -> float:
    """Return `peak (step + 1) / warmup` for `warmup` steps, then a cosine from `peak` to `end` at `steps`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return cosine(step - warmup, steps - warmup, peak, end)


def linear_then_flat(step: int, ramp: int, start: float, end: float) -> float:
    """Go from `start` at step 0 to `end` at step `ramp` along a line, and stay there."""
    return end if step >= ramp else start + (end - start) * step / ramp


def sigmoid_rampup(step: int, ramp: int) -> float:
    """Return `exp(-5 (1 - step / ramp)^2)` until step `ramp`, then 1 (Laine & Aila 2017, section 2.1)."""
    return 1.0 if step >= ramp else math.exp(-5 * (1 - step / ramp) ** 2)
