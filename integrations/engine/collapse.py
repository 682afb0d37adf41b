"""Collapse of a network's outputs, detected from its probabilities and called by its name."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from wmateacher.integrations.engine import processes
from wmateacher.integrations.engine.loop import History


class CollapseWarning(UserWarning):
    """The outputs no longer tell the inputs apart, or most of them are never used."""


class OutputMonitor(nn.Module):
    """Two numbers on the outputs p(c | x) of the last steps, without waiting for the device.

    - information: H(mean_x p) - mean_x H(p), the mutual information of input and output in nats: 0 where
      the output is the same for all inputs, be it uniform or one class.
    - used: exp(H(mean_x p)), the effective number of outputs in use, between 1 and C.

    Args:
        outputs: C.
        window: Steps that one reading stands for.
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
        """Take in the `[..., C]` of the step with this index; at the end of a window, its two numbers."""
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


def verdict(information: float, used: float, outputs: int, least_used: float) -> str | None:
    """What has collapsed, in words; None: nothing.

    Args:
        information: Of a window, in nats.
        used: The effective number of outputs in use.
        outputs: C.
        least_used: Effective outputs below which most of them count as dead.
    """
    if information < 0.01 * math.log(outputs):
        kind = "one output takes all" if used < 1.5 else "all inputs give the same mixture of outputs"
        return f"constant output: {kind} (information {information:.3f} of {math.log(outputs):.1f} nats)"
    if used < least_used:
        return f"dead outputs: about {used:.1f} of {outputs} are in use (at least {least_used:g} expected)"
    return None


class Watch:
    """Warns of a collapse, once of each kind, after the first tenth of a run.

    Args:
        name: Of the run.
        steps: Its length T.
        outputs: C.
        least_used: As for `verdict`.
        remedy: What to change, in words.
    """

    def __init__(self, name: str, steps: int, outputs: int, least_used: float, remedy: str):
        self.name, self.steps, self.remedy = name, steps, remedy
        self.outputs, self.least_used = outputs, least_used
        self._warned: set[str] = set()

    def see(self, step: int, logged: Mapping[str, float]) -> None:
        """Look at what was logged after `step` steps."""
        if "used" not in logged or step <= self.steps // 10:
            return
        found = verdict(logged["information"], logged["used"], self.outputs, self.least_used)
        kind = "" if found is None else found.partition(":")[0]
        if found is not None and kind not in self._warned and processes.is_main():
            self._warned.add(kind)
            warnings.warn(
                f"{self.name}: collapsed at step {step} of {self.steps}, {found}: {self.remedy}",
                CollapseWarning,
                stacklevel=2,
            )

    def judge(self, record: History) -> str | None:
        """The verdict on a run's last window; None where there is none."""
        information, used = record.values("information"), record.values("used")
        return verdict(information[-1], used[-1], self.outputs, self.least_used) if used else None


def _entropy(probabilities: Tensor) -> Tensor:
    return -torch.special.xlogy(probabilities, probabilities).sum(-1)
