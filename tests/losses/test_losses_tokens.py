"""Losses of sequences: masks, the global mean, chunks, precision and memory."""

import math

import loss_oracle as oracle
import numpy as np
import pytest
import torch
from allocations import Live
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from loss_cases import LOGITS, PARAMETERS, name_of, require_grad

from wmateacher import losses
from wmateacher.losses import registry, tokens

SPECS = [spec for spec in LOGITS if losses.build(spec).takes_mask]
every_loss = pytest.mark.parametrize("spec", SPECS)
LABELS = torch.tensor([[-100, -100, 3, 1, 4, -100], [-100, 2, -100, 0, 1, 1]])
MASK = losses.token_mask(LABELS)


def logits(shape=(2, 6, 5), dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, *shape, generator=generator, dtype=torch.float64).to(dtype))


def value_and_gradient(criterion, student, teacher, **given):
    student = require_grad(student)
    loss = criterion(student, teacher, **given)
    (gradient,) = torch.autograd.grad(loss, student)
    return loss.detach(), gradient


@pytest.fixture(params=[True, False], ids=["host", "accelerator"])
def small_chunks(request, monkeypatch):
    """Chunks of two rows of five, as computed on a CPU, or as on an accelerator."""
    for name in ("_ON_HOST", "_ON_ACCELERATOR"):
        monkeypatch.setattr(tokens, name, 14)
    monkeypatch.setattr(tokens, "_on_host", lambda tensor: request.param)
    return request.param


# --- the mask -----------------------------------------------------------------------------------------


@every_loss
def test_the_mean_runs_over_the_positions_that_count(spec, small_chunks):
    student, teacher = logits()
    kept = teacher[MASK].numpy()

    def reference(x):
        return oracle.ORACLES[name_of(spec)](x, kept, **PARAMETERS.get(spec, {}))

    loss, gradient = value_and_gradient(losses.build(spec), student, teacher, mask=MASK)
    assert loss.item() == pytest.approx(reference(student[MASK].numpy()), rel=1e-9)
    expected = oracle.gradient(reference, student[MASK].numpy())
    np.testing.assert_allclose(gradient[MASK], expected, rtol=1e-5, atol=1e-8)
    assert not gradient[~MASK].any()
    share, _ = value_and_gradient(losses.build(spec), student, teacher, mask=MASK, num_items=20)
    assert share.item() == pytest.approx(loss.item() * int(MASK.sum()) / 20)


@pytest.mark.parametrize("given", [{}, {"num_items": torch.tensor(7)}], ids=["own", "given"])
def test_a_masked_mean_in_float64_has_its_precision(given):
    student, teacher = logits()
    _, gradient = value_and_gradient(losses.build("kl"), student, teacher, mask=MASK, **given)
    count = given.get("num_items", MASK.sum()).item()
    expected = (student.softmax(-1) - teacher.softmax(-1)) / count
    torch.testing.assert_close(gradient[MASK], expected[MASK], rtol=1e-13, atol=1e-16)


@settings(max_examples=25, deadline=None)
@drawn(
    st.sampled_from(SPECS),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    st.integers(0, 6),
    st.sampled_from([0.0, 1e4, math.inf, -math.inf, math.nan]),
    st.integers(0, 1000),
)
def test_padding_changes_nothing_bit_for_bit(spec, dtype, pads, content, seed):
    student, teacher = logits(dtype=dtype, seed=seed)
    padding = torch.full((2, pads, 5), content, dtype=dtype)
    front = torch.full((2, 1, 5), content, dtype=dtype)
    padded = [torch.cat([front, x, padding], 1) for x in (student, teacher)]
    mask = torch.cat([MASK.new_zeros(2, 1), MASK, MASK.new_zeros(2, pads)], 1)
    criterion = losses.build(spec)
    plain, expected = value_and_gradient(criterion, student, teacher, mask=MASK)
    loss, gradient = value_and_gradient(criterion, *padded, mask=mask)
    assert torch.equal(loss, plain)
    assert torch.equal(gradient[:, 1:7], expected)
    assert not gradient[~mask].any()


@every_loss
def test_padding_changes_nothing_where_it_is_computed_and_dropped(spec, small_chunks):
    student, teacher = logits(dtype=torch.float32)
    hidden = [x.masked_fill(~MASK[..., None], math.nan) for x in (student, teacher)]
    criterion = losses.build(spec)
    for ours, plain in zip(
        value_and_gradient(criterion, *hidden, mask=MASK),
        value_and_gradient(criterion, student, teacher, mask=MASK),
        strict=True,
    ):
        assert torch.equal(ours, plain)


@every_loss
@pytest.mark.parametrize("as_tensor", [False, True])
def test_micro_batches_add_up_to_the_whole_batch(spec, as_tensor):
    student, teacher = logits((4, 6, 5))
    mask = torch.cat([torch.zeros_like(MASK[:1]), MASK, MASK[1:]])  # the first micro-batch has no answer
    count = mask.sum() if as_tensor else int(mask.sum())
    whole, expected = value_and_gradient(losses.build(spec), student, teacher, mask=mask)
    parts = [
        value_and_gradient(losses.build(spec), student[i], teacher[i], mask=mask[i], num_items=count)
        for i in (slice(0, 1), slice(1, 2), slice(2, 4))
    ]
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole)
    torch.testing.assert_close(torch.cat([gradient for _, gradient in parts]), expected)
    assert parts[0][0] == 0
    assert not parts[0][1].any()


def test_without_any_position_the_loss_and_its_gradient_are_0(small_chunks):
    student, teacher = (torch.full((2, 6, 5), math.nan) for _ in "ab")
    criterion = losses.build("kl + 2*jsd + mse(logits)")
    for given in ({}, {"num_items": 7}, {"num_items": torch.tensor(0)}):
        loss, gradient = value_and_gradient(criterion, student, teacher, mask=MASK & False, **given)
        assert loss == 0
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.uint8])
def test_a_mask_of_0_and_1_is_a_mask(dtype):
    student, teacher = logits()
    criterion = losses.build("kl")
    assert torch.equal(
        criterion(student, teacher, mask=MASK.to(dtype)), criterion(student, teacher, mask=MASK)
    )


def test_terms_and_direct_calls_take_the_mask():
    student, teacher = logits()
    total, terms = losses.build("2*kl(2.0) + ce")(student, teacher, mask=MASK, num_items=9, return_terms=True)
    assert torch.equal(terms["kl"], losses.KL(2.0)(student, teacher, mask=MASK, num_items=9))
    assert torch.equal(terms["ce"], losses.logits.ce(student, teacher, mask=MASK, num_items=9))
    torch.testing.assert_close(total, 2 * terms["kl"] + terms["ce"])


def test_a_registered_loss_may_take_the_mask(monkeypatch):
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))

    @losses.register("masked", family="logits")
    def masked(student, teacher, *, factor=1.0, mask=None, num_items=None):
        return factor * (student - teacher).abs()[mask].sum() / num_items

    @losses.register("unmasked", family="logits")
    def unmasked(student, teacher):
        assert student.dtype == torch.float32
        return student.sum()

    student, teacher = logits(dtype=torch.bfloat16)
    loss = losses.build("masked(3.0)")(student, teacher, mask=MASK, num_items=2)
    assert torch.equal(loss, 3 * (student - teacher).abs()[MASK].sum() / 2)
    assert losses.build("unmasked + kl")(student, teacher).dtype == torch.float32
    with pytest.raises(
        TypeError, match=r"mask cannot be given to unmasked; .* ce, jsd, kl, masked, mse, rev"
    ):
        losses.build("unmasked + kl")(student, teacher, mask=MASK)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"mask": MASK[:, 1:]}, ValueError, r"without the last dimension, \[2, 6\], got \[2, 5\]; give one"),
        ({"mask": MASK[..., None]}, ValueError, r"\[2, 6\], got \[2, 6, 1\]"),
        ({"mask": LABELS}, ValueError, r"0 and 1 alone, got other values.*write token_mask\(labels\)"),
        ({"mask": 0.5 * MASK}, ValueError, "0 and 1 alone, got other values"),
        ({"mask": MASK.tolist()}, TypeError, r"mask must be a boolean tensor .* got list; write torch.as_"),
        ({"num_items": 0}, ValueError, "num_items must be a finite number > 0, got 0"),
        ({"num_items": -1}, ValueError, "num_items must be a finite number > 0, got -1"),
        ({"num_items": True}, ValueError, "num_items must be a finite number > 0, got True"),
        ({"num_items": torch.ones(2)}, ValueError, r"a number or a 0-d tensor, got shape \[2\]; give"),
    ],
)
def test_masks_and_counts_are_checked(given, error, message):
    with pytest.raises(error, match=message):
        losses.build("kl")(*logits(), **given)


@pytest.mark.parametrize("spec", ["fd", "cosine", "dino(5)", "kl + dino(5)"])
def test_a_loss_without_tokens_refuses_a_mask(spec):
    with pytest.raises(TypeError, match="mask cannot be given to (fd|cosine|dino); .*select the rows"):
        losses.build(spec)(*logits(), mask=MASK)


def test_token_mask_follows_the_shift_of_causal_models():
    labels = [[-100, -100, 3, 1, 4, -100], [7, 2, -100, 0, 1, 1]]
    expected = [[0, 1, 1, 1, 0, 0], [1, 0, 1, 1, 1, 0]]
    assert losses.token_mask(torch.tensor(labels)).int().tolist() == expected
    here = [[int(label != -100) for label in row] for row in labels]
    assert losses.token_mask(torch.tensor(labels), causal=False).int().tolist() == here
    assert losses.token_mask(torch.zeros(2, 0, dtype=torch.int64)).shape == (2, 0)
    assert losses.token_mask(torch.tensor([[0, 5, 0]]), causal=False, ignore_index=0).tolist() == [
        [False, True, False]
    ]
    for wrong, error in ((labels, TypeError), (LABELS.float(), TypeError), (MASK, TypeError)):
        with pytest.raises(error, match=r"labels must be a tensor of integers \[\.\.\., S\], got"):
            losses.token_mask(wrong)
    with pytest.raises(ValueError, match="got a 0-d tensor"):
        losses.token_mask(torch.tensor(3))


# --- the formulas -------------------------------------------------------------------------------------


def test_jsd_is_symmetric_bounded_and_goes_over_into_both_divergences():
    student, teacher = (3 * x for x in logits())
    kl, reverse = (losses.build(spec)(student, teacher) for spec in ("kl", "reverse_kl"))
    jsd = {beta: losses.JSD(beta)(student, teacher) for beta in (1e-6, 0.5, 1 - 1e-6)}
    torch.testing.assert_close(jsd[0.5], losses.JSD()(teacher, student))
    assert losses.JSD()(1e3 * student, -1e3 * student).item() == pytest.approx(math.log(2))
    torch.testing.assert_close(jsd[1e-6] / 1e-6, kl, rtol=1e-3, atol=0)
    torch.testing.assert_close(jsd[1 - 1e-6] / 1e-6, reverse, rtol=1e-3, atol=0)
    torch.testing.assert_close(reverse, losses.build("kl")(teacher, student))


@pytest.mark.parametrize("name", ["kl", "reverse_kl", "jsd"])
def test_top_k_of_all_classes_is_the_whole_and_a_tail_bounds_it(name):
    student, teacher = logits()
    whole = losses.build(name)(student, teacher)
    for tail in (True, False):
        for k in (5, 99):
            torch.testing.assert_close(
                losses.build(f"{name}(top_k={k},tail={tail})")(student, teacher), whole
            )
    # Merging classes into a bucket never raises a divergence.
    assert 0 < losses.build(f"{name}(top_k=2)")(student, teacher) < whole


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("jsd(0)", r"jsd: beta must be in \(0, 1\); for its limits write kl .*or reverse_kl .*, got 0"),
        ("jsd(1)", r"jsd: beta must be in \(0, 1\); .*got 1"),
        ("reverse_kl(0)", "reverse_kl: temperature must be a finite number > 0, got 0"),
        ("kl(top_k=0)", "kl: top_k must be a whole number of at least 1, got 0"),
        ("kl(top_k=2.5)", "kl: top_k must be a whole number of at least 1, got 2.5"),
        ("kl(top_k=2,tail=1)", "kl: tail must be True or False, got 1"),
        ("jsd(top_k=2,support=both)", "unknown jsd support 'both'; .*available: student, teacher"),
    ],
)
def test_parameters_are_checked(spec, message):
    with pytest.raises(ValueError, match=message):
        losses.build(spec)


@every_loss
@pytest.mark.parametrize("side", [0, 1])
def test_a_nan_that_counts_makes_the_loss_nan(spec, side):
    pair = [x.clone() for x in logits()]
    pair[1 - side][..., 0] = -1e5  # a class without probability, which is where the other side's NaN is not
    pair[side][0, 3, 2] = math.nan
    loss, gradient = value_and_gradient(losses.build(spec), *pair)
    assert loss.isnan()
    assert gradient[0, 3].isnan().any()
    assert gradient[1].isfinite().all()


# --- chunks, precision, autograd ----------------------------------------------------------------------


@every_loss
@pytest.mark.parametrize("layout", ["sliced", "transposed", "expanded", "row", "many"])
def test_any_layout_in_any_chunks_gives_the_same(spec, layout, monkeypatch):
    student, teacher = logits((3, 7, 5), dtype=torch.float32)
    made = {
        "sliced": lambda x: x[:, 1:-1],
        "transposed": lambda x: x.transpose(0, 1),
        "expanded": lambda x: x[:1].expand(2, 7, 5),
        "row": lambda x: x[0, 0],
        "many": lambda x: x[:, :6].reshape(3, 2, 3, 5).transpose(1, 2),
    }[layout]
    mask = torch.arange(made(student)[..., 0].numel()).remainder(3).reshape(made(student).shape[:-1]) != 1
    for given in ({}, {"mask": mask}):
        plain = value_and_gradient(
            losses.build(spec), made(student).contiguous(), made(teacher).contiguous(), **given
        )
        with monkeypatch.context() as patch:
            patch.setattr(tokens, "_ON_HOST", 14)
            ours = value_and_gradient(losses.build(spec), _Leaf(student, made), made(teacher), **given)
        torch.testing.assert_close(ours, plain)


class _Leaf:
    """A layout of logits, for `require_grad`."""

    def __new__(cls, tensor, made):
        return made(tensor)


@every_loss
def test_a_scaled_gradient_in_half_precision_keeps_what_the_scale_saves(spec):
    """The gradient of one of 4,096 tokens is below float16's smallest number until a GradScaler's factor."""
    student, teacher = logits((4, 50), dtype=torch.float16, seed=3)
    gradients = []
    for dtype in (torch.float16, torch.float32):
        own = require_grad(student.to(dtype))
        loss = losses.build(spec)(own, teacher.to(dtype), num_items=10**7)
        (2.0**16 * loss).backward()
        gradients.append(own.grad)
    half, full = gradients
    assert torch.equal(half, full.half())
    if spec == "kl":
        assert half.count_nonzero() > 0.9 * half.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_graph_that_is_kept_gives_the_same_gradient_again(dtype):
    student, teacher = logits(dtype=dtype)
    student = require_grad(student)
    loss = 3 * losses.build("kl(2.0) + jsd")(student, teacher, mask=MASK)
    first, again = (torch.autograd.grad(loss, student, retain_graph=True)[0].clone() for _ in "ab")
    assert torch.equal(first, again)
    assert first.any()


def test_a_second_derivative_is_refused():
    student, teacher = logits()
    student = require_grad(student)
    loss = losses.build("kl")(student, teacher)
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once only.*write the loss with torch's functions"):
        (gradient.square().sum() + student.sum()).backward()


def test_logits_that_change_before_backward_are_noticed():
    student, teacher = logits(dtype=torch.bfloat16)
    own = require_grad(student)
    student = own * 1
    loss = losses.build("kl")(student, teacher)
    student.div_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("spec", ["kl", "jsd(0.1,2.0)", "kl(top_k=9)", "mse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_beside_the_inputs_and_the_gradient_is_that_of_a_few_chunks(spec, dtype, monkeypatch):
    rows, width = 24, 1024
    monkeypatch.setattr(tokens, "_ON_HOST", 2 * width)
    chunk = 4 * 2 * width
    student, teacher = logits((rows, width), dtype=dtype)
    student = require_grad(student)
    mask = torch.arange(rows) % 5 > 0
    for given in ({}, {"mask": mask}):
        with Live(student, teacher) as live:
            loss = losses.build(spec)(student, teacher, **given)
            torch.autograd.grad(loss, student)
        assert live.peak < student.nbytes + 10.1 * chunk
