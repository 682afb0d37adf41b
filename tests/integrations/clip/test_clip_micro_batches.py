"""A batch in parts gives the gradients of the whole."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from tiny_clip import SOURCE, pairs
from torch.nn import functional as F

from wmateacher.integrations.clip import micro_batches
from wmateacher.integrations.clip.data.batches import Batch
from wmateacher.integrations.clip.methods import METHODS
from wmateacher.integrations.clip.model import Prompts, build
from wmateacher.integrations.clip.recipes import Settings
from wmateacher.integrations.clip.training import build_student, fit
from wmateacher.integrations.vision.digits import WIDE
from wmateacher.losses import PairedEmbeddings, info_nce

SETTINGS = Settings(steps=3, learning_rate=1e-3, batch_size=16, warmup=1, checkpoint_every=2)


class Small(torch.nn.Module):
    """Towers with dropout and batch normalisation."""

    def __init__(self):
        super().__init__()
        self.image = torch.nn.Sequential(
            torch.nn.Linear(5, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.5)
        )
        self.text = torch.nn.Embedding(50, 8)
        self.scale = torch.nn.Parameter(torch.tensor(1.0))
        self.seen = []

    def forward(self, images, tokens, caption):
        image = self.image(images)
        self.seen.append(image.detach().clone())
        return PairedEmbeddings(
            F.normalize(image, dim=-1), F.normalize(self.text(tokens), dim=-1)[caption], self.scale.exp()
        )


def batch(count=10):
    caption = torch.arange(count) % 4
    return Batch(torch.randn(count, 5), torch.arange(4), caption, torch.arange(count))


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_parts_make_the_batch():
    whole = batch()
    parts = micro_batches.split(whole, 4)
    assert [len(p.images) for p in parts] == [3, 3, 4]
    assert [len(p.images) for p in micro_batches.split(whole, 9)] == [5, 5]
    assert len(micro_batches.split(whole, 10)) == 1
    assert torch.equal(torch.cat([p.images for p in parts]), whole.images)
    assert torch.equal(torch.cat([p.tokens[p.caption] for p in parts]), whole.tokens[whole.caption])
    assert torch.equal(torch.cat([p.labels for p in parts]), whole.labels)
    assert len(parts[0].tokens) == 3  # only what it needs


@pytest.mark.parametrize("size", [1, 3, 10])
def test_gradients_are_those_of_the_whole(size):
    model, whole = Small().eval(), batch()
    info_nce(*model(*whole[:3])).backward()
    expected = gradients(model)
    other = deepcopy(model)
    other.zero_grad()
    held = micro_batches.Cached(other, micro_batches.split(whole, size))
    info_nce(*held.answers).backward()
    held.backward()
    found = gradients(other)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def test_dropout_is_the_same_in_both_passes_and_statistics_move_once():
    model, whole = Small().train(), batch(12)
    parts = micro_batches.split(whole, 4)
    held = micro_batches.Cached(model, parts)
    assert model.image[1].num_batches_tracked == 0
    torch.rand(7)  # what the losses draw in between
    drawn = torch.get_rng_state()
    info_nce(*held.answers).backward()
    held.backward()
    assert model.image[1].num_batches_tracked == 3
    first, second = model.seen[:3], model.seen[3:]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(torch.get_rng_state(), drawn)


@pytest.fixture(scope="module")
def pretrained():
    torch.manual_seed(7)
    return build("tiny-vit-16")


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.trains])
def test_every_method_trains_alike_in_parts(pretrained, name):
    method, ends = METHODS[name], []
    prompts = Prompts(SOURCE.classes, SOURCE.templates, pretrained[1])
    for micro_batch in (None, 5):
        towers = deepcopy(pretrained[0])
        fitted = fit(
            build_student(method, towers, prompts), method, pairs(towers, prompts),
            replace(SETTINGS, micro_batch=micro_batch),
            prompts=prompts, anchors=pairs(towers, prompts, WIDE), progress=False,
        )  # fmt: skip
        ends.append(fitted)
    whole, parts = ends
    assert parts.history.values("loss") == pytest.approx(whole.history.values("loss"), rel=1e-4)
    assert parts.history.values("gap") == pytest.approx(whole.history.values("gap"), rel=1e-2, abs=1e-6)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_reaches_all_weights_in_parts(pretrained, precision):
    """What autocast keeps of the first pass, which has no graph, must not serve the second."""
    towers = deepcopy(pretrained[0])
    before = deepcopy(towers.state_dict())
    prompts = Prompts(SOURCE.classes, SOURCE.templates, pretrained[1])
    settings = replace(SETTINGS, micro_batch=5, precision=precision, steps=2, warmup=0)
    fitted = fit(towers, METHODS["tracer"], pairs(towers, prompts), settings, progress=False)
    assert fitted.teacher.step > 0
    moved = [
        name for name, value in fitted.student.state_dict().items() if not torch.equal(value, before[name])
    ]
    trained = {name for name, _ in towers.named_parameters()}
    assert trained <= set(moved) | {"clip.token_embedding.weight"}


@pytest.mark.parametrize("name", ["ft", "tracer"])
def test_one_part_gives_the_same_bits_in_half_precision(pretrained, name):
    """Blocks that leave autocast in the forward leave it in the backward too."""
    prompts = Prompts(SOURCE.classes, SOURCE.templates, pretrained[1])
    batch = pairs(pretrained[0], prompts).batch(0)
    found = []
    for in_parts in (False, True):
        student = build_student(METHODS[name], deepcopy(pretrained[0]), prompts).train()
        held = None
        if in_parts:
            held = micro_batches.Cached(student, [batch], lambda: torch.autocast("cpu", torch.bfloat16))
        with torch.autocast("cpu", torch.bfloat16):
            answers = student(*batch[:3]) if held is None else held.answers
            loss = (answers.logits if name == "ft" else answers.image).float().square().sum()
        loss.backward()
        if held is not None:
            held.backward()
        found.append(gradients(student))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_bad_sizes():
    with pytest.raises(ValueError, match="micro_batch must be at least 1, got 0: None is all at once"):
        replace(SETTINGS, micro_batch=0)
