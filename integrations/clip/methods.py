"""Fine-tuning methods as declarations over one objective and one training loop."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from wmateacher import checks, kernels, losses
from wmateacher.checks import nearest
from wmateacher.integrations.clip import clocks
from wmateacher.integrations.clip.guidance import check as check_guidance


def tracer_terms(width: int, elementwise: float = 2000.0) -> str:
    """TRACER's distillation for embeddings of a width d.

    Its published coefficient is on FD as a mean over elements; on the FD per sample, the sum over them, it is
    that divided by d: 3.90625 at width 512.
    """
    return f"{elementwise / width!r}*fd + crd + icl + cross_kd"


TRACER_TERMS = tracer_terms(512)
"""TRACER's distillation at width 512."""
CAROT_EMA = "ema(0.05,0.9,schedule=linear,warmup=0.2)"
"""CaRot's teacher: retention .05 -> .9 over the first 20% of the run."""


def check_clip_norm(clip_norm: float | None) -> None:
    """See that gradients can be clipped at it.

    Raises:
        ValueError: They cannot.
    """
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"clip_norm must be above 0, or None for no clipping, got {clip_norm}")


@dataclass(frozen=True)
class Merge:
    """Weights made of fine-tuned ones and the pretrained, with no training of their own.

    Attributes:
        of: The method that the fine-tuned models are of.
        alpha: WiSE-FT's coefficient of the fine-tuned model; None: Model Stock's ratio of each layer.
        models: How many fine-tuned models, of seeds of their own.
    """

    of: str
    alpha: float | None = None
    models: int = 1

    def __post_init__(self) -> None:
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ValueError(
                f"alpha must be in [0, 1], got {self.alpha}: 0 is the pretrained model, 1 the fine-tuned"
            )
        least = 1 if self.alpha is not None else 2
        if self.models < least or (self.alpha is not None and self.models > 1):
            raise ValueError(
                f"models must be {'1 for an interpolation' if least == 1 else 'at least 2 for Model Stock'}"
                f", got {self.models}"
            )


@dataclass(frozen=True)
class Method:
    """What is minimised, against which teacher, and what classifies in the end.

        L = task + cross_frobenius |V U^t|_F + orthogonality |V^t V - I|_F
            + l2_sp |W - W^0|^2 + anchors InfoNCE(anchor pairs)
            + distill_weight * distillation(student, teacher)

    With the `"text"` head the task is InfoNCE, the distillation compares embeddings of pairs, and the
    zero-shot head of the fine-tuned towers classifies. With the `"linear"` head the task is cross-entropy
    through a linear classifier that starts as the zero-shot head; it classifies, and the text tower stays as
    it was. There the distillation compares logits: the classifier's, or with `guidance` those of the
    image features against the texts that it gives.

    Attributes:
        name: In tables and on the command line.
        summary: What it is, with its source.
        head: `"text"` or `"linear"`.
        kernel: The teacher's kernel; None: no teacher.
        distillation: A spec of `wmateacher.losses.build`; needed with a kernel.
        guidance: Texts that logits are compared on, as `guidance.build` knows them.
        distill_weight: lambda_SD.
        cross_frobenius: c_F, on the norm of the product of the two projections.
        orthogonality: On the distance of the image projection's Gram matrix from the identity.
        l2_sp: On the squared distance of all trained parameters from where they started.
        anchors: On the InfoNCE of the anchor pairs that each batch has beside it.
        probe: Share of the steps, at the start, in which the linear head alone is trained.
        probe_rate: Their learning rate, in multiples of the recipe's.
        rate: Learning rate, in multiples of the recipe's.
        clip_norm: Largest gradient norm, where the recipe has none.
        update_every: Optimizer steps between updates of the teacher.
        clock: What a teacher's updates count as: see `clocks.build`.
        merge: The weights are not trained but made of other methods'.
        trains: False: the pretrained model as it is, or `merge`.

    Raises:
        ValueError: Parts that do not go together; it says which.
    """

    name: str
    summary: str
    head: Literal["text", "linear"] = "text"
    kernel: str | None = None
    distillation: str | None = None
    guidance: str | None = None
    distill_weight: float = 1.0
    cross_frobenius: float = 0.0
    orthogonality: float = 0.0
    l2_sp: float = 0.0
    anchors: float = 0.0
    probe: float = 0.0
    probe_rate: float = 1.0
    rate: float = 1.0
    clip_norm: float | None = None
    update_every: int = 1
    clock: clocks.Name = "steps"
    merge: Merge | None = None
    trains: bool = True

    def __post_init__(self) -> None:
        if self.head not in ("text", "linear"):
            raise ValueError(f"unknown head {self.head!r}; {nearest(self.head, ('text', 'linear'))}")
        if self.clock not in ("steps", "once", "published"):
            raise ValueError(
                f"unknown clock {self.clock!r}; {nearest(self.clock, ('steps', 'once', 'published'))}"
            )
        checks.positive_int("update_every", self.update_every)
        check_clip_norm(self.clip_norm)
        if self.kernel is not None:
            kernels.build(self.kernel)
        if (self.kernel is None) != (self.distillation is None):
            raise ValueError(
                f"method {self.name!r} has kernel={self.kernel!r} and "
                f"distillation={self.distillation!r}: give both or neither"
            )
        if self.distillation is not None:
            self._check_distillation(self.distillation)
        if self.probe and self.head != "linear":
            raise ValueError(
                f"method {self.name!r} has probe={self.probe} and no linear head to probe with: head='linear'"
            )
        if self.probe and self.kernel is not None:
            raise ValueError(
                f"method {self.name!r} has probe={self.probe} and kernel={self.kernel!r}: a teacher does not "
                "follow a student that is frozen for a while; set probe to 0, or kernel to None"
            )
        if not 0 <= self.probe < 1:
            raise ValueError(f"probe must be a share of the steps in [0, 1), got {self.probe}")
        if self.anchors and self.head != "text":
            raise ValueError(
                f"method {self.name!r} has anchors={self.anchors}: anchor pairs need the towers' "
                "contrastive loss, head='text'"
            )

    def _check_distillation(self, distillation: str) -> None:
        family = losses.build(distillation).family
        if self.head == "text":
            if family not in (None, "paired"):
                raise ValueError(
                    f"distillation {distillation!r} takes {family}, CLIP gives paired embeddings: choose "
                    f"from {', '.join(losses.available('paired'))}"
                )
            if self.guidance is not None:
                raise ValueError(
                    f"method {self.name!r} has guidance={self.guidance!r}, whose texts need a text tower "
                    "that is not trained: head='linear'"
                )
        elif family not in (None, "logits"):
            raise ValueError(
                f"distillation {distillation!r} takes {family}, a linear head gives logits: choose from "
                f"{', '.join(losses.available('logits'))}"
            )
        if self.guidance is not None:
            check_guidance(self.guidance)

    def settings(self) -> dict[str, Any]:
        """All that makes a run of it what it is: the name, and what differs from the defaults."""
        neutral = {f.name: f.default for f in fields(self)}
        chosen = asdict(self)
        del chosen["summary"]
        return {name: value for name, value in chosen.items() if value != neutral[name]}


def _distilling(name: str, summary: str, kernel: str) -> Method:
    return Method(
        name, summary, kernel=kernel, distillation=TRACER_TERMS, distill_weight=0.9, cross_frobenius=0.05
    )


_METHODS = [
    Method("zero-shot", "The pretrained model (Radford et al. 2021)", trains=False),
    # TRACER's recipe for it: 3e-5 where the contrastive methods have 1e-5, gradients clipped at 1.
    Method(
        "ft",
        "Cross-entropy through a head that starts as the zero-shot one",
        head="linear",
        rate=3.0,
        clip_norm=1.0,
    ),
    # The paper tunes rates and lengths of both phases on validation data, and leaves them open. Here: half
    # of the steps each, a warm-up and a decay in each, probing at ten times the rate.
    Method(
        "lp-ft",
        "Linear probing, then fine-tuning (LP-FT, Kumar et al. 2022)",
        head="linear",
        probe=0.5,
        probe_rate=10.0,
    ),
    Method("flyp", "Contrastive fine-tuning as in pre-training (FLYP, Goyal et al. 2023)"),
    # The weight is that of the published toy experiment; the paper gives none for ImageNet.
    Method("l2-sp", "FLYP + L2 pull to the start (Li et al. 2018)", l2_sp=1e-3),
    # KL(p_0 || p) of the context distributions of the images. Weight 1 and the pretrained scale on both
    # sides are choices of ours.
    Method(
        "car-ft",
        "Cross-entropy + KL to the pretrained distribution over contexts (CAR-FT, Mao et al. 2022)",
        head="linear",
        kernel="static",
        distillation="kl",
        guidance="contexts",
    ),
    # 1/(2M) |v - v_0|^2 of the energies v of M = 80 texts of 8 random tokens, drawn anew at each step; weight
    # 1 and the pretrained scale on both sides: its published code. (That trains without weight decay.)
    Method(
        "lipsum-ft",
        "Cross-entropy + energies of random texts as pretrained (Lipsum-FT, Nam et al. 2024, section 5.1)",
        head="linear",
        kernel="static",
        distillation="0.5*mse(logits)",
        guidance="random_texts(80,8)",
    ),
    # Half of it. The paper adds an InfoNCE with rich captions of the fine-tuning images, which need a
    # captioner and are left out, and one of pairs retrieved from web data. Here the recipe gives these pairs:
    # on digits the same images drawn as in pre-training, so it sees again what the other methods do not.
    # Weight 1 is ours.
    Method(
        "arf",
        "FLYP + InfoNCE of anchor pairs like those of pre-training: half of ARF (Han et al. 2024)",
        anchors=1.0,
    ),
    _distilling("static-sd", "TRACER with the pretrained model as a fixed teacher", "static"),
    _distilling(
        "ema",
        "TRACER with CaRot's EMA teacher: retention .05 -> .9 over the first 20% (Oh et al. 2024)",
        CAROT_EMA,
    ),
    Method(
        "carot",
        "FLYP + orthogonality + cross-entropy distillation from an EMA (CaRot, Oh et al. 2024)",
        kernel=CAROT_EMA,
        distillation="paired_ce",
        distill_weight=1.5,
        cross_frobenius=0.05,
        orthogonality=0.2,
        update_every=500,
        clock="once",
    ),
    _distilling("tracer", "TRACER: the Beta(0.5, 0.5) average of the trajectory (2026)", "beta(0.5,0.5)"),
    # alpha = 0.5 is what the paper recommends where there is no more to go by.
    Method(
        "wise-ft",
        "Halfway between the pretrained weights and FT's (WiSE-FT, Wortsman et al. 2022, eq. 1)",
        merge=Merge("ft", alpha=0.5),
        trains=False,
    ),
    # Merged once, at the end; the paper also merges during training.
    Method(
        "model-stock",
        "Each layer between the pretrained weights and two FT models' mean (Jang et al. 2024)",
        merge=Merge("ft", models=2),
        trains=False,
    ),
]
METHODS: dict[str, Method] = {method.name: method for method in _METHODS}
