"""What a `kernel` argument may be, and the kernel that it stands for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from wmateacher import spec
from wmateacher.kernels import registry
from wmateacher.kernels.base import Kernel
from wmateacher.kernels.densities import FunctionDensity, ScipyDensity

__all__ = ["KernelLike", "build"]


def __dir__() -> list[str]:
    return __all__


KernelLike = str | Kernel | Callable[..., Any]
"""The type of every argument called `kernel`: a string, a `Kernel`, a frozen `scipy.stats` distribution, or a
callable density. `build` turns each of them into a `Kernel`."""


def build(kernel: KernelLike) -> Kernel:
    """Return the kernel that a string, an object or a callable stands for.

    Examples:
        >>> from wmateacher.kernels import Beta
        >>> build("beta(0.5,0.5)").profile(4).round(3)
        array([0.256, 0.167, 0.153, 0.167, 0.256])
        >>> build(Beta(0.5, 0.5)).profile(4).round(3)
        array([0.256, 0.167, 0.153, 0.167, 0.256])
        >>> print(build(lambda tau: 1 - tau).summary(100).start_weight)
        0.019...

    Args:
        kernel: A string such as `"beta(0.5,0.5)"` or `"scipy.stats.truncnorm(-2,2,loc=0.5,scale=0.2)"`, a
            `Kernel` such as `Beta(0.5, 0.5)`, a frozen `scipy.stats` distribution with support in [0, 1], or
            a callable density of the fraction `tau` in (0, 1) of the run.

    Raises:
        ValueError: If the string does not parse or names no kernel, or a parameter is out of range.
        TypeError: If the arguments do not fit the named kernel, or `kernel` is none of the above.
    """
    if isinstance(kernel, Kernel):
        return kernel
    if isinstance(kernel, str):
        call = spec.parse_call(kernel)
        if call.name.startswith("scipy.stats."):
            return ScipyDensity.from_call(call)
        return call.build(registry.named(call.name))
    if hasattr(kernel, "pdf") and hasattr(kernel, "dist") and hasattr(kernel, "support"):
        return ScipyDensity(kernel)
    if callable(kernel) and not isinstance(kernel, type):
        return FunctionDensity(kernel)
    raise TypeError(
        "kernel must be a string such as 'beta(0.5,0.5)', a Kernel, a frozen scipy.stats distribution "
        f"or a callable density, got {kernel!r}"
    )
