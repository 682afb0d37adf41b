"""Tables, plots for the terminal and pictures of kernels, for the command `wmateacher kernel`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from wmateacher import kernels, theory
from wmateacher.kernels import Array, Kernel

__all__ = ["figure", "outlook", "stretching", "table", "terminal_plot"]


def __dir__() -> list[str]:
    return __all__


_BLOCKS = " ▁▂▃▄▅▆▇█"
_ASCII = " .:-=+*#@"
_WIDTH, _HEIGHT = 64, 5
_DECADES = 12
"""The largest height of the picture; the weights of a short EMA fall without end."""
_LONGEST_SIMULATED = 10**5
"""The longest run whose noise is computed, step by step."""


def table(built: Sequence[Kernel], total_steps: int, distill_weight: float) -> str:
    """Return a table with a summary of each kernel and its bias in the linear world."""
    header = ["kernel", "W^0", "mean age", "states", "last 10%", "equal EMA"]
    rows = [[*header, "teacher res.", "student res.", "gap"]]
    for kernel in built:
        summary = kernel.summary(total_steps)
        predicted = theory.predict(kernel, total_steps, distill_weight)
        row = [
            str(kernel),
            f"{summary.start_weight:.5f}",
            f"{summary.mean_age:.1f}",
            f"{summary.effective_states:.1f}",
            f"{summary.last_tenth:.4f}",
            f"{summary.equal_ema_retention:.6f}",
        ]
        parts = (predicted.teacher_residual, predicted.student_residual, predicted.gap)
        rows.append([*row, *(f"{part:.3g}" for part in parts)])
    return "\n".join([f"T = {total_steps} steps, distill_weight = {distill_weight:g}", _aligned(rows)])


def outlook(built: Sequence[Kernel], total_steps: int, distill_weight: float) -> str:
    """Return a table of kernels with bias and variance in the linear world."""
    rows = [["kernel", "W^0", "mean age", "states", "teacher: bias", "noise", "student: bias", "noise"]]
    simulated = total_steps <= _LONGEST_SIMULATED
    alone = theory.reference_run("static", total_steps, 0.0) if simulated else None
    for kernel in built:
        summary = kernel.summary(total_steps)
        row = [
            str(kernel),
            f"{summary.start_weight:.5f}",
            f"{summary.mean_age:.1f}",
            f"{summary.effective_states:.1f}",
        ]
        if alone is None:
            predicted = theory.predict(kernel, total_steps, distill_weight)
            rows.append(
                [*row, f"{predicted.teacher_residual:.3f}", "", f"{predicted.student_residual:.3f}", ""]
            )
            continue
        run = theory.reference_run(kernel, total_steps, distill_weight)
        for bias, variance in (
            (run.teacher_bias, run.teacher_variance),
            (run.student_bias, run.student_variance),
        ):
            row.append(f"{np.sqrt(np.mean(bias**2)):.3f}")
            row.append(f"{np.mean(variance / alone.student_variance):.3f}")
        rows.append(row)
    explained = [
        f"T = {total_steps} steps, distill_weight = {distill_weight:g}, in the linear theory.",
        "bias: what is left of the start's error.",
    ]
    if simulated:
        explained.append(
            "noise: the variance relative to no teacher, for SGD whose learning rate falls to 0."
        )
    return "\n".join([*explained, _aligned(rows)])


def stretching(kernel: Kernel, distill_weight: float) -> str:
    """Return a table of a power function, which has no horizon, at some lengths of the run."""
    assert isinstance(kernel, kernels.Power)
    law = theory.PowerLaw(kernel.gamma, distill_weight)
    rows = [["after steps", "W^0", "mean age", "teacher: bias", "student: bias", "gap"]]
    for t in (10**3, 10**4, 10**5, 10**6):
        parts = (law.teacher_residual(t), law.student_residual(t), law.gap(t))
        rows.append(
            [f"{t}", f"{law.start_weight(t):.5f}", f"{law.mean_age(t):.1f}", *(f"{p:.3g}" for p in parts)]
        )
    head = f"distill_weight = {distill_weight:g}, in the linear theory, relative to the start's error"
    return "\n".join([head, _aligned(rows)])


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as lines, the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *numbers in rows:
        cells = [name.ljust(widths[0]), *(n.rjust(w) for n, w in zip(numbers, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def terminal_plot(weights: Array) -> str:
    """Draw a kernel's weights as text, with time to the right and the largest column at full height."""
    edges = np.linspace(0, len(weights), min(_WIDTH, len(weights)) + 1)
    columns = np.diff(np.interp(edges, np.arange(len(weights) + 1), np.append(0.0, np.cumsum(weights))))
    blocks = _BLOCKS if _prints(_BLOCKS) else _ASCII
    steps = len(blocks) - 1
    levels = np.round(columns / columns.max() * _HEIGHT * steps).astype(int)
    return "\n".join(
        "".join(blocks[level] for level in np.clip(levels - row * steps, 0, steps)).rstrip()
        for row in reversed(range(_HEIGHT))
    )


def _prints(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def figure(built: Sequence[Kernel], total_steps: int) -> Any:
    """Return a matplotlib figure of kernels' weights, on a logarithmic axis."""
    try:
        figures = importlib.import_module("matplotlib.figure")
    except ImportError:
        raise ImportError("--plot needs the package matplotlib: pip install matplotlib") from None
    figure = figures.Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    profiles = [kernel.profile(total_steps) for kernel in built]
    for kernel, profile in zip(built, profiles, strict=True):
        axes.plot(np.arange(total_steps + 1), profile, label=str(kernel))
    # Whole decades, so that ticks have labels and rounding errors of equal weights do not fill the picture.
    decades = np.log10(
        [weight for profile in profiles for weight in (profile[profile > 0].min(), profile.max())]
    )
    highest = np.ceil(decades.max() + 0.05)
    lowest = max(np.floor(decades.min() - 0.05), highest - _DECADES)
    axes.set(xlabel="optimizer step", ylabel="weight in the final average", yscale="log")
    axes.set_ylim(10**lowest, 10**highest)
    axes.legend()
    return figure
