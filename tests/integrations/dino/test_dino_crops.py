import math
from itertools import islice

import pytest
import torch
from torch.utils.data import TensorDataset

from wmateacher.integrations.dino.crops import DrawnCrops, PhotoCrops, cut, normalise
from wmateacher.integrations.dino.recipes import Crops
from wmateacher.integrations.vision import digits
from wmateacher.integrations.vision.digits import NARROW, WIDE, Split
from wmateacher.integrations.vision.images import Images

CROPS = Crops(12, 8, 3, (0.6, 1.0), (0.2, 0.5))


def split(count=10):
    return Split(
        torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(count) % 10
    )


def drawn(**options):
    return DrawnCrops(
        split(), WIDE, 16, CROPS, options.pop("batch_size", 4), options.pop("seed", 0), **options
    )


def test_there_are_two_global_crops_and_then_local_ones_always_the_same():
    batch = drawn().batch(3)
    assert [tuple(c.shape) for c in batch] == [(4, 3, 12, 12)] * 2 + [(4, 3, 8, 8)] * 3
    again = next(islice(drawn()(2), 1, None))
    assert all(torch.equal(a, b) for a, b in zip(batch, again, strict=True))
    assert not torch.equal(batch[0], drawn(seed=1).batch(3)[0])
    assert not torch.equal(batch[0], batch[1])


def test_a_cut_is_the_part_of_the_image_it_says():
    """Of an image that is its own coordinates, a crop tells where it was cut and how large."""
    ramp = torch.arange(32.0) + 0.5
    image = torch.stack([ramp.expand(32, 32), ramp[:, None].expand(32, 32), torch.zeros(32, 32)]).expand(
        200, 3, 32, 32
    )
    out = cut(image, 16, (0.25, 0.64), torch.Generator().manual_seed(0))
    widths = (out[:, 0, :, -1] - out[:, 0, :, 0]).mean(1) * 16 / 15
    heights = (out[:, 1, -1] - out[:, 1, 0]).mean(1) * 16 / 15
    torch.testing.assert_close(widths, heights, rtol=0, atol=0.2)
    share = (widths / 32) ** 2
    assert share.min() >= 0.24
    assert share.max() <= 0.66
    assert share.std() > 0.05
    assert out[:, :2].min() >= 0.4
    assert out[:, :2].max() <= 31.6


def test_normalising_takes_colours_away():
    grey = torch.rand(5, 1, 8, 8)
    tinted = 0.1 + grey * torch.rand(5, 3, 1, 1).add(0.5)
    out = normalise(tinted)
    torch.testing.assert_close(out.mean((-2, -1)), torch.zeros(5, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(out[:, 0], out[:, 1], atol=0.2, rtol=0.1)
    assert torch.isfinite(normalise(torch.ones(1, 3, 4, 4))).all()


def test_the_share_of_redrawn_crops_grows():
    stream = drawn(redraw=(10, 20))
    assert [stream.redrawn_at(s) for s in (0, 10, 15, 20, 99)] == [0, 0, 0.5, 1, 1]
    assert drawn().redrawn_at(0) == 1
    whole = Crops(16, 16, 0, (1.0, 1.0), (0.5, 1.0))
    shared, redrawn = (
        DrawnCrops(split(), WIDE, 16, whole, 4, 0, redraw=redraw).batch(0) for redraw in ((10, 20), (0, 0))
    )
    torch.testing.assert_close(*shared)
    assert (redrawn[0] - redrawn[1]).abs().mean() > 0.3
    halfway = DrawnCrops(split(), WIDE, 16, whole, 10, 0, redraw=(-10, 10)).batch(0)
    differs = (halfway[0] - halfway[1]).abs().mean((1, 2, 3)) > 0.3
    assert 0 < differs.sum() < 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 11}, "batch_size must be between 1 and the 10 training images, got 11"),
    ],
)
def test_streams_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        drawn(**options)


def test_crops_larger_than_images_are_refused():
    with pytest.raises(
        ValueError, match="crops of 12 pixels are larger than the images of 8: lower global_size"
    ):
        DrawnCrops(split(), WIDE, 8, CROPS, 4, 0)
    data = TensorDataset(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.zeros(4))
    with pytest.raises(ValueError, match=r"larger than the images \(the first has 8\): lower global_size"):
        PhotoCrops(Images("x", ("a",), data, data, data, torch.zeros(4), 3), CROPS, 2, 0)
    with pytest.raises(ValueError, match="the domain's colours tell the label"):
        DrawnCrops(split(), NARROW, 16, CROPS, 4, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_size": 0}, "global_size must be at least 1, got 0"),
        ({"local_count": -1}, "local_count must be at least 0, got -1"),
        ({"local_scale": (0.5, 0.4)}, r"local_scale must be a range within \(0, 1\], got \(0.5, 0.4\)"),
        ({"global_scale": (0.0, 1.0)}, "global_scale must be a range"),
    ],
)
def test_crops_that_are_none(options, message):
    with pytest.raises(ValueError, match=message):
        Crops(**options)


def test_photographs_are_cut_and_distorted_the_same_at_each_asking():
    data = TensorDataset(torch.randint(0, 256, (6, 3, 20, 20), dtype=torch.uint8), torch.arange(6))
    images = Images("x", ("a",) * 6, data, data, data, torch.arange(6), 3)
    state = torch.get_rng_state()
    batch = next(PhotoCrops(images, CROPS, 4, 0)(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert [tuple(c.shape) for c in batch] == [(4, 3, 12, 12)] * 2 + [(4, 3, 8, 8)] * 3
    again = next(islice(PhotoCrops(images, CROPS, 4, 0)(0), 1, None))
    assert all(torch.equal(a, b) for a, b in zip(batch, again, strict=True))
    assert all(math.isfinite(c.sum()) for c in batch)


def test_the_bundled_digits_are_large_enough_for_the_default():
    from wmateacher.integrations.dino import recipes

    recipe = recipes.drawn()
    source = digits.load("digits")
    stream = DrawnCrops(
        source.train, recipe.domain, recipe.image_size, recipe.crops, recipe.settings.batch_size, 0
    )
    assert len(stream.batch(0)) == 2 + recipe.crops.local_count
