"""Detect collapsed outputs from their probabilities, and name the kind of collapse."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from wmateacher.integrations.engine import processes

__all__ = ["CollapseWarning", "CollapseWatch", "OutputMonitor", "diagnose"]


class CollapseWarning(UserWarning):
    """The outputs are the same for all inputs, or most outputs are never used."""


class OutputMonitor(nn.Module):
    """Summarise the outputs p(c | x) of the last steps in two numbers, without waiting for the device.

    - information: H(mean_x p) - mean_x H(p), the mutual information of input and output in nats. It is 0 if
      the output is the same for all inputs, whether it is uniform or a single class.
    - used: exp(H(mean_x p)), the effective number of outputs in use, between 1 and C.

    Args:
        outputs: The number of outputs C.
        window: The number of steps that one summary covers.
    """

    mean: Tensor
    entropy: Tensor

    def __init__(self, outputs: int, window: int = 50):
        super().__init__()
        self.window = window
        self.register_buffer("mean", torch.zeros(outputs))
        self.register_buffer("entropy", torch.zeros(()))

    @torch.no_grad()
    def update(self, step: int, probabilities: Tensor) -> dict[str, Tensor]:
        """Add the outputs of one step.

        Args:
            step: The index of the step.
            probabilities: The outputs, shape `[..., C]`.

        Returns:
            `information` and `used` at the end of a window, an empty dict otherwise.
        """
        flat = probabilities.detach().flatten(0, -2)
        self.mean += flat.mean(0) / self.window
        self.entropy += _entropy(flat).mean() / self.window
        if (step + 1) % self.window:
            return {}
        of_mean = _entropy(self.mean)
        found = {"information": of_mean - self.entropy, "used": of_mean.exp()}
        self.mean.zero_()
        self.entropy.zero_()
        return found


def diagnose(information: float, used: float, outputs: int, least_used: float) -> str | None:
    """Return a description of the collapse, or None if the outputs have not collapsed.

    Args:
        information: The mutual information of a window, in nats.
        used: The effective number of outputs in use.
        outputs: The number of outputs C.
        least_used: The effective number of outputs below which most of them count as dead.
    """
    if information < 0.01 * math.log(outputs):
        kind = "one output takes all" if used < 1.5 else "all inputs give the same mixture of outputs"
        return f"constant output: {kind} (information {information:.3f} of {math.log(outputs):.1f} nats)"
    if used < least_used:
        return f"dead outputs: about {used:.1f} of {outputs} are in use (at least {least_used:g} expected)"
    return None


class CollapseWatch:
    """Warn of a collapse, once for each kind, after the first tenth of a run.

    Args:
        name: The name of the run.
        steps: The length T of the run.
        outputs: The number of outputs C.
        least_used: The effective number of outputs below which most of them count as dead.
        hint: Advice on what to change, which ends the warning.
    """

    def __init__(self, name: str, steps: int, outputs: int, least_used: float, hint: str):
        self.name, self.steps, self.hint = name, steps, hint
        self.outputs, self.least_used = outputs, least_used
        self._warned: set[str] = set()

    def see(self, step: int, logged: Mapping[str, float]) -> None:
        """Look at the values that were logged after `step` steps, and warn if they show a collapse."""
        if "used" not in logged or step <= self.steps // 10:
            return
        found = diagnose(logged["information"], logged["used"], self.outputs, self.least_used)
        kind = "" if found is None else found.partition(":")[0]
        if found is not None and kind not in self._warned and processes.is_main():
            self._warned.add(kind)
            warnings.warn(
                f"{self.name}: collapsed at step {step} of {self.steps}, {found}: {self.hint}",
                CollapseWarning,
                stacklevel=2,
            )

    def verdict(self, information: Sequence[float], used: Sequence[float]) -> str | None:
        """Return the description of a collapse in the last window; None without a collapse or a window.

        Args:
            information: The information of every window.
            used: The effective number of outputs in use in every window.
        """
        return diagnose(information[-1], used[-1], self.outputs, self.least_used) if used else None


def _entropy(probabilities: Tensor) -> Tensor:
    return -torch.special.xlogy(probabilities, probabilities).sum(-1)
