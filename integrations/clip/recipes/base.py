"""What a recipe is: towers, methods and their optimisation, and perhaps a pre-training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from wmateacher.checks import lookup
from wmateacher.integrations.clip import paper
from wmateacher.integrations.clip.methods import Method
from wmateacher.integrations.engine import settings
from wmateacher.integrations.engine.settings import Hidden

__all__ = ["RECIPES", "FromScratchRecipe", "Recipe", "Settings"]

RecipeT = TypeVar("RecipeT", bound="Recipe")
ScratchT = TypeVar("ScratchT", bound="FromScratchRecipe")


@dataclass(frozen=True, kw_only=True)
class Settings(settings.Settings):
    """How a run is optimised: AdamW, a linear warm-up, then a cosine decay to 0.

    Attributes:
        steps: Number of optimizer steps T.
        learning_rate: The learning rate at the end of the warm-up.
        batch_size: Image-text pairs per step.
        weight_decay: The weight decay of every parameter, in one group as in the published code.
        warmup: Steps of linear warm-up; 500 in the published recipes.
        clip_norm: The largest gradient norm, or None for no clipping.
        precision: `fp32`, or autocast to `bf16` or `fp16` with float32 weights. fp16 uses a gradient scaler,
            and the teacher does not count the steps that it skips.
        grad_checkpointing: Recompute activations in the backward pass instead of keeping them.
        micro_batch: Pairs that go through the towers at a time on each process, or None for all. It saves
            memory and costs a second forward pass; the losses still see the whole batch.
        compile: Compile the forward pass of student and teacher with `torch.compile`.
        seed: The seed of initialisation, dropout and data.
        checkpoint_every: Steps between checkpoints.
        freeze_text: Train the image tower and the logit scale only.
    """

    precisions = ("fp32", "bf16", "fp16")

    batch_size: int
    weight_decay: float = 0.1
    warmup: int = 500
    grad_checkpointing: bool = False
    micro_batch: int | None = None
    compile: bool = False
    freeze_text: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        settings.check_at_least(self, batch_size=1)
        if self.micro_batch is not None and self.micro_batch < 1:
            raise ValueError(f"micro_batch must be at least 1, got {self.micro_batch}: None is all at once")

    def scaled(self, steps: int | None) -> Settings:
        """Return the settings for another number of steps, the warm-up in proportion; unchanged for None."""
        if steps is None:
            return self
        return replace(self, steps=steps, warmup=self.warmup * steps // self.steps)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Fine-tune a CLIP by several methods and evaluate it under shift.

    Attributes:
        name: The name on the command line.
        summary: A description of the experiment, in one line.
        model: The towers: `tiny-conv-32`, `tiny-vit-16`, `tiny-resnet-32`, `light-vit-28`, or any model of
            open_clip.
        finetune: Settings of the fine-tuning, shared by all methods.
        methods: The methods by name; their settings may differ from the published ones.
        default: The names of the methods that run by default; all if empty.
        evaluate_every: Optimizer steps between evaluations of student and teacher during training; 0
            evaluates at the end only.
        published: The name of the paper's figures for this experiment, in `paper`.
    """

    name: Hidden[str]
    summary: Hidden[str]
    model: str
    finetune: Settings
    methods: Mapping[str, Method]
    default: Hidden[tuple[str, ...]] = ()
    evaluate_every: int | None = 0
    published: Hidden[str | None] = None

    def __post_init__(self) -> None:
        if self.evaluate_every is not None and self.evaluate_every < 0:
            raise ValueError(
                f"evaluate_every must be at least 0, got {self.evaluate_every}: 0 is at the end only"
            )
        if self.published is not None:
            lookup("published", self.published, {**paper.PUBLISHED, **paper.FORGETTING})

    def method(self, name: str) -> Method:
        """Return the method of that name, with this recipe's settings.

        Raises:
            ValueError: If the recipe has no such method.
        """
        return lookup("method", name, self.methods)

    def select(self, names: Sequence[str]) -> list[str]:
        """Return the names of the methods to run: these, all for `("all",)`, the default for none.

        Raises:
            ValueError: If the recipe does not have one of them.
        """
        if tuple(names) == ("all",):
            return list(self.methods)
        selected = list(names or self.default or self.methods)
        for name in selected:
            self.method(name)
        return selected

    def trained(self, name: str) -> Method:
        """Return the method that `name` trains: itself, or the one that it merges."""
        method = self.method(name)
        return method if method.merge is None else self.method(method.merge.of)

    def why_not(self, name: str, *, labelled: bool, anchored: bool) -> str | None:
        """Return the reason why a method cannot run on some data, or None if it can.

        Args:
            name: The name of the method.
            labelled: Whether the training pairs have labels.
            anchored: Whether there are anchor pairs.
        """
        method = self.trained(name)
        if self.method(name).merge is not None and not method.trains:
            return f"merge of {method.name!r}, which is not trained: choose a method that is"
        if method.head == "linear" and method.trains and not labelled:
            return (
                f"method {name!r} has a linear head and needs labels, the data has captions only: add a "
                "label column to the table, or leave the method out"
            )
        if method.anchors and not anchored:
            return (
                f"method {name!r} needs anchor pairs, image-text pairs like those of pre-training: name some "
                "(--anchors FILE), or leave the method out"
            )
        return None

    def adjust(self: RecipeT) -> RecipeT:
        """Return the recipe with the values that follow from those changed on the command line."""
        return self

    def with_steps(self: RecipeT, steps: int | None) -> RecipeT:
        """Return the recipe with another number of fine-tuning steps and the warm-up in proportion."""
        return replace(self, finetune=self.finetune.scaled(steps))

    def _check_captions(self) -> None:
        """Check that no method has ImageNet's captions, for a recipe with captions of its own."""
        for method in self.methods.values():
            if method.templates != "openai":
                raise ValueError(
                    f"method {method.name!r} has templates={method.templates!r}, which are for ImageNet's "
                    f"classes: leave them out for recipe {self.name!r}, which has captions of its own"
                )


RECIPES: dict[str, Recipe] = {}
"""The recipes by name, which the package enters; `adjust` compares a recipe with the one of its name here."""


@dataclass(frozen=True, kw_only=True)
class FromScratchRecipe(Recipe):
    """Pre-train a small CLIP before it is fine-tuned.

    Attributes:
        pretrain: Settings of the pre-training, which is plain contrastive learning.
    """

    pretrain: Settings

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_captions()
        if ":" in self.model:
            raise ValueError(
                f"model must be the name of towers, got {self.model!r}, which has weights: this recipe "
                "pre-trains its own"
            )

    def with_pretraining(self: ScratchT, steps: int | None) -> ScratchT:
        """Return the recipe with another number of pre-training steps and the warm-up in proportion."""
        return replace(self, pretrain=self.pretrain.scaled(steps))


def __dir__() -> list[str]:
    return __all__
