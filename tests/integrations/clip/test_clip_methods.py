"""Every method of the paper's tables: its numbers, its loss against an oracle, and what it trains."""

from copy import deepcopy
from dataclasses import replace

import loss_oracle
import numpy as np
import pytest
import torch
from tiny_clip import SOURCE, pairs

from wmateacher.integrations.clip import clocks, recipes
from wmateacher.integrations.clip.data.batches import Batch, join
from wmateacher.integrations.clip.experiment import Experiment
from wmateacher.integrations.clip.methods import METHODS, Merge, Method, RandomTexts, parse_guidance
from wmateacher.integrations.clip.model import (
    Classifier,
    Prompts,
    build,
    head_of,
    towers_of,
    zero_shot_head,
)
from wmateacher.integrations.clip.objective import (
    Objective,
    build_guide,
    cross_frobenius,
    orthogonality,
    random_tokens,
)
from wmateacher.integrations.clip.recipes import Settings
from wmateacher.integrations.clip.training import FineTuning, build_student, fit
from wmateacher.integrations.vision.digits import NARROW, WIDE
from wmateacher.posthoc import interpolate, model_stock
from wmateacher.spec import parse_sum

SETTINGS = Settings(steps=8, learning_rate=1e-3, batch_size=16, warmup=2, checkpoint_every=3)
TRAINED = [name for name, method in METHODS.items() if method.trains]
LINEAR = [name for name in TRAINED if METHODS[name].head == "linear"]


@pytest.fixture(scope="module")
def pretrained():
    torch.manual_seed(7)
    return build("tiny-vit-16")


@pytest.fixture
def towers(pretrained):
    return deepcopy(pretrained[0])


@pytest.fixture(scope="module")
def prompts(pretrained):
    return Prompts(SOURCE.classes, SOURCE.templates, pretrained[1])


def moved(student):
    """A copy whose trained weights are a little elsewhere."""
    other = deepcopy(student)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return other


# --- the oracle -----------------------------------------------------------------------------------


def array(tensor):
    return tensor.detach().double().numpy()


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def cross_entropy(logits, labels):
    return -np.mean([row[label] for row, label in zip(log_softmax(logits), labels, strict=True)])


def contrast(image, text, scale):
    logits, rows = scale * image @ text.T, np.arange(len(image))
    return (cross_entropy(logits, rows) + cross_entropy(logits.T, rows)) / 2


def distilled(method, student, teacher, towers, prompts, step):
    """A method's distillation by the oracles of its losses."""
    sides = [tuple(map(array, side)) for side in (student, teacher)]
    if method.head == "linear":
        sides = [array(side.logits) for side in (student, teacher)]
    if method.guidance is not None:
        texts = guiding(method.guidance, towers, prompts, step)
        sides = [array(towers.logit_scale) * array(side.image) @ texts.T for side in (student, teacher)]
    return sum(
        coefficient * loss_oracle.ORACLES[call.name](*sides, *call.args, **call.kwargs)
        for coefficient, call in parse_sum(method.distillation)
    )


def guiding(guidance, towers, prompts, step):
    """The features of a guidance's texts."""
    texts = parse_guidance(guidance)
    if isinstance(texts, RandomTexts):
        return array(towers.encode_text(random_tokens(prompts.tokenizer, texts, 5, step), normalize=True))
    means = np.stack(
        [
            np.mean(
                [
                    array(towers.encode_text(prompts.tokenizer([t.format(c)]), normalize=True))[0]
                    for c in prompts.classes
                ],
                axis=0,
            )
            for t in prompts.templates
        ]
    )
    return means / np.linalg.norm(means, axis=1, keepdims=True)


@pytest.mark.parametrize("name", TRAINED)
def test_the_loss_is_its_papers(name, towers, prompts):
    method, step = METHODS[name], 2
    start = build_student(method, towers, prompts)
    objective = Objective(method, start, prompts, seed=5)
    student = moved(start)
    batch, anchors = (pairs(towers, prompts, domain).batch(step) for domain in (NARROW, WIDE))
    answers, targets, beside = student(*batch[:3]), start(*batch[:3]), None
    if method.head == "linear":
        expected = cross_entropy(array(answers.logits), batch.labels.numpy())
    else:
        expected = contrast(*map(array, answers))
    if method.anchors:
        beside = student(*anchors[:3])
        expected += contrast(*map(array, beside))
    if method.kernel is not None:
        expected += method.distill_weight * distilled(method, answers, targets, towers, prompts, step)
    if method.l2_sp:
        pulled = [p.requires_grad and (p.ndim > 1 or method.l2_sp_of == "all") for p in student.parameters()]
        distances = zip(student.parameters(), start.parameters(), pulled, strict=True)
        squares = [((array(a) - array(b)) ** 2).sum() for a, b, pull in distances if pull]
        expected += method.l2_sp / 2 * sum(squares)
    expected += method.cross_frobenius * cross_frobenius(towers_of(student)).item()
    expected += method.orthogonality * orthogonality(towers_of(student)).item()
    total, terms = objective(
        student, answers, targets if method.kernel else None,
        labels=batch.labels, anchors=beside, step=step,
    )  # fmt: skip
    assert total.item() == pytest.approx(expected, rel=2e-4)
    assert next(iter(terms)) == ("cross_entropy" if method.head == "linear" else "info_nce")


# --- published numbers ----------------------------------------------------------------------------


def test_the_published_coefficients():
    carot = METHODS["carot"]
    assert (carot.distill_weight, carot.cross_frobenius, carot.orthogonality) == (1.5, 0.05, 0.2)
    assert (carot.update_every, carot.clock, carot.distillation) == (500, "once", "paired_ce")
    assert carot.kernel == "ema(0.05,0.9,schedule=linear,warmup=0.2)"
    tracer = METHODS["tracer"]
    assert (tracer.distill_weight, tracer.cross_frobenius, tracer.orthogonality) == (0.9, 0.05, 0.0)
    assert tracer.distillation == f"{2000 / 512:g}*fd + crd + icl + cross_kd"
    assert METHODS["ft"].rate * 1e-5 == pytest.approx(3e-5)
    assert METHODS["l2-sp"].l2_sp == 0.01
    assert (METHODS["car-ft"].distillation, METHODS["car-ft"].guidance) == ("kl", "contexts")
    # 1/(2M) |v - v_0|^2 with M energies is half of their mean squared difference.
    assert METHODS["lipsum-ft"].distillation == "0.5*mse(logits)"
    assert METHODS["lipsum-ft"].guidance == "random_texts(80,8)"
    assert METHODS["lipsum-ft"].distill_weight == METHODS["car-ft"].distill_weight == 1.0
    assert METHODS["flyp"] == Method("flyp", METHODS["flyp"].summary)
    assert METHODS["wise-ft"].merge == Merge("ft", alpha=0.5)
    assert METHODS["model-stock"].merge == Merge("ft", models=2)


def test_carots_teacher_keeps_its_window_of_ten_updates():
    """Late in a run each update counts one in ten, however many steps lie between."""
    method = METHODS["carot"]
    kernel, _ = clocks.build(method.kernel, method.update_every, method.clock)
    omegas = 1 - kernel.retention(np.arange(25_031), 25_030)
    updates = np.flatnonzero(omegas)
    assert list(updates) == [0, *range(1, 25_030, 500)]
    assert omegas[updates[13:]] == pytest.approx(0.1)


# --- what is trained, and what classifies ---------------------------------------------------------


@pytest.mark.parametrize("name", TRAINED)
def test_gradients_reach_what_the_method_trains(name, towers, prompts):
    method = METHODS[name]
    start = build_student(method, towers, prompts)
    objective = Objective(method, start, prompts)
    student = moved(start)
    both = join(*(pairs(towers, prompts, domain).batch(0) for domain in (NARROW, WIDE)))
    labels = torch.arange(32) % 10
    answers, targets = student(*both[:3]), start(*both[:3])
    beside = answers if method.anchors else None
    loss, _ = objective(student, answers, targets if method.kernel else None, labels=labels, anchors=beside)
    loss.backward()
    inner = towers_of(student).clip
    images = {id(p) for p in inner.visual.parameters()}
    for parameter in inner.parameters():
        reached = parameter.grad is not None and bool(parameter.grad.any())
        assert reached == (id(parameter) in images or method.head == "text")
    if method.head == "linear":
        assert student.weight.grad.any()
    assert all(p.grad is None for p in start.parameters())


def test_a_linear_head_starts_as_the_zero_shot_one(towers, prompts):
    head = zero_shot_head(towers, prompts)
    student = Classifier(towers, prompts)
    torch.testing.assert_close(head_of(student, prompts), head)
    images = torch.randn(4, 3, 16, 16)
    features, logits = student(images)
    torch.testing.assert_close(logits, towers.encode_image(images, normalize=True) @ head)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(4))
    trained = {name for name, p in student.named_parameters() if p.requires_grad}
    assert trained == {"weight"} | {n for n, _ in student.named_parameters() if ".visual." in n}
    outside = Classifier(deepcopy(towers), prompts, scale_outside=True)
    torch.testing.assert_close(outside.weight.norm(dim=0), torch.ones(10))
    torch.testing.assert_close(head_of(outside, prompts), head)
    torch.testing.assert_close(outside(images).logits, logits)
    with torch.no_grad():
        student.weight.zero_()
    assert not head_of(student, prompts).any()


def test_the_texts_of_a_guidance(towers, prompts):
    contexts = build_guide("contexts", towers, prompts, 0)
    assert contexts(0).shape == (5, 64)
    assert torch.equal(contexts(0), contexts(9))
    tokens = random_tokens(prompts.tokenizer, RandomTexts(80, 8), 0, 4)
    assert tokens.shape == (80, 16)
    assert (tokens[:, 0] == 49406).all()
    assert (tokens[:, 9] == 49407).all()
    assert not tokens[:, 10:].any()
    assert (tokens[:, 1:9] < 49406).all()
    assert len(tokens[:, 1:9].unique()) > 600
    assert torch.equal(tokens, random_tokens(prompts.tokenizer, RandomTexts(), 0, 4))
    assert not torch.equal(tokens, random_tokens(prompts.tokenizer, RandomTexts(), 0, 5))
    assert not torch.equal(tokens, random_tokens(prompts.tokenizer, RandomTexts(), 1, 4))
    features = towers.encode_text(tokens, normalize=True)
    for spec in ("random_texts(80,8)", "random_texts"):
        torch.testing.assert_close(build_guide(spec, towers, prompts, 0)(4), features)


def run(method, towers, prompts, settings=SETTINGS, **options):
    method = METHODS[method] if isinstance(method, str) else method
    given = {"prompts": prompts, "anchors": pairs(towers, prompts, WIDE), **options}
    stream = pairs(towers, prompts)
    return fit(build_student(method, towers, prompts), method, stream, settings, progress=False, **given)


def test_probing_trains_the_head_alone_and_then_all(towers, prompts):
    before = deepcopy(towers)
    states = []
    student = build_student(METHODS["lp-ft"], towers, prompts)

    def keep(step):
        states.append(deepcopy(student.state_dict()))

    fit(
        student, METHODS["lp-ft"], pairs(towers, prompts), SETTINGS,
        prompts=prompts, progress=False, after_step=keep,
    )  # fmt: skip
    first = "towers.clip.visual.proj"
    heads = [state["weight"] for state in states]
    assert all(not torch.equal(a, b) for a, b in zip(heads, heads[1:], strict=False))
    assert all(torch.equal(state[first], before.clip.visual.proj) for state in states[:4])
    assert not torch.equal(states[4][first], before.clip.visual.proj)
    text = "towers.clip.text_projection"
    assert torch.equal(states[-1][text], before.clip.text_projection)


def test_a_teacher_follows_a_student_that_is_frozen_at_first(towers, prompts):
    method = replace(METHODS["car-ft"], kernel="uniform", probe=0.5)
    student = build_student(method, towers, prompts)
    name = "towers.clip.visual.proj"
    states = [student.state_dict()[name].clone()]
    task = FineTuning(student, method, pairs(towers, prompts), SETTINGS, prompts, None)
    for step in range(SETTINGS.steps):
        task.train_step(step)
        states.append(student.state_dict()[name].clone())
    assert all(torch.equal(state, states[0]) for state in states[:5])
    assert not torch.equal(states[5], states[4])
    average = task.teacher.averaged_state_dict()[name]
    torch.testing.assert_close(average, torch.stack(states).mean(0))


def test_each_phase_has_its_own_warm_up_and_decay(towers, prompts):
    settings = replace(SETTINGS, steps=100, warmup=20)
    method = replace(METHODS["lp-ft"], probe=0.4, probe_rate=10.0, rate=2.0)
    student = build_student(method, towers, prompts)
    task = FineTuning(student, method, pairs(towers, prompts), settings, prompts, None)
    rates = [task.learning_rate_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(10 * 1e-3 / 8)
    assert max(rates[:40]) == rates[7] == pytest.approx(10 * 1e-3)
    assert rates[39] < 1e-3 * 0.1
    assert rates[40] == pytest.approx(2 * 1e-3 / 12)
    assert max(rates[40:]) == rates[51] == pytest.approx(2 * 1e-3)


def test_anchors_change_what_is_learnt(towers, prompts):
    with_anchors = run("arf", deepcopy(towers), prompts)
    without = run("flyp", deepcopy(towers), prompts)
    assert with_anchors.history.values("loss")[0] > without.history.values("loss")[0]
    assert not torch.equal(with_anchors.student.image_projection, without.student.image_projection)


def test_joined_batches_keep_each_images_caption(towers, prompts):
    first, second = (pairs(towers, prompts, domain).batch(0) for domain in (NARROW, WIDE))
    both = join(first, second)
    captions = [batch.tokens[batch.caption] for batch in (first, second)]
    assert torch.equal(both.tokens[both.caption], torch.cat(captions))
    assert torch.equal(both.images, torch.cat([first.images, second.images]))


# --- from the recipe to the record ----------------------------------------------------------------


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    folder = tmp_path_factory.mktemp("methods")
    recipe = replace(recipes.DIGITS.with_pretraining(10).with_steps(3), model="tiny-vit-16")
    recipe = replace(recipe, finetune=replace(recipe.finetune, batch_size=16, learning_rate=1e-2))
    methods = {
        f"wise-{a:g}": replace(METHODS["wise-ft"], name=f"wise-{a:g}", merge=Merge("ft", a)) for a in (0, 1)
    }
    methods["wise-wise"] = replace(METHODS["wise-ft"], name="wise-wise", merge=Merge("wise-ft", 0.3))
    methods["wise-tracer"] = replace(METHODS["wise-ft"], name="wise-tracer", merge=Merge("tracer", 0.3))
    recipe = replace(recipe, methods={**recipe.methods, **methods})
    made = Experiment(recipe, folder / "out", cache=folder / "cache", progress=False)
    made.pretrain()
    return made


def figures(record):
    return {key: record[key] for key in ("id", "ood_per_shift", "ece")}


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_method_runs_on_the_digits(experiment, name):
    record = experiment.run(name)
    assert 0 <= record["id"] <= 100
    assert len(record["ood_per_shift"]) == 6
    assert experiment.run(name) == record
    has_gap = METHODS[name].kernel is not None
    assert experiment.file("gaps", name, 0).exists() == has_gap


def test_an_interpolations_ends_are_the_pretrained_and_the_fine_tuned(experiment):
    ends = [figures(experiment.run(f"wise-{a}")) for a in (0, 1)]
    assert ends == [figures(experiment.run(name)) for name in ("zero-shot", "ft")]
    assert ends[0] != ends[1]


def test_merged_weights_are_those_of_posthoc(experiment):
    recipe = experiment.recipe
    start = build_student(recipe.method("ft"), deepcopy(experiment.towers), experiment.prompts).state_dict()
    models = [experiment._finished(recipe.method("ft"), seed).student.state_dict() for seed in (0, 1, 2, 3)]
    stocks = [experiment._finished(recipe.method("model-stock"), seed).student for seed in (0, 1)]
    for stock, parts in zip(stocks, (models[:2], models[2:]), strict=True):
        expected = model_stock(start, parts)
        assert all(torch.equal(value, expected[key]) for key, value in stock.state_dict().items())
    wise = experiment._finished(recipe.method("wise-tracer"), 0).student
    tracer = experiment._finished(recipe.method("tracer"), 0).student
    expected = interpolate(experiment.towers.state_dict(), tracer.state_dict(), 0.3)
    assert all(torch.equal(value, expected[key]) for key, value in wise.state_dict().items())


def test_only_trained_methods_are_merged(experiment):
    with pytest.raises(ValueError, match="merge of 'wise-ft', which is not trained: choose a method that is"):
        experiment.check(["flyp", "wise-wise"])


@pytest.mark.parametrize("name", ["lp-ft", "tracer"])
def test_the_trained_head_classifies(experiment, name):
    student = experiment._finished(experiment.recipe.method(name), 0).student
    only = {"id": experiment.data.tests["id"]}
    scores = experiment.evaluate(student, only)
    assert scores["id"].accuracy == experiment.run(name)["id"]
    towers = towers_of(student)
    again = experiment.evaluate(towers, only)
    assert (scores == again) == (METHODS[name].head == "text")


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("ft", {"head": "txt"}, "unknown head 'txt'; did you mean 'text'"),
        ("tracer", {"clock": "step"}, "unknown clock 'step'; did you mean 'steps'"),
        ("tracer", {"update_every": 0}, "update_every must be a whole number of at least 1, got 0"),
        ("tracer", {"distill_from_step": -1}, "distill_from_step must be at least 0, got -1: 0 distils from"),
        ("tracer", {"scale_outside": True}, "scale_outside=True and no linear head: set head='linear'"),
        ("l2-sp", {"weight_decay": -0.1}, "weight_decay must be at least 0, or None for the recipe's, got"),
        ("l2-sp", {"l2_sp_of": "weight"}, "unknown l2_sp_of 'weight'; did you mean 'weights'"),
        ("flyp", {"probe": 0.5}, r"method 'flyp' has probe=0.5 and no linear head .*set head='linear'"),
        ("lp-ft", {"probe": 1.0}, r"probe must be a share of the steps in \[0, 1\), got 1.0"),
        ("ft", {"anchors": 1.0}, "anchor pairs need the towers' contrastive loss, head='text'"),
        ("tracer", {"guidance": "contexts"}, "whose texts need a frozen text tower: set head='linear'"),
        ("car-ft", {"guidance": "context"}, "unknown guidance 'context'; did you mean 'contexts'"),
        ("car-ft", {"guidance": "random_texts(0)"}, "count must be a whole number of at least 1, got 0"),
        ("car-ft", {"distillation": "fd"}, "takes paired, a linear head gives logits: choose from"),
        ("car-ft", {"distillation": None}, "kernel='static' and distillation=None: give both or neither"),
    ],
)  # fmt: skip
def test_parts_that_do_not_go_together(name, changes, message):
    with pytest.raises(ValueError, match=message):
        replace(METHODS[name], **changes)


def test_bad_merges():
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\], got 1.5: 0 is the pretrained model"):
        Merge("ft", alpha=1.5)
    with pytest.raises(ValueError, match="models must be at least 2 for Model Stock, got 1"):
        Merge("ft")
    with pytest.raises(ValueError, match="models must be 1 for an interpolation, got 2"):
        Merge("ft", alpha=0.5, models=2)


def test_what_is_missing_is_named(towers, prompts):
    stream = pairs(towers, prompts)
    with pytest.raises(ValueError, match=r"method 'ft' needs the task's classes and templates: pass prompts"):
        build_student(METHODS["ft"], towers)
    with pytest.raises(
        ValueError, match=r"head='linear', got a Towers: build the student with build_student"
    ):
        fit(towers, METHODS["ft"], stream, SETTINGS)
    with pytest.raises(ValueError, match=r"method 'arf' needs anchor pairs, .* pass anchors="):
        fit(towers, METHODS["arf"], stream, SETTINGS)
    with pytest.raises(ValueError, match="length must be at most 14 for this model, got 15"):
        build_guide("random_texts(80,15)", towers, prompts, 0)
    nothing = replace(prompts, tokenizer=lambda texts: prompts.tokenizer(texts))
    with pytest.raises(ValueError, match="needs a tokenizer with sot_token_id.* got function"):
        build_guide("random_texts", towers, nothing, 0)

    def unlabelled(first_step):
        for batch in stream(first_step):
            yield Batch(*batch[:3])

    with pytest.raises(
        ValueError, match="'ft' has a linear head and needs labels, the data has captions only"
    ):
        fit(
            build_student(METHODS["ft"], towers, prompts), METHODS["ft"], unlabelled, SETTINGS, progress=False
        )
