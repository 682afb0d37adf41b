"""Accuracy and calibration of a classifier on a test set."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from wmateacher.integrations import processes

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
def score(
    classifier: nn.Module, batches: Labelled, classes: int, logits: Callable[[Tensor], Tensor] | None = None
) -> Scores:
    """Compare a classifier's answers with the labels.

    Args:
        classifier: Evaluated in eval mode, its mode restored; on the device to work on.
        batches: The test set.
        classes: Their number C.
        logits: Images `[B, 3, H, W]` to logits `[B, C]`; the classifier itself by default.

    Raises:
        ValueError: The test set is empty.
    """
    device = next((p.device for p in classifier.parameters()), torch.device("cpu"))
    answer = classifier if logits is None else logits
    # What they are given is whole on every rank.
    accuracy = MulticlassAccuracy(classes, average="micro", sync_on_compute=False).to(device)
    overall, single = (
        MulticlassCalibrationError(classes, n_bins=10, norm="l1", sync_on_compute=False).to(device)
        for _ in "ab"
    )
    per_batch: list[Tensor] = []
    training = classifier.training
    classifier.eval()
    for images, labels in batches:
        labels = labels.to(device)
        probabilities = processes.whole(answer(processes.part(images).to(device)).float().softmax(-1))
        accuracy.update(probabilities, labels)
        overall.update(probabilities, labels)
        per_batch.append(single(probabilities, labels))
    classifier.train(training)
    if not per_batch:
        raise ValueError("the test set is empty: give at least one batch of images")
    return Scores(
        100 * accuracy.compute().item(), overall.compute().item(), torch.stack(per_batch).mean().item()
    )
