from itertools import islice

import pytest
import torch

from wmateacher.integrations.clip.data.digits import DigitPairs
from wmateacher.integrations.vision.digits import NARROW, Split


def tokenizer(texts):
    """Each caption as its length and its first letter."""
    return torch.tensor([[len(t), ord(t[0])] for t in texts])


def pairs(batch_size=8, seed=0, count=30):
    images = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    split = Split(images, torch.arange(count) % 3)
    return DigitPairs(
        split,
        NARROW,
        ["a", "bb", "ccc"],
        ["{}", "x {}"],
        tokenizer,
        size=12,
        batch_size=batch_size,
        seed=seed,
    )


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a[:4], b[:4], strict=True))


def test_a_step_is_always_the_same_batch():
    stream = pairs()
    whole = list(islice(stream(0), 10))
    assert all(same(a, b) for a, b in zip(whole[4:], islice(stream(4), 6), strict=True))
    assert not same(whole[0], whole[1])
    assert same(whole[0], pairs().batch(0))


@pytest.mark.parametrize("other", [1, 2, 2**31])
def test_seeds_give_other_orders_drawings_and_captions(other):
    first, second = pairs(batch_size=24).batch(0), pairs(batch_size=24, seed=other).batch(0)
    assert not torch.equal(first.caption, second.caption)
    assert not torch.equal(first.images, second.images)
    assert not torch.equal(pairs().epochs(0), pairs(seed=other).epochs(0))


def test_every_caption_belongs_to_its_image_and_stands_once():
    stream = pairs(batch_size=24)
    for step in range(5):
        images, tokens, caption, *_ = stream.batch(step)
        assert images.shape == (24, 3, 12, 12)
        assert len(tokens) <= 6
        assert len(tokens.unique(dim=0)) == len(tokens)
        labels = stream.split.labels[stream.epochs(step)]
        lengths = torch.tensor([1, 2, 3])[labels]
        assert ((tokens[caption][:, 0] - lengths) % 2 == 0).all()  # "{}" or "x {}": 0 or 2 more


def test_an_epoch_shows_every_image_at_most_once():
    epochs = pairs(batch_size=8).epochs
    assert epochs.steps_per_epoch == 3
    for first in (0, 3, 6):
        assert len(torch.cat([epochs(first + i) for i in range(3)]).unique()) == 24


@pytest.mark.parametrize("size", [0, 31])
def test_bad_batch_sizes(size):
    with pytest.raises(
        ValueError, match=f"batch_size must be between 1 and the 30 training images, got {size}"
    ):
        pairs(batch_size=size)
