"""The features family: identities, invariances, degenerate batches, errors."""

import math

import loss_oracle as oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import require_grad

from wmateacher import losses

property_test = settings(max_examples=20, deadline=None)
seeds = st.integers(0, 10_000)


def pair(seed, shape=(4, 3)):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, *shape, generator=generator, dtype=torch.float64))


def value(spec, student, teacher):
    return losses.build(spec)(student, teacher)


@pytest.mark.parametrize("spec", ["feature_mse", "cosine", "relational"])
def test_zero_for_itself(spec):
    student, _ = pair(0)
    assert value(spec, student, student).item() == pytest.approx(0, abs=1e-12)


@property_test
@given(seeds, st.floats(1e-2, 1e2))
def test_cosine_and_relational_ignore_the_features_size(seed, factor):
    student, teacher = pair(seed)
    for spec in ("cosine", "relational"):
        expected = value(spec, student, teacher).item()
        assert value(spec, factor * student, teacher).item() == pytest.approx(expected, rel=1e-8)


def test_info_nce_knows_rows_that_are_alike():
    rows = torch.eye(4, dtype=torch.float64)
    assert value("info_nce(0.01)", 3 * rows, rows).item() == pytest.approx(0, abs=1e-9)
    assert value("info_nce", torch.ones(4, 3), torch.ones(4, 3)).item() == pytest.approx(
        math.log(4), rel=1e-6
    )
    with pytest.raises(ValueError, match=r"info_nce needs features \[B, ..., d\], got shape \[4\]"):
        value("info_nce", rows[0], rows[0])
    with pytest.raises(ValueError, match="info_nce: temperature must be a finite number > 0, got 0"):
        losses.build("info_nce(0)")


@property_test
@given(seeds)
def test_relational_ignores_rotations_and_shifts(seed):
    student, teacher = pair(seed)
    rotation = torch.linalg.qr(pair(seed + 1, (3, 3))[0]).Q
    moved = student @ rotation + 5
    expected = value("relational", student, teacher).item()
    assert value("relational", moved, teacher).item() == pytest.approx(expected, abs=1e-9)


def test_relational_takes_two_widths():
    student, teacher = pair(0, (4, 3))[0], pair(1, (4, 2, 5))[1]
    expected = oracle.relational(student.numpy(), teacher.numpy())
    assert value("relational", student, teacher).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("identical", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_relational_is_finite_with_identical_rows(identical, dtype):
    student, teacher = (x.to(dtype) for x in pair(0))
    student[:identical] = student[0]
    teacher[1:] = teacher[1]
    student = require_grad(student)
    total = value("relational", student, teacher)
    total.backward()
    assert torch.isfinite(total)
    assert torch.isfinite(student.grad).all()


def test_relational_uses_the_linear_part_of_huber():
    student = torch.tensor([[0.0], [0.0], [0.0], [9.0]])
    teacher = torch.tensor([[0.0], [9.0], [9.0], [9.0]])
    expected = oracle.relational(student.double().numpy(), teacher.double().numpy())
    assert value("relational", student, teacher).item() == pytest.approx(expected, rel=1e-6)
    assert expected > 0.5


def test_cosine_is_finite_for_zero_features():
    student = require_grad(torch.zeros(2, 3))
    total = value("cosine", student, torch.ones(2, 3))
    total.backward()
    assert total == 1
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize(
    ("spec", "student", "teacher", "error", "message"),
    [
        ("cosine", None, torch.zeros(2, 3), TypeError, r"student must be .*\[B, \.\.\.\], got None"),
        ("cosine", torch.zeros(2, 3), 1.0, TypeError, "teacher must be .*, got float"),
        ("feature_mse", torch.tensor(1.0), torch.zeros(1), ValueError, "got a 0-d tensor"),
        ("feature_mse", torch.zeros(0, 2), torch.zeros(0, 2), ValueError, "a batch of at least 1"),
        (
            "feature_mse",
            torch.zeros(2, 3),
            torch.zeros(2, 4),
            ValueError,
            r"feature_mse needs student and teacher of equal shape, got student \[2, 3\] and teacher "
            r"\[2, 4\]; .*project",
        ),
        ("cosine", torch.zeros(2, 3), torch.zeros(2, 4), ValueError, "cosine needs student and"),
        (
            "relational",
            torch.zeros(2, 3),
            torch.zeros(3, 3),
            ValueError,
            r"of the same batch, got student \[2, 3\] and teacher \[3, 3\]",
        ),
        (
            "relational",
            torch.zeros(1, 3),
            torch.zeros(1, 3),
            ValueError,
            r"relational compares pairs and needs a batch of at least 2, got shape \[1, 3\]; leave",
        ),
        (
            "cosine",
            torch.zeros(3),
            torch.zeros(3),
            ValueError,
            r"cosine needs features \[B, \.\.\., d\], got shape \[3\]; add the feature dimension",
        ),
    ],
)
def test_inputs_are_checked(spec, student, teacher, error, message):
    with pytest.raises(error, match=message):
        value(spec, student, teacher)
