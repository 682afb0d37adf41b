"""The number of optimizer steps that a Lightning Trainer will take."""

from __future__ import annotations

import math

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler

__all__ = ["steps_per_epoch", "taken", "total_steps"]


def total_steps(trainer: Trainer) -> int | None:
    """Return the number of optimizer steps in the whole run; None if the Trainer cannot know it."""
    # `max_steps` limits the steps of all optimizers together, so it says nothing about one of several.
    if trainer.max_steps != -1 and len(trainer.optimizers) > 1:
        return None
    steps = trainer.estimated_stepping_batches  # which also loads the data
    schedules, batches, epochs = _schedules(trainer), trainer.num_training_batches, trainer.max_epochs
    if schedules and math.isfinite(batches) and epochs not in (None, -1):
        factors = map(schedules[-1].get_accumulate_grad_batches, range(epochs))
        steps = sum(math.ceil(batches / factor) for factor in factors)
        steps = steps if trainer.max_steps == -1 else min(steps, trainer.max_steps)
    return int(steps) if math.isfinite(steps) and steps > 0 else None


def taken(trainer: Trainer) -> int:
    """Return the number of optimizer steps so far, counted as `total_steps` counts those of the run."""
    # `global_step` adds up the steps of all optimizers. Each of several, which the module steps itself, is
    # taken to step once a batch.
    return trainer.fit_loop.total_batch_idx + 1 if len(trainer.optimizers) > 1 else trainer.global_step


def steps_per_epoch(trainer: Trainer) -> int:
    """Return the number of optimizer steps in each epoch.

    Raises:
        ValueError: If the Trainer cannot know it, or it is not the same in all epochs.
    """
    if trainer.train_dataloader is None:
        trainer.fit_loop.setup_data()
    batches = trainer.num_training_batches
    if not trainer.lightning_module.automatic_optimization:
        why = "the module steps its optimizers itself"
    elif not math.isfinite(batches):
        why = "the training data has no length"
    elif _schedules(trainer):
        why = "a GradientAccumulationScheduler changes it"
    else:
        return math.ceil(batches / trainer.accumulate_grad_batches)
    raise ValueError(
        "update_every='epoch' needs to know the number of optimizer steps in an epoch, the same for all, and "
        f"{why}: pass a number of steps, update_every=N"
    )


def _schedules(trainer: Trainer) -> list[GradientAccumulationScheduler]:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, GradientAccumulationScheduler)]
