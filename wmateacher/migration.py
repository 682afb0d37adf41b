"""Averages that other libraries have made, to be continued by a `WMATeacher`: weights and clock."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from wmateacher.checks import nearest, positive_int
from wmateacher.kernels import Array, Kernel

_RULES = ("constant", "inverse_gamma", "ratio")


@dataclass(frozen=True)
class PeerEMA(Kernel):
    """An EMA by the rules of other libraries, so that a teacher goes on exactly as they would.

    With `n = step - 1 - delay` the retention is 0 where `n <= 0` (the average is the student), and else

        constant        decay
        inverse_gamma   1 - (1 + n / gamma)^(-power)     timm's and diffusers' warm-up, ema-pytorch
        ratio           (1 + n) / (10 + n)               diffusers' default

    kept between `least` and `decay`. torch-ema's rule is `ratio` with `delay=-1`.

    Attributes:
        decay: The largest retention.
        rule: How it rises.
        gamma: Of `inverse_gamma`; 1 everywhere.
        power: Of `inverse_gamma`; 2/3 everywhere.
        least: The smallest retention after the delay (`min_decay`, `min_value`).
        delay: Steps in which the average is the student (`update_after_step`).
        every: Only the steps 1, 1 + every, ... are averaged, each with the retention of its own step
            (ema-pytorch's `update_every`, 10 there by default).

    Raises:
        ValueError: A value out of range.
    """

    name: ClassVar[str] = "peer_ema"

    decay: float
    rule: Literal["constant", "inverse_gamma", "ratio"] = "constant"
    gamma: float = 1.0
    power: float = 2 / 3
    least: float = 0.0
    delay: int = 0
    every: int = 1

    def __post_init__(self) -> None:
        for argument, value in (("decay", self.decay), ("least", self.least)):
            if not 0 <= value <= 1:
                raise ValueError(f"{argument} must be a retention in [0, 1], got {value!r}")
        if self.rule not in _RULES:
            raise ValueError(f"unknown rule {self.rule!r}; {nearest(str(self.rule), _RULES)}")
        for argument, value in (("gamma", self.gamma), ("power", self.power)):
            if not value > 0:
                raise ValueError(f"{argument} must be above 0, got {value!r}")
        positive_int("every", self.every)

    @property
    def needs_horizon(self) -> bool:
        """No: the last step is like any other."""
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
class Average:
    """What another library has averaged.

    Attributes:
        source: `"torch"`, `"lightning"`, `"ema-pytorch"`, `"diffusers"`, `"torch-ema"` or `"timm"`.
        weights: By the names of the student's `state_dict`.
        step: Optimizer steps that it has counted; None where its state does not say.
        kernel: The kernel that goes on as the library would; None where its state does not say.
    """

    source: str
    weights: Mapping[str, Tensor]
    step: int | None
    kernel: Kernel | None

    def into(self, teacher: Any, step: int | None = None) -> None:
        """Let a `WMATeacher` go on from it.

        Args:
            teacher: Built from the student as it is now.
            step: Optimizer steps of the run so far; None: what the state says.

        Raises:
            ValueError: The state says nothing of steps, and `step` is None; or as
                `WMATeacher.load_average`.
        """
        step = self.step if step is None else step
        if step is None:
            raise ValueError(
                f"the state of {self.source} does not say how many steps it has averaged: pass step=..., the "
                "optimizer steps of the run so far"
            )
        teacher.load_average(self.weights, step)


def read(state: Mapping[str, Any], model: nn.Module) -> Average:
    """Find the average in a state or checkpoint of another library.

    Example:
        >>> from torch.optim.swa_utils import AveragedModel
        >>> from wmateacher import WMATeacher
        >>> model = nn.Linear(2, 2)
        >>> swa = AveragedModel(model)
        >>> for _ in range(5):
        ...     swa.update_parameters(model)
        >>> average = read(swa.state_dict(), model)
        >>> teacher = WMATeacher(model, "uniform", total_steps=20)
        >>> average.into(teacher)
        >>> average.source, teacher.step
        ('torch', 4)

    Args:
        state: What its `state_dict()` gave, or the checkpoint that holds it: torch's `AveragedModel`,
            Lightning's `WeightAveraging` callbacks, `ema_pytorch.EMA`, diffusers' `EMAModel`, torch_ema's
            `ExponentialMovingAverage`, or timm (`state_dict_ema`, or the weights alone).
        model: The student, whose names and shapes the average must have.

    Raises:
        ValueError: It is none of these, or of another architecture.
    """
    for source, (keys, reader) in _READERS.items():
        if keys <= state.keys():
            return reader(source, state, model)
    if state and all(isinstance(value, Tensor) for value in state.values()):
        return Average("timm", dict(state), None, None)
    raise ValueError(
        f"a state with {', '.join(map(repr, list(state)[:5])) or 'nothing in it'} is of no library that is "
        f"known here ({', '.join(_READERS)}): pass weights by name to WMATeacher.load_average"
    )


def _averaged_model(source: str, state: Mapping[str, Any], model: nn.Module) -> Average:
    # The first of its updates copies the student, which is what W^0 is here.
    return Average(source, _under("module.", state), int(state["n_averaged"]) - 1, None)


def _lightning(source: str, state: Mapping[str, Any], model: nn.Module) -> Average:
    step = int(state["averaging_state"]["n_averaged"]) - 1
    return Average(source, dict(state["state_dict"]), step, None)


def _ema_pytorch(source: str, state: Mapping[str, Any], model: nn.Module) -> Average:
    return Average(source, _under("ema_model.", state), int(state["step"]), None)


def _timm(source: str, state: Mapping[str, Any], model: nn.Module) -> Average:
    return Average(source, dict(state["state_dict_ema"]), None, None)


def _diffusers(source: str, state: Mapping[str, Any], model: nn.Module) -> Average:
    kernel = PeerEMA(
        state["decay"], "inverse_gamma" if state["use_ema_warmup"] else "ratio", state["inv_gamma"],
        state["power"], state["min_decay"], state["update_after_step"],
    )  # fmt: skip
    named = dict(model.named_parameters())
    return Average(source, _in_order(source, state, named), int(state["optimization_step"]), kernel)


def _torch_ema(source: str, state: Mapping[str, Any], model: nn.Module) -> Average:
    counted = state["num_updates"]
    kernel = (
        PeerEMA(state["decay"], delay=-2) if counted is None else PeerEMA(state["decay"], "ratio", delay=-1)
    )
    named = dict(model.named_parameters())
    if len(state["shadow_params"]) < len(named):  # older versions leave out what is frozen
        named = {name: p for name, p in named.items() if p.requires_grad}
    return Average(source, _in_order(source, state, named), counted, kernel)


def _under(prefix: str, state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _in_order(source: str, state: Mapping[str, Any], named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names for a list of weights without names: those of the model's parameters, one after the other."""
    shadows = list(state["shadow_params"])
    shapes = [tuple(s.shape) for s in shadows]
    for (name, own), shape in zip(named.items(), shapes, strict=False):
        if tuple(own.shape) != shape:
            raise ValueError(
                f"the state of {source} is of another architecture: its weights have no names, and the one "
                f"in the place of {name!r} has shape {shape}, the model's {tuple(own.shape)}"
            )
    if len(shadows) != len(named):
        raise ValueError(
            f"the state of {source} is of another architecture: it has {len(shadows)} weights, the model "
            f"{len(named)}; pass the model whose parameters it was made of"
        )
    return dict(zip(named, shadows, strict=True))


_READERS: dict[str, tuple[set[str], Callable[[str, Mapping[str, Any], nn.Module], Average]]] = {
    "diffusers": ({"shadow_params", "optimization_step"}, _diffusers),
    "torch-ema": ({"shadow_params", "num_updates"}, _torch_ema),
    "ema-pytorch": ({"initted", "step"}, _ema_pytorch),
    "lightning": ({"averaging_state", "state_dict"}, _lightning),
    "torch": ({"n_averaged"}, _averaged_model),
    "timm": ({"state_dict_ema"}, _timm),
}
"""Source -> the keys that tell it, and what reads it."""
