"""Fine-tuning methods as declarations over one objective and one training loop."""

from __future__ import annotations

from dataclasses import dataclass

from wmateacher.spec import nearest

TRACER_TERMS = "3.90625*fd + crd + icl + cross_kd"
"""TRACER's distillation; 3.90625 on the per-sample FD is the published 2000 on the element-wise mean
at width 512."""


@dataclass(frozen=True)
class Method:
    """What is minimised, and which teacher it is minimised against.

        L = InfoNCE + cross_frobenius |V U^t|_F + orthogonality |V^t V - I|_F
            + l2_sp |W - W^0|^2 + strength * distillation(student, teacher)

    Attributes:
        name: In tables and on the command line.
        summary: What it is, with its source.
        kernel: The teacher's kernel; None: no teacher.
        distillation: A spec of `wmateacher.losses.build`; needed with a kernel.
        strength: lambda_SD.
        cross_frobenius: c_F, on the norm of the product of the two projections.
        orthogonality: On the distance of the image projection's Gram matrix from the identity.
        l2_sp: On the squared distance of all parameters from where they started.
        trains: False: the pretrained model as it is.
    """

    name: str
    summary: str
    kernel: str | None = None
    distillation: str | None = None
    strength: float = 1.0
    cross_frobenius: float = 0.0
    orthogonality: float = 0.0
    l2_sp: float = 0.0
    trains: bool = True


def _distilling(name: str, summary: str, kernel: str) -> Method:
    return Method(name, summary, kernel, TRACER_TERMS, strength=0.9, cross_frobenius=0.05)


_METHODS = [
    Method("zero-shot", "The pretrained model (Radford et al. 2021)", trains=False),
    Method("flyp", "Contrastive fine-tuning as in pre-training (FLYP, Goyal et al. 2023)"),
    Method("l2-sp", "FLYP + L2 pull to the start (Li et al. 2018)", l2_sp=1e-3),
    _distilling("static-sd", "TRACER with the pretrained model as a fixed teacher", "static"),
    _distilling(
        "ema",
        "TRACER with CaRot's EMA teacher: retention .05 -> .9 over the first 20% (Oh et al. 2024)",
        "ema(0.05,0.9,schedule=linear,warmup=0.2)",
    ),
    _distilling("tracer", "TRACER: the Beta(0.5, 0.5) average of the trajectory (2026)", "beta(0.5,0.5)"),
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
