"""The clock: it turns a kernel, a horizon and an update interval into the weight of each update.

No other module counts steps. With `update_every=n`, snapshots of the student are taken at steps 0, n, 2n, ...
and T. The mass of each step goes to the nearest snapshot, and to the later one at a tie:

    omega = 1 - prod_j r_j   over the steps j that belong to the snapshot

A snapshot that was skipped leaves its steps to the next one, and an average that was made elsewhere has the
mass of all steps up to the one at which it joined the run.

With n = 1 this is TRACER's recursion, an EMA at interval n has omega = 1 - rho^n, and for every n the window,
measured in steps, stays the same. All numbers are float64 on the host.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wmateacher.checks import positive_int, whole
from wmateacher.kernels import Array, Kernel, build, realised_weights

__all__ = ["Clock"]

# The steps of a run of unknown length, and of the longest one that is looked at.
_LONG, _LONGEST = 100_000, 1_000_000


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
        """The step of the last snapshot in the average, or the last `jump`."""
        self.joined = 0
        """The step of the last `jump`: the states up to it came as one average."""
        self.skipped: list[int] = []
        """The steps of the skipped snapshots."""
        self._previous: int | None = None  # `snapshot` before the last one, until that is skipped
        self._horizons: list[tuple[int, int | None]] = []  # (step since which it holds, horizon)
        self._warned = False
        self._set_horizon(None if total_steps is None else positive_int("total_steps", total_steps))

    @property
    def total_steps(self) -> int | None:
        """The current horizon T."""
        return self._horizons[-1][1]

    @property
    def covered(self) -> int:
        """The last step whose mass is in the average, under the current horizon."""
        return int(self._covered(self.snapshot, self.total_steps))

    def relative_mean_age(self) -> float:
        """Return the mean age of the states in the finished average, as a share of the run.

        Without a horizon, the run is taken to be long. Kernels that are asked step by step are looked at for
        a million steps at most.
        """
        late = getattr(self.kernel, "start_step", 0)
        total = self.total_steps or max(_LONG, 2 * late)  # enough for an average that starts late
        # Such an average is that of a run that begins where it starts.
        first, last = (0, total) if self._table is not None else (late, min(total, late + _LONGEST))
        if first == last:
            return 0.0
        kept = self._kept(
            np.arange(first + 1, last + 1), self.total_steps if self._table is not None else last
        )
        # A state is at least n steps old with the product of the last n retentions.
        return float(np.cumprod(kept[::-1]).sum()) / (last - first) * (total - first) / total

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
        step = self.step + 1
        if step % self.update_every and step != total:
            self.step = step
            return None
        omega = float(self._omegas(np.array([self.snapshot, step]), total)[0])  # an error counts no step
        self._previous, self.snapshot, self.step = self.snapshot, step, step
        return omega

    def skip(self) -> None:
        """Take back the last snapshot, which did not enter the average after all.

        Its step stays counted and gets weight 0. Its mass goes to the next snapshot; after the last snapshot
        of a run there is none, and the other states share it in their proportions. This may be called at any
        time after the `tick` that returned the snapshot's omega, and before the `tick` that returns the next.

        Raises:
            RuntimeError: If no `tick` has returned an omega since the start, the last skip, the last jump, or
                the state that was restored.
        """
        # A tick that failed is taken back by its caller, who sets `step` and `snapshot` to what they were.
        if self._previous is None or self._previous >= self.snapshot:
            raise RuntimeError(
                "there is no snapshot to skip: call skip() after a tick() that returned a weight"
            )
        self.skipped.append(self.snapshot)
        self.snapshot, self._previous = self._previous, None

    def trajectory_weights(self) -> Array:
        """Return the weight of every student state in the current average.

        Returns:
            A float64 array of shape `[step + 1]` that sums to 1. Steps without a snapshot have weight 0.
        """
        # The states of an average that was made elsewhere share its mass as the kernel shares it.
        kept = self._kept(np.arange(self.joined + 1), self._horizons[0][1])
        start = realised_weights(1.0 - kept)
        # Replay the run: each horizon gave the weights of the snapshots that were taken while it held.
        snapshots, omegas = [np.array([self.joined])], [np.array([1.0])]
        ends = [since for since, _ in self._horizons[1:]] + [self.step]
        for (since, total), end in zip(self._horizons, ends, strict=True):
            due = np.arange(max(since, self.joined) + 1, end + 1)
            due = due[(due % self.update_every == 0) | (due == total)]
            due = due[~np.isin(due, self.skipped)]
            if len(due):
                omegas.append(self._omegas(np.append(snapshots[-1][-1], due), total))
                snapshots.append(due)
        weights = np.zeros(self.step + 1)
        weights[np.concatenate(snapshots)] = realised_weights(np.concatenate(omegas))
        weights[: self.joined + 1] = weights[self.joined] * start
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
        """Set the step count, for an average that covers all steps up to this one.

        Whatever the interval, later steps get exactly their weights. At step 0 this is a new start.

        Raises:
            ValueError: If `step` is not a whole number in [0, total_steps].
        """
        total = self.total_steps
        step = whole("step", step, 0)
        if total is not None and step > total:
            raise ValueError(f"step must be at most total_steps={total}, got {step}")
        self.step = self.snapshot = self.joined = step
        self.skipped, self._previous = [], None
        self._horizons, self._warned = [(0, total)], False

    def state(self) -> dict[str, Any]:
        """Return everything that an exact resume needs, in plain Python types."""
        return {
            "kernel": str(self.kernel),
            "update_every": self.update_every,
            "step": self.step,
            "snapshot": self.snapshot,
            "joined": self.joined,
            "skipped": list(self.skipped),
            "horizons": [list(h) for h in self._horizons],
            "mass": None if self._table is None else self._mass(self.snapshot),
        }

    @classmethod
    def resumed(cls, state: Mapping[str, Any]) -> Clock:
        """Return the clock that wrote a state.

        Raises:
            ValueError: If the state is damaged, or is of a kernel that its name does not build.
        """
        _check_values(state)
        clock = cls(build(state["kernel"]), state["horizons"][-1][1], state["update_every"])
        clock.check(state)
        clock.restore(state)
        return clock

    def check(self, state: Mapping[str, Any]) -> None:
        """Check that a state was written with this kernel, horizon and interval.

        Raises:
            ValueError: If one of them differs, and the message names both values; or if the state is damaged.
        """
        _check_values(state)
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
        # States of version 0.1 have the mass of every kernel.
        if state["mass"] is None:
            return
        mass = self._mass(state["snapshot"])
        if not np.isclose(state["mass"], mass, rtol=1e-9, atol=0):
            raise ValueError(
                f"the checkpoint's running mass at step {state['snapshot']} is {state['mass']!r}, this "
                f"teacher's kernel {str(self.kernel)!r} gives {mass!r}: its density has changed since"
            )

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned, after `check` has accepted it."""
        self.step, self.snapshot = state["step"], state["snapshot"]
        # Version 0.1 counted as if an average that joined the run had been made by it, snapshots and all.
        self.joined, self.skipped = state.get("joined", 0), list(state.get("skipped", []))
        self._horizons = [(since, total) for since, total in state["horizons"]]
        self._previous, self._warned = None, False

    def _set_horizon(self, total_steps: int | None) -> None:
        self._table = self._make_table(total_steps)
        if self._table is None:
            self.kernel.retention(np.arange(1), total_steps)  # raises the kernel's own error
        # A horizon that was set at this same step has never been used.
        self._horizons = [h for h in self._horizons if h[0] < self.step]
        self._horizons.append((self.step, total_steps))
        self._warned = False

    def _make_table(self, total_steps: int | None) -> Array | None:
        """Return the retention of every step of the run, or None where the kernel is asked step by step."""
        if total_steps is None or self.kernel.stepwise:
            return None
        # A density has to be summed over the whole run to give any of its retentions, so that is done once.
        try:
            return self.kernel.retention(np.arange(total_steps + 1), total_steps)
        except MemoryError:
            raise MemoryError(
                f"kernel {str(self.kernel)!r} needs a table of all steps, which does not fit into memory for "
                f"total_steps={total_steps}: check the number, or use a kernel such as 'ema(0.999)'"
            ) from None

    def _kept(self, steps: NDArray[np.int64], total_steps: int | None) -> Array:
        """Return the retention of some steps under the current horizon or an earlier one."""
        table = self._table if total_steps == self.total_steps else self._make_table(total_steps)
        return self.kernel.retention(steps, total_steps) if table is None else table[steps]

    def _last_steps(self, snapshots: Any, total_steps: int | None) -> Any:
        """Return the last step that belongs to each snapshot.

        A snapshot's steps are one interval, which ends halfway to the snapshot that follows. The step exactly
        in the middle belongs to the later one, hence the `- 1` below. When the next snapshot is due is known
        beforehand, so that the weight can be applied at once.
        """
        following = (snapshots // self.update_every + 1) * self.update_every
        if total_steps is not None:
            following = np.minimum(following, total_steps)
        # At T no snapshot follows: `following` is T itself, and the maximum keeps the interval's end there.
        return np.maximum((snapshots + following - 1) // 2, snapshots)

    def _covered(self, snapshot: int, total_steps: int | None) -> Any:
        """Return the last step whose mass is in the average right after a snapshot or a jump."""
        # A jump has the mass of no later step. A jump to the start is the snapshot that was taken there.
        jumped = 0 < self.joined == snapshot
        return snapshot if jumped else self._last_steps(snapshot, total_steps)

    def _omegas(self, chain: NDArray[np.int64], total_steps: int | None) -> Array:
        """Return the weights of the snapshots at steps `chain[1:]`; `chain[0]` is the one before them."""
        last = self._last_steps(chain[1:], total_steps)
        # The intervals adjoin, so that reduceat multiplies from the start of each to the start of the next.
        first = np.append(self._covered(chain[0], total_steps), last[:-1]) + 1
        kept = self._kept(np.arange(first[0], last[-1] + 1), total_steps)
        return 1.0 - np.multiply.reduceat(kept, first - first[0])

    def _mass(self, snapshot: int) -> float:
        """Return the share that states up to `snapshot` will have in the average at the end of the run."""
        if self._table is not None:
            return float(np.prod(self._table[snapshot + 1 :]))
        total = self.total_steps
        return 1.0 if total is None else float(np.prod(self._kept(np.arange(snapshot + 1, total + 1), total)))


def _check_values(state: Mapping[str, Any]) -> None:
    """Check that a clock's state has values that a clock can have, whatever its kernel and horizon."""
    found: dict[str, Any] = {"joined": 0, "skipped": [], **state}  # version 0.1 wrote neither
    fields = ("kernel", "update_every", "horizons", "step", "snapshot", "joined", "skipped", "mass")
    missing = [f for f in fields if f not in found]
    if missing or ("joined" in state) != ("skipped" in state):
        missing = missing or [f for f in ("joined", "skipped") if f not in state]
        raise ValueError(f"the state of the teacher's clock lacks {', '.join(missing)}: it is damaged")
    kernel, every, horizons, step, snapshot, joined, skipped, mass = (found[f] for f in fields)
    sound = {
        "kernel": isinstance(kernel, str),
        "update_every": _whole(every, 1),
        "horizons": _sound_horizons(horizons),
    }
    if all(sound.values()):
        since, total = horizons[-1]
        sound["step"] = _whole(step, since, total)
        sound["snapshot"] = sound["step"] and _whole(snapshot, 0, step)
        sound["joined"] = sound["snapshot"] and _whole(joined, 0, snapshot)
        sound["skipped"] = sound["joined"] and _rising(skipped, joined + 1, step) and snapshot not in skipped
        sound["mass"] = mass is None or (isinstance(mass, Real) and bool(np.isfinite(float(mass))))
    for field, ok in sound.items():
        if not ok:
            raise ValueError(
                f"the state of the teacher's clock has {field}={found[field]!r}, which no run leads to: it "
                "is damaged, or not a teacher's; load another checkpoint"
            )


def _sound_horizons(horizons: Any) -> bool:
    """Return whether these are pairs of the step since which a horizon held and the horizon."""
    if not _sequence(horizons) or not horizons or not all(_sequence(h) and len(h) == 2 for h in horizons):
        return False
    starts, totals = zip(*horizons, strict=True)
    if not (_rising(starts, 0) and all(total is None or _whole(total, 1) for total in totals)):
        return False
    # A horizon is set within itself and within the one before.
    bounds = [*zip(starts, totals, strict=True), *zip(starts[1:], totals, strict=False)]
    return starts[0] == 0 and all(total is None or start <= total for start, total in bounds)


def _rising(values: Any, low: int, high: int | None = None) -> bool:
    return (
        _sequence(values)
        and all(_whole(value, low, high) for value in values)
        and all(a < b for a, b in itertools.pairwise(values))
    )


def _sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _whole(value: Any, low: int, high: int | None = None) -> bool:
    number = isinstance(value, Integral) and not isinstance(value, bool)
    return number and low <= value and (high is None or value <= high)


def __dir__() -> list[str]:
    return __all__
