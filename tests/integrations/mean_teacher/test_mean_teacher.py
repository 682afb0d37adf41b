import json
import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wmateacher.integrations.engine.collapse import CollapseWarning
from wmateacher.integrations.mean_teacher.experiment import Experiment, choose_labelled
from wmateacher.integrations.mean_teacher.recipes import METHODS, RECIPES, Method, Settings
from wmateacher.integrations.mean_teacher.training import Consistency, fit
from wmateacher.integrations.mean_teacher.views import Plain, Weak, WeakAndStrong
from wmateacher.integrations.vision import backbones, images

SETTINGS = Settings(
    steps=6, learning_rate=0.05, labelled_batch=6, unlabelled_batch=8, warmup=2, rampup=3, checkpoint_every=2
)
DATA = images.load("digits")
LABELLED = choose_labelled(DATA.labels, 10, 20, 0)


class Stopped(Exception):
    pass


def network(seed=7, classes=10, spec="test_resnet"):
    torch.manual_seed(seed)
    return backbones.build(spec, 16, channels=1, classes=classes)


def run(method="mean-teacher", settings=SETTINGS, student=None, stop_after=None, unlabelled=None, **options):
    def stop(step):
        if step == stop_after:
            raise Stopped

    labelled = images.Views(DATA.train, Weak(16, False), 6, 1, indices=LABELLED)
    unlabelled = unlabelled or images.Views(DATA.train, WeakAndStrong(16, False), 8, 2)
    return fit(
        student or network(), METHODS.get(method, method), labelled, unlabelled, settings,
        classes=10, progress=False, after_step=stop, **options,
    )  # fmt: skip


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def oracle(kind, student, target, confidence):
    """Mean over all images, those of which the target is not sure counting 0; float64."""
    p, q, total = softmax(target), softmax(student), 0.0
    for own, other in zip(p, q, strict=True):
        if confidence is not None and own.max() < confidence:
            continue
        if kind == "mse":
            total += ((own - other) ** 2).mean()
        elif kind == "kl":
            total += (own * np.log(own / other)).sum()
        else:
            total += -np.log(other[own.argmax()])
    return total / len(p)


@pytest.mark.parametrize("kind", ["mse", "kl", "pseudo"])
@given(st.integers(1, 6), st.integers(2, 5), st.sampled_from([None, 0.0, 0.5, 0.8]), st.integers(0, 2**20))
def test_consistency_and_its_gradient_are_the_formulas(kind, batch, classes, confidence, seed):
    random = np.random.default_rng(seed)
    student, target = (2 * random.normal(size=(batch, classes)) for _ in "ab")
    logits = torch.tensor(student, dtype=torch.float32, requires_grad=True)
    of_target = torch.tensor(target, dtype=torch.float32, requires_grad=True)
    agreement = Consistency(kind, confidence)(logits, of_target)
    assert agreement.loss.item() == pytest.approx(
        oracle(kind, student, target, confidence), rel=1e-4, abs=1e-6
    )
    sure = softmax(target).max(-1) >= (confidence or 0)
    assert agreement.kept.item() == pytest.approx(sure.mean())
    agreement.loss.backward()
    assert of_target.grad is None
    direction = random.normal(size=student.shape)
    ends = [oracle(kind, student + s * 1e-6 * direction, target, confidence) for s in (1, -1)]
    slope = (logits.grad.double().numpy() * direction).sum()
    assert slope == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(method):
    student = network()
    start = [p.detach().clone() for p in student.parameters()]
    fitted = run(method, student=student)
    assert any(not torch.equal(a, b) for a, b in zip(start, student.parameters(), strict=True))
    assert all(map(math.isfinite, fitted.history.values("loss")))
    assert (fitted.teacher is not None) == (METHODS[method].kernel is not None)
    assert len(fitted.history.values("consistency")) == (6 if METHODS[method].distill_weight else 0)


def test_unlabelled_images_train_the_student():
    """The loss on labels fixed at 0 by an absent weight, what is left must move it."""
    ones = [run(m).student.state_dict() for m in ("supervised", "mean-teacher", "pi-model")]
    first = next(k for k in ones[0] if k.endswith("weight"))
    assert len({tuple(state[first].flatten().tolist()) for state in ones}) == 3


def test_labels_alone_never_read_the_other_stream():
    def never(step):
        raise AssertionError

    run("supervised", unlabelled=never)


@pytest.mark.filterwarnings("ignore:the teacher normalises with the running statistics of the start")
@pytest.mark.parametrize(
    ("mode", "buffers", "same"),
    [
        ("eval", "copy", "student"),
        ("eval", "keep", "start"),
        ("eval", "average", None),
        ("train", "copy", None),
    ],
)
def test_batch_norm_follows_the_mode_and_the_policy(mode, buffers, same):
    student = network()
    start = {n: b.clone() for n, b in student.named_buffers()}
    teacher = run(student=student, settings=replace(SETTINGS, mode=mode, buffers=buffers)).teacher
    held = dict(teacher.module.named_buffers())
    name = next(n for n in held if n.endswith("running_mean"))
    of = {"student": dict(student.named_buffers())[name], "start": start[name]}
    assert not torch.equal(of["student"], of["start"])
    for who, value in of.items():
        assert torch.equal(held[name], value) == (who == same)
    layer = teacher.module.get_submodule(name.rpartition(".")[0])
    assert layer.training == (mode == "train")


def evaluate(networks):
    network = networks.get("teacher", networks["student"])
    return {"validation": float(next(network.parameters()).detach().sum())}


@pytest.mark.parametrize(
    "method",
    [
        "mean-teacher",
        *(pytest.param(m, marks=pytest.mark.slow) for m in ("pi-model", "fixmatch", "supervised")),
    ],
)
def test_a_resumed_run_ends_bit_identical(tmp_path, method):
    spec, file = "test_resnet(drop_rate=0.3)", tmp_path / "run.pt"
    options = {"evaluate": evaluate, "evaluate_every": 2, "evaluate_last": True}
    whole = run(method, student=network(spec=spec), **options)
    for stop_after in (1, 3, 5):
        with pytest.raises(Stopped):
            run(method, student=network(spec=spec), stop_after=stop_after, checkpoint=file, **options)
    resumed = run(method, student=network(spec=spec), checkpoint=file, **options)
    for key, value in whole.student.state_dict().items():
        assert torch.equal(value, resumed.student.state_dict()[key]), key
    assert whole.history.series == resumed.history.series
    if whole.teacher is not None:
        ours, theirs = whole.teacher.state_dict(), resumed.teacher.state_dict()
        assert all(torch.equal(v, theirs[k]) for k, v in ours.items() if isinstance(v, torch.Tensor))


def test_a_teacher_that_answers_noise_is_named():
    method = replace(METHODS["mean-teacher"], name="mine", kernel="static", distill_weight=1.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fitted = run(method, settings=replace(SETTINGS, steps=60, learning_rate=1e-4, mode="eval"))
    (found,) = [w for w in caught if w.category is CollapseWarning]
    assert str(found.message).startswith("mine: collapsed at step 50 of 60, ")
    assert "lower distill_weight (1.0) or learning_rate (0.0001), or lengthen rampup (3)" in str(
        found.message
    )
    assert fitted.collapsed is not None


def test_a_head_of_the_wrong_width_is_named():
    with pytest.raises(
        ValueError, match="answers with 7 logits, but there are 10 classes: build it with num_classes=10"
    ):
        run(student=network(classes=7))


def test_the_unlabelled_batch_must_fit():
    with pytest.raises(
        ValueError, match="batch_size must be between 1 and the 1097 unlabelled images, got 2000"
    ):
        images.Views(DATA.train, WeakAndStrong(16, False), 2000, 0, what="unlabelled images")


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (9, "labels must be at least one of each of the 10 classes, got 9: raise --labels"),
        (25, "labels must be a multiple of the 10 classes, got 25: take 20 or 30"),
        (2000, "labels=2000 needs 200 images of class 0, which has"),
    ],
)
def test_labels_that_cannot_be_chosen(count, message):
    with pytest.raises(ValueError, match=message):
        choose_labelled(DATA.labels, 10, count, 0)


def test_labels_are_balanced_and_the_seeds():
    chosen = choose_labelled(DATA.labels, 10, 40, 0)
    assert DATA.labels[chosen].bincount().tolist() == [4] * 10
    assert len(chosen.unique()) == 40
    assert torch.equal(chosen, choose_labelled(DATA.labels, 10, 40, 0))
    assert not torch.equal(chosen, choose_labelled(DATA.labels, 10, 40, 1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"consistency": "mes"}, "unknown consistency 'mes'; did you mean 'mse'"),
        ({"distill_weight": -1.0}, "distill_weight must be at least 0, got -1.0"),
        ({"confidence": 1.0}, r"confidence must be in \[0, 1\), got 1.0"),
    ],
)
def test_methods_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        Method("mine", "", **changes)


def test_views_are_the_same_for_any_workers_and_leave_the_global_generator_alone():
    state = torch.get_rng_state()
    batches = [
        next(images.Views(DATA.train, WeakAndStrong(16, False), 8, 2, workers=workers)(3))
        for workers in (0, 2)
    ]
    assert torch.equal(torch.get_rng_state(), state)
    ((weak, strong), labels), ((weak_2, strong_2), labels_2) = batches
    assert torch.equal(weak, weak_2)
    assert torch.equal(strong, strong_2)
    assert torch.equal(labels, labels_2)
    assert not torch.equal(weak, strong)
    assert Plain(16)(DATA.train[0][0]).shape == (1, 16, 16)


def test_an_experiment_keeps_its_records(tmp_path):
    recipe = RECIPES["digits"].with_steps(4)
    recipe = replace(recipe, settings=replace(recipe.settings, unlabelled_batch=8))
    experiment = Experiment(recipe, tmp_path, progress=False)
    for name in ("supervised", "mean-teacher"):
        experiment.run(name)
    content = json.loads((tmp_path / "results.json").read_text())
    assert set(content) == {"config", "environment", "methods"}
    record = content["methods"]["mean-teacher"]
    assert {"accuracy", "ece", "student", "validation", "final_gap", "std", "runs"} <= set(record)
    supervised = content["methods"]["supervised"]
    assert supervised["accuracy"] == supervised["student"]["accuracy"]
    assert supervised["final_gap"] is None
    again = Experiment(recipe, tmp_path, progress=False)
    again.data = None  # would be needed by anything that is run
    assert again.run("mean-teacher") == record["runs"][0]
