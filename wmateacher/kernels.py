"""Kernels: how much each step of the student's trajectory counts in the teacher.

A kernel is a per-step retention `r_j`: at step `j` the average keeps the share `r_j` of what it was and
takes `1 - r_j` of the new student. Density kernels derive it from a density over the run,

    tau_j = (j + 1/2) / (T + 1),   S_j = sum_{i <= j} kappa(tau_i),   r_j = S_{j-1} / S_j

(TRACER, Definition 3.3 and eq. 15: `omega_j = 1 - r_j = kappa(tau_j) / S_j`, with the pretrained
`W^0` in the sum). Everything here is float64 on the host.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import scipy.optimize
import scipy.stats
from numpy.typing import NDArray

from wmateacher import checks, spec

Array = NDArray[np.float64]


class Kernel(ABC):
    """How much each optimizer step's student counts in the average.

    Subclass it (or `Density`, for a density over the run) and `register` the subclass to give it a name
    in the string grammar.
    """

    name: ClassVar[str] = ""

    @property
    def needs_horizon(self) -> bool:
        """Whether the weights depend on the total number of steps."""
        return True

    @abstractmethod
    def retention(self, steps: NDArray[np.int64], total_steps: int | None) -> Array:
        """The share `r_j` in [0, 1] of the average that survives each of `steps`; `r_0` is 0.

        Args:
            steps: Optimizer steps, integers `[n]` in `[0, total_steps]`.
            total_steps: The horizon T; None is allowed where `needs_horizon` is False.

        Returns:
            float64 `[n]`.
        """

    def profile(self, total_steps: int) -> Array:
        """The weight of every student state in the average at the end of the run.

        Args:
            total_steps: The horizon T.

        Returns:
            float64 `[T + 1]`, summing to 1; entry 0 is the pretrained state `W^0`.
        """
        total_steps = checks.positive_int("total_steps", total_steps)
        return realised_weights(1.0 - self.retention(np.arange(total_steps + 1), total_steps))

    def summary(self, total_steps: int) -> Summary:
        """What the kernel does over `total_steps` steps, in a few numbers."""
        weights = self.profile(total_steps)
        ages = np.arange(total_steps, -1, -1)
        mean_age = float(weights @ ages)
        return Summary(
            kernel=str(self),
            total_steps=total_steps,
            start_weight=float(weights[0]),
            mean_age=mean_age,
            effective_states=float(1.0 / np.sum(weights**2)),
            last_tenth=float(weights[ages < 0.1 * total_steps].sum()),
            equal_ema_retention=_ema_retention_of_mean_age(mean_age, total_steps),
        )

    def __str__(self) -> str:
        return str(spec.canonical(self, self.name)) if is_dataclass(self) else self.name

    def _require(self, total_steps: int | None) -> int:
        if total_steps is None:
            raise ValueError(
                f"kernel {str(self)!r} needs total_steps, got None: pass the number of optimizer "
                "steps of the whole run (steps per epoch x epochs), or take a kernel without a "
                "horizon such as 'ema(0.999)' or 'uniform'"
            )
        return total_steps


@dataclass(frozen=True)
class Summary:
    """A kernel over a horizon, in numbers; `str` gives a small table.

    Attributes:
        kernel: The kernel's text.
        total_steps: The horizon T.
        start_weight: Weight of the pretrained state `W^0` in the final average.
        mean_age: Mean age of the averaged states at the end, in optimizer steps.
        effective_states: `1 / sum_k w_k^2`: how many equally weighted states average as widely.
        last_tenth: Weight of the states younger than `T / 10` steps.
        equal_ema_retention: Retention of the EMA with the same mean age over the same horizon.
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


def realised_weights(omegas: Array) -> Array:
    """The weight of every state after `M <- (1 - omega_k) M + omega_k W^k` over all `k`.

    Args:
        omegas: float64 `[n]`, the weight applied at each state; the first is 1.

    Returns:
        float64 `[n]`: `w_k = omega_k * prod_{i > k} (1 - omega_i)`.
    """
    kept = np.append(1.0 - omegas[1:], 1.0)
    return omegas * np.cumprod(kept[::-1])[::-1]


# --- registry ---------------------------------------------------------------------------------------

Factory = Callable[..., Kernel]
_FACTORIES: dict[str, Factory] = {}


def register(name: str, *, override: bool = False) -> Callable[[Factory], Factory]:
    """Give a kernel class (or a factory of kernels) a name in the string grammar.

    Example:
        >>> @register("rising", override=True)
        ... @dataclass(frozen=True)
        ... class Rising(Density):
        ...     power: float = 1.0
        ...     def density(self, tau):
        ...         return tau**self.power
        >>> str(build("rising(2)"))
        'rising(2)'

    Args:
        name: The name, a Python identifier.
        override: Replace a kernel that already has this name.

    Raises:
        ValueError: The name is taken or not an identifier.
    """
    if not name.isidentifier():
        raise ValueError(f"name must be an identifier such as 'my_kernel', got {name!r}")
    if name in _FACTORIES and not override:
        raise ValueError(f"name {name!r} is taken; choose another or pass override=True")

    def add(factory: Factory) -> Factory:
        if isinstance(factory, type) and issubclass(factory, Kernel):
            factory.name = name
        _FACTORIES[name] = factory
        return factory

    return add


def available() -> list[str]:
    """The registered names, sorted."""
    return sorted(_FACTORIES)


KernelLike = str | Kernel | Callable[..., Any]
"""What `build` makes a kernel of, and every argument called `kernel` accepts: a string, a `Kernel`, a frozen
`scipy.stats` distribution, or a callable density."""


def build(kernel: KernelLike) -> Kernel:
    """Make a kernel of what a user may write.

    Example:
        >>> build("beta(0.5,0.5)").profile(4).round(3)
        array([0.256, 0.167, 0.153, 0.167, 0.256])
        >>> print(build(lambda tau: 1 - tau).summary(100).start_weight)
        0.019...

    Args:
        kernel: A string such as `"beta(0.5,0.5)"` or `"scipy.stats.truncnorm(-2,2,loc=0.5,scale=0.2)"`, a
            `Kernel`, a frozen `scipy.stats` distribution with support in [0, 1], or a callable density
            of the run's fraction `tau` in (0, 1).

    Raises:
        ValueError: The text does not parse, names no kernel, or has a parameter out of range.
        TypeError: The arguments do not fit the named kernel, or `kernel` is none of the above.
    """
    if isinstance(kernel, Kernel):
        return kernel
    if isinstance(kernel, str):
        call = spec.parse_call(kernel)
        if call.name.startswith("scipy.stats."):
            return ScipyDensity.from_call(call)
        if call.name not in _FACTORIES:
            raise ValueError(
                f"unknown kernel {call.name!r}; {checks.nearest(call.name, _FACTORIES)}, "
                "scipy.stats.NAME(...), or a callable density"
            )
        return call.build(_FACTORIES[call.name])
    if hasattr(kernel, "pdf") and hasattr(kernel, "dist") and hasattr(kernel, "support"):
        return ScipyDensity(kernel)
    if callable(kernel) and not isinstance(kernel, type):
        return FunctionDensity(kernel)
    raise TypeError(
        "kernel must be a string such as 'beta(0.5,0.5)', a Kernel, a frozen scipy.stats distribution "
        f"or a callable density, got {kernel!r}"
    )


# --- densities over the run ---------------------------------------------------------------------------


class Density(Kernel):
    """A kernel given by a density over the run; only its shape matters, not its normalisation."""

    @abstractmethod
    def density(self, tau: Array) -> Array:
        """The density `kappa`, finite and not negative, at the fractions `tau` in (0, 1) of the run."""

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
            raise ValueError(
                f"kernel {str(self)!r} has no mass on any of the {horizon + 1} states of a run of "
                f"total_steps={horizon}: widen it or lengthen the run"
            )
        earlier = np.append(0.0, mass[:-1])
        # Where there is no mass yet nothing is kept: the teacher is the latest student.
        return np.divide(earlier, mass, out=np.zeros_like(mass), where=mass > 0)[steps]


def _set(obj: Any, **values: Any) -> None:
    for key, value in values.items():
        object.__setattr__(obj, key, value)


@register("beta")
@dataclass(frozen=True)
class Beta(Density):
    """The Beta(a, b) density, TRACER's kernel; a = b = 0.5, U-shaped, is the paper's default (Def. 3.3).

    a < 1 weighs the start of the run up, b < 1 its end; a = b = 1 is the running mean.
    """

    a: float
    b: float

    def __post_init__(self) -> None:
        rule = "a finite number above 0"
        _set(self, a=checks.number("beta", "a", self.a, lambda x: x > 0, rule))
        _set(self, b=checks.number("beta", "b", self.b, lambda x: x > 0, rule))

    def density(self, tau: Array) -> Array:  # noqa: D102
        return scipy.stats.beta.pdf(tau, self.a, self.b)


@register("arcsine")
@dataclass(frozen=True)
class Arcsine(Density):
    """The arcsine density `1 / (pi sqrt(tau (1 - tau)))`; the same kernel as `beta(0.5,0.5)`."""

    def density(self, tau: Array) -> Array:  # noqa: D102
        return scipy.stats.arcsine.pdf(tau)


@register("tail")
@dataclass(frozen=True)
class Tail(Density):
    """Uniform over the last `fraction` of the run, as in stochastic weight averaging.

    Before its start there is no mass, and the teacher is the latest student.
    """

    fraction: float

    def __post_init__(self) -> None:
        rule = "a fraction of the run in (0, 1]"
        _set(self, fraction=checks.number("tail", "fraction", self.fraction, lambda x: 0 < x <= 1, rule))

    def density(self, tau: Array) -> Array:  # noqa: D102
        return (tau >= 1.0 - self.fraction).astype(np.float64)


@dataclass(frozen=True, eq=False)
class ScipyDensity(Density):
    """A frozen continuous `scipy.stats` distribution with support in [0, 1]."""

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
        """Freeze the distribution that `scipy.stats.NAME(...)` names."""
        name = call.name.removeprefix("scipy.stats.")
        known = {k for k, v in vars(scipy.stats).items() if isinstance(v, scipy.stats.rv_continuous)}
        if name not in known:
            raise ValueError(f"unknown distribution {call.name!r}; {checks.nearest(name, known)}")
        try:
            return cls(getattr(scipy.stats, name)(*call.args, **call.kwargs))
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
    """Any callable `tau -> kappa(tau)`, of arrays or of single floats."""

    function: Callable[[Any], Any]

    def density(self, tau: Array) -> Array:  # noqa: D102
        try:
            values = np.asarray(self.function(tau), dtype=np.float64)
        except (
            TypeError,
            ValueError,
        ):  # written for single floats: `if tau < 0.5`, `math.sin(tau)`
            values = np.array([self.function(float(t)) for t in tau], dtype=np.float64)
        return np.broadcast_to(values, tau.shape) if values.ndim == 0 else values

    def __str__(self) -> str:
        function = self.function
        if not hasattr(function, "__qualname__"):
            function = type(function)
        return f"callable:{function.__module__}.{function.__qualname__}"


# --- kernels without a density ------------------------------------------------------------------------


@register("uniform")
@dataclass(frozen=True)
class Uniform(Kernel):
    """The running mean of all states, `r_j = j / (j + 1)`; needs no horizon and equals `beta(1,1)`."""

    @property
    def needs_horizon(self) -> bool:  # noqa: D102
        return False

    def retention(self, steps: NDArray[np.int64], total_steps: int | None) -> Array:  # noqa: D102
        return steps / (steps + 1.0)


@register("power")
@dataclass(frozen=True, kw_only=True)
class Power(Kernel):
    """Power-function average of Karras et al. 2024 (EDM2): weights grow as a power of the step.

    `r_j = (1 - 1/t)^(gamma + 1)` with `t = j + 1` (their post-hoc EMA formula, counting `W^0` as the
    first state); `sigma_rel` is the profile's standard deviation relative to the run's length, from
    which gamma follows as the largest root of `(gamma + 1) = sigma_rel^2 (gamma + 2)^2 (gamma + 3)`.
    The shape stretches with the run, so no horizon is needed.

    Args:
        sigma_rel: In (0, 1/sqrt(12)]; the largest is the running mean (gamma = 0), and small values
            weigh the end of the run.
    """

    sigma_rel: float

    def __post_init__(self) -> None:
        limit = 1 / math.sqrt(12)
        rule = f"in (0, {limit:.4f}] (1/sqrt(12), which is the running mean)"
        checked = checks.number("power", "sigma_rel", self.sigma_rel, lambda x: 0 < x <= limit, rule)
        _set(self, sigma_rel=checked)

    @property
    def gamma(self) -> float:
        """The exponent of the profile, `w(t) ~ t^gamma`."""
        precision = self.sigma_rel**-2
        return float(np.roots([1, 7, 16 - precision, 12 - precision]).real.max())

    @property
    def needs_horizon(self) -> bool:  # noqa: D102
        return False

    def retention(self, steps: NDArray[np.int64], total_steps: int | None) -> Array:  # noqa: D102
        return (steps / (steps + 1.0)) ** (self.gamma + 1.0)


@register("static")
@dataclass(frozen=True)
class Static(Kernel):
    """The teacher never moves from `W^0`."""

    @property
    def needs_horizon(self) -> bool:  # noqa: D102
        return False

    def retention(self, steps: NDArray[np.int64], total_steps: int | None) -> Array:  # noqa: D102
        return (steps > 0).astype(np.float64)


@register("ema")
@dataclass(frozen=True)
class Ema(Kernel):
    """Exponential moving average: `r_j` is the retention, constant or scheduled over the run.

    `ema(0.996, 1.0, schedule=cosine)` is DINO's (Caron et al. 2021); `ema(0.05, 0.9, schedule=linear,
    warmup=0.2)` is CaRot's. With a schedule the retention of step `j` is taken at the fraction
    `(j - 1) / T` of the run, as DINO does; it reaches `final_decay` after the fraction `warmup` and stays.

    Args:
        decay: Retention in [0, 1]; what PyTorch and timm call decay. 0.999 keeps 99.9% a step.
        final_decay: Retention at the end of the schedule; None for a constant one.
        schedule: `linear` or `cosine`, required with `final_decay`.
        warmup: Fraction of the run, in (0, 1], over which the schedule goes from `decay` to `final_decay`.
    """

    decay: float
    final_decay: float | None = None
    schedule: Literal["linear", "cosine"] | None = None
    warmup: float = 1.0

    def __post_init__(self) -> None:
        def share(x: float) -> bool:
            return 0 <= x <= 1

        rule = "a retention in [0, 1] (0.999 keeps 99.9% of the average at every step)"
        _set(self, decay=checks.number("ema", "decay", self.decay, share, rule))
        if self.final_decay is None:
            if self.schedule is not None or self.warmup != 1.0:
                raise ValueError(
                    f"ema: a schedule needs the retention that it ends at, got final_decay=None; write "
                    f"ema({self.decay},1.0,schedule={self.schedule or 'cosine'})"
                )
            return
        _set(self, final_decay=checks.number("ema", "final_decay", self.final_decay, share, rule))
        if self.schedule not in ("linear", "cosine"):
            raise ValueError(
                f"ema: schedule must be linear or cosine where final_decay is given, got {self.schedule!r}; "
                f"write ema({self.decay},{self.final_decay},schedule=cosine)"
            )
        rule = "a fraction of the run in (0, 1]"
        warmup = checks.number("ema", "warmup", self.warmup, lambda x: 0 < x <= 1, rule)
        _set(self, warmup=warmup)

    @property
    def needs_horizon(self) -> bool:  # noqa: D102
        return self.final_decay is not None

    def retention(self, steps: NDArray[np.int64], total_steps: int | None) -> Array:  # noqa: D102
        kept = np.full(steps.shape, self.decay)
        if self.final_decay is not None:
            progress = (steps - 1) / (self._require(total_steps) * self.warmup)
            progress = np.clip(progress, 0.0, 1.0)
            if self.schedule == "cosine":
                progress = (1 - np.cos(np.pi * progress)) / 2
            kept = self.decay + (self.final_decay - self.decay) * progress
        return np.where(steps > 0, kept, 0.0)


def _ema_retention_of_mean_age(mean_age: float, total_steps: int) -> float:
    """The constant retention whose mean age over the horizon, `sum_{k=1}^{T} rho^k`, is `mean_age`."""

    def excess(rho: float) -> float:
        if rho == 1.0:
            return total_steps - mean_age
        return rho * -math.expm1(total_steps * math.log(rho)) / (1 - rho) - mean_age

    if mean_age <= 0:
        return 0.0
    if mean_age >= total_steps:
        return 1.0
    return float(scipy.optimize.brentq(excess, 1e-300, 1.0, xtol=1e-15))
