from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from wmateacher import losses
from wmateacher.integrations.clip import methods
from wmateacher.integrations.clip.methods import METHODS
from wmateacher.integrations.clip.model import build
from wmateacher.integrations.clip.objective import Objective, cross_frobenius, orthogonality
from wmateacher.losses import PairedEmbeddings


@pytest.fixture
def towers():
    return build("tiny-vit-16")[0]


def embeddings(seed, batch=6, width=5):
    generator = torch.Generator().manual_seed(seed)
    image, text = (torch.randn(batch, width, generator=generator) for _ in "ab")
    return PairedEmbeddings(image.requires_grad_(), text.requires_grad_(), torch.tensor(7.0))


@pytest.mark.parametrize("name", ["tiny-vit-16", "tiny-resnet-32", "tiny-conv-32"])
def test_projection_terms_are_their_formulas(name):
    towers = build(name)[0]
    v, u = (p.detach().double() for p in (towers.image_projection, towers.text_projection))
    expected = sum(float(v[i] @ u[j]) ** 2 for i in range(len(v)) for j in range(len(u))) ** 0.5
    assert cross_frobenius(towers).item() == pytest.approx(expected, rel=1e-5)
    gram = v.T @ v
    expected = float(((gram - torch.eye(len(gram))) ** 2).sum() ** 0.5)
    assert orthogonality(towers).item() == pytest.approx(expected, rel=1e-5)


def test_projection_terms_stay_in_float32_under_autocast(towers):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = cross_frobenius(towers), orthogonality(towers)
    assert [i.item() for i in inside] == [cross_frobenius(towers).item(), orthogonality(towers).item()]


def test_the_total_is_the_declared_sum(towers):
    student, teacher = embeddings(1), embeddings(2)
    method = replace(
        METHODS["tracer"], distill_weight=0.3, cross_frobenius=0.05, orthogonality=0.2, l2_sp=0.01
    )
    objective = Objective(method, towers)
    with torch.no_grad():
        for p in towers.parameters():
            p.add_(0.01)
    total, terms = objective(towers, student, teacher)
    distillation = losses.build(methods.TRACER_TERMS)(student, teacher)
    count = sum(p.numel() for p in towers.parameters() if p.ndim > 1)
    expected = (
        losses.info_nce(*student)
        + 0.05 * cross_frobenius(towers)
        + 0.2 * orthogonality(towers)
        + 0.01 / 2 * count * 0.01**2
        + 0.3 * distillation
    )
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-4)
    assert set(terms) == {
        "info_nce",
        "cross_frobenius",
        "orthogonality",
        "l2_sp",
        "fd",
        "crd",
        "icl",
        "cross_kd",
    }
    total.backward()
    assert student.image.grad is not None
    assert teacher.image.grad is None


@pytest.mark.parametrize("pulled", ["weights", "all"])
def test_an_l2_pull_takes_weights_or_all_parameters(towers, pulled):
    method, student = replace(METHODS["l2-sp"], l2_sp=2.0, l2_sp_of=pulled), embeddings(1)
    objective = Objective(method, towers)
    with torch.no_grad():
        for p in towers.parameters():
            p.add_(0.01)
    count = sum(p.numel() for p in towers.parameters() if pulled == "all" or p.ndim > 1)
    total, terms = objective(towers, student)
    torch.testing.assert_close(terms["l2_sp"], torch.tensor(1e-4 * count), rtol=1e-3, atol=0)
    torch.testing.assert_close(total, losses.info_nce(*student) + terms["l2_sp"])


def test_flyp_is_infonce_alone(towers):
    student = embeddings(1)
    total, terms = Objective(METHODS["flyp"], towers)(towers, student)
    normalised = [F.normalize(x, dim=1) for x in student[:2]]
    logits = 7 * normalised[0] @ normalised[1].T
    rows = torch.arange(6)
    expected = (F.cross_entropy(logits, rows) + F.cross_entropy(logits.T, rows)) / 2
    torch.testing.assert_close(total, expected)
    assert set(terms) == {"info_nce"}


def test_the_teachers_differ_in_their_kernel_alone():
    distilling = [
        replace(METHODS[n], name="", summary="", kernel="static") for n in ("static-sd", "ema", "tracer")
    ]
    assert distilling[0] == distilling[1] == distilling[2]
    assert METHODS["tracer"].kernel == "beta(0.5,0.5)"


def test_bad_methods_say_what_to_do(towers):
    with pytest.raises(ValueError, match="kernel='static' and distillation=None: give both or neither"):
        Objective(replace(METHODS["flyp"], kernel="static"), towers)
    with pytest.raises(ValueError, match="takes logits, CLIP gives paired embeddings: choose from afd"):
        Objective(replace(METHODS["tracer"], distillation="kl"), towers)
    with pytest.raises(ValueError, match="unknown loss 'fdd'; did you mean 'fd'"):
        Objective(replace(METHODS["tracer"], distillation="fdd"), towers)
