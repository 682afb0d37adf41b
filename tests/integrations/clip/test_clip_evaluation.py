import numpy as np
import pytest
import torch

from wmateacher.integrations.clip.evaluation import Scores, score, summarise
from wmateacher.integrations.clip.model import Prompts, build, zero_shot_head


class Fixed(torch.nn.Module):
    """Towers whose image features are the images' first values."""

    def encode_image(self, images, normalize):
        assert normalize
        assert not self.training
        return images[:, 0, 0]


def ece_oracle(probabilities, labels, bins=10):
    confidence, predicted = probabilities.max(1), probabilities.argmax(1)
    correct = predicted == labels
    total = 0.0
    edges = np.linspace(0, 1, bins + 1)
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        inside = (confidence >= low) & (confidence < high)
        if inside.any():
            total += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    return total


def test_scores_are_their_definitions():
    logits, labels = 2 * torch.randn(500, 4), torch.randint(0, 4, (500,))
    labels[:250] = logits[:250].argmax(1)
    images = logits[:, None, None, :]
    batches = list(zip(images.split(100), labels.split(100), strict=True))
    towers = Fixed().train()
    scores = score(towers, torch.eye(4), batches)
    assert towers.training
    probabilities = logits.softmax(1).numpy()
    assert scores.accuracy == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item())
    assert scores.ece == pytest.approx(ece_oracle(probabilities, labels.numpy()), abs=1e-6)
    parts = [
        ece_oracle(p, y) for p, y in zip(np.split(probabilities, 5), np.split(labels.numpy(), 5), strict=True)
    ]
    assert scores.ece_per_batch == pytest.approx(np.mean(parts), abs=1e-6)
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels.numpy()
    assert sum(share for *_, share in scores.reliability) == pytest.approx(1)
    for mean, accuracy, share in scores.reliability:
        inside = np.floor(10 * confidence) == np.floor(10 * mean)
        assert (confidence[inside].mean(), right[inside].mean()) == pytest.approx((mean, accuracy), abs=1e-6)
        assert share == pytest.approx(inside.mean())
    gaps = sum(share * abs(accuracy - mean) for mean, accuracy, share in scores.reliability)
    assert gaps == pytest.approx(scores.ece, abs=1e-6)
    assert scores.ece_per_batch > scores.ece


def test_summaries_average_over_the_shifts_only():
    record = summarise(
        {"id": Scores(90, 0.1, 0.2), "gray": Scores(80, 0.2, 0.3), "noisy": Scores(60, 0.4, 0.5)}
    )
    assert record["id"] == 90
    assert record["ood"] == 70
    assert record["ood_per_shift"] == {"gray": 80, "noisy": 60}
    assert record["ece"] == pytest.approx(0.3)
    assert record["ece_per_batch"] == pytest.approx(0.4)
    assert record["id_ece"] == 0.1


def test_answers_that_are_no_numbers_have_scores():
    images, labels = torch.full((3, 1, 1, 4), float("nan")), torch.tensor([0, 1, 2])
    scores = score(Fixed(), torch.eye(4), [(images, labels)])
    assert 0 <= scores.accuracy <= 100


def test_a_head_is_built_in_eval_mode():
    towers, tokenizer = build("tiny-vit-16")
    towers.clip.token_embedding.register_forward_hook(lambda *a: seen.append(towers.training))
    seen = []
    towers.train()
    zero_shot_head(towers, Prompts(["a"], ["x {}"], tokenizer))
    assert seen == [False]
    assert towers.training


def test_without_shifts_there_are_no_means():
    record = summarise({"imagenet": Scores(90, 0.1, 0.2)}, "imagenet")
    assert (record["id"], record["ood"], record["ece"], record["ood_per_shift"]) == (90, None, None, {})


def test_an_empty_set_is_an_error():
    with pytest.raises(ValueError, match="the test set is empty"):
        score(Fixed(), torch.eye(4), [])
