"""The methods and the evaluation side by side with independent re-implementations of the published codes."""

from copy import deepcopy
from dataclasses import replace
from math import cos, pi

import pytest
import torch
from tiny_clip import SOURCE, pairs
from torch.nn import functional as F

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
    start = {key: value.detach().clone() for key, value in towers.named_parameters()}
    parameters = list(towers.parameters())
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
    for step in range(SETTINGS.steps):
        used = teacher if step or name != "tracer" else None
        contrastive_loss(name, towers, batches(step), used, start).backward()
        adamw(parameters, moments, step, decay)
        weight = None if teacher is None else share(name, step, every)
        if weight is not None:
            with torch.no_grad():
                for old, new in zip(teacher.parameters(), parameters, strict=True):
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


def test_lipsum_ft_trains_its_head_with_the_logit_scale_outside(pretrained):
    towers, prompts = pretrained
    task, _, stream = trained(METHODS["lipsum-ft"], towers, prompts)
    expected = deepcopy(towers)
    scale = towers.clip.logit_scale.exp().detach()

    def texts(words):
        return F.normalize(towers.clip.encode_text(words), dim=1).detach()

    named = [texts(prompts.tokenizer([t.format(c) for t in prompts.templates])) for c in prompts.classes]
    head = F.normalize(torch.stack([rows.mean(0) for rows in named]), dim=1).requires_grad_()
    parameters = [head, *expected.clip.visual.parameters()]
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
    for step in range(SETTINGS.steps):
        batch = stream.batch(step)
        image = F.normalize(expected.clip.encode_image(batch.images), dim=1)
        with torch.no_grad():
            before = F.normalize(towers.clip.encode_image(batch.images), dim=1)
        random = texts(random_tokens(prompts.tokenizer, RandomTexts(80, 8), 0, step))
        energies = (scale * image @ random.T - scale * before @ random.T).square().sum(1) / (2 * 80)
        loss = F.cross_entropy(scale * (image @ head.T), batch.labels) + energies.mean()
        loss.backward()
        adamw(parameters, moments, step, decay=0.0)
    assert_same(task.student.towers, expected, towers)
    torch.testing.assert_close(task.student.head, scale * head.T, rtol=1e-10, atol=1e-10)


def test_an_l2_pull_survives_a_phase_that_trains_the_head_alone(pretrained):
    """The parameters that are pulled to their start do not depend on what is frozen at a step."""
    towers, prompts = pretrained
    method = replace(METHODS["l2-sp"], head="linear", probe=0.5)
    _, logged, _ = trained(method, towers, prompts, steps=4, warmup=0)
    assert all(torch.isfinite(values["loss"]) for values in logged)
