"""Masked entries, whose logits are -inf, and terms that a coefficient of 0 drops."""

import loss_oracle as oracle
import numpy as np
import pytest
import torch
from loss_cases import CLASSES, LOGITS, PARAMETERS, criterion_for, inputs_for, name_of, paired, require_grad

from wmateacher import losses
from wmateacher.diagnostics import output_kl
from wmateacher.losses import registry

INF = float("inf")
every_loss = pytest.mark.parametrize("spec", LOGITS)
# The losses of which `wmateacher.losses.logits` says what they do with entries masked on one side.
DOCUMENTED = {"ce", "dino", "jsd", "kl", "mse", "reverse_kl"}

# The masked entries of each of the 2 x 3 rows; each row keeps some.
MASK = torch.tensor(
    [
        [[0, 0, 0, 0, 1], [1, 0, 0, 1, 0], [0, 0, 0, 0, 0]],
        [[1, 1, 1, 1, 0], [0, 1, 0, 0, 0], [0, 0, 1, 1, 1]],
    ],
    dtype=torch.bool,
)


def without(rows, mask, center):
    """The entries that are not masked, for each row: student, teacher and DINO's centre."""
    flat = [t.reshape(-1, CLASSES) for t in (*rows, mask)]
    for student, teacher, masked in zip(*flat, strict=True):
        yield student[~masked][None], teacher[~masked][None], center[~masked]


def expected(spec, student, teacher, mask, center):
    """The mean over the rows of the oracle's value of what is not masked."""
    values = []
    for own, target, centre in without((student, teacher), mask, center):
        parameters = dict(PARAMETERS.get(spec, {}))
        if name_of(spec) == "dino":
            parameters["center"] = centre
        # A mean over entries counts the masked ones, which contribute 0.
        share = own.shape[1] / CLASSES if name_of(spec) == "mse" else 1.0
        values.append(share * oracle.ORACLES[name_of(spec)](own, target, **parameters))
    return np.mean(values)


def center_of(criterion):
    return criterion.terms["dino"].center.numpy().copy() if "dino" in criterion.terms else np.zeros(CLASSES)


@every_loss
@pytest.mark.parametrize("seed", [0, 3])
def test_masked_entries_contribute_nothing(spec, seed):
    criterion = criterion_for(spec)
    student, teacher = inputs_for(spec, seed)
    masked = require_grad(student.masked_fill(MASK, -INF))
    total = criterion(masked, teacher.masked_fill(MASK, -INF))
    total.backward()
    center = center_of(criterion)

    def value(x):
        return expected(spec, x, teacher.numpy(), MASK.numpy(), center)

    assert total.item() == pytest.approx(value(student.numpy()), rel=1e-9, abs=1e-12)
    gradient = oracle.gradient(value, student.numpy())
    np.testing.assert_allclose(masked.grad, gradient, rtol=1e-5, atol=1e-7)
    assert not masked.grad[MASK].any()


def one_sided(spec, student, teacher, center):
    """The loss of float64 logits by its definition, where 0 times any logarithm is 0."""
    parameters, name = {"temperature": 1.0, **PARAMETERS.get(spec, {})}, name_of(spec)
    if spec == "mse(space=logits)":
        return np.mean((student - teacher) ** 2)
    tau = parameters["temperature"]
    if name == "dino":
        student = student / parameters.get("student_temperature", 0.1)
        teacher = (teacher - center) / parameters.get("teacher_temperature", 0.04)
    student, teacher = student / tau, teacher / tau
    if "top_k" in parameters:
        largest = {"student": student, "teacher": teacher}
        support = largest[parameters.get("support", "teacher" if name == "kl" else "student")]
        chosen = np.argsort(-support, axis=-1)
        top, rest = np.split(chosen, [parameters["top_k"]], axis=-1)
        student, teacher = (
            np.concatenate(
                [
                    np.take_along_axis(x, top, -1),
                    *(
                        [np.log(np.exp(np.take_along_axis(x, rest, -1)).sum(-1, keepdims=True))]
                        if parameters.get("tail", True)
                        else []
                    ),
                ],
                -1,
            )
            for x in (student, teacher)
        )
    q, p = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (student, teacher))

    def divergence(a, b):
        with np.errstate(divide="ignore"):
            return (a * (np.log(np.where(a > 0, a, 1.0)) - np.where(a > 0, np.log(b), 0.0))).sum(-1).mean()

    if name == "mse":
        return np.mean((p - q) ** 2)
    if name == "jsd":
        beta = parameters.get("beta", 0.5)
        m = beta * p + (1 - beta) * q
        return tau**2 * (beta * divergence(p, m) + (1 - beta) * divergence(q, m))
    entropy = 0.0 if "kl" in name else divergence(p, np.ones_like(p))
    return tau**2 * (divergence(q, p) if name == "reverse_kl" else divergence(p, q) - entropy)


@pytest.mark.parametrize("spec", [s for s in LOGITS if name_of(s) in DOCUMENTED])
@pytest.mark.parametrize("masked", ["student", "teacher", "neither"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_entry_that_is_masked_on_one_side_has_the_value_of_the_definition(spec, masked, dtype):
    criterion = criterion_for(spec, dtype)
    student, teacher = inputs_for(spec, dtype=dtype)
    pair = {"student": student.clone(), "teacher": teacher.clone()}
    center = center_of(criterion).astype(np.float64)
    if masked != "neither":
        # An entry of which the teacher is sure: of the others its probability may be 0 in this precision.
        pair[masked][0, 1, (teacher[0, 1].double().numpy() - center).argmax()] = -INF
    value = one_sided(spec, *(t.double().numpy() for t in pair.values()), center)
    infinite = {
        "student": "space" in spec or name_of(spec) not in ("mse", "reverse_kl", "jsd"),
        "teacher": "space" in spec or name_of(spec) == "reverse_kl",
    }
    assert "top_k" in spec or np.isinf(value) == infinite.get(masked, False)
    assert criterion(**pair).item() == pytest.approx(value, rel=1e-4)


@pytest.mark.parametrize("shape", [(7,), (4, 7), (2, 3, 7)])
def test_output_kl_reduces_over_all_positions_and_ignores_masked_entries(shape):
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, *shape, generator=generator)
    student[..., 2] = teacher[..., 2] = -INF
    kept = [t[..., [0, 1, 3, 4, 5, 6]].double().numpy() for t in (student, teacher)]
    assert output_kl(student, teacher).item() == pytest.approx(oracle.kl(*kept), rel=1e-5)
    if len(shape) == 3:
        mask = torch.tensor([[1, 1, 0], [1, 0, 0]], dtype=torch.bool)
        rows = [k[mask.numpy()] for k in kept]
        assert output_kl(student[mask], teacher[mask]).item() == pytest.approx(oracle.kl(*rows), rel=1e-5)


def test_masked_entries_leave_dinos_centre_where_it_is():
    student, teacher = (t.float() for t in inputs_for("kl"))
    mask = torch.zeros(CLASSES, dtype=torch.bool)
    mask[1] = True
    criterion = criterion_for(f"dino({CLASSES})", torch.float32).train()
    centre = criterion.terms["dino"].center
    before = centre.clone()
    hidden = teacher.masked_fill(mask, -INF)
    hidden[0, 0, 2] = -INF  # one position alone
    for _ in range(2):
        assert torch.isfinite(criterion(student.masked_fill(mask, -INF), hidden))
    mean = teacher.mean((0, 1))
    expected = before.lerp(mean, 0.1).lerp(mean, 0.1)
    torch.testing.assert_close(centre[[0, 3, 4]], expected[[0, 3, 4]])
    assert centre[1] == before[1]
    rest = teacher[..., 2].sum() - teacher[0, 0, 2]
    moved = before[2]
    for _ in range(2):
        moved = moved.lerp((rest + moved) / 6, 0.1)
    torch.testing.assert_close(centre[2], moved)


def test_sinkhorn_balances_what_is_not_masked():
    _, teacher = inputs_for("kl")
    dino = losses.build("dino(5,centering=sinkhorn)").terms["dino"]
    mask = torch.zeros(CLASSES, dtype=torch.bool)
    mask[3] = True
    targets = dino.targets(teacher.masked_fill(mask, -INF))
    without = losses.build("dino(4,centering=sinkhorn)").terms["dino"].targets(teacher[..., ~mask])
    torch.testing.assert_close(targets[..., ~mask], without)
    assert not targets[..., mask].any()


# --- coefficients of 0 --------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """The calls of two losses, `poison` (NaN) and `explosion` (infinite)."""
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))
    found = []

    @losses.register("poison", family="paired")
    def poison(student, teacher):
        found.append("poison")
        return student.image.sum() * float("nan")

    @losses.register("explosion")
    def explosion(student, teacher):
        found.append("explosion")
        return (student.image / 0.0).square().sum()

    return found


@pytest.mark.parametrize(
    "spec", ["0*poison + 2*fd + 0.0*explosion", {"poison": 0, "fd": 2, "explosion": 0.0}], ids=str
)
def test_a_term_with_coefficient_0_is_dropped(calls, spec):
    criterion = losses.build(spec)
    student, alone = require_grad(paired(0)), require_grad(paired(0))
    total = criterion(student, paired(1))
    total.backward()
    losses.build("2*fd")(alone, paired(1)).backward()
    assert not calls
    assert torch.equal(total, 2 * losses.paired.fd(paired(0), paired(1)))
    assert torch.equal(student.image.grad, alone.image.grad)
    criterion.coefficients["poison"] = 1.0
    assert criterion(student, paired(1)).isnan()
    assert calls == ["poison"]


def test_return_terms_reports_a_term_with_coefficient_0_outside_of_the_total(calls):
    total, terms = losses.build("0*poison + fd + 0*explosion")(paired(0), paired(1), return_terms=True)
    assert list(terms) == ["poison", "fd", "explosion"]
    assert terms["poison"].isnan()
    assert terms["explosion"].isinf()
    assert torch.equal(total, terms["fd"])


@pytest.mark.parametrize("poison", [1.0, INF, float("nan")])
def test_without_any_term_the_loss_and_its_gradient_are_0(poison):
    student = paired(0)
    student.image[0, 0] = poison
    student = require_grad(student)
    total = losses.build({"fd": 0, "crd": 0.0})(student, paired(1))
    total.backward()
    assert (total.item(), total.shape, total.dtype) == (0.0, (), torch.float64)
    assert not student.image.grad.any()
