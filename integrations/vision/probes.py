"""Probes of frozen features: k nearest neighbours and a linear classifier."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["knn_accuracy", "linear_accuracy"]

_CHUNK = 1024


@torch.no_grad()
def knn_accuracy(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, k: int = 20, tau: float = 0.07
) -> float:
    """Return the accuracy, in percent, of a vote of the k most similar training images by cosine.

    Each image votes with weight exp(similarity / tau) (Wu et al. 2018, section 3.4). The defaults k = 20 and
    tau = .07 are those of Caron et al. 2021.

    Args:
        train: The training features, shape `[N, D]`.
        train_labels: Their labels, int64 `[N]`.
        test: The test features, shape `[M, D]`.
        test_labels: Their labels, int64 `[M]`.
        k: The number of neighbours; all training images if there are fewer.
        tau: The temperature of the vote.
    """
    classes = int(torch.cat([train_labels, test_labels]).max()) + 1
    bank, k = F.normalize(train.float(), dim=1), min(k, len(train))
    right = 0
    for features, labels in zip(test.split(_CHUNK), test_labels.split(_CHUNK), strict=True):
        similarity, index = (F.normalize(features.float(), dim=1) @ bank.mT).topk(k)
        votes = torch.zeros(len(features), classes, device=features.device)
        votes.scatter_add_(1, train_labels[index], ((similarity - 1) / tau).exp())
        right += int((votes.argmax(1) == labels).sum())
    return 100 * right / len(test)


def linear_accuracy(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    inverse_penalty: float = 1.0,
    most: int = 100_000,
) -> float:
    """Return the accuracy, in percent, of scikit-learn's logistic regression on standardised features.

    Args:
        train: The training features, shape `[N, D]`.
        train_labels: Their labels, int64 `[N]`.
        test: The test features, shape `[M, D]`.
        test_labels: Their labels, int64 `[M]`.
        inverse_penalty: The inverse C of the L2 penalty.
        most: The largest number of training images; more are subsampled at random.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=inverse_penalty, max_iter=1000))
    if len(train) > most:
        chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:most]
        train, train_labels = train[chosen], train_labels[chosen]
    classifier.fit(train.cpu().numpy(), train_labels.cpu().numpy())
    return 100 * float(classifier.score(test.cpu().numpy(), test_labels.cpu().numpy()))
