"""Kernels: how much each step of the student's trajectory counts in the teacher.

A kernel can be written as a string or as an object. Both forms are equal, and a kernel prints as its string:

    >>> build("beta(0.5,0.5)") == Beta(0.5, 0.5)
    True
    >>> build("ema(0.996,1.0,schedule=cosine)") == Ema(0.996, 1.0, schedule="cosine")
    True
    >>> print(Power(sigma_rel=0.1), Tail(0.25), Uniform())
    power(sigma_rel=0.1) tail(0.25) uniform

A kernel is defined by its retention `r_j`: at step `j` the average keeps the share `r_j` of its value and
takes `1 - r_j` of the new student. Density kernels derive it from a density `kappa` over the run,

    tau_j = (j + 1/2) / (T + 1),   S_j = sum_{i <= j} kappa(tau_i),   r_j = S_{j-1} / S_j

(TRACER, Definition 3.3 and eq. 15: `omega_j = 1 - r_j = kappa(tau_j) / S_j`, where the sum includes the
pretrained `W^0`). All numbers are float64 on the host.
"""

from wmateacher.kernels.base import Kernel
from wmateacher.kernels.densities import Arcsine, Beta, Density, FunctionDensity, ScipyDensity, Tail
from wmateacher.kernels.exponential import Ema
from wmateacher.kernels.grammar import KernelLike, build
from wmateacher.kernels.measured import Gap
from wmateacher.kernels.powers import Power, Static, Uniform
from wmateacher.kernels.registry import available, register
from wmateacher.kernels.weights import Array, Summary, realised_weights

__all__ = [
    "Arcsine",
    "Array",
    "Beta",
    "Density",
    "Ema",
    "FunctionDensity",
    "Gap",
    "Kernel",
    "KernelLike",
    "Power",
    "ScipyDensity",
    "Static",
    "Summary",
    "Tail",
    "Uniform",
    "available",
    "build",
    "realised_weights",
    "register",
]


def __dir__() -> list[str]:
    return __all__
