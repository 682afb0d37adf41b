"""Synthesise the average of any kernel from a recorder's snapshots."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wmateacher import kernels
from wmateacher.files import File, save
from wmateacher.folders import check_target
from wmateacher.kernels import Array, KernelLike
from wmateacher.posthoc.combining import combine
from wmateacher.posthoc.snapshots import read_header, snapshot_files
from wmateacher.posthoc.sources import align
from wmateacher.schedule import Clock

__all__ = ["Synthesis", "solve", "synthesise"]


def __dir__() -> list[str]:
    return __all__


@dataclass(frozen=True, eq=False)
class Synthesis:
    """How well a synthesised average follows its kernel; `str` gives a small table.

    If no state of the run is further than `r` from some fixed point, the synthesised weights are within
    `l1_error * r` of the average that a teacher would have kept during training. The rounding errors of the
    snapshots, multiplied by up to `amplification`, come on top of that.

    Attributes:
        kernel: The kernel as a string.
        step: The step of the average.
        total_steps: The kernel's horizon.
        files: The snapshots.
        coefficients: The coefficient of each snapshot, float64 `[len(files)]`.
        weights: The realised weight of every student state, float64 `[states]`.
        target: The kernel's weight of every student state, float64 `[states]`.
        relative_error: `||weights - target|| / ||target||` in the Euclidean norm.
        l1_error: `sum |weights - target|`. 0 is exact; at 2, nothing is shared with the target.
        weight_sum: `sum(weights)`, which is 1 up to rounding.
        amplification: `sum |coefficients|`, which is 1 for a convex combination.
    """

    kernel: str
    step: int
    total_steps: int
    files: tuple[Path, ...]
    coefficients: Array
    weights: Array
    target: Array

    @property
    def relative_error(self) -> float:  # noqa: D102
        return float(np.linalg.norm(self.weights - self.target) / np.linalg.norm(self.target))

    @property
    def l1_error(self) -> float:  # noqa: D102
        return float(np.abs(self.weights - self.target).sum())

    @property
    def weight_sum(self) -> float:  # noqa: D102
        return float(self.weights.sum())

    @property
    def amplification(self) -> float:  # noqa: D102
        return float(np.abs(self.coefficients).sum())

    def __str__(self) -> str:
        return "\n".join(
            [
                f"{self.kernel} at step {self.step} of {self.total_steps}, from {len(self.files)} snapshots",
                f"  relative error         {self.relative_error:.2e}",
                f"  L1 error               {self.l1_error:.2e}",
                f"  sum of the weights     {self.weight_sum:.9f}",
                f"  amplification          {self.amplification:.1f}",
            ]
        )


def synthesise(
    snapshots: File | Sequence[File],
    kernel: KernelLike,
    total_steps: int | None = None,
    *,
    step: int | None = None,
    ridge: float = 1e-5,
    output: File | None = None,
) -> tuple[dict[str, Any], Synthesis]:
    r"""Compute the average of any kernel from snapshots that a `Recorder` wrote.

    With `p_i` the realised weights of snapshot i and `q` the kernel's (both exact, for every step), the
    coefficients minimise

    $$\| \textstyle\sum_i c_i p_i - q \|^2 + \mu^2 \| c - e \|^2, \qquad \textstyle\sum_i c_i = 1,$$

    where `e` selects the snapshot nearest to `q`. A recorded average is therefore reproduced exactly, and the
    weights always sum to 1. (Karras et al. 2024, Algorithm 3, use the inner products of continuous profiles,
    no `mu`, and scale to sum 1 at the end.)

    Tensors that the teacher copies instead of averaging (by default, the buffers) come from the last
    snapshot.

    Args:
        snapshots: The recorder's folder, or a list of its files.
        kernel: The kernel, in any form that `WMATeacher` accepts.
        total_steps: The kernel's horizon. Default: the recorder's, or the step of the last snapshot.
        step: The step of the average. Default: `total_steps`.
        ridge: `mu`. Snapshots are rounded (float32: 6e-8 of a weight), and coefficients of 1e4 would turn
            that into noise. The default suits float32 and a run that moves its weights by about 1%. For
            float64, use a smaller value such as 1e-12.
        output: The file to write the state to with `files.save`. Default: none.

    Returns:
        The averaged weights at the snapshots' precision, and how well they follow the kernel.

    Raises:
        ValueError: If there are no snapshots, they come from different runs, or they end before `step`.
    """
    check_target(output, [{}])
    if not np.isfinite(ridge) or ridge < 0:
        raise ValueError(f"ridge must be a finite number of at least 0, got {ridge!r}")
    files = _chosen_files(snapshots)
    headers = [read_header(file) for file in files]
    clocks = [header.clock for header in headers]
    last = max(range(len(files)), key=lambda i: clocks[i].step)
    intervals = {clock.update_every for clock in clocks}
    if len(intervals) > 1 or any(h.averaged != headers[last].averaged for h in headers):
        raise ValueError(
            f"the {len(files)} snapshots are not of one run: their update_every or the tensors that they "
            "average differ; pass the snapshots of one recorder. If parameters were unfrozen during the run, "
            "pass those from after that, and record with frozen='copy' next time"
        )
    built = kernels.build(kernel)
    if total_steps is None:
        total_steps = clocks[last].total_steps or clocks[last].step
    target_clock = Clock(built, total_steps, intervals.pop())
    step = total_steps if step is None else step
    latest = min(total_steps, clocks[last].step)
    if not 0 <= step <= latest:
        raise ValueError(
            f"step must be between 0 and {latest} (total_steps={total_steps}, last snapshot at step "
            f"{clocks[last].step}), got {step}: pass step={latest}, or snapshots of later steps"
        )
    target_clock.restore({**target_clock.state(), "step": step})

    states = clocks[last].step + 1
    target = _padded(target_clock.trajectory_weights(), states)
    profiles = np.stack([_padded(clock.trajectory_weights(), states) for clock in clocks], axis=1)
    coefficients = solve(profiles, target, ridge)
    report = Synthesis(
        kernel=str(built),
        step=step,
        total_steps=total_steps,
        files=tuple(files),
        coefficients=coefficients,
        weights=profiles @ coefficients,
        target=target,
    )
    state = combine(
        align(files, check=False),
        lambda name: coefficients,
        last=last,
        only=frozenset(headers[last].averaged),
    )
    if output is not None:
        save(state, output)
    return state, report


def solve(profiles: Array, target: Array, ridge: float = 0.0) -> Array:
    """Return the coefficients of `synthesise`: a least-squares fit of weight vectors, with sum 1.

    Args:
        profiles: The weight vectors as columns, float64 `[states, n]`; each column sums to 1.
        target: The weights to fit, float64 `[states]`.
        ridge: The penalty on the distance from the nearest profile alone, `mu` in `synthesise`.

    Returns:
        float64 `[n]`, summing to 1.
    """
    import scipy.linalg  # takes a while to load, and nothing else here needs it

    used = profiles.any(axis=1) | (target != 0)
    profiles, target = profiles[used], target[used]
    nearest = int(np.argmin(np.linalg.norm(profiles - target[:, None], axis=0)))
    # The unknowns are the other coefficients. The nearest profile gets what they leave of 1.
    system = np.delete(profiles, nearest, axis=1) - profiles[:, [nearest]]
    others = system.shape[1]
    if others == 0:
        return np.ones(1)
    system = np.concatenate([system, ridge * np.eye(others)])
    residual = np.append(target - profiles[:, nearest], np.zeros(others))
    found = scipy.linalg.lstsq(system, residual, overwrite_a=True, overwrite_b=True)[0]
    return np.insert(found, nearest, 1.0 - found.sum())


def _chosen_files(snapshots: File | Sequence[File]) -> list[Path]:
    if isinstance(snapshots, str | os.PathLike):
        folder = Path(snapshots)
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {str(folder)!r}")
        files = snapshot_files(folder)
        where = f"{str(folder)!r} holds"
    else:
        files, where = [Path(s) for s in snapshots], "the list has"
    if not files:
        raise ValueError(f"{where} no snapshots: record some with Recorder(model, folder=..., every=...)")
    return files


def _padded(weights: Array, states: int) -> Array:
    return np.append(weights, np.zeros(states - len(weights)))
