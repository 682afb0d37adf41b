"""Accuracy and calibration of a classifier on a test set."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from wmateacher.integrations.engine import processes

Labelled = Iterable[tuple[Tensor, Tensor]]
"""Batches of images `[B, 3, H, W]` and labels `[B]`."""

_BINS = 10


class Scores(NamedTuple):
    """What is measured on one test set.

    Attributes:
        accuracy: Top-1, in percent.
        ece: Expected calibration error over the whole set, in [0, 1]: 10 bins, l1.
        ece_per_batch: The same, computed in each batch and averaged. This is how the published TRACER
            figures were computed; it is larger, and depends on the batches' size and order.
        reliability: For each of the 10 bins of confidence that has images: their mean confidence, their
            accuracy in [0, 1], and their share of the set.
    """

    accuracy: float
    ece: float
    ece_per_batch: float
    reliability: tuple[tuple[float, float, float], ...] = ()


@torch.no_grad()
def score(
    classifier: nn.Module,
    batches: Labelled,
    classes: int,
    logits: Callable[[Tensor], Tensor] | None = None,
    *,
    parts: bool = False,
) -> Scores:
    """Compare a classifier's answers with the labels.

    Args:
        classifier: Evaluated in eval mode, its mode restored; on the device to work on.
        batches: The test set.
        classes: Their number C.
        logits: Images `[B, 3, H, W]` to logits `[B, C]`; the classifier itself by default.
        parts: The batches are this rank's parts of them; else every rank is given all, and takes its part.

    Raises:
        ValueError: The test set is empty.
    """
    device = next((p.device for p in classifier.parameters()), torch.device("cpu"))
    answer = classifier if logits is None else logits
    # What they are given is whole on every rank.
    accuracy = MulticlassAccuracy(classes, average="micro", sync_on_compute=False).to(device)
    overall, single = (
        MulticlassCalibrationError(classes, n_bins=_BINS, norm="l1", sync_on_compute=False).to(device)
        for _ in "ab"
    )
    per_batch: list[Tensor] = []
    bins = torch.zeros(_BINS, 3, dtype=torch.float64, device=device)
    training = classifier.training
    classifier.eval()
    try:
        for images, labels in batches:
            own, labels = (
                (images, labels) if parts else (processes.shard_rows(images), processes.shard_rows(labels))
            )
            labels = processes.all_gather_rows(labels.to(device))
            given = answer(own.to(device)) if len(own) else torch.empty(0, classes, device=device)
            probabilities = processes.all_gather_rows(given.float().softmax(-1))
            if not len(labels):
                continue
            accuracy.update(probabilities, labels)
            overall.update(probabilities, labels)
            per_batch.append(single(probabilities, labels))
            _fill(bins, probabilities, labels)
    finally:
        classifier.train(training)
    if not per_batch:
        raise ValueError("the test set is empty: give at least one batch of images")
    return Scores(
        100 * accuracy.compute().item(),
        overall.compute().item(),
        torch.stack(per_batch).mean().item(),
        _reliability(bins),
    )


def _fill(bins: Tensor, probabilities: Tensor, labels: Tensor) -> None:
    """Add answers to the bins of their confidence: its sum, the right ones, all."""
    confidence, predicted = probabilities.double().nan_to_num().max(1)
    which = (confidence * len(bins)).long().clamp(max=len(bins) - 1)
    right = (predicted == labels).double()
    bins.index_add_(0, which, torch.stack([confidence, right, torch.ones_like(right)], 1))


def _reliability(bins: Tensor) -> tuple[tuple[float, float, float], ...]:
    total = bins[:, 2].sum()
    rows = [(c / n, r / n, n / total.item()) for c, r, n in bins.tolist() if n]
    return tuple(rows)
