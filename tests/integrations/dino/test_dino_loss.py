import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wmateacher import losses
from wmateacher.integrations.dino.masks import Masks
from wmateacher.integrations.dino.model import MultiCropLoss, PairLoss, koleo, masked_loss
from wmateacher.losses.logits import DINO


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def oracle(student, teacher, center, tau_s, tau_t):
    """Caron et al. 2021, equation 3: every pair of a teacher's view and another student's view."""
    total, pairs = 0.0, 0
    for t in range(len(teacher)):
        p = softmax((teacher[t] - center) / tau_t)
        for s in range(len(student)):
            if s != t:
                total += -(p * np.log(softmax(student[s] / tau_s))).sum(-1).mean()
                pairs += 1
    return total / pairs


@given(st.integers(1, 2), st.integers(0, 3), st.integers(1, 4), st.integers(2, 6), st.integers(0, 2**20))
def test_the_loss_is_the_mean_over_pairs_of_different_crops(globals_, locals_, batch, width, seed):
    views = globals_ + locals_
    if views < 2:
        return
    random = np.random.default_rng(seed)
    student, teacher = random.normal(size=(views, batch, width)), random.normal(size=(globals_, batch, width))
    loss = MultiCropLoss(DINO(width, 0.1, 0.07))
    center = random.normal(size=width)
    loss.criterion.center.copy_(torch.from_numpy(center))
    value, p = loss(torch.from_numpy(student).float(), torch.from_numpy(teacher).float())
    assert value.item() == pytest.approx(oracle(student, teacher, center, 0.1, 0.07), rel=1e-4, abs=1e-6)
    np.testing.assert_allclose(p, softmax((teacher - center) / 0.07), rtol=1e-3, atol=1e-6)


def test_the_centre_moves_after_its_use_over_all_global_crops():
    student, teacher = torch.randn(4, 3, 5), torch.randn(2, 3, 5)
    loss = MultiCropLoss(DINO(5, center_momentum=0.9))
    first, _ = loss(student, teacher)
    assert first.item() == pytest.approx(
        oracle(student.double().numpy(), teacher.double().numpy(), 0.0, 0.1, 0.04), rel=1e-4
    )
    center = 0.1 * teacher.mean((0, 1))
    torch.testing.assert_close(loss.criterion.center, center)
    second, _ = loss(student, teacher)
    expected = oracle(student.double().numpy(), teacher.double().numpy(), center.double().numpy(), 0.1, 0.04)
    assert second.item() == pytest.approx(expected, rel=1e-4)


def test_the_gradient_reaches_the_student_alone_and_is_the_formulas():
    student, teacher = torch.randn(3, 2, 4, requires_grad=True), torch.randn(2, 2, 4, requires_grad=True)
    value, _ = MultiCropLoss(DINO(4).eval())(student, teacher)
    value.backward()
    assert teacher.grad is None
    step = torch.randn(3, 2, 4).double()
    ends = [
        oracle(
            student.detach().double().add(sign * 1e-5 * step).numpy(),
            teacher.detach().double().numpy(),
            0.0,
            0.1,
            0.04,
        )
        for sign in (1, -1)
    ]
    assert (student.grad.double() * step).sum().item() == pytest.approx(
        (ends[0] - ends[1]) / 2e-5, rel=1e-3, abs=1e-4
    )


def test_half_precision_logits_are_computed_in_float32():
    student, teacher = torch.randn(2, 2, 4).bfloat16(), 100 * torch.randn(2, 2, 4).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, _ = MultiCropLoss(DINO(4))(student, teacher)
    assert value.dtype == torch.float32
    assert torch.isfinite(value)


@pytest.mark.parametrize(
    ("student", "teacher"), [((1, 2, 4), (1, 2, 4)), ((1, 2, 4), (2, 2, 4)), ((2, 3, 4), (2, 2, 4))]
)
def test_crops_that_make_no_pairs_are_refused(student, teacher):
    with pytest.raises(
        ValueError, match=r"needs student \[V, B, K\] and teacher \[G, B, K\] with V >= G and V >= 2"
    ):
        MultiCropLoss(DINO(4))(torch.zeros(student), torch.zeros(teacher))


def test_koleo_is_minus_the_mean_log_distance_to_the_nearest():
    features = torch.randn(6, 3, requires_grad=True)
    unit = features.detach().double() / features.detach().double().norm(dim=1, keepdim=True)
    distances = torch.cdist(unit, unit).fill_diagonal_(float("inf")).amin(1)
    value = koleo(features)
    assert value.item() == pytest.approx(-distances.log().mean().item(), rel=1e-4)
    value.backward()
    assert features.grad.abs().sum() > 0


def test_koleo_of_equal_rows_is_finite_and_of_one_row_an_error():
    assert torch.isfinite(koleo(torch.ones(3, 4)))
    with pytest.raises(ValueError, match=r"at least two rows of features, got shape \[1, 4\]"):
        koleo(torch.ones(1, 4))


def test_ibot_compares_every_masked_patch_with_the_teacher_of_the_same_patch():
    random = np.random.default_rng(0)
    hidden = random.random((6, 9)) < 0.4
    hidden[2] = False
    student, teacher = random.normal(size=(2, int(hidden.sum()), 5))
    criterion = DINO(5, 0.1, 0.07)
    center = random.normal(size=5)
    criterion.center.copy_(torch.from_numpy(center))
    expected, row = 0.0, 0
    for image in hidden:
        for _ in range(image.sum()):
            p, q = softmax((teacher[row] - center) / 0.07), softmax(student[row] / 0.1)
            expected += -(p * np.log(q)).sum() / image.sum() / len(hidden)
            row += 1
    weights = Masks.of(torch.from_numpy(hidden)).weights
    value = masked_loss(criterion, torch.from_numpy(student), torch.from_numpy(teacher), weights)
    assert value.item() == pytest.approx(expected, rel=1e-5)
    moved = 0.9 * torch.from_numpy(center).float() + 0.1 * torch.from_numpy(teacher).float().mean(0)
    torch.testing.assert_close(criterion.center, moved)


def test_predictions_are_compared_with_all_other_global_crops():
    student, teacher = torch.randn(3, 4, 5).double(), torch.randn(2, 4, 5).double()

    def byol(s, t):
        s, t = (x / x.norm(dim=-1, keepdim=True) for x in (s, t))
        return (s - t).square().sum(-1).mean()  # Grill et al. 2020, equation 2

    pairs = [(1, 0), (2, 0), (0, 1), (2, 1)]
    expected = sum(byol(student[s], teacher[t]) for s, t in pairs) / 4
    torch.testing.assert_close(PairLoss(losses.build("2*cosine"))(student, teacher), expected)
