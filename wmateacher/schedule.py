"""The clock: it turns a kernel, a horizon and an update interval into the weight of each update.

No other module counts steps. With `update_every=n`, snapshots of the student are taken at steps 0, n, 2n, ...
and T. The mass of each step goes to the nearest snapshot, and to the later one at a tie:

    omega = 1 - prod_j r_j   over the steps j that belong to the snapshot

With n = 1 this is TRACER's recursion, an EMA at interval n has omega = 1 - rho^n, and for every n the window,
measured in steps, stays the same. All numbers are float64 on the host.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wmateacher.checks import positive_int
from wmateacher.kernels import Array, Kernel, realised_weights

__all__ = ["Clock"]


class Clock:
    """Counts optimizer steps and returns the weight of each snapshot.

    Args:
        kernel: The weighting of the steps.
        total_steps: The horizon T in optimizer steps; None for kernels that need none.
        update_every: The snapshot interval n in optimizer steps.

    Raises:
        ValueError: If a number is out of range, the kernel needs a horizon and `total_steps` is None, or the
            kernel has no mass within the horizon.
    """

    def __init__(self, kernel: Kernel, total_steps: int | None = None, update_every: int = 1):
        self.kernel = kernel
        self.update_every = positive_int("update_every", update_every)
        self.step = 0
        self.snapshot = 0
        """The step of the last snapshot."""
        self._horizons: list[tuple[int, int | None]] = []  # (step since which it holds, horizon)
        self._warned = False
        self._set_horizon(None if total_steps is None else positive_int("total_steps", total_steps))

    @property
    def total_steps(self) -> int | None:
        """The current horizon T."""
        return self._horizons[-1][1]

    def tick(self) -> float | None:
        """Count one optimizer step.

        Returns:
            The weight omega of the student in the average, or None if no snapshot is due. Past the horizon
                the clock stays at T, warns once, and no snapshot is due.
        """
        total = self.total_steps
        if total is not None and self.step >= total:
            if not self._warned:
                warnings.warn(
                    f"update() was called after step {total} of total_steps={total}: the teacher is "
                    "finished and does not change any more; if the run is longer, call set_total_steps first",
                    stacklevel=4,  # the caller of WMATeacher.update
                )
                self._warned = True
            return None
        self.step += 1
        if self.step % self.update_every and self.step != total:
            return None
        omega = float(self._omegas(np.array([self.snapshot, self.step]), self._retention, total)[0])
        self.snapshot = self.step
        return omega

    def trajectory_weights(self) -> Array:
        """Return the weight of every student state in the current average.

        Returns:
            A float64 array of shape `[step + 1]` that sums to 1. Steps without a snapshot have weight 0.
        """
        snapshots, omegas = [np.array([0])], [np.array([1.0])]
        # Replay the run: each horizon gave the weights of the snapshots that were taken while it held.
        ends = [since for since, _ in self._horizons[1:]] + [self.step]
        for (since, total), end in zip(self._horizons, ends, strict=True):
            due = np.arange(since + 1, end + 1)
            due = due[(due % self.update_every == 0) | (due == total)]
            if len(due):
                chain = np.append(snapshots[-1][-1], due)
                retention = self._retention if total == self.total_steps else self._whole_retention(total)
                snapshots.append(due)
                omegas.append(self._omegas(chain, retention, total))
        weights = np.zeros(self.step + 1)
        weights[np.concatenate(snapshots)] = realised_weights(np.concatenate(omegas))
        return weights

    def set_total_steps(self, total_steps: int) -> None:
        """Change the horizon from here on, as described at `WMATeacher.set_total_steps`.

        Raises:
            ValueError: If `total_steps` is not a whole number, or the run is already past it.
        """
        total_steps = positive_int("total_steps", total_steps)
        if total_steps < self.step:
            raise ValueError(
                f"total_steps must be at least the {self.step} steps already taken, got {total_steps}"
            )
        self._set_horizon(total_steps)

    def jump(self, step: int) -> None:
        """Set the step count, as if all steps had been counted under the current horizon.

        Raises:
            ValueError: If `step` is not a whole number in [0, total_steps].
        """
        total = self.total_steps
        if step:
            step = positive_int("step", step)
        if total is not None and step > total:
            raise ValueError(f"step must be at most total_steps={total}, got {step}")
        self.step = step
        self.snapshot = step if step == total else step - step % self.update_every
        self._horizons, self._warned = [(0, total)], False

    def state(self) -> dict[str, Any]:
        """Return everything that an exact resume needs, in plain Python types."""
        return {
            "kernel": str(self.kernel),
            "update_every": self.update_every,
            "step": self.step,
            "snapshot": self.snapshot,
            "horizons": [list(h) for h in self._horizons],
            "mass": self._mass(self.snapshot),
        }

    def check(self, state: dict[str, Any]) -> None:
        """Check that a state was written with this kernel, horizon and interval.

        Raises:
            ValueError: If one of them differs; the message names both values.
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
        # A callable density has only its name in the state. Its running mass tells whether it has changed.
        mass = self._mass(state["snapshot"])
        if not np.isclose(state["mass"], mass, rtol=1e-9, atol=0):
            raise ValueError(
                f"the checkpoint's running mass at step {state['snapshot']} is {state['mass']!r}, this "
                f"teacher's kernel {str(self.kernel)!r} gives {mass!r}: its density has changed since"
            )

    def restore(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned, after `check` has accepted it."""
        self.step, self.snapshot = state["step"], state["snapshot"]
        self._horizons = [(since, total) for since, total in state["horizons"]]
        self._warned = False

    def _set_horizon(self, total_steps: int | None) -> None:
        if total_steps is None and self.kernel.needs_horizon:
            self.kernel.retention(np.arange(1), None)  # raises the kernel's own error
        # A density has to be summed over the whole run to give any of its retentions, so that is done once.
        self._retention = self._whole_retention(total_steps)
        # A horizon that was set at this same step has never been used.
        self._horizons = [h for h in self._horizons if h[0] < self.step]
        self._horizons.append((self.step, total_steps))
        self._warned = False

    def _whole_retention(self, total_steps: int | None) -> Array | None:
        """Return the retention of every step of the run, or None without a horizon."""
        if total_steps is None:
            return None
        return self.kernel.retention(np.arange(total_steps + 1), total_steps)

    def _omegas(self, chain: NDArray[np.int64], retention: Array | None, total_steps: int | None) -> Array:
        """Return the weights of the snapshots at steps `chain[1:]`; `chain[0]` is the snapshot before them.

        A snapshot's steps are one interval: they begin halfway to the snapshot before it and end halfway to
        the one that follows. The step exactly in the middle belongs to the later snapshot, hence the `- 1`
        below. When the next snapshot is due is known beforehand, so that the weight can be applied at once.
        """
        following = (chain[1:] // self.update_every + 1) * self.update_every
        if total_steps is not None:
            following = np.minimum(following, total_steps)
        # At T no snapshot follows: `following` is T itself, and the maximum keeps the interval's end there.
        last = np.maximum((chain[1:] + following - 1) // 2, chain[1:])
        first = np.append((chain[0] + chain[1] - 1) // 2, last[:-1]) + 1
        steps = np.arange(first[0], last[-1] + 1)
        kept = self.kernel.retention(steps, None) if retention is None else retention[steps]
        # The intervals adjoin, so that reduceat multiplies from the start of each to the start of the next.
        return 1.0 - np.multiply.reduceat(kept, first - first[0])

    def _mass(self, snapshot: int) -> float:
        """Return the share that states up to `snapshot` will have in the average at the end of the run."""
        if self._retention is None:
            return 1.0
        return float(np.prod(self._retention[snapshot + 1 :]))


def __dir__() -> list[str]:
    return __all__
