"""The exponential moving average, with a constant or a scheduled decay."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from wmateacher import checks
from wmateacher.kernels.base import Kernel
from wmateacher.kernels.registry import register
from wmateacher.kernels.weights import Array

__all__ = ["Ema"]


def __dir__() -> list[str]:
    return __all__


@register("ema")
@dataclass(frozen=True)
class Ema(Kernel):
    """The exponential moving average, written `ema(0.999)`, with a constant or scheduled decay.

    `ema(0.996,1.0,schedule=cosine)` is DINO's kernel (Caron et al. 2021), and
    `ema(0.05,0.9,schedule=linear,warmup=0.2)` is CaRot's. As in DINO, step `j` takes the value of the
    schedule at the fraction `(j - 1) / T` of the run. The schedule reaches `final_decay` after the fraction
    `warmup` and stays there.

    With `start_step=s`, the average is the one of a run that begins at step `s`: `W^s` takes the place of
    `W^0`, and a schedule takes the `T - s` steps that are left.

    Examples:
        >>> print(Ema(0.999), Ema(0.996, 1.0, schedule="cosine"), Ema(half_life=500, start_step=1000))
        ema(0.999) ema(0.996,1.0,schedule=cosine) ema(half_life=500,start_step=1000)

    Args:
        decay: The retention in [0, 1], called decay by PyTorch and timm. 0.999 keeps 99.9% of the average at
            each step.
        final_decay: The retention at the end of the schedule; None for a constant one.
        schedule: `linear` or `cosine`, required with `final_decay`.
        warmup: The fraction of the run, in (0, 1], that the schedule takes from `decay` to `final_decay`.
        half_life: The number of optimizer steps after which a state counts half, above 0. It stands in place
            of `decay`, which is then `2^(-1 / half_life)`.
        start_step: The first step whose state is averaged. Until then the teacher is the latest student.
    """

    stepwise: ClassVar[bool] = True

    decay: float | None = None
    final_decay: float | None = None
    schedule: Literal["linear", "cosine"] | None = None
    warmup: float = 1.0
    half_life: float | None = field(default=None, kw_only=True)
    start_step: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        def share(x: float) -> bool:
            return 0 <= x <= 1

        if (self.decay is None) == (self.half_life is None):
            raise ValueError(
                f"ema: give either decay or half_life, got decay={self.decay} and "
                f"half_life={self.half_life}; write ema(0.999), or ema(half_life=500) for 2^(-1/500)"
            )
        rule = "a retention in [0, 1] (0.999 keeps 99.9% of the average at every step)"
        if self.half_life is None:
            self._set(decay=checks.number("ema", "decay", self.decay, share, rule))
        else:
            steps = "a finite number of optimizer steps above 0"
            life = checks.number("ema", "half_life", self.half_life, lambda x: x > 0, steps)
            # 500 prints as it was written.
            self._set(half_life=int(life) if life.is_integer() else life)
        self._set(start_step=checks.whole("ema: start_step", self.start_step, 0, integral=True))
        if self.final_decay is None:
            if self.schedule is not None or self.warmup != 1.0:
                raise ValueError(
                    f"ema: a schedule needs the retention at its end, got final_decay=None; write "
                    f"ema({self._first_decay},1.0,schedule={self.schedule or 'cosine'})"
                )
            return
        self._set(final_decay=checks.number("ema", "final_decay", self.final_decay, share, rule))
        if self.schedule not in ("linear", "cosine"):
            raise ValueError(
                f"ema: schedule must be linear or cosine if final_decay is given, got {self.schedule!r}; "
                f"write ema({self._first_decay},{self.final_decay},schedule=cosine)"
            )
        rule = "a fraction of the run in (0, 1]"
        warmup = checks.number("ema", "warmup", self.warmup, lambda x: 0 < x <= 1, rule)
        self._set(warmup=warmup)

    @property
    def _first_decay(self) -> float:
        """The decay, or the one that has the half-life."""
        return self.decay if self.half_life is None else 2.0 ** (-1.0 / self.half_life)  # type: ignore[return-value]

    @property
    def needs_horizon(self) -> bool:  # noqa: D102
        return self.final_decay is not None

    def retention(self, steps: NDArray[np.int64], total_steps: int | None) -> Array:  # noqa: D102
        since, first = self._since(self.start_step, steps, total_steps), self._first_decay
        kept = np.full(steps.shape, first)
        if self.final_decay is not None:
            length = max(self._require(total_steps) - self.start_step, 1)
            progress = np.clip((since - 1) / (length * self.warmup), 0.0, 1.0)
            if self.schedule == "cosine":
                progress = (1 - np.cos(np.pi * progress)) / 2
            kept = first + (self.final_decay - first) * progress
        return np.where(since > 0, kept, 0.0)
