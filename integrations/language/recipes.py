"""The methods and recipes of language models: what is known, what is new, and how it is learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from wmateacher import kernels, losses
from wmateacher.checks import lookup, one_of
from wmateacher.integrations.engine import settings
from wmateacher.integrations.engine.settings import Hidden, check_at_least
from wmateacher.integrations.language.data import FACTS, SKILLS

__all__ = ["KERNELS", "LIVE", "METHODS", "PRETRAINING", "RECIPES", "START", "Method", "Recipe", "Settings"]

START = "start"
"""The name of the pretrained model in the table, before it learns anything new."""
LIVE = "ema(0.0)"
"""The kernel of a live teacher, which is the student itself."""
KERNELS = ("static", LIVE, "ema(0.95)", "beta(0.5,0.5)", "power(sigma_rel=0.2)")
"""The default kernels; `static` is a frozen teacher."""


@dataclass(frozen=True)
class Method:
    """A loss of new questions.

    `sft` learns the right answers, and stays near a teacher that sees the same prompt:

        L = CE(student(prompt), answer) + distill_weight KL(teacher(prompt) || student(prompt))

    `sdft` learns from a teacher whose prompt also has the answer as a demonstration (Shenfeld et al. 2026),
    at the tokens of an answer that the student has drawn:

        L = KL(teacher(demonstration, prompt) || student(prompt))

    Both are means over the tokens of the answers.

    Attributes:
        name: Name in tables and on the command line.
        kind: `sft` or `sdft`.
        kernel: The teacher's kernel; None for `sft` without a teacher.
        distill_weight: Weight of the teacher's term of `sft`; None for the recipe's weight of the kernel, or
            1 if it has none.
        distillation: The loss between the teacher's and the student's logits.

    Raises:
        ValueError: If a name is unknown, or kernel and weight do not fit the kind.
    """

    name: Hidden[str]
    kind: Literal["sft", "sdft"] = "sft"
    kernel: Hidden[str | None] = None
    distill_weight: float | None = None
    distillation: str = "kl"

    def __post_init__(self) -> None:
        one_of("kind", self.kind, ("sft", "sdft"))
        if losses.build(self.distillation).family not in ("logits", None):
            raise ValueError(
                f"distillation={self.distillation!r} does not compare logits; choose from "
                f"{', '.join(losses.available('logits'))}"
            )
        if self.distill_weight is not None and not self.distill_weight > 0:
            raise ValueError(
                f"distill_weight must be above 0, got {self.distill_weight}: kernel=None is no teacher"
            )
        if self.kernel is not None:
            kernels.build(self.kernel)
        elif self.kind == "sdft":
            raise ValueError("sdft learns from a teacher alone: kernel=None leaves nothing; give a kernel")


PRETRAINING = Method("pre-training")
METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method("sft"),
        Method("sft-teacher", kernel="beta(0.5,0.5)"),
        Method("sdft", "sdft", kernel="beta(0.5,0.5)"),
    )
}


@dataclass(frozen=True, kw_only=True)
class Settings(settings.Settings):
    """The optimisation of a run: AdamW, a linear warm-up, a cosine decay to 0.

    Attributes:
        batch_size: Questions per step.
    """

    batch_size: int
    clip_norm: float | None = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, batch_size=1)

    def with_steps(self, steps: int | None) -> Settings:
        """Return the settings with another number of steps, the warm-up stretched; unchanged for None."""
        if steps is None:
            return self
        return replace(self, steps=steps, warmup=round(self.warmup * steps / self.steps))


@dataclass(frozen=True)
class Recipe:
    """Pre-train a small transformer on facts and skills, then teach it something new.

    Attributes:
        new: The knowledge to add: `facts`, or one of the skills `reverse`, `successor` and `rotate`.
        skills: The skills of pre-training.
        symbols: The number of symbols that prompts and answers are made of.
        old_facts: The number of facts of pre-training.
        new_facts: The number of new facts, if they are what is new.
        questions: The number of questions of each kind in an evaluation.
        width: The width of the transformer.
        depth: The number of its blocks.
        lora_rank: The rank of LoRA adapters to fine-tune; 0 fine-tunes every weight.
        pretrain: The optimisation of pre-training.
        settings: The optimisation of every method.
        trainer: `loop` for the training loop of this library, or `trl` for the trainers of TRL, with the same
            data and settings. A run of TRL that is interrupted starts again; finished ones are kept.
        methods: The methods by name.
        distill_weights: The weight of the teacher's term of `sft-teacher` by kernel, chosen on validation. A
            weight of the method itself takes precedence, and kernels that are not listed have the weight 1.

    Raises:
        ValueError: If a name is unknown or a number is out of range.
    """

    new: str
    skills: tuple[str, ...]
    pretrain: Settings
    settings: Settings
    symbols: int = 32
    old_facts: int = 100
    new_facts: int = 40
    questions: int = 100
    width: int = 64
    depth: int = 3
    lora_rank: int = 0
    trainer: Literal["loop", "trl"] = "loop"
    methods: Mapping[str, Method] = field(default_factory=lambda: dict(METHODS))
    distill_weights: Hidden[Mapping[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        one_of("new", self.new, (FACTS, *SKILLS))
        one_of("trainer", self.trainer, ("loop", "trl"))
        for skill in self.skills:
            one_of("skills", skill, tuple(SKILLS))
        if not self.skills or self.new in self.skills:
            raise ValueError(
                f"skills must be one or more, and not {self.new!r}, which is new; got {self.skills}"
            )
        check_at_least(self, symbols=2, old_facts=2, new_facts=2, questions=1, width=16, depth=1, lora_rank=0)
        if self.width % 16:
            raise ValueError(f"width must be a multiple of 16, the width of a head, got {self.width}")

    def method(self, name: str) -> Method:
        """Return the method of that name.

        Raises:
            ValueError: If the recipe has no such method.
        """
        return lookup("method", name, self.methods)

    @property
    def summary(self) -> str:
        """A description in one line."""
        new = f"{self.new_facts} new facts" if self.new == "facts" else f"the new skill {self.new!r}"
        lora = f", LoRA of rank {self.lora_rank}" if self.lora_rank else ""
        known = f"{self.old_facts} facts and {len(self.skills)} skills"
        by = "" if self.trainer == "loop" else " by TRL"
        return f"{new}, after {known}: {self.settings.steps} steps{lora}{by}"

    def with_steps(self, steps: int | None, pretrain_steps: int | None) -> Recipe:
        """Return the recipe with other numbers of steps, its warm-ups stretched; unchanged for None."""
        return replace(
            self, settings=self.settings.with_steps(steps), pretrain=self.pretrain.with_steps(pretrain_steps)
        )

    def with_kernels(self, methods: Sequence[str], teachers: Sequence[str]) -> Recipe:
        """Return the recipe with these methods, one for each kernel if they have a teacher.

        Args:
            methods: The names of methods.
            teachers: Kernels for those that have a teacher. Each is named `METHOD KERNEL`. A live teacher of
                `sft` is left out: it sees what the student sees, so it changes nothing.

        Raises:
            ValueError: If the recipe has no such method, a kernel is unknown, or a method has a weight
                that would have no effect.
        """
        specs = [str(kernels.build(kernel)) for kernel in teachers]
        found = []
        for method in map(self.method, methods):
            if method.distill_weight is not None and (method.kernel is None or method.kind == "sdft"):
                raise ValueError(
                    f"distill_weight={method.distill_weight} has no effect on {method.name!r}: only the "
                    "teacher's term of sft-teacher has a weight"
                )
            if method.kernel is None:
                found.append(method)
                continue
            for kernel in specs:
                if method.kind == "sft" and kernel == LIVE:
                    continue  # teacher and student agree, so the term has no gradient: this is `sft`
                weight = method.distill_weight
                if method.kind == "sft" and weight is None:
                    weight = self.distill_weights.get(kernel, 1.0)
                found.append(
                    replace(method, name=f"{method.name} {kernel}", kernel=kernel, distill_weight=weight)
                )
        return replace(self, methods={method.name: method for method in found})


_FACTS = Recipe(
    "facts",
    ("reverse", "successor"),
    pretrain=Settings(steps=1_200, learning_rate=3e-3, weight_decay=0.1, warmup=100, batch_size=48),
    settings=Settings(steps=200, learning_rate=2e-4, warmup=10, batch_size=20),
    distill_weights={"static": 0.3, "beta(0.5,0.5)": 0.3, "ema(0.95)": 1.0, "power(sigma_rel=0.2)": 1.0},
)
_SKILL = replace(
    _FACTS,
    new="rotate",
    # A new skill disturbs the old ones more than new facts do, so it is learned more slowly.
    settings=replace(_FACTS.settings, learning_rate=1e-4),
    distill_weights={"static": 0.1, "beta(0.5,0.5)": 0.3, "ema(0.95)": 1.0, "power(sigma_rel=0.2)": 1.0},
)
RECIPES: Mapping[str, Recipe] = {"facts": _FACTS, "skill": _SKILL}
"""The recipes by what is new."""
