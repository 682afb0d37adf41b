import pytest
import torch

from wmateacher.integrations.dino.masks import Masks, draw_blocks
from wmateacher.integrations.engine.sampling import generator


@pytest.mark.parametrize("grid", [(14, 14), (4, 6), (1, 1)])
def test_the_wanted_share_of_the_patches_of_some_images_is_hidden(grid):
    hidden = draw_blocks(40, grid, (0.25, 0.25), 0.5, generator(0, 1))
    assert hidden.shape == (40, grid[0] * grid[1])
    counts = hidden.sum(1)
    assert sorted(counts.unique().tolist()) == [0, max(1, round(0.25 * grid[0] * grid[1]))]
    assert (counts > 0).sum() == 20
    assert torch.equal(hidden, draw_blocks(40, grid, (0.25, 0.25), 0.5, generator(0, 1)))


def test_patches_are_hidden_in_blocks():
    """Half of the neighbours of a hidden patch are hidden by chance, and more if they come in blocks."""
    hidden = draw_blocks(200, (14, 14), (0.5, 0.5), 1.0, generator(0, 1)).unflatten(1, (14, 14))
    both = (hidden[:, :, 1:] & hidden[:, :, :-1]).sum() / hidden[:, :, :-1].sum()
    assert both > 0.7


def test_the_share_of_hidden_patches_is_drawn_from_its_range():
    shares = draw_blocks(200, (14, 14), (0.1, 0.5), 1.0, generator(0, 1)).float().mean(1)
    assert 0.09 < shares.min() < 0.15
    assert 0.45 < shares.max() < 0.51


def test_one_image_at_least_has_hidden_patches():
    assert draw_blocks(2, (4, 4), (0.1, 0.1), 0.01, generator(0, 1)).any(1).sum() == 1


def test_an_image_counts_as_the_mean_of_its_hidden_patches():
    hidden = torch.tensor([[True, False, True], [False, False, False], [False, True, False]])
    masks = Masks.of(hidden)
    assert masks.positions.tolist() == [0, 2, 7]
    torch.testing.assert_close(masks.weights, torch.tensor([1 / 6, 1 / 6, 1 / 3]))
