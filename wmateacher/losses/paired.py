"""Losses between paired image-text embeddings: those of TRACER, CLIP-KD and CaRot, and InfoNCE.

Notation: I, T [B, d] L2-normalised image and text features, s the logit scale, indices S and T the
student's and the teacher's; p = softmax over a row of the [B, B] logits s I T^t (image->text) and of
their transpose (text->image). The criterion passes features that `_prepare` has normalised, the
teacher's detached; s_S receives gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wmateacher.losses import checks
from wmateacher.losses.numerics import (
    diagonal_cross_entropy,
    full_precision,
    kl_divergence,
    soft_cross_entropy,
    working_dtype,
)
from wmateacher.losses.registry import add_family, register


class PairedEmbeddings(NamedTuple):
    """What a CLIP-like model gives for a batch of image-text pairs.

    Attributes:
        image: [B, d] image features. The losses normalise them, so they may be raw or normalised.
        text: [B, d] text features; row i belongs to row i of `image`.
        logit_scale: 0-d, the multiplier s of the cosine similarities itself (the exponential of the
            parameter that CLIP learns).
    """

    image: Tensor
    text: Tensor
    logit_scale: Tensor


def similarity_logits(anchors: Tensor, candidates: Tensor, logit_scale: Tensor) -> Tensor:
    """The logits s A C^t: one row of logits over the candidates for each anchor.

    Args:
        anchors: [B, d], L2-normalised.
        candidates: [N, d], L2-normalised.
        logit_scale: 0-d.

    Returns:
        [B, N].
    """
    return logit_scale * (anchors @ candidates.mT)


def info_nce(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """CLIP's symmetric InfoNCE, 1/2 (CE(s I T^t) + CE(s T I^t)) with the diagonal as labels.

    Radford et al. 2021, figure 3; the contrastive part of TRACER's L_MMCL. Features are normalised
    here and logits computed in float32 (float64 stays), also under autocast.

    Args:
        image: [B, d], raw or normalised.
        text: [B, d], raw or normalised.
        logit_scale: 0-d, the multiplier itself.

    Returns:
        0-d, the mean over the batch.

    Raises:
        TypeError: An argument is not a floating-point tensor.
        ValueError: Shapes that do not fit, or an empty batch.
    """
    embeddings = PairedEmbeddings(image, text, logit_scale)
    with full_precision(image):
        return _info_nce(_normalised(_checked("info_nce", embeddings)))


def _info_nce(embeddings: PairedEmbeddings) -> Tensor:
    return _both_ways(diagonal_cross_entropy, similarity_logits(*embeddings)) / 2


def _both_ways(measure: Callable[..., Tensor], *logits: Tensor) -> Tensor:
    """measure(image->text logits) + measure(text->image logits)."""
    return measure(*logits) + measure(*(z.mT for z in logits))


_TAKES = "PairedEmbeddings(image [B, d], text [B, d], logit_scale [])"


def _checked(who: str, embeddings: Any) -> PairedEmbeddings:
    if not isinstance(embeddings, PairedEmbeddings):
        raise TypeError(
            f"{who} must be {_TAKES}, got {type(embeddings).__name__}; wrap the model's output in "
            "wmateacher.losses.PairedEmbeddings"
        )
    for name, value in embeddings._asdict().items():
        kind = "a 0-d tensor" if name == "logit_scale" else "a tensor [B, d]"
        checks.floating_tensor(f"{who}.{name}", value, kind)
    image, text, scale = embeddings
    if image.ndim != 2 or image.shape != text.shape:
        raise ValueError(
            f"{who}.image and {who}.text must both be [B, d], got {list(image.shape)} and "
            f"{list(text.shape)}; give one text for each image"
        )
    if scale.ndim != 0:
        raise ValueError(
            f"{who}.logit_scale must be a 0-d tensor, got shape {list(scale.shape)}; pass such as "
            "model.logit_scale.exp()"
        )
    return embeddings


def _normalised(embeddings: PairedEmbeddings, *others: Tensor) -> PairedEmbeddings:
    """In the working dtype of all features, rows of length 1; a gather across ranks belongs here."""
    image, text, scale = embeddings
    dtype = working_dtype(image, text, *others)
    image, text = (F.normalize(x.to(dtype), dim=-1) for x in (image, text))
    return PairedEmbeddings(image, text, scale.to(dtype))


def _prepare(student: Any, teacher: Any) -> tuple[PairedEmbeddings, PairedEmbeddings]:
    student, teacher = _checked("student", student), _checked("teacher", teacher)
    checks.same_batch("a paired loss", student.image, teacher.image)
    return (
        _normalised(student, teacher.image, teacher.text),
        _normalised(teacher, student.image, student.text),
    )


add_family("paired", _TAKES, _prepare)


@register("fd", family="paired")
def fd(student: PairedEmbeddings, teacher: PairedEmbeddings) -> Tensor:
    """Feature distillation, mean_B |I_S - I_T|^2 + mean_B |T_S - T_T|^2.

    TRACER (Asadollahzadeh et al. 2026), term FD, in the paper's per-sample form: not divided by d.
    The authors' coefficient of 2000 on the element-wise mean is 3.90625 here at d = 512.

    Raises:
        ValueError: The widths differ.
    """
    checks.same_shape("fd", student.image, teacher.image)
    image = (student.image - teacher.image).square().sum(-1).mean()
    return image + (student.text - teacher.text).square().sum(-1).mean()


@register("crd", family="paired")
def crd(student: PairedEmbeddings, teacher: PairedEmbeddings) -> Tensor:
    """Contrastive relational distillation, 1/2 (KL(p_T || p_S) image->text + text->image).

    TRACER, term CRD, as its code has it (the paper's formula lacks the 1/2); CLIP-KD (Yang et al.
    2024), CRD. Each side at its own scale; the widths of student and teacher may differ.
    """
    return _both_ways(kl_divergence, similarity_logits(*student), similarity_logits(*teacher)) / 2


@register("icl", family="paired")
def icl(student: PairedEmbeddings, teacher: PairedEmbeddings) -> Tensor:
    """Interactive contrastive learning, 1/2 (CE(s_S I_S T_T^t) + CE(s_S T_S I_T^t)), labels diagonal.

    TRACER eq. 24; CLIP-KD (Yang et al. 2024), ICL. With the student as its own teacher it is InfoNCE.

    Raises:
        ValueError: The widths differ.
    """
    image_to_text, text_to_image = _crossed("icl", student, teacher)
    return (diagonal_cross_entropy(image_to_text) + diagonal_cross_entropy(text_to_image)) / 2


@register("cross_kd", family="paired")
def cross_kd(student: PairedEmbeddings, teacher: PairedEmbeddings) -> Tensor:
    """Cross-KD, 1/2 (KL(p_T || softmax(s_S I_S T_T^t)) + KL(p_T' || softmax(s_S T_S I_T^t))).

    TRACER, term Cross-KD; p_T is the teacher's image->text and p_T' its text->image distribution.

    Raises:
        ValueError: The widths differ.
    """
    image_to_text, text_to_image = _crossed("cross_kd", student, teacher)
    target = similarity_logits(*teacher)
    return (kl_divergence(image_to_text, target) + kl_divergence(text_to_image, target.mT)) / 2


def _crossed(loss: str, student: PairedEmbeddings, teacher: PairedEmbeddings) -> tuple[Tensor, Tensor]:
    """(s_S I_S T_T^t, s_S T_S I_T^t): the student's anchors against the teacher's candidates."""
    checks.same_shape(loss, student.image, teacher.image)
    return (
        similarity_logits(student.image, teacher.text, student.logit_scale),
        similarity_logits(student.text, teacher.image, student.logit_scale),
    )


@register("gd", family="paired")
def gd(student: PairedEmbeddings, teacher: PairedEmbeddings) -> Tensor:
    """Gradient distillation, MSE(dL_S/dI_S, dL_T/dI_T) + MSE(dL_S/dT_S, dL_T/dT_T), element-wise.

    CLIP-KD (Yang et al. 2024), GD: L is the InfoNCE loss of each side at its own scale, and its
    gradients are those with respect to the normalised features. In closed form, with the rows of
    P summing to 1,

        dL/dI = s/(2B) [(P_i2t - 1) T + (P_t2i - 1)^t T],

    and the same for T with the roles exchanged, so that the student gets second-order gradients from
    one backward pass.

    Raises:
        ValueError: The widths differ.
    """
    checks.same_shape("gd", student.image, teacher.image)
    pairs = zip(_info_nce_gradients(student), _info_nce_gradients(teacher), strict=True)
    image, text = (F.mse_loss(own, target) for own, target in pairs)
    return image + text


def _info_nce_gradients(embeddings: PairedEmbeddings) -> tuple[Tensor, Tensor]:
    """The derivatives of `_info_nce` with respect to image and text, [B, d] each."""
    image, text, scale = embeddings
    logits = similarity_logits(image, text, scale)
    excess = (
        logits.softmax(-1)
        + logits.softmax(0)
        - 2 * torch.eye(len(logits), dtype=logits.dtype, device=logits.device)
    )
    factor = scale / (2 * len(logits))
    return factor * (excess @ text), factor * (excess.mT @ image)


@register("paired_ce", family="paired")
def paired_ce(student: PairedEmbeddings, teacher: PairedEmbeddings) -> Tensor:
    """Cross-entropy distillation, -sum p_T log p_S over both directions, not halved, batch mean.

    CaRot (Oh et al. 2024), its self-distillation term. It is 2 crd plus the teacher's entropies; the
    widths of student and teacher may differ.
    """
    return _both_ways(soft_cross_entropy, similarity_logits(*student), similarity_logits(*teacher))


@register("temperature_kl", family="paired")
class TemperatureKL(nn.Module):
    """1/2 of both directions of KL(softmax(z_T / temperature) || softmax(z_S)), z the logits.

    From TRACER's registry of losses: the temperature flattens the teacher only, and there is no
    factor temperature^2. At temperature 1 it is `crd`; the widths of student and teacher may differ.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        """Set the temperature.

        Args:
            temperature: Divides the teacher's logits; 1 leaves them as they are.

        Raises:
            ValueError: It is not a finite number above 0.
        """
        super().__init__()
        self.temperature = checks.positive("temperature_kl", "temperature", temperature)

    def forward(self, student: PairedEmbeddings, teacher: PairedEmbeddings) -> Tensor:
        """The loss of two prepared `PairedEmbeddings`, 0-d."""
        return crd(student, teacher._replace(logit_scale=teacher.logit_scale / self.temperature))


@register("afd", family="paired")
class AFD(nn.Module):
    """Augmented feature distillation: InfoNCE of I = W_I [I_S, I_T] and T = W_T [T_S, T_T].

    CLIP-KD (Yang et al. 2024), AFD. The two fusions are learned with the student, so give the
    criterion's parameters to the optimizer. Fused features are normalised and compared at the
    student's scale, where CLIP-KD learns a further one. The fusions have no bias: like those of
    CLIP's own projections their outputs are normalised and compared, and an offset common to all
    samples only makes them more alike.
    """

    def __init__(self, dim: int) -> None:
        """Make the fusions, initialised as `torch.nn.Linear` does.

        Args:
            dim: The width d of student and teacher.

        Raises:
            ValueError: It is not an integer of at least 1.
        """
        super().__init__()
        self.dim = checks.width("afd", "dim", dim)
        self.image = nn.Linear(2 * self.dim, self.dim, bias=False)
        self.text = nn.Linear(2 * self.dim, self.dim, bias=False)

    def forward(self, student: PairedEmbeddings, teacher: PairedEmbeddings) -> Tensor:
        """The loss of two prepared `PairedEmbeddings`, 0-d.

        Raises:
            ValueError: A width is not `dim`.
        """
        checks.same_shape("afd", student.image, teacher.image)
        checks.last_dimension("afd", "dim", self.dim, student.image)
        image = _fuse(self.image, student.image, teacher.image)
        text = _fuse(self.text, student.text, teacher.text)
        return _info_nce(PairedEmbeddings(image, text, student.logit_scale))


def _fuse(fusion: nn.Linear, student: Tensor, teacher: Tensor) -> Tensor:
    both = torch.cat([student, teacher], dim=-1)
    # A criterion that was moved to half precision with the model still computes in the inputs' dtype.
    return F.normalize(F.linear(both, fusion.weight.to(both.dtype)), dim=-1)
