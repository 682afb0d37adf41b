"""Kernel + horizon + update interval -> the weight of each update. The only file that knows time.

The clock counts optimizer steps. With `update_every=n` the student is looked at at steps 0, n, 2n, ...
and T, and each step's mass goes to the nearest of these snapshots (ties to the later):

    omega = 1 - prod_j r_j   over the steps j that the snapshot stands for

so n = 1 is the paper exactly, an EMA at interval n has omega = 1 - rho^n, and for any n the window,
measured in steps, stays the same. All of it is float64 on the host.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wmateacher.checks import positive_int
from wmateacher.kernels import Array, Kernel, realised_weights


class Clock:
    """Counts optimizer steps and says what weight each snapshot gets.

    Args:
        kernel: How much each step counts.
        total_steps: The horizon T in optimizer steps; None where the kernel needs none.
        update_every: Snapshot interval n in optimizer steps.

    Raises:
        ValueError: A number out of range, a kernel that needs a horizon without one, or a kernel that
            has no mass within it.
    """

    def __init__(self, kernel: Kernel, total_steps: int | None = None, update_every: int = 1):
        self.kernel = kernel
        self.update_every = positive_int("update_every", update_every)
        self.step = 0
        self.snapshot = 0
        """The step of the last snapshot."""
        self._horizons: list[tuple[int, int | None]] = []
        self._held = False
        self._set_horizon(None if total_steps is None else positive_int("total_steps", total_steps))

    @property
    def total_steps(self) -> int | None:
        """The horizon T now in force."""
        return self._horizons[-1][1]

    def tick(self) -> float | None:
        """Count one optimizer step.

        Returns:
            The weight omega of the student in the average, or None where no snapshot is due. Past the
            horizon the clock holds at T, with one warning, and nothing is due.
        """
        total = self.total_steps
        if total is not None and self.step >= total:
            if not self._held:
                warnings.warn(
                    f"update() was called after step {total} of total_steps={total}: the teacher is "
                    "finished and stays as it is; if the run is longer, call set_total_steps first",
                    stacklevel=4,
                )
                self._held = True
            return None
        self.step += 1
        if self.step % self.update_every and self.step != total:
            return None
        omega = float(self._omegas(np.array([self.snapshot, self.step]), self._retention, total)[0])
        self.snapshot = self.step
        return omega

    def trajectory_weights(self) -> Array:
        """The realised weight of every student state so far.

        Returns:
            float64 `[step + 1]`, summing to 1; steps without a snapshot have weight 0.
        """
        snapshots, omegas = [np.array([0])], [np.array([1.0])]
        ends = [since for since, _ in self._horizons[1:]] + [self.step]
        for (since, total), end in zip(self._horizons, ends, strict=True):
            due = np.arange(since + 1, end + 1)
            due = due[(due % self.update_every == 0) | (due == total)]
            if len(due):
                chain = np.append(snapshots[-1][-1], due)
                retention = self._retention if total == self.total_steps else self._look_up(total)
                snapshots.append(due)
                omegas.append(self._omegas(chain, retention, total))
        weights = np.zeros(self.step + 1)
        weights[np.concatenate(snapshots)] = realised_weights(np.concatenate(omegas))
        return weights

    def set_total_steps(self, total_steps: int) -> None:
        """Change the horizon from here on.

        What is already averaged keeps its proportions, and together it gets the mass that the kernel
        over the new horizon gives to those steps; every later step gets exactly its new weight.

        Raises:
            ValueError: `total_steps` is not a whole number, or the run is already past it.
        """
        total_steps = positive_int("total_steps", total_steps)
        if total_steps < self.step:
            raise ValueError(
                f"total_steps must be at least the {self.step} steps already taken, got {total_steps}"
            )
        self._set_horizon(total_steps)

    def jump(self, step: int) -> None:
        """Stand after `step` steps, as if they had been counted under the horizon now in force.

        Raises:
            ValueError: `step` is not a whole number in [0, total_steps].
        """
        total = self.total_steps
        if step:
            step = positive_int("step", step)
        if total is not None and step > total:
            raise ValueError(f"step must be at most total_steps={total}, got {step}")
        self.step = step
        self.snapshot = step if step == total else step - step % self.update_every
        self._horizons, self._held = [(0, total)], False

    def state(self) -> dict[str, Any]:
        """Everything needed to go on exactly, in plain Python types."""
        return {
            "kernel": str(self.kernel),
            "update_every": self.update_every,
            "step": self.step,
            "snapshot": self.snapshot,
            "horizons": [list(h) for h in self._horizons],
            "mass": self._mass(self.snapshot),
        }

    def check(self, state: dict[str, Any]) -> None:
        """Refuse a state that another kernel, horizon or interval wrote.

        Raises:
            ValueError: It names the checkpoint's value and this clock's.
        """
        for name, theirs, ours in (
            ("kernel", state["kernel"], str(self.kernel)),
            ("total_steps", state["horizons"][-1][1], self.total_steps),
            ("update_every", state["update_every"], self.update_every),
        ):
            if theirs != ours:
                raise ValueError(
                    f"the checkpoint was written with {name}={theirs!r}, this teacher has "
                    f"{name}={ours!r}: build the teacher with {name}={theirs!r} to resume that run"
                    + (", then call set_total_steps to change its horizon" if name == "total_steps" else "")
                )
        mass = self._mass(state["snapshot"])
        if not np.isclose(state["mass"], mass, rtol=1e-9, atol=0):
            raise ValueError(
                f"the checkpoint's running mass at step {state['snapshot']} is {state['mass']!r}, this "
                f"teacher's kernel {str(self.kernel)!r} gives {mass!r}: its density has changed since"
            )

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state that `state` returned; call `check` before."""
        self.step, self.snapshot = state["step"], state["snapshot"]
        self._horizons = [(since, total) for since, total in state["horizons"]]
        self._held = False

    def _set_horizon(self, total_steps: int | None) -> None:
        if total_steps is None and self.kernel.needs_horizon:
            self.kernel.retention(np.arange(1), None)  # raises, and says what to do
        self._retention = self._look_up(total_steps)
        self._horizons = [h for h in self._horizons if h[0] < self.step]
        self._horizons.append((self.step, total_steps))
        self._held = False

    def _look_up(self, total_steps: int | None) -> Array | None:
        if total_steps is None:
            return None
        return self.kernel.retention(np.arange(total_steps + 1), total_steps)

    def _omegas(self, chain: NDArray[np.int64], retention: Array | None, total_steps: int | None) -> Array:
        """The weights of the snapshots `chain[1:]`, `chain[0]` being the one before them."""
        following = (chain[1:] // self.update_every + 1) * self.update_every
        if total_steps is not None:
            following = np.minimum(following, total_steps)
        # The last step nearer to a snapshot than to the one that follows it; T itself ends the run.
        last = np.maximum((chain[1:] + following - 1) // 2, chain[1:])
        first = np.append((chain[0] + chain[1] - 1) // 2, last[:-1]) + 1
        steps = np.arange(first[0], last[-1] + 1)
        kept = self.kernel.retention(steps, None) if retention is None else retention[steps]
        return 1.0 - np.multiply.reduceat(kept, first - first[0])

    def _mass(self, snapshot: int) -> float:
        """The share of the finished run's average that states up to `snapshot` will hold."""
        if self._retention is None:
            return 1.0
        return float(np.prod(self._retention[snapshot + 1 :]))
