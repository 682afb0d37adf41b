import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from wmateacher.integrations.vision.probes import knn_accuracy, linear_accuracy


def clusters(count, seed, spread=1.5):
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (count,), generator=random)
    centres = torch.randn(4, 6, generator=torch.Generator().manual_seed(9))
    return centres[labels] + spread * torch.randn(count, 6, generator=random), labels


@pytest.mark.parametrize("k", [1, 5, 20, 10_000])
def test_neighbours_vote_like_scikit_learns(k):
    (train, y), (test, z) = clusters(150, 0), clusters(1500, 1)
    ours = knn_accuracy(train, y, test, z, k=k, tau=0.3)
    theirs = KNeighborsClassifier(min(k, 150), metric="cosine", weights=lambda d: np.exp(-d / 0.3)).fit(
        train.numpy(), y.numpy()
    )
    assert ours == pytest.approx(100 * theirs.score(test.numpy(), z.numpy()), abs=0.1)
    assert 40 < ours < 95


def test_a_linear_probe_separates_what_can_be():
    (train, y), (test, z) = clusters(300, 0, 0.2), clusters(200, 1, 0.2)
    assert linear_accuracy(train, y, test, z) > 95
    assert linear_accuracy(train, y, test, z, most=50) > 90
    shuffled = y[torch.randperm(300, generator=torch.Generator().manual_seed(0))]
    assert linear_accuracy(train, shuffled, test, z) < 60
