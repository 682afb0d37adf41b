"""Accuracy and calibration of a classifier on a test set."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from wmateacher.integrations.engine import processes

__all__ = ["Labelled", "Scores", "score"]

Labelled = Iterable[tuple[Tensor, Tensor]]
"""Batches of images `[B, 3, H, W]` and labels `[B]`."""

_BINS = 10


class Scores(NamedTuple):
    """The scores of a classifier on one test set.

    Attributes:
        accuracy: The top-1 accuracy, in percent.
        ece: The expected calibration error over the whole set, in [0, 1], with 10 bins and the l1 norm.
        ece_per_batch: The mean of the calibration errors of the batches, weighted by their sizes. The
            published TRACER figures are computed this way, in batches of the training batch size. It is
            larger, and depends on the size and the order of the batches.
        reliability: For each of the 10 bins of confidence with images, their mean confidence, their accuracy
            in [0, 1], and their share of the set.
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
    """Compare the predictions of a classifier with the labels.

    Args:
        classifier: The classifier, on the device to work on. It is evaluated in eval mode; its mode is
            restored.
        batches: The test set.
        classes: The number of classes C.
        logits: Maps images `[B, 3, H, W]` to logits `[B, C]`. Default: the classifier.
        parts: Whether the batches are already split between ranks. If not, every rank gets all batches and
            scores its part.

    Raises:
        ValueError: If the test set is empty.
    """
    device = next((p.device for p in classifier.parameters()), torch.device("cpu"))
    answer = classifier if logits is None else logits
    # The metrics see gathered rows, the same on every rank, so they must not be summed over ranks again.
    accuracy = MulticlassAccuracy(classes, average="micro", sync_on_compute=False).to(device)
    overall, single = (
        MulticlassCalibrationError(classes, n_bins=_BINS, norm="l1", sync_on_compute=False).to(device)
        for _ in "ab"
    )
    per_batch: list[Tensor] = []
    sizes: list[int] = []
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
            sizes.append(len(labels))
            _fill(bins, probabilities, labels)
    finally:
        classifier.train(training)
    if not per_batch:
        raise ValueError("the test set is empty: give at least one batch of images")
    return Scores(
        100 * accuracy.compute().item(),
        overall.compute().item(),
        (torch.stack(per_batch) @ torch.tensor(sizes, dtype=per_batch[0].dtype, device=device)).item()
        / sum(sizes),
        _reliability(bins),
    )


def _fill(bins: Tensor, probabilities: Tensor, labels: Tensor) -> None:
    """Add predictions to bins by confidence: their confidence, how many are correct, and how many."""
    confidence, predicted = probabilities.double().nan_to_num().max(1)
    which = (confidence * len(bins)).long().clamp(max=len(bins) - 1)
    right = (predicted == labels).double()
    bins.index_add_(0, which, torch.stack([confidence, right, torch.ones_like(right)], 1))


def _reliability(bins: Tensor) -> tuple[tuple[float, float, float], ...]:
    total = bins[:, 2].sum()
    rows = [(c / n, r / n, n / total.item()) for c, r, n in bins.tolist() if n]
    return tuple(rows)
