"""Accuracy and calibration of a zero-shot head, over any number of test sets."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from wmateacher.integrations import evaluation
from wmateacher.integrations.clip.towers import Towers
from wmateacher.integrations.evaluation import Labelled, Scores


def score(towers: Towers, head: Tensor, batches: Labelled) -> Scores:
    """Classify images by `features @ head` and compare with their labels.

    Args:
        towers: The model; evaluated in eval mode, its mode restored.
        head: `[d, classes]`, as `zero_shot_head` gives.
        batches: The test set.

    Raises:
        ValueError: The test set is empty.
    """
    return evaluation.score(
        towers, batches, head.shape[1], lambda images: towers.encode_image(images, normalize=True) @ head
    )


def summarise(scores: Mapping[str, Scores], in_distribution: str = "id") -> dict[str, object]:
    """One record of a model's scores: ID, mean and single shifts, ECE.

    Returns:
        `id`, `ood` (mean over the shifts) and `ood_per_shift` in percent; `ece` and `ece_per_batch`,
        means over the shifts; `id_ece`.
    """
    shifts = {name: s for name, s in scores.items() if name != in_distribution}

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    return {
        "id": scores[in_distribution].accuracy,
        "ood": mean([s.accuracy for s in shifts.values()]),
        "ood_per_shift": {name: s.accuracy for name, s in shifts.items()},
        "ece": mean([s.ece for s in shifts.values()]),
        "ece_per_batch": mean([s.ece_per_batch for s in shifts.values()]),
        "id_ece": scores[in_distribution].ece,
    }
