"""The logits family: identities, invariances, DINO's centre, errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import require_grad

from wmateacher import losses

property_test = settings(max_examples=20, deadline=None)
seeds = st.integers(0, 10_000)
shapes = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)


def pair(seed, shape=(3, 5)):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, *shape, generator=generator, dtype=torch.float64))


def value(spec, student, teacher):
    return losses.build(spec)(student, teacher)


@property_test
@given(seeds, shapes, st.floats(0.1, 10))
def test_kl_is_not_negative_and_zero_for_itself(seed, shape, temperature):
    student, teacher = pair(seed, shape)
    assert value(f"kl({temperature})", student, teacher) >= -1e-12
    assert value(f"kl({temperature})", student, student) == 0


@property_test
@given(seeds, shapes)
def test_ce_is_kl_plus_entropy(seed, shape):
    student, teacher = pair(seed, shape)
    expected = value("kl", student, teacher) + value("ce", teacher, teacher)
    assert value("ce", student, teacher).item() == pytest.approx(expected.item(), abs=1e-10)


@property_test
@given(seeds, st.floats(-100, 100))
def test_a_shift_of_the_logits_does_not_matter(seed, shift):
    student, teacher = pair(seed)
    criterion = losses.build("kl(2.0) + ce + mse + dino(5)").eval()
    _, expected = criterion(student, teacher, return_terms=True)
    _, shifted = criterion(student + shift, teacher - shift, return_terms=True)
    for name, term in expected.items():
        assert shifted[name].item() == pytest.approx(term.item(), rel=1e-6, abs=1e-9), name


def test_kl_keeps_the_gradients_size_at_high_temperature():
    student, teacher = (0.1 * x for x in pair(0))
    sizes = []
    for temperature in (100.0, 1000.0):
        own = require_grad(student)
        value(f"kl({temperature})", own, teacher).backward()
        sizes.append(own.grad.norm().item())
    assert sizes[0] == pytest.approx(sizes[1], rel=1e-2)


def test_dino_uses_the_centre_before_it_moves_it():
    student, teacher = (x.float() for x in pair(0))
    criterion = losses.build("dino(5,center_momentum=0.75)")
    fresh = losses.build("dino(5)").eval()(student, teacher)
    assert torch.equal(criterion(student, teacher), fresh)
    centre = 0.25 * teacher.mean(0)
    torch.testing.assert_close(criterion.terms["dino"].center, centre)
    criterion(student, teacher)
    expected = 0.75 * centre + 0.25 * teacher.mean(0)
    torch.testing.assert_close(criterion.terms["dino"].center, expected)


def test_dino_averages_the_centre_over_all_leading_dimensions():
    student, teacher = (x.float() for x in pair(0, (2, 3, 5)))
    criterion = losses.build("dino(5)")
    criterion(student, teacher)
    expected = 0.1 * teacher.mean((0, 1))
    torch.testing.assert_close(criterion.terms["dino"].center, expected)


def test_dino_keeps_the_centre_in_evaluation_mode_and_in_its_state():
    student, teacher = pair(0)
    criterion = losses.build("dino(5)")
    criterion(student, teacher)
    before = criterion.terms["dino"].center.clone()
    criterion.eval()(student, teacher)
    assert torch.equal(criterion.terms["dino"].center, before)
    assert before.abs().sum() > 0
    again = losses.build("dino(5)").eval()
    again.load_state_dict(criterion.state_dict())
    assert torch.equal(again(student, teacher), criterion(student, teacher))


def test_sinkhorn_uses_all_outputs_alike():
    """Against the iterations on probabilities that SwAV writes down, in float64."""
    student, teacher = pair(0, (6, 4))
    criterion = losses.build("dino(4,teacher_temperature=0.5,centering=sinkhorn)").terms["dino"]
    targets = criterion.targets(teacher)
    scores = (teacher.double() / 0.5).exp()
    for _ in range(3):
        scores = scores / scores.sum(0)
        scores = scores / scores.sum(1, keepdim=True)
    torch.testing.assert_close(targets, scores.to(targets.dtype), rtol=1e-4, atol=1e-6)
    balanced = criterion.targets(teacher.repeat(50, 1) + torch.tensor([3.0, 0, 0, 0])).mean(0)
    torch.testing.assert_close(balanced, torch.full_like(balanced, 0.25), rtol=0.1, atol=0)
    expected = -(targets * (student / 0.1).log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(criterion(student, teacher), expected.to(targets.dtype))
    assert not criterion.center.any()
    huge = criterion.targets(1e4 * teacher)
    assert torch.isfinite(huge).all()


def test_dino_may_be_called_twice_before_backward():
    student, teacher = pair(0)
    student = require_grad(student)
    criterion = losses.build("dino(5)")
    (criterion(student, teacher) + criterion(student, teacher)).backward()
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize(
    ("student", "teacher", "error", "message"),
    [
        (
            [1.0],
            torch.zeros(1, 3),
            TypeError,
            r"student must be a tensor of logits \[\.\.\., C\], got list",
        ),
        (
            torch.zeros(2, 3),
            torch.zeros(2, dtype=torch.int64),
            TypeError,
            "teacher must be a tensor of logits .* of a floating-point dtype, got torch.int64; class "
            "indices are targets of the task loss",
        ),
        (
            torch.zeros(2, 3),
            torch.zeros(2, 4),
            ValueError,
            r"a logits loss needs student and teacher of equal shape, got student \[2, 3\] and "
            r"teacher \[2, 4\]; the last dimension must be the same classes or vocabulary .* cut it off",
        ),
        (
            torch.zeros(2, 5, 3),
            torch.zeros(2, 6, 3),
            ValueError,
            r"got student \[2, 5, 3\] and teacher \[2, 6, 3\]; give both the same inputs, or select",
        ),
        (torch.zeros(0, 3), torch.zeros(0, 3), ValueError, r"at least 1, got shape \[0, 3\]"),
        (torch.tensor(1.0), torch.tensor(1.0), ValueError, "got a 0-d tensor"),
        (
            losses.PairedEmbeddings(*torch.zeros(2, 1, 1), torch.tensor(1.0)),
            torch.zeros(1, 1),
            TypeError,
            "got PairedEmbeddings",
        ),
    ],
)
def test_inputs_are_checked(student, teacher, error, message):
    with pytest.raises(error, match=message):
        value("kl", student, teacher)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("kl(0)", "kl: temperature must be a finite number > 0, got 0"),
        (
            "mse(space=logit)",
            "unknown mse space 'logit'; did you mean 'logits'\\? available: logits, probabilities",
        ),
        ("dino(0)", r"dino: dim must be an integer >= 1, got 0; give the size.*dino\(512\)"),
        ("dino(4,student_temperature=0)", "dino: student_temperature must be a finite number > 0"),
        ("dino(4,teacher_temperature=-1)", "dino: teacher_temperature must be a finite number > 0"),
        ("dino(4,centering=none)", "unknown dino centering 'none'; .*available: mean, sinkhorn"),
        ("dino(4,center_momentum=1)", r"dino: center_momentum must be a number in \[0, 1\), got 1"),
    ],
)
def test_parameters_are_checked(spec, message):
    with pytest.raises(ValueError, match=message):
        losses.build(spec)


def test_dino_keeps_to_its_dim():
    with pytest.raises(ValueError, match=r"dino was built with dim=4.*\[3, 5\]; write dino\(5\)"):
        value("dino(4)", *pair(0))
