"""The weights of the states of a run, and a few numbers that describe them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Array", "Summary", "realised_weights", "summarise"]


def __dir__() -> list[str]:
    return __all__


Array = NDArray[np.float64]


def realised_weights(omegas: Array) -> Array:
    """Return the weight of every state after the updates `M <- (1 - omega_k) M + omega_k W^k`.

    Args:
        omegas: The weight applied at each state, a float64 array of shape `[n]`; the first is 1.

    Returns:
        A float64 array of shape `[n]`: `w_k = omega_k * prod_{i > k} (1 - omega_i)`.
    """
    kept = np.append(1.0 - omegas[1:], 1.0)
    return omegas * np.cumprod(kept[::-1])[::-1]


@dataclass(frozen=True)
class Summary:
    """The numbers that describe a kernel over a horizon; `str` returns a small table.

    Attributes:
        kernel: The kernel's string.
        total_steps: The horizon T.
        start_weight: The weight of the pretrained state `W^0` in the final average.
        mean_age: The mean age of the averaged states at the end, in optimizer steps.
        effective_states: `1 / sum_k w_k^2`, the number of equally weighted states with the same variance.
        last_tenth: The weight of the states younger than `T / 10` steps.
        equal_ema_retention: The retention of the EMA with the same mean age over the same horizon.
    """

    kernel: str
    total_steps: int
    start_weight: float
    mean_age: float
    effective_states: float
    last_tenth: float
    equal_ema_retention: float

    def __str__(self) -> str:
        return "\n".join(
            [
                f"{self.kernel} over {self.total_steps} steps",
                f"  weight of W^0          {self.start_weight:.5f}",
                f"  mean age               {self.mean_age:.1f} steps",
                f"  effective states       {self.effective_states:.1f}",
                f"  mass of the last 10%   {self.last_tenth:.4f}",
                f"  EMA of equal mean age  {self.equal_ema_retention:.6f}",
            ]
        )


def summarise(kernel: str, weights: Array) -> Summary:
    """Return the numbers for a kernel's string and the weights of the `T + 1` states of its run."""
    total_steps = len(weights) - 1
    ages = np.arange(total_steps, -1, -1)
    mean_age = float(weights @ ages)
    return Summary(
        kernel=kernel,
        total_steps=total_steps,
        start_weight=float(weights[0]),
        mean_age=mean_age,
        effective_states=float(1.0 / np.sum(weights**2)),
        last_tenth=float(weights[ages < 0.1 * total_steps].sum()),
        equal_ema_retention=_ema_retention_of_mean_age(mean_age, total_steps),
    )


def _ema_retention_of_mean_age(mean_age: float, total_steps: int) -> float:
    """Return the constant retention rho of a given mean age over the horizon, `sum_{k=1}^T rho^k`."""

    def excess(rho: float) -> float:
        if rho == 1.0:
            return total_steps - mean_age
        return rho * -math.expm1(total_steps * math.log(rho)) / (1 - rho) - mean_age

    if mean_age <= 0:
        return 0.0
    if mean_age >= total_steps:
        return 1.0
    from scipy.optimize import brentq

    return float(brentq(excess, 1e-300, 1.0, xtol=1e-15))
