"""Pairs, test sets and batches in parts, shared out to processes."""

from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image
from pool import device
from ranks import on_ranks
from torch import distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torchvision.transforms.functional import to_tensor

from wmateacher.integrations.clip import micro_batches
from wmateacher.integrations.clip.data import imagenet
from wmateacher.integrations.clip.data.batches import Batch
from wmateacher.integrations.clip.data.digits import DigitPairs
from wmateacher.integrations.clip.data.files import Table
from wmateacher.integrations.clip.data.imagenet import Photos
from wmateacher.integrations.clip.data.photos import PhotoPairs
from wmateacher.integrations.clip.evaluation import score_set
from wmateacher.integrations.clip.methods import METHODS
from wmateacher.integrations.clip.model import build
from wmateacher.integrations.clip.recipes import Settings
from wmateacher.integrations.clip.training import fit
from wmateacher.integrations.engine import processes
from wmateacher.integrations.engine.sampling import mix
from wmateacher.integrations.vision import digits
from wmateacher.losses import PairedEmbeddings, info_nce

COUNT = 11


def view(image):
    return to_tensor(image) + 0.01 * torch.rand(1)


def tokenizer(texts):
    return torch.tensor([[int(t)] for t in texts])


def files(folder):
    for i in range(COUNT):
        file = Path(folder) / f"{i}.png"
        if not file.exists():
            partial = Path(folder) / f"{i}-{dist.get_rank()}.png"
            Image.new("RGB", (2, 2), (20 * i, 0, 0)).save(partial)
            partial.rename(file)
    return [str(Path(folder) / f"{i}.png") for i in range(COUNT)]


def gathered(value):
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


@on_ranks(1, 2, 4)
def test_ranks_parts_make_the_batch_of_one_process(folder):
    files(folder)
    table = Path(folder) / f"pairs-{dist.get_rank()}.csv"
    table.write_text("filepath,title\n" + "".join(f"{i}.png,{i}\n" for i in range(COUNT)))
    made = PhotoPairs(Table(table), view, tokenizer, batch_size=6, seed=0)
    assert made.order.steps_per_epoch == 2
    for step, batch in enumerate(islice(made(0), 4)):
        texts = batch.tokens[batch.caption, 0]
        parts = gathered((texts, batch.images))
        assert torch.equal(torch.cat([t for t, _ in parts]), made.order(step))
        images = torch.cat([i for _, i in parts])
        assert ((255 * images[:, 0, 0, 0] / 20).round().long() == made.order(step)).all()
        for i, image in enumerate(images):  # each its own noise, whichever rank draws it
            drawn = torch.rand(1, generator=torch.Generator().manual_seed(mix(0, 2, step, i)))
            torch.testing.assert_close(image[1], 0.01 * drawn.expand(2, 2))


class Reads(torch.nn.Module):
    """Image features that tell the number of an image."""

    def __init__(self):
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(1))
        self.seen = 0

    def encode_image(self, images, normalize=False):
        self.seen += len(images)
        number = (255 * images[:, 0, 0, 0] / 20).round().long()
        return 4 * F.one_hot(number, COUNT).float()


@on_ranks(1, 2, 4)
def test_every_rank_reads_its_part_of_a_set_and_all_know_the_scores(folder):
    everything = files(folder)
    labels = torch.arange(COUNT)
    labels[3] = 0  # one wrong
    Path(everything[5]).write_bytes(b"no image")
    test = imagenet.Test(Photos(everything, labels), COUNT, lambda logits: logits)
    towers = Reads().to(device())
    dist.barrier()
    with pytest.warns(UserWarning, match="of 11 images cannot be read") if _reads(5) else nullcontext():
        found = score_set(towers, torch.eye(COUNT, device=device()), test, to_tensor, batch_size=4)
    assert found.accuracy == pytest.approx(100 * 9 / 10)
    assert len(set(gathered(tuple(found)))) == 1
    assert sum(gathered(towers.seen)) == 10


def _reads(index, batch=4):
    """Whether this rank reads an image."""
    first = index // batch * batch
    part = range(first, min(first + batch, COUNT))[processes.local_slice(min(batch, COUNT - first))]
    return index in part


class Towers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.image, self.text = torch.nn.Linear(5, 4), torch.nn.Embedding(9, 4)
        self.scale = torch.nn.Parameter(torch.tensor(1.0))

    def forward(self, images, tokens, caption):
        return PairedEmbeddings(self.image(images), self.text(tokens)[caption], self.scale.exp())


@on_ranks(1, 2, 4)
def test_gradients_in_parts_on_ranks_are_those_of_the_whole_batch(folder):
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    whole = Batch(torch.randn(12, 5), torch.arange(9), torch.arange(12) % 9)
    alone = Towers()
    images, tokens, caption, *_ = whole
    given = alone(images, tokens, caption)
    # One process's loss, and a term on the weights themselves.
    logits = given.logit_scale * F.normalize(given.image) @ F.normalize(given.text).T
    loss = (F.cross_entropy(logits, torch.arange(12)) + F.cross_entropy(logits.T, torch.arange(12))) / 2
    (loss + 0.1 * alone.image.weight.norm()).backward()
    model = Towers().to(device())
    wrapped = DistributedDataParallel(model) if size > 1 else model
    each = 12 // size
    own = whole.rows(slice(rank * each, (rank + 1) * each)).to(device())
    for _ in range(2):  # a second step, after the reducer has been used
        model.zero_grad()
        held = micro_batches.Cached(wrapped, micro_batches.split(own, 2))
        (info_nce(*held.answers) + 0.1 * model.image.weight.norm()).backward()
        held.backward()
        for (name, expected), found in zip(alone.named_parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(found.grad.cpu(), expected.grad, msg=name)


@on_ranks(1, 2, 4)
def test_counts_are_of_all_ranks(folder):
    rank, size = dist.get_rank(), dist.get_world_size()
    assert processes.all_reduce_sum(rank + 1, device()).item() == size * (size + 1) / 2


@on_ranks(1, 2)
def test_statistics_of_student_and_teacher_are_the_same_on_all_ranks_at_every_step(folder):
    """Else a checkpoint, which rank 0 writes, would not hold what the others go on from."""
    torch.manual_seed(0)
    towers, tokenizer = build("tiny-resnet-32")
    source = digits.load("digits")
    stream = DigitPairs(
        source.val, digits.NARROW, source.classes, source.templates, tokenizer,
        size=towers.image_size, batch_size=8, seed=0,
    )  # fmt: skip
    settings = Settings(steps=3, learning_rate=1e-3, batch_size=8, warmup=0, micro_batch=3)
    student = towers.to(device())
    fitted = fit(student, METHODS["tracer"], stream, settings, progress=False)
    for model in (student, fitted.teacher.module):
        statistics = [b.float().cpu() for b in model.buffers() if b.numel()]
        assert any(b.any() for b in statistics)
        for other in gathered(statistics):
            assert all(torch.equal(a, b) for a, b in zip(statistics, other, strict=True))
