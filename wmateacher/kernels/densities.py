"""Kernels that are a density over the run."""

from __future__ import annotations

import bisect
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from wmateacher import checks, spec
from wmateacher.kernels.base import Kernel
from wmateacher.kernels.registry import register
from wmateacher.kernels.weights import Array

# scipy.stats is imported where it is used: it takes longer to import than the rest of the library.

__all__ = ["Arcsine", "Beta", "Density", "FunctionDensity", "ScipyDensity", "Tail"]


def __dir__() -> list[str]:
    return __all__


class Density(Kernel):
    """A kernel given by a density over the run, which need not be normalised."""

    @abstractmethod
    def density(self, tau: Array) -> Array:
        """Return the density `kappa`, finite and not negative, at fractions `tau` in (0, 1) of the run."""

    def retention(self, steps: NDArray[np.int64], total_steps: int | None) -> Array:  # noqa: D102
        horizon = self._require(total_steps)
        tau = (np.arange(horizon + 1) + 0.5) / (horizon + 1)
        alpha = np.asarray(self.density(tau), dtype=np.float64)
        if alpha.shape != tau.shape:
            raise ValueError(
                f"kernel {str(self)!r} gave shape {alpha.shape} for {tau.shape} fractions: a density "
                "must return one value for each tau"
            )
        wrong = ~(np.isfinite(alpha) & (alpha >= 0))
        if wrong.any():
            first = int(np.argmax(wrong))
            raise ValueError(
                f"kernel {str(self)!r} gave {alpha[first]} at tau={tau[first]:.6g} (step {first} of "
                f"{horizon}): a density must be finite and not negative on (0, 1)"
            )
        mass = np.cumsum(alpha)
        if mass[-1] == 0:
            raise self._no_mass(horizon)
        earlier = np.append(0.0, mass[:-1])
        # Before the density has any mass the retention is 0, so that the teacher is the latest student.
        return np.divide(earlier, mass, out=np.zeros_like(mass), where=mass > 0)[steps]

    def _no_mass(self, horizon: int) -> ValueError:
        return ValueError(
            f"kernel {str(self)!r} has no mass on any of the {horizon + 1} states of a run of "
            f"total_steps={horizon}: widen it or lengthen the run"
        )


@register("beta")
@dataclass(frozen=True)
class Beta(Density):
    """The Beta(a, b) density, written `beta(a,b)`: TRACER's kernel (Definition 3.3).

    The paper's default is `a = b = 0.5`, which is U-shaped. `a < 1` emphasises the start of the run and
    `b < 1` its end; `a = b = 1` is the running mean.

    Examples:
        >>> print(Beta(0.5, 0.5))
        beta(0.5,0.5)

    Args:
        a: The first shape parameter, above 0.
        b: The second shape parameter, above 0.
    """

    a: float
    b: float

    def __post_init__(self) -> None:
        rule = "a finite number above 0"
        self._set(a=checks.number("beta", "a", self.a, lambda x: x > 0, rule))
        self._set(b=checks.number("beta", "b", self.b, lambda x: x > 0, rule))

    def density(self, tau: Array) -> Array:  # noqa: D102
        import scipy.stats

        return scipy.stats.beta.pdf(tau, self.a, self.b)


@register("arcsine")
@dataclass(frozen=True)
class Arcsine(Density):
    """The arcsine density `1 / (pi sqrt(tau (1 - tau)))`, written `arcsine`. It equals `beta(0.5,0.5)`."""

    def density(self, tau: Array) -> Array:  # noqa: D102
        import scipy.stats

        return scipy.stats.arcsine.pdf(tau)


@register("tail")
@dataclass(frozen=True)
class Tail(Density):
    """The uniform density over the last part of the run, written `tail(fraction)`.

    This is stochastic weight averaging (Izmailov et al. 2018). Until it starts, the teacher is the latest
    student.

    Args:
        fraction: The fraction of the run, in (0, 1].
    """

    stepwise: ClassVar[bool] = True

    fraction: float

    def __post_init__(self) -> None:
        rule = "a fraction of the run in (0, 1]"
        self._set(fraction=checks.number("tail", "fraction", self.fraction, lambda x: 0 < x <= 1, rule))

    def density(self, tau: Array) -> Array:  # noqa: D102
        return (tau >= 1.0 - self.fraction).astype(np.float64)

    def retention(self, steps: NDArray[np.int64], total_steps: int | None) -> Array:  # noqa: D102
        horizon = self._require(total_steps)
        # The first step of the tail. From it on this is a running mean, whose masses are whole numbers.
        states = range(horizon + 1)
        first = bisect.bisect_left(states, 1.0 - self.fraction, key=lambda i: (i + 0.5) / (horizon + 1))
        if first > horizon:
            raise self._no_mass(horizon)
        mass = np.maximum(steps - first, 0.0)
        return mass / (mass + 1.0)


@dataclass(frozen=True, eq=False)
class ScipyDensity(Density):
    """The density of a `scipy.stats` distribution, written `scipy.stats.NAME(...)`.

    Args:
        distribution: A frozen continuous distribution with support in [0, 1].
    """

    distribution: Any

    def __post_init__(self) -> None:
        low, high = self.distribution.support()
        if not hasattr(self.distribution.dist, "pdf") or low < 0 or high > 1:
            raise ValueError(
                f"kernel {str(self)!r} has support [{low}, {high}]: it must be a continuous "
                "distribution on [0, 1]; shift it with loc and scale, or truncate it with "
                "scipy.stats.truncnorm or scipy.stats.truncate"
            )

    @classmethod
    def from_call(cls, call: spec.Call) -> ScipyDensity:
        """Return the density for a parsed `scipy.stats.NAME(...)`."""
        import scipy.stats

        known = {k: v for k, v in vars(scipy.stats).items() if isinstance(v, scipy.stats.rv_continuous)}
        name = call.name.removeprefix("scipy.stats.")
        distribution = checks.lookup("scipy.stats distribution", name, known)
        try:
            return cls(distribution(*call.args, **call.kwargs))
        except TypeError as error:
            raise TypeError(f"{call}: {error}") from None

    def density(self, tau: Array) -> Array:  # noqa: D102
        return self.distribution.pdf(tau)

    def __str__(self) -> str:
        frozen = self.distribution
        args = tuple(float(a) for a in frozen.args)
        kwargs = {k: float(v) for k, v in frozen.kwds.items()}
        return str(spec.Call(f"scipy.stats.{frozen.dist.name}", args, kwargs))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ScipyDensity) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))


@dataclass(frozen=True)
class FunctionDensity(Density):
    """The density that a callable computes.

    Args:
        function: A callable `tau -> kappa(tau)` of arrays or of single floats.
    """

    function: Callable[[Any], Any]

    def density(self, tau: Array) -> Array:  # noqa: D102
        try:
            values = np.asarray(self.function(tau), dtype=np.float64)
        except (TypeError, ValueError):
            # The function is for single floats, as with `if tau < 0.5` or `math.sin(tau)`.
            values = np.array([self.function(float(t)) for t in tau], dtype=np.float64)
        return np.broadcast_to(values, tau.shape) if values.ndim == 0 else values

    def __str__(self) -> str:
        function = self.function
        if not hasattr(function, "__qualname__"):
            function = type(function)
        return f"callable:{function.__module__}.{function.__qualname__}"
