"""Accuracy and calibration of a zero-shot head, over any number of test sets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from wmateacher.integrations import processes
from wmateacher.integrations.clip.towers import Towers

Labelled = Iterable[tuple[Tensor, Tensor]]
"""Batches of images `[B, 3, H, W]` and labels `[B]`."""


class Scores(NamedTuple):
    """What is measured on one test set.

    Attributes:
        accuracy: Top-1, in percent.
        ece: Expected calibration error over the whole set, in [0, 1]: 10 bins, l1.
        ece_per_batch: The same, computed in each batch and averaged. This is how the published TRACER
            figures were computed; it is larger, and depends on the batches' size and order.
    """

    accuracy: float
    ece: float
    ece_per_batch: float


@torch.no_grad()
def score(towers: Towers, head: Tensor, batches: Labelled) -> Scores:
    """Classify images by `features @ head` and compare with their labels.

    With an initialised process group every rank embeds its part of each batch, and all get the scores.

    Args:
        towers: The model; evaluated in eval mode, its mode restored.
        head: `[d, classes]`, as `zero_shot_head` gives.
        batches: The test set.

    Raises:
        ValueError: The test set is empty.
    """
    classes, device = head.shape[1], head.device
    # What they are given is whole on every rank.
    accuracy = MulticlassAccuracy(classes, average="micro", sync_on_compute=False).to(device)
    overall, single = (
        MulticlassCalibrationError(classes, n_bins=10, norm="l1", sync_on_compute=False).to(device)
        for _ in "ab"
    )
    per_batch: list[Tensor] = []
    training = towers.training
    towers.eval()
    for images, labels in batches:
        labels = labels.to(device)
        features = towers.encode_image(processes.part(images).to(device), normalize=True)
        probabilities = processes.whole((features @ head).float().softmax(-1))
        accuracy.update(probabilities, labels)
        overall.update(probabilities, labels)
        per_batch.append(single(probabilities, labels))
    towers.train(training)
    if not per_batch:
        raise ValueError("the test set is empty: give at least one batch of images")
    return Scores(
        100 * accuracy.compute().item(), overall.compute().item(), torch.stack(per_batch).mean().item()
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
