"""Propose a kernel from what is known before a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from wmateacher import checks, kernels
from wmateacher.kernels import Kernel

__all__ = ["Suggestion", "suggest"]


def __dir__() -> list[str]:
    return __all__


_STARTS = ("pretrained", "random")
_WINDOW = 0.05
"""The window of the EMA for random starts, relative to the run."""
_LOWEST, _HIGHEST = 0.02, 50.0
"""The shape parameters of `beta` that are looked at."""
_LONGEST = 10**6
"""The longest run for which a wish is fitted, which takes some ten profiles of the run."""


@dataclass(frozen=True)
class Suggestion:
    """A kernel and the reasons for it.

    Attributes:
        kernel: The kernel.
        reasons: A sentence for each reason.
    """

    kernel: Kernel
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join([str(self.kernel), *(f"- {reason}" for reason in self.reasons)])


def suggest(
    total_steps: int | None = None,
    *,
    start: str = "pretrained",
    start_weight: float | None = None,
    mean_age: float | None = None,
    batch_norm: bool | None = None,
) -> Suggestion:
    """Propose a kernel for a run, and say why.

    Examples:
        >>> print(suggest(10_000, start_weight=0.01).kernel)
        beta(0.386,0.386)
        >>> print(suggest(mean_age=0.5).kernel)
        power(exponent=0.0)

    Args:
        total_steps: The number of optimizer steps of the run. Default: the end of the run is open.
        start: The kind of weights that the run starts from: `pretrained`, which are worth remembering, or
            `random`.
        start_weight: The wished weight of W^0 in the final average, in (0, 1).
        mean_age: The wished mean age of the averaged states, as a share of the run in (0, 1).
        batch_norm: Whether the student has batch normalisation. Default: nothing is said about it.

    Raises:
        ValueError: If no kernel fits the wishes, or they contradict the start.
    """
    checks.one_of("start", start, _STARTS)
    total = None if total_steps is None else checks.positive_int("total_steps", total_steps)
    rule = "a share in (0, 1)"
    weight, age = (
        None if value is None else checks.number("suggest", name, value, lambda v: 0 < v < 1, rule)
        for name, value in (("start_weight", start_weight), ("mean_age", mean_age))
    )
    if total is not None and (weight or age) and total > _LONGEST:
        raise ValueError(
            f"total_steps must be at most {_LONGEST} to fit a kernel to a wish, got {total}: leave it out "
            "for a kernel that needs no horizon"
        )
    if start == "random":
        kernel, reasons = _forgetting(total, weight, age)
    else:
        kernel, reasons = _remembering(total, weight, age)
    if batch_norm:
        reasons.append(
            "With batch normalisation, the student's running statistics do not fit an average that reaches "
            'far back: use mode="train" or recalibrate.'
        )
    return Suggestion(kernel, tuple(reasons))


def _forgetting(total: int | None, weight: float | None, age: float | None) -> tuple[Kernel, list[str]]:
    """Return a kernel for a random start."""
    if weight is not None:
        raise ValueError(
            f"start_weight is for pretrained starts, got {weight} with start='random': such a start holds "
            "nothing to remember; leave it out, or wish a mean_age"
        )
    why = "A random start holds nothing to remember, so the average must forget it."
    if age is not None:
        return _power(age, [why], total)
    if total is None:
        kernel: Kernel = kernels.Power(sigma_rel=0.1)
        return kernel, [
            why,
            "It needs no horizon: its window grows with the run, with a mean age of a ninth of it.",
        ]
    window = max(2.0, _WINDOW * total)
    return kernels.Ema(_rounded(1 - 1 / window, 1 / window)), [
        why, f"Its window of about {window:.0f} steps is {window / total:.0%} of the run."
    ]  # fmt: skip


def _remembering(total: int | None, weight: float | None, age: float | None) -> tuple[Kernel, list[str]]:
    """Return a kernel for a start that is worth remembering."""
    why = "The start is worth remembering, and early states decide how much of its bias is left."
    if total is None:
        if weight is not None:
            raise ValueError(
                f"start_weight needs total_steps, got {weight} alone: without an end, it falls to "
                "0; pass total_steps, or wish a mean_age"
            )
        if age is not None:
            return _power(age, [why])
        return kernels.Power(exponent=-0.5), [
            why, "It needs no horizon: its profile stretches with the run, as that of beta(0.5,1)."
        ]  # fmt: skip
    if weight is None and age is None:
        return kernels.Beta(0.5, 0.5), [
            why,
            "It is the default of the paper, and where no kernel was better above noise.",
        ]
    if weight is not None and age is not None:
        return _beta(total, weight, age), [
            why,
            "Of the Beta kernels, it has the wished weight of W^0 and mean age.",
        ]
    if age is not None:
        youngest, oldest = (_numbers(kernels.Beta(0.5, b), total)[1] for b in (_LOWEST, _HIGHEST))
        if not youngest < age < oldest:
            return _power(age, [why], total)
        shape = _solve(age, lambda b: _numbers(kernels.Beta(0.5, b), total)[1])
        return kernels.Beta(0.5, shape), [
            why, "The exponent 0.5 of the early states is the paper's; the other has the wished mean age."
        ]  # fmt: skip
    assert weight is not None
    lowest, highest = (_numbers(kernels.Beta(a, a), total)[0] for a in (_HIGHEST, _LOWEST))
    if lowest < weight < highest:
        shape = _solve(weight, lambda a: _numbers(kernels.Beta(a, a), total)[0])
        return kernels.Beta(shape, shape), [
            why, "Of the symmetric Beta kernels, the paper's family, it has the wished weight of W^0."
        ]  # fmt: skip
    exponent = -math.log(weight) / math.log(total + 1) - 1.0
    return kernels.Power(exponent=_rounded(exponent, exponent + 1.0)), [
        why,
        f"No symmetric Beta kernel gives W^0 this weight ({highest:.3g} is the most); a power function does.",
    ]


def _power(age: float, reasons: list[str], total: int | None = None) -> tuple[Kernel, list[str]]:
    """Return the power function whose mean age is this share of the run."""
    a = 1.0 / age - 1.0  # in a long run
    if total is not None:
        # In a run of a few steps, a small mean age takes a far smaller exponent than in a long one.
        low, high = min(0.1, 0.1 * a), 10.0 * a
        a = _solve(age, lambda a: _numbers(kernels.Power(exponent=a - 1.0), total)[1], low, high)
    return kernels.Power(exponent=_rounded(a - 1.0, a)), [
        *reasons, "It needs no horizon: its mean age stays this share of the run, whatever its length."
    ]  # fmt: skip


def _beta(total: int, weight: float, age: float) -> Kernel:
    """Return the Beta kernel with this weight of W^0 and this mean age."""
    from scipy.optimize import root

    def missed(shapes: Any) -> list[float]:
        a, b = np.exp(np.clip(shapes, math.log(_LOWEST), math.log(_HIGHEST)))
        found, mean = _numbers(kernels.Beta(float(a), float(b)), total)
        return [math.log(max(found, 1e-300) / weight), math.log(max(mean, 1e-300) / age)]

    found = root(missed, np.log([0.5, 0.5]), tol=1e-6)
    a, b = np.exp(found.x)
    if not found.success or max(map(abs, missed(found.x))) > 1e-3:
        raise ValueError(
            f"no Beta kernel with shapes in [{_LOWEST:g}, {_HIGHEST:g}] has start_weight={weight:g} and "
            f"mean_age={age:g} over {total} steps: wish one of the two"
        )
    return kernels.Beta(_rounded(a, a), _rounded(b, b))


def _solve(
    wished: float, measured: Callable[[float], float], low: float = _LOWEST, high: float = _HIGHEST
) -> float:
    """Return the shape parameter at which a monotone number of the kernel is the wished one."""
    from scipy.optimize import brentq

    ends = math.log(low), math.log(high)
    shape = math.exp(brentq(lambda log_shape: measured(math.exp(log_shape)) - wished, *ends, xtol=1e-6))
    return _rounded(shape, shape)


def _numbers(kernel: Kernel, total: int) -> tuple[float, float]:
    """Return the weight of W^0 and the mean age as a share of the run."""
    summary = kernel.summary(total)
    return summary.start_weight, summary.mean_age / total


def _rounded(value: float, scale: float) -> float:
    """Return the value with three digits of what matters, `scale`."""
    return round(float(value), 2 - math.floor(math.log10(abs(scale))))
