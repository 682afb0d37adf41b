"""Continue averages that other libraries have made, including their step counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from wmateacher import checks, walking
from wmateacher.kernels import Array, Kernel
from wmateacher.teacher import WMATeacher

__all__ = ["Description", "PeerEMA", "describe", "load"]


def __dir__() -> list[str]:
    return __all__


@dataclass(frozen=True)
class PeerEMA(Kernel):
    """An EMA with the warm-up rules of other libraries, to continue exactly as they would.

    With `n = step - 1 - delay`, the retention is 0 while `n <= 0` (the average is the student). After that
    it is

        constant        decay
        inverse_gamma   1 - (1 + n / gamma)^(-power)     warm-up of timm, diffusers and ema-pytorch
        ratio           (1 + n) / (10 + n)               default of diffusers

    clipped to the range from `least` to `decay`. The rule of torch-ema is `ratio` with `delay=-1`.

    Attributes:
        decay: The largest retention, in [0, 1].
        rule: The shape of the retention's rise: `"constant"`, `"inverse_gamma"` or `"ratio"`.
        gamma: The gamma of `inverse_gamma`. All libraries default to 1.
        power: The power of `inverse_gamma`. All libraries default to 2/3.
        least: The smallest retention after the delay (`min_decay`, `min_value`), in [0, 1].
        delay: The number of steps in which the average is the student (`update_after_step`).
        every: The interval between averaged steps (`update_every` of ema-pytorch, whose default is 10). Steps
            1, 1 + every, ... are averaged, each with the retention of its own step.

    Raises:
        ValueError: If a value is out of range.
    """

    name: ClassVar[str] = "peer_ema"
    stepwise: ClassVar[bool] = True

    decay: float
    rule: Literal["constant", "inverse_gamma", "ratio"] = "constant"
    gamma: float = 1.0
    power: float = 2 / 3
    least: float = 0.0
    delay: int = 0
    every: int = 1

    def __post_init__(self) -> None:
        checks.one_of("rule", self.rule, ("constant", "inverse_gamma", "ratio"))
        rules: dict[str, tuple[Callable[[float], bool], str]] = {
            "decay": (lambda x: 0 <= x <= 1, "a retention in [0, 1]"),
            "least": (lambda x: 0 <= x <= 1, "a retention in [0, 1]"),
            "gamma": (lambda x: x > 0, "a finite number above 0"),
            "power": (lambda x: x > 0, "a finite number above 0"),
            "delay": (lambda x: x.is_integer() and abs(x) <= 2**53, "a whole number of optimizer steps"),
        }
        for argument, (ok, rule) in rules.items():
            value = checks.number("peer_ema", argument, getattr(self, argument), ok, rule)
            # Plain numbers, of which the kernel's name in a saved state consists.
            object.__setattr__(self, argument, int(value) if argument == "delay" else value)
        object.__setattr__(self, "every", checks.positive_int("peer_ema: every", self.every))

    @property
    def needs_horizon(self) -> bool:
        """False, because no weight depends on the length of the run."""
        return False

    def retention(self, steps: NDArray[np.int64], total_steps: int | None) -> Array:  # noqa: D102
        n = steps - 1.0 - self.delay
        later = np.maximum(n, 0.0)
        rising = {
            "constant": lambda: np.full(len(steps), self.decay),
            "inverse_gamma": lambda: 1.0 - (1.0 + later / self.gamma) ** -self.power,
            "ratio": lambda: (1.0 + later) / (10.0 + later),
        }[self.rule]()
        kept = np.where(n > 0, np.clip(rising, self.least, max(self.least, self.decay)), 0.0)
        passed = (steps - 1) % self.every != 0
        return np.where(steps == 0, 0.0, np.where(passed, 1.0, kept))


@dataclass(frozen=True)
class Description:
    """The source, step count and kernel of another library's average.

    Attributes:
        source: The library: `"torch"`, `"lightning"`, `"ema-pytorch"`, `"diffusers"`, `"torch-ema"` or
            `"timm"`.
        step: The number of optimizer steps that the library has counted, or None if the state does not say.
        kernel: The kernel that continues exactly as the library would, or None if the state does not say.
    """

    source: str
    step: int | None
    kernel: Kernel | None


def describe(state: Mapping[str, Any]) -> Description:
    """Recognise the state or checkpoint of another library, for example to choose the teacher's kernel.

    Args:
        state: The state or checkpoint of another library, as for `load`.

    Raises:
        ValueError: If the state belongs to none of the libraries that `load` knows, or is incomplete.
        TypeError: If the state is not a mapping.
    """
    return _recognise(state)[0]


def load(teacher: WMATeacher, state: Mapping[str, Any], step: int | None = None) -> Description:
    """Let a teacher continue the average that another library has made.

    Examples:
        >>> from torch.optim.swa_utils import AveragedModel
        >>> model = nn.Linear(2, 2)
        >>> swa = AveragedModel(model)
        >>> for _ in range(5):
        ...     swa.update_parameters(model)
        >>> teacher = WMATeacher(model, "uniform", total_steps=20)
        >>> load(teacher, swa.state_dict()).source, teacher.step
        ('torch', 4)

    Args:
        teacher: The teacher, built from the student with its present weights.
        state: The result of the library's `state_dict()`, or the checkpoint that contains it. The libraries
            are torch (`AveragedModel`), Lightning (the `WeightAveraging` callbacks), ema-pytorch (`EMA`),
            diffusers (`EMAModel`), torch-ema (`ExponentialMovingAverage`) and timm (`state_dict_ema`, or the
            weights alone).
        step: The number of optimizer steps in the run so far. Default: the number in the state.

    Returns:
        The source, step count and kernel that the state contains.

    Raises:
        ValueError: If the state belongs to none of these libraries or to another architecture, or if it does
            not contain the number of steps and `step` is None.
        RuntimeError: If the teacher is inside `swap`.
    """
    found, weights = _recognise(state)
    step = found.step if step is None else step
    if step is None:
        raise ValueError(
            f"the state of {found.source} does not say how many steps it has averaged: pass step=..., the "
            "number of optimizer steps in the run so far"
        )
    average = weights(teacher.student)
    if not isinstance(average, Mapping):  # None would keep the teacher's own average
        raise ValueError(
            f"the state of {found.source} has no weights: a {type(average).__name__} is in their place"
        )
    teacher.load_average(average, step)
    return found


_Weights = Callable[[nn.Module], Mapping[str, Tensor]]
"""A function that takes the student and returns the averaged weights under the names of its parameters."""


def _recognise(state: Mapping[str, Any]) -> tuple[Description, _Weights]:
    if not isinstance(state, Mapping):
        raise TypeError(
            f"state must be a state dict, got {type(state).__name__}: pass what torch.load returns"
        )
    clock = state.get("_extra_state")
    if isinstance(clock, Mapping) and "omega" in clock:
        raise ValueError("this is a WMATeacher's own state: read it with teacher.load_state_dict")
    for source, (keys, reader) in _READERS.items():
        if keys <= state.keys():
            try:
                step, kernel, weights = reader(state)
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"the state of {source} is incomplete or damaged ({type(error).__name__}: {error}): pass "
                    "all that its state_dict() returned"
                ) from error
            if step is not None and step < 0:
                raise ValueError(
                    f"the state of {source} has averaged nothing yet: build the teacher from the model, "
                    "which starts its average, and load nothing"
                )
            return Description(source, step, kernel), weights
    if state and all(isinstance(value, Tensor) for value in state.values()):
        return Description("timm", None, None), lambda model: state
    raise ValueError(
        f"a state with {', '.join(map(repr, list(state)[:5])) or 'no entries'} belongs to none of the known "
        f"libraries ({', '.join(_READERS)}): pass weights by name to WMATeacher.load_average"
    )


_Reading = tuple[int | None, Kernel | None, _Weights]
"""The step, the kernel and the weights of a state."""


def _torch(state: Mapping[str, Any]) -> _Reading:
    # The first of its updates copies the student, which is W^0 here.
    return int(state["n_averaged"]) - 1, None, lambda model: _under("module.", state)


def _lightning(state: Mapping[str, Any]) -> _Reading:
    return int(state["averaging_state"]["n_averaged"]) - 1, None, lambda model: state["state_dict"]


def _ema_pytorch(state: Mapping[str, Any]) -> _Reading:
    return int(state["step"]), None, lambda model: _under("ema_model.", state)


def _timm(state: Mapping[str, Any]) -> _Reading:
    return None, None, lambda model: state["state_dict_ema"]


def _diffusers(state: Mapping[str, Any]) -> _Reading:
    kernel = PeerEMA(
        state["decay"], "inverse_gamma" if state["use_ema_warmup"] else "ratio", state["inv_gamma"],
        state["power"], state["min_decay"], state["update_after_step"],
    )  # fmt: skip
    return int(state["optimization_step"]), kernel, lambda model: _in_order("diffusers", state, model)


def _torch_ema(state: Mapping[str, Any]) -> _Reading:
    counted = state["num_updates"]
    kernel = (
        PeerEMA(state["decay"], delay=-2) if counted is None else PeerEMA(state["decay"], "ratio", delay=-1)
    )
    return counted, kernel, lambda model: _in_order("torch-ema", state, model)


def _under(prefix: str, state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _in_order(source: str, state: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Name a list of weights by the model's parameters, which are in the same order."""
    named, shadows = dict(walking.named_parameters(model)), list(state["shadow_params"])
    if source == "torch-ema" and len(shadows) < len(named):  # older versions leave out frozen parameters
        named = {name: p for name, p in named.items() if p.requires_grad}
    for (name, own), shadow in zip(named.items(), shadows, strict=False):
        if not isinstance(shadow, Tensor):
            raise ValueError(
                f"the state of {source} is damaged: a {type(shadow).__name__} is among its weights"
            )
        if own.shape != shadow.shape:
            raise ValueError(
                f"the state of {source} is of another architecture: its weights have no names, and the one "
                f"in the place of {name!r} has shape {tuple(shadow.shape)}, the model's {tuple(own.shape)}"
            )
    if len(shadows) != len(named):
        raise ValueError(
            f"the state of {source} is of another architecture: it has {len(shadows)} weights, the model "
            f"{len(named)}; build the teacher from the model whose parameters were averaged"
        )
    return dict(zip(named, shadows, strict=True))


_READERS: dict[str, tuple[set[str], Callable[[Mapping[str, Any]], _Reading]]] = {
    "diffusers": ({"shadow_params", "optimization_step"}, _diffusers),
    "torch-ema": ({"shadow_params", "num_updates"}, _torch_ema),
    "ema-pytorch": ({"initted", "step"}, _ema_pytorch),
    "lightning": ({"averaging_state", "state_dict"}, _lightning),
    "torch": ({"n_averaged"}, _torch),
    "timm": ({"state_dict_ema"}, _timm),
}
"""For each library, the keys that identify its state and the function that reads it."""
