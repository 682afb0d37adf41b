"""The methods and the evaluation side by side with independent re-implementations of the published codes."""

from copy import deepcopy
from dataclasses import replace
from itertools import islice
from math import cos, pi

import numpy as np
import open_clip
import pytest
import torch
from miniature import everything
from tiny_clip import SOURCE, pairs
from torch.func import functional_call
from torch.nn import functional as F

from wmateacher.integrations.clip import recipes
from wmateacher.integrations.clip.data import imagenet
from wmateacher.integrations.clip.data.files import Table
from wmateacher.integrations.clip.data.photos import PhotoPairs, Rows
from wmateacher.integrations.clip.datamodules import PhotoData
from wmateacher.integrations.clip.evaluation import score
from wmateacher.integrations.clip.methods import METHODS, RandomTexts
from wmateacher.integrations.clip.model import Prompts, build
from wmateacher.integrations.clip.objective import random_tokens
from wmateacher.integrations.clip.recipes import Settings
from wmateacher.integrations.clip.training import FineTuning, build_student

SETTINGS = Settings(steps=10, learning_rate=1e-3, batch_size=16, warmup=3)


@pytest.fixture(scope="module")
def pretrained():
    """Towers in float64, and the texts of the digits."""
    torch.manual_seed(7)
    towers, tokenizer = build("tiny-vit-16")
    towers.clip.token_embedding.requires_grad_(False)  # most of the weights, and most of the time
    return towers.double(), Prompts(SOURCE.classes, SOURCE.templates, tokenizer)


# --- training, written out -------------------------------------------------------------------------


def contrast(logits):
    rows = torch.arange(len(logits))
    return (F.cross_entropy(logits, rows) + F.cross_entropy(logits.T, rows)) / 2


def kl(target, logits):
    return (target.softmax(1) * (target.log_softmax(1) - logits.log_softmax(1))).sum(1).mean()


def tracer_terms(own, targets):
    (image, text, scale), (image_t, text_t, scale_t) = own, targets
    target, mine = scale_t * image_t @ text_t.T, scale * image @ text.T
    there, back = scale * image @ text_t.T, scale * text @ image_t.T
    fd = (image - image_t).square().mean() + (text - text_t).square().mean()
    crd = (kl(target, mine) + kl(target.T, mine.T)) / 2
    cross_kd = (kl(target, there) + kl(target.T, back)) / 2
    return 2000 * fd + crd + (contrast_rows(there) + contrast_rows(back)) / 2 + cross_kd


def contrast_rows(logits):
    return F.cross_entropy(logits, torch.arange(len(logits)))


def carot_terms(own, targets):
    (image, text, scale), (image_t, text_t, scale_t) = own, targets
    target, mine = scale_t * image_t @ text_t.T, scale * image @ text.T
    there = -(target.softmax(1) * mine.log_softmax(1)).sum(1).mean()
    return there - (target.T.softmax(1) * mine.T.log_softmax(1)).sum(1).mean()


def features(towers, batch):
    text = F.normalize(towers.clip.encode_text(batch.tokens), dim=1)[batch.caption]
    return F.normalize(towers.clip.encode_image(batch.images), dim=1), text, towers.clip.logit_scale.exp()


def contrastive_loss(name, towers, batch, teacher, start):
    """The loss of one step by FLYP's descendants; no teacher at the first step."""
    own = features(towers, batch)
    image, text, scale = own
    loss = contrast(scale * image @ text.T)
    projection, other = towers.clip.visual.proj, towers.clip.text_projection
    if name in ("carot", "tracer"):
        loss = loss + 0.05 * (projection @ other.T).square().sum().sqrt()
    if name == "carot":
        gram = projection.T @ projection
        loss = loss + 0.2 * (gram - torch.eye(len(gram), dtype=gram.dtype)).square().sum().sqrt()
    if name == "l2-sp":
        for key, value in towers.named_parameters():
            if value.ndim >= 2:
                loss = loss + 0.01 / 2 * (value - start[key]).square().sum()
    if teacher is not None:
        with torch.no_grad():
            targets = features(teacher, batch)
        loss = loss + (
            0.9 * tracer_terms(own, targets) if name == "tracer" else 1.5 * carot_terms(own, targets)
        )
    return loss


def adamw(parameters, moments, step, decay):
    """One step of AdamW with the published schedule."""
    total, warmup, base = SETTINGS.steps, SETTINGS.warmup, SETTINGS.learning_rate
    rate = base * (step + 1) / warmup
    if step >= warmup:
        rate = base / 2 * (1 + cos(pi * (step - warmup) / (total - warmup)))
    with torch.no_grad():
        for parameter, (mean, square) in zip(parameters, moments, strict=True):
            mean.mul_(0.9).add_(0.1 * parameter.grad)
            square.mul_(0.999).add_(0.001 * parameter.grad**2)
            scaled = (square / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
            parameter.mul_(1 - rate * decay).sub_(rate * mean / (1 - 0.9 ** (step + 1)) / scaled)
            parameter.grad = None


def density(update):
    tau = (update + 0.5) / (SETTINGS.steps + 1)
    return (tau * (1 - tau)) ** -0.5


def share(name, step, every):
    """The weight of the student in the average after the step with this index, or None without an update."""
    if name == "tracer":
        return density(step + 1) / sum(density(j) for j in range(step + 2))
    if step % every:
        return None
    return 1 - min(0.9, 0.05 + (0.9 - 0.05) * step / (0.2 * SETTINGS.steps))


def written_out(name, towers, batches, *, decay, every=1):
    """Train by the published loop and return the average, or None without one."""
    teacher = deepcopy(towers) if name in ("carot", "tracer") else None
    start = deepcopy(dict(towers.named_parameters()))
    parameters = [p for p in towers.parameters() if p.requires_grad]
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
    for step in range(SETTINGS.steps):
        used = teacher if step or name != "tracer" else None
        contrastive_loss(name, towers, batches(step), used, start).backward()
        adamw(parameters, moments, step, decay)
        weight = None if teacher is None else share(name, step, every)
        if weight is not None:
            with torch.no_grad():
                for old, new in zip(teacher.parameters(), towers.parameters(), strict=True):
                    old.add_(weight * (new - old))
    return teacher


def assert_same(module, expected, start):
    """Assert that all parameters agree to a small part of their movement."""
    apart = sum(
        (a - b).square().sum() for a, b in zip(module.parameters(), expected.parameters(), strict=True)
    )
    moved = sum(
        (a - b).square().sum() for a, b in zip(expected.parameters(), start.parameters(), strict=True)
    )
    assert apart.sqrt().item() < 1e-9 * moved.sqrt().item()


class Doubled:
    """The digits with images in float64."""

    def __init__(self, towers, prompts):
        self.pairs = pairs(towers, prompts)

    def batch(self, step):
        batch = self.pairs.batch(step)
        return batch._replace(images=batch.images.double())

    def __call__(self, first_step):
        step = first_step
        while True:
            yield self.batch(step)
            step += 1


def trained(method, towers, prompts, **changes):
    stream = Doubled(towers, prompts)
    student = build_student(method, deepcopy(towers), prompts)
    task = FineTuning(student, method, stream, replace(SETTINGS, **changes), prompts, None)
    logged = [task.train_step(step) for step in range(task.steps)]
    return task, logged, stream


@pytest.mark.parametrize("name", ["tracer", "carot", "l2-sp"])
def test_training_is_that_of_the_published_loop(pretrained, name):
    """TRACER distils from its second step on when asked; CaRot's average moves after steps 1, 5 and 9."""
    towers, prompts = pretrained
    changes = {"tracer": {"distill_from_step": 1, "distillation": "31.25*fd + crd + icl + cross_kd"},
               "carot": {"update_every": 4}, "l2-sp": {}}[name]  # fmt: skip
    task, logged, stream = trained(replace(METHODS[name], **changes), towers, prompts)
    expected = deepcopy(towers)
    teacher = written_out(name, expected, stream.batch, decay=0.0 if name == "l2-sp" else 0.1, every=4)
    assert_same(task.student, expected, towers)
    if teacher is not None:
        assert_same(task.teacher.module, teacher, towers)
    if name == "tracer":
        assert ["crd" in values for values in logged] == [False] + [True] * 9


@pytest.mark.parametrize("name", ["lipsum-ft", "ft"])
def test_a_linear_head_is_trained_as_in_the_published_loop(pretrained, name):
    """Lipsum-FT trains its head with the logit scale outside; FT with the scale inside, and clips at norm 1."""
    towers, prompts = pretrained
    lipsum = name == "lipsum-ft"
    task, _, stream = trained(replace(METHODS[name], rate=1.0), towers, prompts)
    expected = deepcopy(towers)
    scale = towers.clip.logit_scale.exp().detach()

    def texts(words):
        return F.normalize(towers.clip.encode_text(words), dim=1).detach()

    named = [texts(prompts.tokenizer([t.format(c) for t in prompts.templates])) for c in prompts.classes]
    head = F.normalize(torch.stack([rows.mean(0) for rows in named]), dim=1)
    head = (head if lipsum else scale * head).requires_grad_()
    parameters = [head, *expected.clip.visual.parameters()]
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
    for step in range(SETTINGS.steps):
        batch = stream.batch(step)
        image = F.normalize(expected.clip.encode_image(batch.images), dim=1)
        loss = F.cross_entropy((scale if lipsum else 1) * (image @ head.T), batch.labels)
        if lipsum:
            with torch.no_grad():
                before = F.normalize(towers.clip.encode_image(batch.images), dim=1)
            random = texts(random_tokens(prompts.tokenizer, RandomTexts(80, 8), 0, step))
            energies = scale * image @ random.T - scale * before @ random.T
            loss = loss + energies.square().sum(1).mean() / (2 * 80)
        loss.backward()
        norm = torch.stack([p.grad.square().sum() for p in parameters]).sum().sqrt()
        for parameter in [] if lipsum else parameters:
            parameter.grad.mul_(min(1.0, 1 / (norm.item() + 1e-6)))
        adamw(parameters, moments, step, decay=0.0 if lipsum else 0.1)
    assert_same(task.student.towers, expected, towers)
    torch.testing.assert_close(task.student.head, (scale if lipsum else 1) * head.T, rtol=1e-9, atol=1e-9)


def test_an_l2_pull_survives_a_phase_that_trains_the_head_alone(pretrained):
    """The parameters that are pulled to their start do not depend on what is frozen at a step."""
    towers, prompts = pretrained
    method = replace(METHODS["l2-sp"], head="linear", probe=0.5)
    _, logged, _ = trained(method, towers, prompts, steps=4, warmup=0)
    assert all(torch.isfinite(values["loss"]) for values in logged)


@pytest.mark.parametrize("recipe", ["imagenet-rn50", "folders"])
def test_batch_normalisation_in_the_teacher_has_the_statistics_of_the_start_or_of_the_batch(recipe):
    """The published code averages parameters only: batch normalisation in RN50's teacher keeps its statistics.

    On other images, where there is nothing to reproduce, the teacher normalises by the batch, as its student.
    """
    torch.manual_seed(3)
    towers, tokenizer = build("tiny-resnet-32")
    prompts = Prompts(SOURCE.classes, SOURCE.templates, tokenizer)
    method = recipes.get(recipe).method("tracer")
    task = FineTuning(deepcopy(towers), method, pairs(towers, prompts), SETTINGS, prompts, None)
    average = dict(towers.named_parameters())
    for step in range(3):
        task.train_step(step)
        weight = share("tracer", step, 1)
        average = {
            key: average[key] + weight * (value.detach() - average[key])
            for key, value in task.student.named_parameters()
        }
    published = recipe == "imagenet-rn50"
    if published:
        moved = dict(task.student.named_buffers())
        for key, value in towers.named_buffers():
            assert torch.equal(dict(task.teacher.module.named_buffers())[key], value)
        assert any(not torch.equal(moved[key], value) for key, value in towers.named_buffers())
    batch = pairs(towers, prompts).batch(9)[:3]
    expected = functional_call(towers.train(not published), average, batch)
    for ours, theirs in zip(task.teacher(*batch), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


# --- ImageNet: names, captions, pairs, evaluation -------------------------------------------------


def test_heads_have_distinct_names_and_captions_the_common_ones():
    common, distinct = imagenet.class_names(), imagenet.head_names()
    assert (len(common), len(set(common)), len(set(distinct))) == (1000, 998, 1000)
    differing = {
        i: name for i, (name, other) in enumerate(zip(distinct, common, strict=True)) if name != other
    }
    assert differing == {
        201: "Silky Terrier", 227: "Kelpie", 638: "maillot", 639: "tank suit", 692: "product packet",
        744: "projectile", 837: "dark glasses", 911: "woolen",
    }  # fmt: skip


def test_tracer_has_86_captions_and_others_80():
    seen = ["small", "vague", "distant", "partially visible", "hidden", "faint"]
    openai = [t("{}") for t in open_clip.OPENAI_IMAGENET_TEMPLATES]
    expected = [*openai, *(f"a photo containing a {how} {{}}." for how in seen)]
    assert list(imagenet.tracer_templates()) == expected
    assert len(set(expected)) == 86
    for name in ("imagenet-vit-b-16", "imagenet-vit-l-14", "imagenet-rn50"):
        methods = recipes.get(name).methods.values()
        assert {m.name for m in methods if m.templates == "tracer"} == {"static-sd", "ema", "tracer"}
    with pytest.raises(ValueError, match="'tracer' has templates='tracer', which are for ImageNet's classes"):
        replace(recipes.DIGITS, methods={"tracer": replace(METHODS["tracer"], templates="tracer")})


def photo_recipe(**changes):
    recipe = replace(recipes.get("imagenet-vit-b-16"), model="tiny-vit-16", pretrained=None, **changes)
    return replace(recipe, finetune=replace(recipe.finetune, batch_size=8, warmup=0, precision="fp32"))


def test_the_recipes_data_has_each_methods_captions_and_the_heads_names(tmp_path):
    everything(tmp_path, {"imagenet": (744, 837), "imagenet-r": (1, 2, 9), "imagenet-a": (6, 11)}, each=8)
    torch.manual_seed(0)
    towers, tokenizer = build("tiny-vit-16")

    def seen(method, **changes):
        recipe = photo_recipe(**changes)
        data = PhotoData(recipe, towers, tokenizer, root=tmp_path).captioned_for(recipe.method(method))
        drawn = data.pairs(recipe.finetune)
        assert isinstance(drawn.order, Rows) == (recipe.pairing == "published")
        stream = islice(drawn(0), 12)
        captions = {tuple(t) for batch in stream for t in batch.tokens.tolist()}
        return data, captions

    def filled(templates):
        named = [t.format(name) for t in templates for name in ("missile", "sunglasses")]
        return {tuple(t) for t in tokenizer(named).tolist()}

    data, captions = seen("tracer")
    assert data.prompts.classes == imagenet.head_names()
    assert data.prompts.templates == imagenet.tracer_templates()
    assert captions <= filled(imagenet.tracer_templates())
    assert not captions <= filled(imagenet.openai_templates())
    assert data.tests["objectnet"].keywords["test"].images.border == 0
    data, captions = seen("carot", crop_border=True)
    assert data.prompts.templates == imagenet.openai_templates()
    assert captions <= filled(imagenet.openai_templates())
    assert data.tests["objectnet"].keywords["test"].images.border == 2
    data, captions = seen("tracer", templates=("a {}", "the {}"), pairing="published")
    assert captions == filled(("a {}", "the {}"))


def test_published_pairs_are_rows_of_the_table_of_all_images_with_all_captions():
    """An epoch is as long as the images alone would take, so that it misses 1/e of them."""
    count, templates, batch = 4000, 86, 64
    rows, again = Rows(count, templates, batch, 5), Rows(count, templates, batch, 5)
    drawn = [torch.stack([rows(step), rows.templates(step)]) for step in range(2 * rows.steps_per_epoch)]
    assert rows.steps_per_epoch == -(-count // batch)
    assert all(pair.shape == (2, batch) for pair in drawn)
    epochs = [torch.cat(drawn[: len(drawn) // 2], 1), torch.cat(drawn[len(drawn) // 2 :], 1)]
    for images, captions in epochs:
        assert len((images * templates + captions).unique()) == len(images)
        # Independently: a shuffled table, cut off.
        table = torch.randperm(count * templates)[: len(images)] // templates
        missed, wanted = (1 - len(i.unique()) / count for i in (images, table))
        assert missed == pytest.approx(wanted, abs=0.03)
        assert missed == pytest.approx((1 - len(images) / count / templates) ** templates, abs=0.02)
        assert captions.bincount(minlength=templates).min() > 0
    assert not torch.equal(*epochs)
    assert torch.equal(again(70), drawn[70][0])
    assert torch.equal(again.templates(70), drawn[70][1])
    small = Rows(10, 1, 4, 0)
    assert sorted(torch.cat([small(step) for step in range(3)]).unique().tolist()) == list(range(10))


def test_bad_pairings(tmp_path):
    with pytest.raises(ValueError, match="unknown pairing 'publish'; did you mean 'published'"):
        photo_recipe(pairing="publish")
    with pytest.raises(
        ValueError, match="pairing='published' draws images by itself, got sampling='balanced'"
    ):
        photo_recipe(pairing="published", sampling="balanced")
    (tmp_path / "pairs.csv").write_text("filepath,title\nx.png,an x\n")
    with pytest.raises(ValueError, match="needs captions made of templates, and these pairs have their own"):
        PhotoPairs(Table(tmp_path / "pairs.csv"), None, None, batch_size=1, seed=0, pairing="published")


class Given(torch.nn.Module):
    """Towers whose features are the images' first values."""

    def encode_image(self, images, normalize):
        return images[:, 0, 0]


def calibration(confidence, right):
    """The l1 calibration error of 10 bins."""
    which = np.minimum((10 * confidence).astype(int), 9)
    gaps = [abs((right - confidence)[which == b].sum()) for b in range(10)]
    return sum(gaps) / len(confidence)


def test_the_per_batch_calibration_error_is_weighted_over_batches_of_the_training_size():
    """A calibrated classifier of ImageNet-A's size, sorted by class, whose accuracy differs between classes."""
    random = np.random.default_rng(0)
    classes, count = 200, 7500
    labels = np.sort(random.integers(classes, size=count))
    confidence = random.uniform(0.02, 0.9, classes)[labels] + random.uniform(0, 0.09, count)
    right = random.random(count) < confidence
    predicted = np.where(right, labels, (labels + 1) % classes)
    probabilities = np.repeat(((1 - confidence) / (classes - 1))[:, None], classes, 1)
    probabilities[np.arange(count), predicted] = confidence
    images = torch.from_numpy(np.log(probabilities)).float()[:, None, None]

    def scored(size):
        batches = zip(images.split(size), torch.from_numpy(labels).split(size), strict=True)
        return score(Given(), torch.eye(classes), batches)

    def published(size):
        parts = [slice(first, first + size) for first in range(0, count, size)]
        return sum(calibration(confidence[p], right[p]) * len(right[p]) for p in parts) / count

    scores = scored(512)
    assert scores.ece == pytest.approx(calibration(confidence, right), abs=1e-6)
    assert scores.ece_per_batch == pytest.approx(published(512), abs=1e-6)
    assert scored(256).ece_per_batch == pytest.approx(published(256), abs=1e-6)
    assert scores.ece < 0.012 < scores.ece_per_batch < 0.8 * published(256)
    sizes = {"imagenet-vit-b-16": 512, "imagenet-vit-l-14": 224, "imagenet-rn50": 512}
    assert {name: recipes.get(name).evaluation_batch for name in sizes} == sizes
