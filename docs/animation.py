"""Draw what teachers do over a run, as animated SVG for light and dark pages: `python docs/animation.py`.

Above, the weight of every student state in the average of that moment. Below, the linear world of
`wmateacher.theory`, in which the teacher follows its student. Readers who prefer reduced motion, and programs
that show no animation, see the end of the run.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wmateacher import kernels
from wmateacher.theory import LinearWorld, distil

Array = NDArray[np.float64]
ASSETS = Path(__file__).parent / "assets"
STEPS = 1_000
DISTILL_WEIGHT = 0.9
SHOWN = {
    "static": ("#8c8c8c", "the start, for the whole run"),
    "beta(0.5,0.5)": ("#ff7f0e", "the whole run, most of all its two ends"),
    "uniform": ("#2ca02c", "every state alike"),
    "ema(0.99)": ("#d62728", "the last 100 steps"),
}
"""Colour and explanation by kernel; the colours are those of `pictures.py`."""
INK = {"light": ("#24292f", "#6e7781"), "dark": ("#e6edf3", "#9198a1")}
"""The colours of text and of axes by page."""

# The plots' edges and, from above, the rows of weights and the linear world, in units of the drawing.
_LEFT, _RIGHT = 14.0, 506.0
_FIRST_ROW, _ROW, _HILL = 92.0, 66.0, 40.0
_OPTIMUM, _START = 374.0, 536.0
# A row is as high as this weight, relative to the uniform kernel's at the end of the run.
_LARGEST = 16.0
# The run takes this share of the animation; then its end stays in view.
_SECONDS, _MOVING = 11, 0.75
_POINTS = 48


def frames() -> list[int]:
    """Return the steps that are drawn, most of them at the beginning, where most happens."""
    return sorted({round(STEPS * share**1.7) for share in np.linspace(0, 1, 33).tolist()})


@functools.cache
def weights(kernel: str) -> Array:
    """Return the weight of every state in the average after every step, `[STEPS + 1, STEPS + 1]`."""
    omegas = 1.0 - kernels.build(kernel).retention(np.arange(STEPS + 1), STEPS)
    found = np.zeros((STEPS + 1, STEPS + 1))
    for step in range(STEPS + 1):
        found[step, : step + 1] = kernels.realised_weights(omegas[: step + 1])
    return found


@functools.cache
def courses(kernel: str) -> tuple[Array, Array]:
    """Return the bias of teacher and student after every step as a share of the start's, `[STEPS + 1]`."""
    run = distil(LinearWorld(np.eye(1), np.zeros((1, 1)), np.eye(1)), kernel, STEPS, DISTILL_WEIGHT)
    return run.teacher_residual, run.student_residual


def picture(page: str) -> str:
    """Return the SVG for light or for dark pages."""
    ink, faint = INK[page]
    left, right = f"{_LEFT:g}", f"{_RIGHT:g}"
    led = "Where that leads: the teacher (solid) follows its student (dashed)"
    rows = "".join(_heading(kernel, row) for row, kernel in enumerate(SHOWN))
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 520 572" width="640" role="img">
<title>The weights of four teachers as a run grows, and how each follows its student</title>
<style>
text {{ font: 13px system-ui, sans-serif; fill: {ink}; }}
.title {{ font-weight: 600; }}
.kernel {{ font-family: ui-monospace, monospace; font-weight: 600; }}
.faint {{ fill: {faint}; }}
.axis {{ stroke: {faint}; }}
.still {{ display: none; }}
@media (prefers-reduced-motion: reduce) {{ .film {{ display: none; }} .still {{ display: inline; }} }}
</style>
<text class="title" x="{left}" y="18">What the teacher averages so far, over the states of its student</text>
<text class="faint" x="{right}" y="44" text-anchor="end">height: square root of the weight</text>
{rows}
<text class="title" x="{left}" y="340">{led}</text>
<text class="faint" x="{left}" y="364">the task's optimum</text>
<text class="faint" x="{_RIGHT - 12:g}" y="528" text-anchor="end">the start</text>
<path class="axis" d="M{left},{_OPTIMUM:g}H{right}M{left},{_START:g}H{right}"/>
<text class="faint" x="{left}" y="556">0</text>
<text class="faint" x="{(_LEFT + _RIGHT) / 2:g}" y="556" text-anchor="middle">optimizer steps</text>
<text class="faint" x="{right}" y="556" text-anchor="end">{STEPS:,}</text>
<g class="film">{_body("film", frames())}</g>
<g class="still">{_body("still", [STEPS])}</g>
</svg>
"""


def _heading(kernel: str, row: int) -> str:
    """Return the name of a row of weights, and its axis."""
    colour, words = SHOWN[kernel]
    base = _FIRST_ROW + _ROW * row
    return (
        f'<rect x="{_LEFT:g}" y="{base - _HILL - 18:g}" width="11" height="11" rx="2" fill="{colour}"/>'
        f'<text x="{_LEFT + 17:g}" y="{base - _HILL - 8:g}"><tspan class="kernel">{kernel}</tspan>'
        f'<tspan class="faint" dx="8">{words}</tspan></text>'
        f'<path class="axis" d="M{_LEFT:g},{base:g}H{_RIGHT:g}"/>\n'
    )


def _body(name: str, steps: Sequence[int]) -> str:
    """Return the moving parts; without animation they show the last of the steps."""
    hills, curves, heads = [], [], []
    for row, (kernel, (colour, _)) in enumerate(SHOWN.items()):
        found, base = weights(kernel), _FIRST_ROW + _ROW * row
        teacher, student = (_OPTIMUM + (_START - _OPTIMUM) * left for left in courses(kernel))
        outlines = [_outline(found[step, 1 : step + 1], base) for step in steps]
        starts = [f"{base - _height(found[step, 0]):.1f}" for step in steps]
        hills.append(
            f'<path fill="{colour}" fill-opacity="0.55" {_moving("d", outlines, steps)}</path>'
            f'<line x1="{_LEFT:g}" x2="{_LEFT:g}" y1="{base:g}" stroke="{colour}" stroke-width="4" '
            f"{_moving('y2', starts, steps)}</line>\n"
        )
        line = f'fill="none" stroke="{colour}" stroke-width='
        curves.append(
            f'<path fill="{colour}" fill-opacity="0.15" '
            f'd="{_course(teacher)}L{_course(student, back=True)}Z"/>'
            f'<path {line}"2.4" d="{_course(teacher)}"/>'
            f'<path {line}"1.4" stroke-dasharray="5 3" d="{_course(student)}"/>\n'
        )
        for course, filled in ((student, "none"), (teacher, colour)):
            places = [f"{course[step]:.1f}" for step in steps]
            heads.append(
                f'<circle cx="{_RIGHT:g}" r="4" fill="{filled}" stroke="{colour}" stroke-width="1.8" '
                f"{_moving('cy', places, steps)}</circle>\n"
            )
    shown = [f"{_x(step) - _LEFT + 1:.1f}" for step in steps]
    shifts = [f"{_x(step) - _RIGHT:.1f},0" for step in steps]
    bases = (_FIRST_ROW + _ROW * row for row in range(len(SHOWN)))
    now = "".join(f"M{_RIGHT:g},{base - _HILL:g}V{base:g}" for base in bases)
    now += f"M{_RIGHT:g},{_OPTIMUM:g}V{_START:g}"
    moved = _animation("animateTransform", "transform", shifts, steps, ' type="translate"')
    return (
        f'<clipPath id="{name}"><rect x="{_LEFT - 1:g}" y="{_OPTIMUM - 9:g}" height="180" '
        f"{_moving('width', shown, steps)}</rect></clipPath>\n"
        f'{"".join(hills)}<g clip-path="url(#{name})">\n{"".join(curves)}</g>\n'
        f'<g>{moved}<path class="axis" stroke-dasharray="2 3" d="{now}"/>\n'
        f"{''.join(heads)}</g>"
    )


def _moving(attribute: str, values: Sequence[str], steps: Sequence[int]) -> str:
    """Return an attribute with its last value, the end of the tag, and the attribute's animation."""
    return f'{attribute}="{values[-1]}">{_animation("animate", attribute, values, steps)}'


def _animation(tag: str, attribute: str, values: Sequence[str], steps: Sequence[int], more: str = "") -> str:
    """Return an animation through the values, which stays at the last one for a while; none for one value."""
    if len(values) == 1 or len(set(values)) == 1:
        return ""
    times = ";".join([*(f"{_MOVING * step / STEPS:.3f}" for step in steps), "1"])
    return (
        f'<{tag} attributeName="{attribute}"{more} dur="{_SECONDS}s" repeatCount="indefinite" '
        f'keyTimes="{times}" values="{";".join([*values, values[-1]])}"/>'
    )


def _outline(found: Array, base: float) -> str:
    """Return the outline of weights from step 1 on, with the same number of points for any step."""
    if not len(found):
        found = np.zeros(1)
    # Denser at both ends, where weights change most.
    places = 1 + (len(found) - 1) * (1 - np.cos(np.linspace(0, np.pi, _POINTS))) / 2
    heights = _height(np.interp(places, np.arange(1, len(found) + 1), found))
    top = "L".join(f"{_x(x):.1f},{base - y:.1f}" for x, y in zip(places, heights, strict=True))
    return f"M{_x(1):.1f},{base:g}L{top}V{base:g}Z"


def _height(weight: Array) -> Array:
    return _HILL * np.minimum(np.sqrt(weight * STEPS / _LARGEST), 1.0)


def _course(places: Array, back: bool = False) -> str:
    """Return a curve over the run as the points of a path, or its points in reverse."""
    # Dense at the beginning, where the student's first step is its largest.
    steps = [0, *np.unique(np.geomspace(1, STEPS, 60).round().astype(int))]
    points = [f"{_x(step):.1f},{places[step]:.1f}" for step in steps]
    return "L".join(points[::-1]) if back else f"M{'L'.join(points)}"


def _x(step: float) -> float:
    return _LEFT + (_RIGHT - _LEFT) * step / STEPS


def main() -> None:
    """Write the animation for light and for dark pages."""
    ASSETS.mkdir(exist_ok=True)
    for page in INK:
        (ASSETS / f"run-{page}.svg").write_text(picture(page), "utf-8")


if __name__ == "__main__":
    main()
