"""Draw the pictures of the documentation, for light and dark pages: `python docs/pictures.py`."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib as mpl
import matplotlib.style
import numpy as np
from matplotlib.figure import Figure

from wmateacher import kernels
from wmateacher.theory import predict

ROOT = Path(__file__).parents[1]
ASSETS = ROOT / "docs/assets"
STYLES = {"light": "default", "dark": "dark_background"}
SIZE, DPI = (4.33, 3.2), 180  # as wide as a telephone, with two pixels of the picture for each of its own
STEPS = 2_000
SHOWN = {
    "beta(0.5,0.5)": "tab:orange",
    "uniform": "tab:green",
    "tail(0.25)": "tab:cyan",
    "power(sigma_rel=0.1)": "tab:purple",
    "ema(0.99)": "tab:red",
    "ema(0.999)": "tab:pink",
}


def profiles() -> Figure:
    """Draw the weight of every student state at the end of the run."""
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    for kernel, colour in SHOWN.items():
        weights = kernels.build(kernel).profile(STEPS)
        axes.plot(np.arange(STEPS + 1) / STEPS, weights * STEPS, color=colour, label=kernel, lw=1.8)
    axes.set(yscale="log", ylim=(1e-2, 1e3), xlabel="share of the run", ylabel="weight, 1 is uniform")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    axes.grid(alpha=0.25)
    return figure


def bias() -> Figure:
    """Draw the share of the start's bias that is left in the linear theory, over the horizon."""
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    horizons = np.unique(np.geomspace(10, 25_030, 30).astype(int))
    for kernel, colour in {**SHOWN, "static": "tab:gray"}.items():
        left = [predict(kernel, int(t)).student_residual for t in horizons]
        axes.plot(horizons, left, color=colour, label=kernel, lw=1.8)
    axes.set(xscale="log", yscale="log", ylim=(1e-4, 1), xlabel="optimizer steps of the run",
             ylabel="bias of the start that is left")  # fmt: skip
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    axes.grid(alpha=0.25)
    return figure


def plane() -> Figure:
    """Draw the measured methods by accuracy in and out of distribution."""
    methods = json.loads((ROOT / "benchmarks/results/clip-emoji/results.json").read_text())["methods"]
    teachers = {
        "zero-shot": "tab:gray", "flyp": "tab:red", "static-sd": "tab:blue", "ema": "tab:pink",
        "tracer": "tab:orange",
    }  # fmt: skip
    labels = {
        "zero-shot": "pretrained", "flyp": "no teacher", "static-sd": "frozen teacher",
        "ema": "fast EMA teacher", "tracer": "weighted average",
    }  # fmt: skip
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    for name, colour in teachers.items():
        record = methods[name]
        axes.errorbar(
            record["id"], record["ood"], xerr=record["std"]["id"], yerr=record["std"]["ood"], fmt="o",
            color=colour, capsize=3, markersize=7,
        )  # fmt: skip
        axes.annotate(
            labels[name],
            (record["id"], record["ood"]),
            xytext=(8 if name == "zero-shot" else -8, {"flyp": -15, "tracer": -15, "ema": 16}.get(name, 8)),
            textcoords="offset points",
            horizontalalignment="left" if name == "zero-shot" else "right",
            color=colour,
        )
    axes.set(xlabel="accuracy in distribution (%)", ylabel="accuracy under shift (%)")
    axes.margins(x=0.1, y=0.15)
    axes.grid(alpha=0.25)
    return figure


def main() -> None:
    """Write every picture for light and for dark pages."""
    ASSETS.mkdir(exist_ok=True)
    transparent = {"savefig.facecolor": "none", "axes.facecolor": "none"}
    for page, style in STYLES.items():
        with mpl.style.context([style, {"font.size": 8}, transparent]):
            for draw in (profiles, bias, plane):
                draw().savefig(ASSETS / f"{draw.__name__}-{page}.png", dpi=DPI, transparent=True)


if __name__ == "__main__":
    main()
