"""What holds for every loss: value, gradient, detached teacher, precision, extremes."""

from functools import partial

import loss_oracle as oracle
import numpy as np
import pytest
import torch
from loss_cases import (
    PAIRED,
    PARAMETERS,
    REQUIRED,
    SPECS,
    criterion_for,
    inputs_for,
    leaves,
    like,
    name_of,
    paired,
    require_grad,
    to_numpy,
)

from wmateacher import losses

every_loss = pytest.mark.parametrize("spec", SPECS)


def oracle_for(spec, criterion):
    parameters = dict(PARAMETERS.get(spec, {}))
    name = name_of(spec)
    if name == "afd":
        fusions = criterion.terms["afd"]
        parameters["image_weight"] = fusions.image.weight.detach().double().numpy()
        parameters["text_weight"] = fusions.text.weight.detach().double().numpy()
    if name == "dino":
        parameters["center"] = criterion.terms["dino"].center.double().numpy().copy()
    return partial(oracle.ORACLES[name], **parameters)


def test_every_registered_loss_has_an_oracle_and_a_family():
    assert losses.available() == sorted(oracle.ORACLES)
    assert {name_of(spec) for spec in SPECS} == set(oracle.ORACLES)


@every_loss
@pytest.mark.parametrize("seed", [0, 7])
def test_value_is_the_oracles(spec, seed):
    criterion = criterion_for(spec)
    student, teacher = inputs_for(spec, seed)
    total, terms = criterion(student, teacher, return_terms=True)
    expected = oracle_for(spec, criterion)(to_numpy(student), to_numpy(teacher))
    assert total.shape == ()
    assert total.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert terms[name_of(spec)].item() == total.item()


@every_loss
def test_gradient_is_the_oracles(spec):
    criterion = criterion_for(spec)
    student, teacher = inputs_for(spec)
    student = require_grad(student)
    criterion(student, teacher).backward()
    reference, arrays = oracle_for(spec, criterion), to_numpy(student)
    for k, tensor in enumerate(leaves(student)):

        def of_one(x, k=k):
            if not isinstance(arrays, tuple):
                return reference(x, to_numpy(teacher))
            changed = tuple(x if i == k else a for i, a in enumerate(arrays))
            return reference(changed, to_numpy(teacher))

        expected = oracle.gradient(of_one, tensor.detach().numpy())
        actual = np.zeros_like(expected) if tensor.grad is None else tensor.grad.numpy()
        # fd compares directions alone, so the scale is the one input that a loss may ignore.
        assert tensor.grad is not None or (name_of(spec) == "fd" and k == 2)
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-7)


@every_loss
def test_no_gradient_reaches_the_teacher(spec):
    student, teacher = (require_grad(x) for x in inputs_for(spec))
    criterion_for(spec).train()(student, teacher).backward()
    assert all(t.grad is None for t in leaves(teacher))
    assert leaves(student)[0].grad.abs().sum() > 0


@every_loss
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_a_direct_call_is_the_criterion_of_that_loss_alone(spec, dtype):
    criterion = criterion_for(spec, torch.float32)
    results = []
    for call in (criterion, criterion.terms[name_of(spec)]):
        student, teacher = (require_grad(x) for x in inputs_for(spec, dtype=dtype))
        with torch.autocast("cpu", torch.bfloat16):
            loss = call(student, teacher)
        loss.backward()
        assert all(t.grad is None for t in leaves(teacher))
        results.append([loss, *(t.grad for t in leaves(student) if t.grad is not None)])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("family", [losses.paired, losses.logits, losses.features])
def test_the_public_losses_are_the_registered_ones(family):
    for name in losses.available(family.__name__.rsplit(".", 1)[1]):
        (term,) = losses.build(REQUIRED.get(name, name)).terms.values()
        own = getattr(term, "function", type(term))
        assert own.__name__ in family.__all__, f"add it to __all__ of {family.__name__}"
        assert getattr(family, own.__name__) is own


def test_fd_of_raw_features_compares_directions():
    student, teacher = (paired(0, dim=512) for _ in "ab")
    opposite = teacher._replace(image=-30 * teacher.image)
    assert losses.paired.fd(student, opposite).item() == pytest.approx(4.0)
    assert losses.paired.fd(teacher=opposite, student=student).item() == pytest.approx(4.0)
    with pytest.raises(TypeError, match="missing a required argument: 'teacher'"):
        losses.paired.fd(student)
    with pytest.raises(TypeError, match="teacher must be PairedEmbeddings"):
        losses.paired.fd(student, teacher.image)


def test_targets_of_dino_are_computed_in_float32():
    logits = inputs_for("kl", dtype=torch.float16)[1]
    dino = losses.logits.DINO(logits.shape[-1]).eval()
    dino.center.normal_()
    assert torch.equal(dino.targets(logits), dino.targets(logits.float()))


@every_loss
def test_terms_are_detached(spec):
    student, teacher = inputs_for(spec)
    total, terms = criterion_for(spec)(require_grad(student), teacher, return_terms=True)
    assert total.requires_grad
    assert not any(t.requires_grad for t in terms.values())


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast_and_low_precision_inputs_change_nothing(spec, dtype):
    criterion = criterion_for(spec, torch.float32)
    inputs = inputs_for(spec, dtype=dtype)
    results = []
    for autocast, cast in ((True, dtype), (False, torch.float32)):
        student, teacher = (like(x, [t.to(cast) for t in leaves(x)]) for x in inputs)
        student = require_grad(student)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            total = criterion(student, teacher)
        total.backward()
        results.append((total, leaves(student)[0].grad))
    (low, low_grad), (full, full_grad) = results
    assert low.dtype == torch.float32
    assert torch.equal(low, full)
    assert torch.equal(low_grad, full_grad.to(dtype))


@every_loss
def test_float32_is_close_to_float64(spec):
    student, teacher = inputs_for(spec)
    exact = criterion_for(spec)(student, teacher)
    single = [like(x, [t.float() for t in leaves(x)]) for x in (student, teacher)]
    total = criterion_for(spec, torch.float32)(*single)
    assert total.dtype == torch.float32
    assert exact.dtype == torch.float64
    assert total.item() == pytest.approx(exact.item(), rel=1e-4, abs=1e-6)


@every_loss
@pytest.mark.parametrize("mixed", [0, 1])
def test_one_float64_side_makes_it_float64(spec, mixed):
    student, teacher = inputs_for(spec, dtype=torch.float32)
    both = [student, teacher]
    both[mixed] = like(both[mixed], [t.double() for t in leaves(both[mixed])])
    assert criterion_for(spec, torch.float32)(*both).dtype == torch.float64


@every_loss
def test_finite_at_a_logit_gap_of_ten_thousand(spec):
    if spec in PAIRED:
        student, teacher = (paired(s, dtype=torch.float32, scale=1e4) for s in (0, 1))
        # Opposite certainties: each teacher pair agrees, each student pair is at odds.
        student = student._replace(text=-student.image)
        teacher = teacher._replace(text=teacher.image.clone())
    else:
        student, teacher = inputs_for(spec, dtype=torch.float32)
        student, teacher = student.clone(), teacher.clone()
        student[..., 0], student[..., 1] = 1e4, 0.0
        teacher[..., 0], teacher[..., 1] = 0.0, 1e4
    student = require_grad(student)
    with torch.autocast("cpu", torch.bfloat16):
        total = criterion_for(spec, torch.float32)(student, teacher)
    total.backward()
    assert torch.isfinite(total)
    gradients = [t.grad for t in leaves(student) if t.grad is not None]
    assert gradients
    assert all(torch.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("spec", ["crd", "icl", "cross_kd", "paired_ce", "temperature_kl(0.5)"])
def test_a_large_gap_gives_a_large_paired_loss(spec):
    student, teacher = (paired(s, dtype=torch.float32, scale=1e4) for s in (0, 1))
    total = losses.build(spec)(student._replace(text=-student.image), teacher)
    assert total > 1e3


@every_loss
def test_gradcheck(spec):
    criterion = criterion_for(spec)
    student, teacher = inputs_for(spec)

    def of_tensors(*tensors):
        return criterion(like(student, list(tensors)), teacher)

    assert torch.autograd.gradcheck(of_tensors, tuple(leaves(require_grad(student))))
