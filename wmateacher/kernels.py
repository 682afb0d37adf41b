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

from __future__ import annotations

import bisect
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, is_dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from wmateacher import checks, spec

# scipy.stats and scipy.optimize are imported where they are used: they take longer to import than the rest of
# the library.

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

Array = NDArray[np.float64]


class Kernel(ABC):
    """The weighting of the student's states in the average.

    For a kernel that is a density over the run, subclass `Density`. For any other kernel, such as an EMA,
    subclass `Kernel` and implement `retention`. `register` gives the subclass a name for use in strings.
    """

    name: ClassVar[str] = ""

    stepwise: ClassVar[bool] = False
    """Whether `retention` of a few steps costs only these steps. A clock then asks for each step when it is
    due. Otherwise it asks once for all steps of the run, and holds 8 bytes for each."""

    @property
    def needs_horizon(self) -> bool:
        """Whether the weights depend on the total number of steps."""
        return True

    @abstractmethod
    def retention(self, steps: NDArray[np.int64], total_steps: int | None) -> Array:
        """Return the share `r_j` of the average that is kept at each of `steps`.

        Args:
            steps: Optimizer steps in [0, total_steps], an integer array of shape `[n]`.
            total_steps: The horizon T; None is allowed if `needs_horizon` is False.

        Returns:
            A float64 array of shape `[n]` with values in [0, 1]; `r_0` is 0.
        """

    def profile(self, total_steps: int) -> Array:
        """Return the weight of every student state in the average at the end of the run.

        Args:
            total_steps: The horizon T.

        Returns:
            A float64 array of shape `[T + 1]` that sums to 1; entry 0 is the pretrained state `W^0`.
        """
        total_steps = checks.positive_int("total_steps", total_steps)
        return realised_weights(1.0 - self.retention(np.arange(total_steps + 1), total_steps))

    def summary(self, total_steps: int) -> Summary:
        """Describe the kernel over `total_steps` steps in a few numbers."""
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
                "steps of the whole run (steps per epoch x epochs), or use a kernel without a "
                "horizon, such as 'ema(0.999)' or 'uniform'"
            )
        return total_steps


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


def realised_weights(omegas: Array) -> Array:
    """Return the weight of every state after the updates `M <- (1 - omega_k) M + omega_k W^k`.

    Args:
        omegas: The weight applied at each state, a float64 array of shape `[n]`; the first is 1.

    Returns:
        A float64 array of shape `[n]`: `w_k = omega_k * prod_{i > k} (1 - omega_i)`.
    """
    kept = np.append(1.0 - omegas[1:], 1.0)
    return omegas * np.cumprod(kept[::-1])[::-1]


# --- registry ---------------------------------------------------------------------------------------

_Factory = Callable[..., Kernel]
_FACTORIES: dict[str, _Factory] = {}


def register(name: str, *, override: bool = False) -> Callable[[_Factory], _Factory]:
    """Give a kernel class, or a function that returns kernels, a name for use in strings.

    Examples:
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
        override: Whether to replace a kernel that already has this name.

    Raises:
        ValueError: If the name is taken or is not an identifier.
    """
    if not name.isidentifier():
        raise ValueError(f"name must be an identifier such as 'my_kernel', got {name!r}")
    if name in _FACTORIES and not override:
        raise ValueError(f"name {name!r} is taken; choose another or pass override=True")

    def add(factory: _Factory) -> _Factory:
        if isinstance(factory, type) and issubclass(factory, Kernel):
            factory.name = name
        _FACTORIES[name] = factory
        return factory

    return add


def available() -> list[str]:
    """Return the registered names, sorted."""
    return sorted(_FACTORIES)


KernelLike = str | Kernel | Callable[..., Any]
"""The type of every argument called `kernel`: a string, a `Kernel`, a frozen `scipy.stats` distribution, or a
callable density. `build` turns each of them into a `Kernel`."""


def build(kernel: KernelLike) -> Kernel:
    """Return the kernel that a string, an object or a callable stands for.

    Examples:
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
        also = "scipy.stats.NAME(...), or a callable density"
        return call.build(checks.lookup("kernel", call.name, _FACTORIES, also=also))
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


def _set(obj: Any, **values: Any) -> None:
    for key, value in values.items():
        object.__setattr__(obj, key, value)


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
        _set(self, a=checks.number("beta", "a", self.a, lambda x: x > 0, rule))
        _set(self, b=checks.number("beta", "b", self.b, lambda x: x > 0, rule))

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
        _set(self, fraction=checks.number("tail", "fraction", self.fraction, lambda x: 0 < x <= 1, rule))

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


# --- kernels without a density ------------------------------------------------------------------------


def _since(kernel: Uniform | Ema, steps: NDArray[np.int64], total_steps: int | None) -> NDArray[np.int64]:
    """Return the steps counted from the kernel's `start_step`, 0 before it."""
    if total_steps is not None and kernel.start_step > total_steps:
        raise ValueError(
            f"kernel {str(kernel)!r} starts at step {kernel.start_step}, after the end of a run of "
            f"total_steps={total_steps}: lower start_step or lengthen the run"
        )
    return np.maximum(steps - kernel.start_step, 0)


@register("uniform")
@dataclass(frozen=True)
class Uniform(Kernel):
    """The running mean of all states, written `uniform`: `r_j = j / (j + 1)`.

    It equals `beta(1,1)` and needs no horizon. `uniform(start_step=1000)` is stochastic weight averaging
    (Izmailov et al. 2018) from step 1000 on; `tail` starts at a fraction of the run instead.

    Args:
        start_step: The first step whose state is averaged. Until then the teacher is the latest student.
    """

    stepwise: ClassVar[bool] = True

    start_step: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        _set(self, start_step=checks.whole("uniform: start_step", self.start_step, 0, integral=True))

    @property
    def needs_horizon(self) -> bool:  # noqa: D102
        return False

    def retention(self, steps: NDArray[np.int64], total_steps: int | None) -> Array:  # noqa: D102
        since = _since(self, steps, total_steps)
        return since / (since + 1.0)


@register("power")
@dataclass(frozen=True, kw_only=True)
class Power(Kernel):
    """The power-function average, written `power(sigma_rel=0.1)` or `power(exponent=-0.5)`.

    Weights follow the power gamma of the step: `r_j = (1 - 1/t)^(gamma + 1)` with `t = j + 1` (the post-hoc
    EMA formula of Karras et al. 2024, EDM2, where `W^0` counts as the first state). The profile stretches
    with the run, so no horizon is needed: after `t` steps, the weight of `W^0` is `(t + 1)^-(gamma + 1)`, and
    the mean age of the states tends to `t / (gamma + 2)`.

    Karras et al. give the standard deviation of the profile relative to the length of the run, `sigma_rel`.
    Gamma is then the largest root of `(gamma + 1) = sigma_rel^2 (gamma + 2)^2 (gamma + 3)`, at least 0.
    With `exponent`, gamma may also be negative, so that the average leans on the start of the run. In a long
    run it is the average of `beta(1 + exponent, 1)`, which needs a horizon.

    Examples:
        >>> round(Power(sigma_rel=0.1).gamma, 2)
        6.94
        >>> print(Power(exponent=-0.5))
        power(exponent=-0.5)

    Args:
        sigma_rel: The relative standard deviation, in (0, 1/sqrt(12)]. The largest value is the running mean
            (gamma = 0); small values emphasise the end of the run.
        exponent: Gamma itself, above -1, in place of `sigma_rel`. Values below 0 emphasise the start of the
            run, and 0 is the running mean.
    """

    stepwise: ClassVar[bool] = True

    sigma_rel: float | None = None
    exponent: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if (self.sigma_rel is None) == (self.exponent is None):
            raise ValueError(
                f"power: give either sigma_rel or exponent, got sigma_rel={self.sigma_rel} and "
                f"exponent={self.exponent}; write power(sigma_rel=0.1), or power(exponent=-0.5)"
            )
        if self.sigma_rel is None:
            rule = "above -1 (-0.5 emphasises the start of the run, 0 is the running mean)"
            _set(self, exponent=checks.number("power", "exponent", self.exponent, lambda x: x > -1, rule))
            return
        limit = 1 / math.sqrt(12)
        rule = f"in (0, {limit:.4f}] (1/sqrt(12), which is the running mean)"
        checked = checks.number("power", "sigma_rel", self.sigma_rel, lambda x: 0 < x <= limit, rule)
        _set(self, sigma_rel=checked)

    @functools.cached_property
    def gamma(self) -> float:
        """The exponent of the profile, `w(t) ~ t^gamma`."""
        if self.exponent is not None:
            return self.exponent
        precision = self.sigma_rel**-2  # type: ignore[operator]
        return float(np.roots([1, 7, 16 - precision, 12 - precision]).real.max())

    @property
    def needs_horizon(self) -> bool:  # noqa: D102
        return False

    def retention(self, steps: NDArray[np.int64], total_steps: int | None) -> Array:  # noqa: D102
        return (steps / (steps + 1.0)) ** (self.gamma + 1.0)


@register("static")
@dataclass(frozen=True)
class Static(Kernel):
    """The kernel of a teacher that stays at `W^0`, written `static`."""

    stepwise: ClassVar[bool] = True

    @property
    def needs_horizon(self) -> bool:  # noqa: D102
        return False

    def retention(self, steps: NDArray[np.int64], total_steps: int | None) -> Array:  # noqa: D102
        return (steps > 0).astype(np.float64)


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
            _set(self, decay=checks.number("ema", "decay", self.decay, share, rule))
        else:
            steps = "a finite number of optimizer steps above 0"
            life = checks.number("ema", "half_life", self.half_life, lambda x: x > 0, steps)
            # 500 prints as it was written.
            _set(self, half_life=int(life) if life.is_integer() else life)
        _set(self, start_step=checks.whole("ema: start_step", self.start_step, 0, integral=True))
        if self.final_decay is None:
            if self.schedule is not None or self.warmup != 1.0:
                raise ValueError(
                    f"ema: a schedule needs the retention at its end, got final_decay=None; write "
                    f"ema({self._first_decay},1.0,schedule={self.schedule or 'cosine'})"
                )
            return
        _set(self, final_decay=checks.number("ema", "final_decay", self.final_decay, share, rule))
        if self.schedule not in ("linear", "cosine"):
            raise ValueError(
                f"ema: schedule must be linear or cosine if final_decay is given, got {self.schedule!r}; "
                f"write ema({self._first_decay},{self.final_decay},schedule=cosine)"
            )
        rule = "a fraction of the run in (0, 1]"
        warmup = checks.number("ema", "warmup", self.warmup, lambda x: 0 < x <= 1, rule)
        _set(self, warmup=warmup)

    @property
    def _first_decay(self) -> float:
        """The decay, or the one that has the half-life."""
        return self.decay if self.half_life is None else 2.0 ** (-1.0 / self.half_life)  # type: ignore[return-value]

    @property
    def needs_horizon(self) -> bool:  # noqa: D102
        return self.final_decay is not None

    def retention(self, steps: NDArray[np.int64], total_steps: int | None) -> Array:  # noqa: D102
        since, first = _since(self, steps, total_steps), self._first_decay
        kept = np.full(steps.shape, first)
        if self.final_decay is not None:
            length = max(self._require(total_steps) - self.start_step, 1)
            progress = np.clip((since - 1) / (length * self.warmup), 0.0, 1.0)
            if self.schedule == "cosine":
                progress = (1 - np.cos(np.pi * progress)) / 2
            kept = first + (self.final_decay - first) * progress
        return np.where(since > 0, kept, 0.0)


@register("gap")
@dataclass(frozen=True)
class Gap(Kernel):
    """The kernel of a teacher that keeps its distance, written `gap(0.5)`.

    The average M follows the student W at a share of the distance that W has covered since the start: each
    snapshot moves M just so far that |M - W| is at most `share` |W - W^0|. With D = |M - W| before it,

        omega = max(0, 1 - share |W - W^0| / D).

    The distances are Euclidean, over all parameters that the teacher averages. The weights follow from the
    run, so that there is no profile and no horizon: `WMATeacher.trajectory_weights` returns those of a run
    so far. On a straight way from W^0, M = share W^0 + (1 - share) W at every step, whatever the learning
    rate. At a constant speed these are the weights of `power` with `exponent = 1 / share - 2` (exactly
    `uniform` for 1/2, in the limit else). See the theory page.

    The teacher holds a copy of W^0 in the student's dtype, also in its state.

    Args:
        share: The share in (0, 1]. 1 is a static teacher; small values follow the student closely.
    """

    stepwise: ClassVar[bool] = True

    share: float

    def __post_init__(self) -> None:
        rule = "a share of the student's distance from its start, in (0, 1]"
        _set(self, share=checks.number("gap", "share", self.share, lambda x: 0 < x <= 1, rule))

    @property
    def needs_horizon(self) -> bool:  # noqa: D102
        return False

    def omega(self, apart: Any, moved: Any) -> Any:
        """Return the weight of a snapshot.

        Args:
            apart: The distance |M - W| before the snapshot, a number or a tensor; not 0.
            moved: The distance |W - W^0|, in the same form.
        """
        above = 1.0 - self.share * moved / apart
        return (above + abs(above)) / 2.0  # max(0, above), also of a tensor; NaN stays NaN

    def retention(self, steps: NDArray[np.int64], total_steps: int | None) -> Array:
        """Return 0 for step 0. No later step has a retention before the run.

        Raises:
            ValueError: If another step is asked for.
        """
        if np.any(steps > 0):
            raise ValueError(
                f"kernel {str(self)!r} has no weights before the run, which it measures: read "
                "teacher.trajectory_weights() in or after it, or use a kernel that is the same for every "
                f"run, such as 'power(exponent={round(1 / self.share - 2, 2):g})'"
            )
        return np.zeros(steps.shape)


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


def __dir__() -> list[str]:
    return __all__
