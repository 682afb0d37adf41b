"""The fine-tuning methods: the settings of `Objective` and of the training loop that make each of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from wmateacher import kernels, losses
from wmateacher.checks import lookup, one_of, positive_int
from wmateacher.integrations.clip import clocks
from wmateacher.integrations.engine.settings import Hidden
from wmateacher.spec import parse_call

__all__ = [
    "CAROT_EMA",
    "METHODS",
    "TRACER_TERMS",
    "Contexts",
    "Merge",
    "Method",
    "RandomTexts",
    "parse_guidance",
    "tracer_terms",
    "with_batch_statistics",
]


def tracer_terms(width: int, elementwise: float = 2000.0) -> str:
    """Return TRACER's distillation for embeddings of width d.

    The published coefficient multiplies FD averaged over elements. `fd` sums over them, so its coefficient is
    the published one divided by d: 3.90625 at width 512.
    """
    return f"{elementwise / width!r}*fd + crd + icl + cross_kd"


TRACER_TERMS = tracer_terms(512)
"""TRACER's distillation at width 512."""
CAROT_EMA = "ema(0.05,0.9,schedule=linear,warmup=0.2)"
"""CaRot's teacher: its decay rises from 0.05 to 0.9 over the first 20% of the run."""


@dataclass(frozen=True)
class Contexts:
    """One text for each template: its features averaged over the classes (CAR-FT, Mao et al. 2022).

    The softmax of an image's similarities to them is the paper's context distribution of the image.
    """


@dataclass(frozen=True)
class RandomTexts:
    """Texts of random tokens, drawn anew at each step (Lipsum-FT, Nam et al. 2024, section 5.1).

    Attributes:
        count: The number of texts M; 80 in the paper.
        length: The tokens of each text between its start and end tokens; 8 in the paper.
    """

    count: int = 80
    length: int = 8

    def __post_init__(self) -> None:
        for name in ("count", "length"):
            positive_int(f"random_texts: {name}", getattr(self, name))


_GUIDANCE: dict[str, Callable[..., Contexts | RandomTexts]] = {
    "contexts": Contexts,
    "random_texts": RandomTexts,
}


def parse_guidance(guidance: str) -> Contexts | RandomTexts:
    """Return the texts that a spec names.

    Args:
        guidance: `"contexts"` or `"random_texts(count,length)"`.

    Raises:
        ValueError: If the spec does not parse or names neither.
    """
    call = parse_call(guidance)
    texts: Contexts | RandomTexts = call.build(lookup("guidance", call.name, _GUIDANCE))
    return texts


@dataclass(frozen=True)
class Merge:
    """Weights computed from fine-tuned models and the pretrained one, without training of their own.

    Attributes:
        of: The name of the method whose fine-tuned models are merged.
        alpha: WiSE-FT's coefficient of the fine-tuned model, or None for Model Stock's ratio of each layer.
        models: The number of fine-tuned models, each with a seed of its own.
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
    """A loss to minimise, the teacher it distils from, and the head that classifies in the end.

        L = task + cross_frobenius |V U^t|_F + orthogonality |V^t V - I|_F
            + l2_sp / 2 |W - W^0|^2 + anchors InfoNCE(anchor pairs)
            + distill_weight * distillation(student, teacher)

    With the `"text"` head the task is InfoNCE, the distillation compares embeddings of pairs, and the
    zero-shot head of the fine-tuned towers classifies. With the `"linear"` head the task is cross-entropy
    through a linear classifier that starts as the zero-shot head; that classifier is used in the end, and the
    text tower is frozen. Its distillation compares the classifier's logits or, with a `guidance`, the logits
    of the image features against the texts of the guidance.

    Attributes:
        name: The name in tables and on the command line.
        summary: One line on the method and its source.
        head: The head that classifies in the end, `text` or `linear`.
        kernel: The teacher's kernel, or None for no teacher.
        distillation: A spec of `wmateacher.losses.build`, such as `fd + 0.5*crd`. Required with a kernel.
        guidance: The texts on which logits are compared, `contexts` or `random_texts(80,8)`.
        distill_weight: The weight lambda_SD of the distillation.
        distill_from_step: The number of steps before the distillation starts. The paper's Algorithm 1 distils
            from the first step on (0); the published code starts after it (1).
        cross_frobenius: The weight c_F of the norm of the product of the two projections.
        orthogonality: The weight of the distance of the image projection's Gram matrix from the identity.
        l2_sp: The coefficient alpha of half the squared distance of the trained parameters from their start.
        l2_sp_of: The parameters that it pulls: `weights` (of two or more dimensions) or `all`.
        anchors: The weight of the InfoNCE loss on anchor pairs, which are like those of pre-training.
        probe: The share of the steps, at the start, that train the linear head alone.
        probe_rate: The learning rate of these steps, in multiples of the recipe's.
        rate: The learning rate, in multiples of the recipe's.
        weight_decay: The weight decay if it is not the recipe's.
        templates: ImageNet's captions in training and in the zero-shot head, `openai` (80) or `tracer` (86),
            unless the recipe has captions of its own.
        scale_outside: Whether the linear head is trained without the logit scale, which then multiplies its
            output. The head's steps are larger by that factor.
        clip_norm: The largest gradient norm if the recipe has none.
        update_every: Optimizer steps between updates of the teacher.
        clock: The steps that an update stands for: all since the last one (`steps`), one (`once`), or
            those of TRACER's code (`published`).
        batch_norm: The statistics that batch normalisation in the teacher takes. `pretrained` keeps the
            running statistics of the start, as the published code does. `batch` takes those of each batch,
            which a teacher that follows its student needs: the statistics of the start do not fit its weights
            once the student has moved.
        merge: Weights that are merged rather than trained.
        trains: Whether the method trains. If not, it is the pretrained model or the `merge`.

    Raises:
        ValueError: If two values do not go together; the message says which.
    """

    name: Hidden[str]
    summary: Hidden[str]
    head: Literal["text", "linear"] = "text"
    kernel: str | None = None
    distillation: str | None = None
    guidance: str | None = None
    distill_weight: float = 1.0
    distill_from_step: int = 0
    cross_frobenius: float = 0.0
    orthogonality: float = 0.0
    l2_sp: float = 0.0
    l2_sp_of: Literal["weights", "all"] = "weights"
    anchors: float = 0.0
    probe: float = 0.0
    probe_rate: float = 1.0
    rate: float = 1.0
    weight_decay: float | None = None
    scale_outside: bool = False
    templates: Literal["openai", "tracer"] = "openai"
    clip_norm: float | None = None
    update_every: int = 1
    clock: clocks.Clock = "steps"
    batch_norm: Literal["pretrained", "batch"] = "pretrained"
    merge: Hidden[Merge | None] = None
    trains: bool = True

    def __post_init__(self) -> None:
        one_of("head", self.head, ("text", "linear"))
        one_of("clock", self.clock, clocks.CLOCKS)
        one_of("batch_norm", self.batch_norm, ("pretrained", "batch"))
        one_of("l2_sp_of", self.l2_sp_of, ("weights", "all"))
        one_of("templates", self.templates, ("openai", "tracer"))
        positive_int("update_every", self.update_every)
        if self.distill_from_step < 0:
            raise ValueError(
                f"distill_from_step must be at least 0, got {self.distill_from_step}: 0 distils from the "
                "first step on"
            )
        if self.weight_decay is not None and not self.weight_decay >= 0:
            raise ValueError(
                f"weight_decay must be at least 0, or None for the recipe's, got {self.weight_decay}"
            )
        if self.scale_outside and self.head != "linear":
            raise ValueError(
                f"method {self.name!r} has scale_outside=True and no linear head: set head='linear'"
            )
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"clip_norm must be above 0, or None for no clipping, got {self.clip_norm}")
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
                f"method {self.name!r} has probe={self.probe} and no linear head to probe with: set "
                "head='linear'"
            )
        if not 0 <= self.probe < 1:
            raise ValueError(f"probe must be a share of the steps in [0, 1), got {self.probe}")
        if self.anchors and self.head != "text":
            raise ValueError(
                f"method {self.name!r} has anchors={self.anchors}: anchor pairs need the towers' "
                "contrastive loss, head='text'"
            )

    def _check_distillation(self, distillation: str) -> None:
        takes, gives = ("paired", "CLIP gives paired embeddings")
        if self.head == "linear":
            takes, gives = ("logits", "a linear head gives logits")
        family = losses.build(distillation).family
        if family not in (None, takes):
            raise ValueError(
                f"distillation {distillation!r} takes {family}, {gives}: choose from "
                f"{', '.join(losses.available(takes))}"
            )
        if self.guidance is not None and self.head == "text":
            raise ValueError(
                f"method {self.name!r} has guidance={self.guidance!r}, whose texts need a frozen text "
                "tower: set head='linear'"
            )
        if self.guidance is not None:
            parse_guidance(self.guidance)

    def settings(self) -> dict[str, Any]:
        """Return everything that determines a run: the name, and the values that differ from the defaults."""
        defaults = {f.name: f.default for f in fields(self)}
        values = asdict(self)
        del values["summary"]
        return {name: value for name, value in values.items() if value != defaults[name]}


def _distilling(name: str, summary: str, kernel: str) -> Method:
    return Method(
        name, summary, kernel=kernel, distillation=TRACER_TERMS, distill_weight=0.9, cross_frobenius=0.05
    )


_METHODS = [
    Method("zero-shot", "The pretrained model (Radford et al. 2021)", trains=False),
    # As in TRACER's experiments: 3e-5 where the contrastive methods have 1e-5, gradients clipped at norm 1.
    Method(
        "ft",
        "Cross-entropy through a head that starts as the zero-shot one",
        head="linear",
        rate=3.0,
        clip_norm=1.0,
    ),
    # The paper tunes rates and lengths of both phases on validation data and does not report them. Here each
    # phase has half of the steps, with its own warm-up and decay; probing has ten times the learning rate.
    Method(
        "lp-ft",
        "Linear probing, then fine-tuning (LP-FT, Kumar et al. 2022)",
        head="linear",
        probe=0.5,
        probe_rate=10.0,
    ),
    Method("flyp", "Contrastive fine-tuning as in pre-training (FLYP, Goyal et al. 2023)"),
    # alpha/2 |W - W^0|^2 on weights instead of weight decay, with the paper's alpha = 0.01. Its beta/2 |W|^2
    # is for new layers, of which FLYP has none.
    Method(
        "l2-sp",
        "FLYP + L2 pull to the start, instead of weight decay (L2-SP, Li et al. 2018)",
        l2_sp=0.01,
        weight_decay=0.0,
    ),
    # KL(p_0 || p) between context distributions. Weight 1 and the pretrained logit scale on both sides are
    # our choices.
    Method(
        "car-ft",
        "Cross-entropy + KL to the pretrained distribution over contexts (CAR-FT, Mao et al. 2022)",
        head="linear",
        kernel="static",
        distillation="kl",
        guidance="contexts",
    ),
    # 1/(2M) |v - v_0|^2, where v are the energies of M = 80 random texts. Weight 1, the pretrained logit
    # scale on both sides and outside the head, and no weight decay are those of the published code. The
    # recipe decides the rest; published are 50,000 steps of 256 images, 10% of warm-up, and the checkpoint
    # that is best on validation data.
    Method(
        "lipsum-ft",
        "Cross-entropy + energies of random texts as pretrained (Lipsum-FT, Nam et al. 2024, section 5.1)",
        head="linear",
        kernel="static",
        distillation="0.5*mse(logits)",
        guidance="random_texts(80,8)",
        weight_decay=0.0,
        scale_outside=True,
    ),
    # ARF adds two InfoNCE losses. The one on rich captions of the fine-tuning images is left out, because it
    # needs a captioning model. The one on pairs retrieved from web data uses the recipe's anchor pairs; on
    # digits these are drawn as in pre-training, so ARF sees images that other methods do not. Weight 1 is our
    # choice.
    Method(
        "arf",
        "FLYP + InfoNCE of anchor pairs like those of pre-training: half of ARF (Han et al. 2024)",
        anchors=1.0,
    ),
    _distilling("static-sd", "TRACER with the pretrained model as a fixed teacher", "static"),
    _distilling(
        "ema",
        "TRACER with CaRot's EMA teacher: decay 0.05 -> 0.9 over the first 20% (Oh et al. 2024)",
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
    # The paper recommends alpha = 0.5 when it cannot be tuned.
    Method(
        "wise-ft",
        "Halfway between the pretrained weights and FT's (WiSE-FT, Wortsman et al. 2022, eq. 1)",
        merge=Merge("ft", alpha=0.5),
        trains=False,
    ),
    # Merged once at the end; the paper also merges during training.
    Method(
        "model-stock",
        "Each layer between the pretrained weights and two FT models' mean (Jang et al. 2024)",
        merge=Merge("ft", models=2),
        trains=False,
    ),
]
METHODS: dict[str, Method] = {method.name: method for method in _METHODS}
"""The methods of the paper's tables, by name."""


def with_batch_statistics(methods: Mapping[str, Method]) -> dict[str, Method]:
    """Return methods whose moving teachers normalise by the batch where they have batch normalisation."""
    return {
        name: m if m.kernel in (None, "static") else replace(m, batch_norm="batch")
        for name, m in methods.items()
    }
