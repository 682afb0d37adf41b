import gzip
import struct

import pytest
import torch

from wmateacher.integrations.vision import digits
from wmateacher.integrations.vision.digits import NARROW, SHIFTS, WIDE, Domain, Split


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def source():
    return digits.load("digits")


def test_the_bundled_digits_split_stratified_without_overlap(source):
    parts = (source.train, source.val, source.test)
    assert [len(p) for p in parts] == [1097, 300, 400]
    images = torch.cat([p.images for p in parts]).flatten(1)
    assert len(images.unique(dim=0)) == len(images)
    for part in parts:
        shares = part.labels.bincount(minlength=10) / len(part)
        assert (shares - 0.1).abs().max() < 0.012
        assert part.images.shape[1:] == (1, 8, 8)
        assert part.images.min() == 0
        assert part.images.max() == 1


def test_loading_is_the_same_every_time(source):
    again = digits.load("digits")
    assert torch.equal(again.test.images, source.test.images)


@pytest.mark.parametrize("domain", [NARROW, WIDE, *SHIFTS.values()])
def test_every_domain_draws_colour_images_in_range_reproducibly(source, domain):
    part = source.val.subset(20)
    first, again = (domain.draw(part, 16, generator()) for _ in range(2))
    assert first.shape == (20, 3, 16, 16)
    assert first.min() >= 0
    assert first.max() <= 1
    assert torch.equal(first, again)


def ink_colour(domain, label, count=2000):
    """Drawn pixels of full ink, [count, 3]."""
    full = Split(torch.ones(count, 1, 4, 4), torch.full((count,), label))
    return domain.draw(full, 4, generator())[:, :, 2, 2]


def test_colours_follow_the_label_95_times_in_100():
    low, high = ink_colour(NARROW, 2), ink_colour(NARROW, 7)
    assert (low[:, 0] > low[:, 2]).float().mean().item() == pytest.approx(0.95, abs=0.02)
    assert (high[:, 2] > high[:, 0]).float().mean().item() == pytest.approx(0.95, abs=0.02)
    assert (ink_colour(SHIFTS["swapped"], 2)[:, 2] > 0.5).float().mean().item() == pytest.approx(
        0.95, abs=0.02
    )


def test_the_shifts_do_what_they_are_called(source):
    part = source.test.subset(50)
    grey = SHIFTS["gray"].draw(part, 8, generator())
    torch.testing.assert_close(grey, part.images.expand(-1, 3, -1, -1))
    torch.testing.assert_close(SHIFTS["inverted"].draw(part, 8, generator()), 1 - grey)
    plain = NARROW.draw(part, 8, generator())
    noise = SHIFTS["noisy"].draw(part, 8, generator()) - plain
    assert noise.std() > 0.1
    papers = SHIFTS["background"].draw(part, 8, generator())[:, :, 0, 0]
    assert len(papers.unique(dim=0)) > 45  # now and then a corner has ink


def test_rotation_turns_counter_clockwise():
    bar = torch.zeros(1, 1, 33, 33)
    bar[..., 15:18, 17:] = 1  # from the middle to the right
    turned = Domain(ink=(digits.WHITE,) * 2, paper=(digits.BLACK,) * 2, rotation=(90.0, 90.0)).draw(
        Split(bar, torch.tensor([0])), 33, generator()
    )[0, 0]
    assert turned[:14].sum() > 20
    assert turned[19:].sum() < 5


def test_random_papers_keep_contrast_to_the_ink():
    empty = Split(torch.zeros(500, 1, 4, 4), torch.arange(500) % 10)
    full = Split(torch.ones(500, 1, 4, 4), empty.labels)
    domain = Domain(ink="random", paper="random")
    apart = (domain.draw(full, 4, generator()) - domain.draw(empty, 4, generator()))[:, :, 0, 0]
    assert apart.abs().amax(1).min() >= 0.35 - 1e-6


def write_idx(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(header + array.to(torch.uint8).numpy().tobytes())


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
def test_torchvisions_files_are_read(tmp_path, name, folder):
    for part, count in (("train", 2500), ("t10k", 60)):
        labels = torch.arange(count) % 10
        write_idx(tmp_path / folder / "raw" / f"{part}-labels-idx1-ubyte", labels)
        write_idx(
            tmp_path / folder / "raw" / f"{part}-images-idx3-ubyte", torch.randint(0, 256, (count, 28, 28))
        )
    source = digits.load(name, tmp_path)
    assert [len(p) for p in (source.train, source.val, source.test)] == [500, 2000, 60]
    assert source.test.images.shape == (60, 1, 28, 28)
    assert source.classes[9] == {"mnist": "nine", "fashion-mnist": "ankle boot"}[name]


def test_missing_data_says_where_it_looked_and_what_to_do(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no mnist in .*MNIST/raw: .*root \(--data-root\), or pass download=True"
    ):
        digits.load("mnist", tmp_path)
    with pytest.raises(ValueError, match="needs the folder that holds it, got root=None: pass root=DIR"):
        digits.load("mnist")
    with pytest.raises(ValueError, match="unknown data 'minst'; did you mean 'mnist'"):
        digits.load("minst")


def test_damaged_files_are_named(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        for kind in ("labels-idx1", "images-idx3"):
            (raw / f"{part}-{kind}-ubyte").write_bytes(gzip.compress(b"not an idx file"))
    with pytest.raises(ValueError, match=r"mnist in .*MNIST/raw cannot be read .*delete it"):
        digits.load("mnist", tmp_path)
