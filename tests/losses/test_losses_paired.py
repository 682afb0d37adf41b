"""The paired family: identities between losses, invariances, InfoNCE, its gradients, AFD."""

import loss_oracle as oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import paired, require_grad, to_numpy
from torch.nn import functional as F

from wmateacher import losses

property_test = settings(max_examples=20, deadline=None)
seeds = st.integers(0, 10_000)


def value(spec, student, teacher):
    return losses.build(spec)(student, teacher)


def torch_info_nce(image, text, scale):
    """InfoNCE of normalised features, from CLIP's pseudo-code."""
    logits = scale * image @ text.T
    labels = torch.arange(len(image))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def test_info_nce_is_the_oracles():
    embeddings = paired(0)
    expected = oracle.info_nce(to_numpy(embeddings))
    assert losses.info_nce(*embeddings).item() == pytest.approx(expected, rel=1e-12)


def test_info_nce_takes_bfloat16_under_autocast():
    image, text, scale = paired(0, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        low = losses.info_nce(image, text, scale)
    assert torch.equal(low, losses.info_nce(image.float(), text.float(), scale.float()))


def test_info_nce_checks_its_arguments():
    image, text, scale = paired(0)
    with pytest.raises(ValueError, match=r"info_nce\.image and info_nce\.text must both be \[B, d\]"):
        losses.info_nce(image, text[:2], scale)
    with pytest.raises(TypeError, match=r"info_nce\.logit_scale must be a 0-d tensor, got float"):
        losses.info_nce(image, text, 10.0)


def test_similarity_logits_has_one_row_for_each_anchor():
    anchors, candidates = torch.eye(3)[:2], 2 * torch.eye(3)
    logits = losses.similarity_logits(anchors, candidates, torch.tensor(5.0))
    assert torch.equal(logits, 10 * torch.eye(3)[:2])


@property_test
@given(seeds, st.integers(1, 6), st.integers(1, 5))
def test_crd_is_temperature_kl_at_one_and_zero_for_itself(seed, batch, dim):
    student, teacher = paired(seed, batch, dim), paired(seed + 1, batch, dim)
    crd = value("crd", student, teacher)
    assert torch.equal(crd, value("temperature_kl(1.0)", student, teacher))
    assert crd >= -1e-12
    assert value("crd", student, student) == 0


@property_test
@given(seeds, st.integers(1, 6), st.integers(1, 5))
def test_a_student_that_is_its_own_teacher(seed, batch, dim):
    student = paired(seed, batch, dim)
    info_nce = losses.info_nce(*student).item()
    assert value("icl", student, student).item() == pytest.approx(info_nce, rel=1e-12, abs=1e-12)
    for spec in ("fd", "gd", "cross_kd"):
        assert value(spec, student, student).item() == pytest.approx(0, abs=1e-12)


@property_test
@given(seeds, st.integers(1, 6), st.integers(1, 5))
def test_paired_ce_is_twice_crd_plus_the_teachers_entropies(seed, batch, dim):
    student, teacher = paired(seed, batch, dim), paired(seed + 1, batch, dim)
    entropies = value("paired_ce", teacher, teacher)
    expected = 2 * value("crd", student, teacher) + entropies
    assert value("paired_ce", student, teacher).item() == pytest.approx(expected.item(), abs=1e-9)


@property_test
@given(seeds, st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_raw_and_normalised_features_give_the_same(seed, factor, other):
    student, teacher = paired(seed), paired(seed + 1)
    scaled = student._replace(image=factor * student.image, text=other * student.text)
    spec = "fd + crd + icl + cross_kd + gd + paired_ce"
    _, before = losses.build(spec)(student, teacher, return_terms=True)
    _, after = losses.build(spec)(scaled, teacher, return_terms=True)
    for name, term in before.items():
        assert after[name].item() == pytest.approx(term.item(), rel=1e-9, abs=1e-12), name


@property_test
@given(seeds, st.permutations(range(4)))
def test_the_order_of_the_pairs_does_not_matter(seed, order):
    student, teacher = paired(seed, 4), paired(seed + 1, 4)
    spec = "fd + crd + icl + cross_kd + gd + paired_ce + temperature_kl(2.0)"
    shuffled = [e._replace(image=e.image[list(order)], text=e.text[list(order)]) for e in (student, teacher)]
    expected = value(spec, student, teacher).item()
    assert value(spec, *shuffled).item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_fd_is_the_codes_coefficient_times_its_element_wise_mean():
    student, teacher = paired(0, 3, 512), paired(1, 3, 512)
    element_wise = sum(
        F.mse_loss(F.normalize(s, dim=-1), F.normalize(t, dim=-1))
        for s, t in zip(student[:2], teacher[:2], strict=True)
    )
    total = value("3.90625*fd", student, teacher)
    assert total.item() == pytest.approx(2000 * element_wise.item(), rel=1e-12)


def test_gd_is_what_autograd_gives():
    def gradients(embeddings):
        image, text = (F.normalize(x, dim=-1) for x in embeddings[:2])
        image.requires_grad_()
        text.requires_grad_()
        loss = torch_info_nce(image, text, embeddings.logit_scale)
        return torch.autograd.grad(loss, (image, text))

    student, teacher = paired(0), paired(1)
    expected = sum(F.mse_loss(s, t) for s, t in zip(gradients(student), gradients(teacher), strict=True))
    assert value("gd", student, teacher).item() == pytest.approx(expected.item(), rel=1e-10)


@pytest.mark.parametrize("spec", ["crd", "temperature_kl(2.0)", "paired_ce"])
def test_losses_between_distributions_take_two_widths(spec):
    student, teacher = require_grad(paired(0, dim=4)), paired(1, dim=7)
    total = value(spec, student, teacher)
    expected = oracle.ORACLES[spec.split("(")[0]](
        to_numpy(student), to_numpy(teacher), *([2.0] if "(" in spec else [])
    )
    assert total.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("spec", ["fd", "icl", "cross_kd", "gd", "afd(4)"])
def test_losses_between_features_need_one_width(spec):
    name = spec.split("(")[0]
    with pytest.raises(
        ValueError,
        match=rf"{name} needs student and teacher of equal shape, got student \[3, 4\] and teacher "
        r"\[3, 7\]; give both the same inputs, and project one",
    ):
        value(spec, paired(0, dim=4), paired(1, dim=7))


def test_afd_learns_its_fusions_and_keeps_to_its_dim():
    criterion = losses.build("afd(4)")
    student, teacher = require_grad(paired(0)), paired(1)
    criterion(student, teacher).backward()
    assert set(criterion.state_dict()) == {"terms.afd.image.weight", "terms.afd.text.weight"}
    assert all(p.grad.abs().sum() > 0 for p in criterion.parameters())
    with pytest.raises(ValueError, match=r"afd was built with dim=4, got inputs of shape \[3, 6\]"):
        criterion(paired(0, dim=6), paired(1, dim=6))


def test_afd_in_half_precision_still_computes_in_float32():
    criterion = losses.build("afd(4)").bfloat16()
    total = criterion(*(paired(s, dtype=torch.bfloat16) for s in (0, 1)))
    assert total.dtype == torch.float32


def test_the_student_scale_gets_a_gradient():
    student, teacher = require_grad(paired(0)), paired(1)
    value("3.90625*fd + crd + icl + cross_kd", student, teacher).backward()
    assert student.logit_scale.grad != 0


def test_zero_features_stay_finite():
    student = require_grad(paired(0)._replace(image=torch.zeros(3, 4, dtype=torch.float64)))
    total = value("fd + crd + icl + cross_kd + gd + paired_ce", student, paired(1))
    total.backward()
    assert torch.isfinite(total)
    assert torch.isfinite(student.image.grad).all()


def with_field(**changes):
    return paired(0)._replace(**changes)


@pytest.mark.parametrize(
    ("student", "error", "message"),
    [
        (
            torch.zeros(3, 4),
            TypeError,
            r"student must be PairedEmbeddings\(image \[B, d\], text \[B, d\], logit_scale \[\]\), "
            r"got Tensor; wrap the model's output in wmateacher\.losses\.PairedEmbeddings",
        ),
        (tuple(paired(0)), TypeError, "got tuple; wrap"),
        (with_field(image=None), TypeError, r"student\.image must be a tensor \[B, d\], got None"),
        (
            with_field(text=torch.zeros(3, 4, dtype=torch.int64)),
            TypeError,
            r"student\.text must be a tensor \[B, d\], of a floating-point dtype, got torch\.int64",
        ),
        (with_field(logit_scale=10.0), TypeError, r"logit_scale must be a 0-d tensor, got float"),
        (
            with_field(logit_scale=torch.ones(1)),
            ValueError,
            r"logit_scale must be a 0-d tensor, got shape \[1\]; pass for example",
        ),
        (
            with_field(text=torch.zeros(2, 4)),
            ValueError,
            r"student\.image and student\.text must both be \[B, d\], got \[3, 4\] and \[2, 4\]; "
            "give one text for each image",
        ),
        (
            with_field(image=torch.zeros(3), text=torch.zeros(3)),
            ValueError,
            r"must both be \[B, d\], got \[3\] and \[3\]",
        ),
        (
            paired(0, batch=0),
            ValueError,
            r"student\.image must have a batch of at least 1, got shape \[0, 4\]; skip the loss",
        ),
        (
            paired(0, batch=2),
            ValueError,
            r"a paired loss needs student and teacher of the same batch, got student \[2, 4\] and "
            r"teacher \[3, 4\]",
        ),
    ],
)
def test_inputs_are_checked(student, error, message):
    with pytest.raises(error, match=message):
        value("crd", student, paired(1))


def test_the_teacher_is_checked_too():
    with pytest.raises(TypeError, match="teacher must be PairedEmbeddings"):
        value("crd", paired(0), torch.zeros(3, 4))


@pytest.mark.parametrize("temperature", ["0", "-1.0", "1e999", "True", "None", "hot"])
def test_the_temperature_must_be_positive(temperature):
    with pytest.raises(ValueError, match="temperature_kl: temperature must be a finite number > 0"):
        losses.build(f"temperature_kl({temperature})")


@pytest.mark.parametrize("dim", ["0", "-3", "2.0", "True"])
def test_afd_needs_a_width(dim):
    with pytest.raises(ValueError, match=r"afd: dim must be an integer >= 1, got .*afd\(512\)"):
        losses.build(f"afd({dim})")
