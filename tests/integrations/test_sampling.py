import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wmateacher.integrations.sampling import Epochs, generator, mix


@given(st.integers(1, 50), st.data(), st.integers(0, 2**40))
def test_an_epoch_holds_every_image_at_most_once_and_any_order_of_asking_gives_the_same(count, data, seed):
    batch = data.draw(st.integers(1, count))
    epochs = Epochs(count, batch, seed)
    steps = range(3 * epochs.steps_per_epoch)
    forwards = [epochs(s) for s in steps]
    for first in steps[:: epochs.steps_per_epoch]:
        seen = torch.cat(forwards[first : first + epochs.steps_per_epoch])
        assert len(seen.unique()) == len(seen) == epochs.steps_per_epoch * batch
    again = Epochs(count, batch, seed)
    assert all(torch.equal(again(s), forwards[s]) for s in reversed(steps))


def test_high_bits_of_a_seed_count():
    seeds = [(0,), (1,), (2**31,), (2**33,), (2**40,), (0, 1), (1, 5)]
    assert len({mix(*s) for s in seeds}) == len(seeds)
    draws = {torch.rand(1, generator=generator(*s)).item() for s in seeds}
    assert len(draws) == len(seeds)


@pytest.mark.parametrize("size", [0, 31])
def test_batches_that_do_not_fit(size):
    with pytest.raises(ValueError, match=f"batch_size must be between 1 and the 30 labels, got {size}"):
        Epochs(30, size, 0, "labels")
