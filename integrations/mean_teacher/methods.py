"""Semi-supervised methods as declarations over one objective and one training loop."""

from __future__ import annotations

from dataclasses import dataclass

from wmateacher.checks import nearest

CONSISTENCIES = ("mse", "kl", "pseudo")


@dataclass(frozen=True)
class Method:
    """What is minimised, and whose answers the unlabelled images are pulled to.

        L = CE(student(weak labelled), label) + weight ramp(t) consistency(student(strong), target(weak))

    The target is the teacher's answer, or without one the student's own from before the step; no
    gradient reaches it, and one reaches the student's strong view.

    Attributes:
        name: In tables and on the command line.
        summary: What it is, with its source.
        kernel: The teacher's kernel; None: the student is its own teacher.
        consistency: `"mse"` between probabilities, `"kl"`, or `"pseudo"`: cross-entropy against the
            target's most probable class.
        weight: Of the consistency after its ramp-up; 0: labels alone.
        confidence: Only images on which the target is at least that sure count; None: all.
    """

    name: str
    summary: str
    kernel: str | None = None
    consistency: str = "mse"
    weight: float = 0.0
    confidence: float | None = None

    def __post_init__(self) -> None:
        if self.consistency not in CONSISTENCIES:
            raise ValueError(
                f"unknown consistency {self.consistency!r}; {nearest(self.consistency, CONSISTENCIES)}"
            )
        if not self.weight >= 0:
            raise ValueError(f"weight must be at least 0, got {self.weight}")
        if self.confidence is not None and not 0 <= self.confidence < 1:
            raise ValueError(f"confidence must be in [0, 1), got {self.confidence}")


WEIGHT = 10.0
"""Of the consistency by MSE, a mean over the classes."""

_METHODS = [
    Method("supervised", "The labelled images alone"),
    Method("pi-model", "Pi-model: the student is its own teacher (Laine & Aila 2017)", weight=WEIGHT),
    Method(
        "mean-teacher",
        "Mean teacher: an EMA of the student (Tarvainen & Valpola 2017)",
        kernel="ema(0.95)",
        weight=WEIGHT,
    ),
    Method(
        "fixmatch",
        "FixMatch: the student's own confident answers as labels (Sohn et al. 2020)",
        consistency="pseudo",
        weight=1.0,
        confidence=0.95,
    ),
]
METHODS: dict[str, Method] = {method.name: method for method in _METHODS}


def get(name: str) -> Method:
    """The method of that name.

    Raises:
        ValueError: There is none; lists those there are.
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; {nearest(name, METHODS)}")
    return METHODS[name]
