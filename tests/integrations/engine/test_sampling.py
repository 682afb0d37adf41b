import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wmateacher.integrations.engine.sampling import Balanced, Epochs, generator, mix


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


@given(st.integers(1, 50), st.data(), st.integers(0, 2**40))
def test_filled_epochs_show_every_image_in_full_batches(count, data, seed):
    batch = data.draw(st.integers(1, count))
    epochs = Epochs(count, batch, seed, fill=True)
    assert epochs.steps_per_epoch == -(-count // batch)
    for epoch in range(2):
        steps = [epochs(epoch * epochs.steps_per_epoch + i) for i in range(epochs.steps_per_epoch)]
        assert {len(step) for step in steps} == {batch}
        seen = torch.cat(steps)
        assert set(seen.tolist()) == set(range(count))
        assert torch.equal(seen[count:], seen[: len(seen) - count])
    assert len(epochs(0).unique()) == batch


def test_an_imagenet_epoch_is_2503_steps():
    assert Epochs(1_281_167, 512, 0, fill=True).steps_per_epoch == 2503


@given(st.lists(st.integers(0, 9), min_size=1, max_size=60), st.data(), st.integers(0, 2**40))
def test_balanced_batches_have_all_classes_equally_often(labels, data, seed):
    labels = torch.tensor(labels)
    batch = data.draw(st.integers(1, len(labels)))
    balanced = Balanced(labels, batch, seed)
    for step in (0, 1, 7):
        chosen = balanced(step)
        assert len(chosen) == batch
        assert torch.equal(Balanced(labels, batch, seed)(step), chosen)
        counts = torch.bincount(labels[chosen], minlength=10)[labels.unique()]
        assert counts.max() - counts.min() <= 1
    assert balanced.steps_per_epoch == -(-len(labels) // batch)


def test_every_image_is_drawn_in_time_and_classes_alike_whatever_their_size():
    labels = torch.tensor([0] * 30 + [1] * 6 + [2] * 2)
    balanced = Balanced(labels, 3, 0)
    drawn = torch.cat([balanced(step) for step in range(400)])
    counts = torch.bincount(drawn, minlength=38)
    assert (counts > 0).all()
    assert torch.bincount(labels[drawn]).tolist() == [400, 400, 400]
    assert counts[:30].float().std() < 3 * (400 / 30) ** 0.5


def test_at_512_of_1000_classes_40_percent_of_anchors_have_a_false_negative_and_balanced_ones_none():
    labels = torch.arange(20_000) % 1000

    def twins(batch):
        counts = torch.bincount(labels[batch], minlength=1000)
        return (counts[labels[batch]] > 1).float().mean().item()

    plain, balanced = Epochs(20_000, 512, 0), Balanced(labels, 512, 0)
    assert sum(twins(plain(s)) for s in range(30)) / 30 == pytest.approx(0.40, abs=0.02)
    assert all(twins(balanced(s)) == 0 for s in range(30))


def test_balanced_batches_that_do_not_fit():
    with pytest.raises(ValueError, match="batch_size must be between 1 and the 3 training images, got 4"):
        Balanced(torch.arange(3), 4, 0)
