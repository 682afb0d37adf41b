"""Losses between paired image-text embeddings: those of TRACER, CLIP-KD and CaRot, and InfoNCE.

Notation: I, T [B, d] L2-normalised image and text features, s the logit scale, indices S and T the
student's and the teacher's; p = softmax over a row of the [B, B] logits s I T^t (image->text) and of
their transpose (text->image). The criterion passes features that `_prepare` has normalised, the
teacher's detached; s_S receives gradient. Over several ranks they are those of all (`gather="full"`), or the
rank's own rows with everybody's as candidates beside them ("rows").
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wmateacher import checks
from wmateacher.losses.gathering import BatchLayout, Gather, GatherMode
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


def columns(embeddings: PairedEmbeddings) -> tuple[Tensor, Tensor]:
    """The candidates of prepared embeddings, image and text [B, d]: all ranks', or just its own rows."""
    return embeddings.columns if isinstance(embeddings, _Rows) else (embeddings.image, embeddings.text)


class _Rows(PairedEmbeddings):
    """The rows that this rank answers for, and all ranks' beside them."""

    ranks: BatchLayout
    columns: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, embeddings: PairedEmbeddings, ranks: BatchLayout) -> _Rows:
        rows = cls(*embeddings)
        image, text = ranks.gather_columns(torch.cat(embeddings[:2], -1)).chunk(2, -1)
        rows.ranks, rows.columns = ranks, (image, text)
        return rows

    def _replace(self, **changes: Any) -> _Rows:
        changed = super()._replace(**changes)
        changed.ranks, changed.columns = self.ranks, self.columns
        return changed


def info_nce(
    image: Tensor, text: Tensor, logit_scale: Tensor, *, gather: Gather = "full", group: Any = None
) -> Tensor:
    """CLIP's symmetric InfoNCE, 1/2 (CE(s I T^t) + CE(s T I^t)) with the diagonal as labels.

    Radford et al. 2021, figure 3; the contrastive part of TRACER's L_MMCL. Features are normalised
    here and logits computed in float32 (float64 stays), also under autocast.

    Args:
        image: [B, d], raw or normalised.
        text: [B, d], raw or normalised.
        logit_scale: 0-d, the multiplier itself.
        gather: Over the ranks of a process group, as in `wmateacher.losses.build`.
        group: As there.

    Returns:
        0-d, the mean over the batch.

    Raises:
        TypeError: An argument is not a floating-point tensor.
        ValueError: Shapes that do not fit, an empty batch, or `gather` is none of the three.
    """
    across = GatherMode(gather, group)
    with full_precision(image):
        embeddings = _normalised(_checked("info_nce", PairedEmbeddings(image, text, logit_scale)))
        spread, _, ranks = _spread(embeddings, None, across)
        loss = _info_nce(spread)
        return loss if ranks is None else ranks.mean(loss[None])[0]


def _info_nce(embeddings: PairedEmbeddings) -> Tensor:
    return _pairs_cross_entropy(embeddings, _logits(embeddings, embeddings))


def _pairs_cross_entropy(rows: PairedEmbeddings, logits: tuple[Tensor, Tensor]) -> Tensor:
    """Half of both directions' cross-entropy where the right answer is the own pair."""
    first = rows.ranks.first if isinstance(rows, _Rows) else 0
    return (diagonal_cross_entropy(logits[0], first) + diagonal_cross_entropy(logits[1], first)) / 2


def _logits(rows: PairedEmbeddings, candidates: PairedEmbeddings) -> tuple[Tensor, Tensor]:
    """Image->text and text->image logits, [rows, columns], of one side's rows and a side's candidates."""
    image, text = columns(candidates)
    image_to_text = similarity_logits(rows.image, text, rows.logit_scale)
    if candidates is rows and not isinstance(rows, _Rows):
        return image_to_text, image_to_text.mT
    return image_to_text, similarity_logits(rows.text, image, rows.logit_scale)


def _both_ways(
    measure: Callable[[Tensor, Tensor], Tensor], student: PairedEmbeddings, teacher: PairedEmbeddings
) -> Tensor:
    """measure(image->text logits) + measure(text->image logits), each side against itself."""
    pairs = zip(_logits(student, student), _logits(teacher, teacher), strict=True)
    there, back = (measure(*logits) for logits in pairs)
    return there + back


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
    """In the working dtype of all features, rows of length 1."""
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


def _spread(student: Any, teacher: Any, across: GatherMode) -> tuple[Any, Any, BatchLayout | None]:
    """Prepared embeddings with those of other ranks; for a loss by rows, its `BatchLayout`."""
    ranks = across.ranks(student.image)
    if ranks is None:
        return student, teacher, None
    make = _Rows.of if across.gather == "rows" else _joined
    joined = (None if side is None else make(side, ranks) for side in (student, teacher))
    return *joined, (ranks if across.gather == "rows" else None)  # type: ignore[return-value]


def _joined(embeddings: PairedEmbeddings, ranks: BatchLayout) -> PairedEmbeddings:
    image, text = ranks.gather_replicated(torch.cat(embeddings[:2], -1)).chunk(2, -1)
    return PairedEmbeddings(image, text, embeddings.logit_scale)


add_family("paired", _TAKES, _prepare, _spread)


@register("fd", family="paired", by_rows=True)
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


@register("crd", family="paired", by_rows=True)
def crd(student: PairedEmbeddings, teacher: PairedEmbeddings) -> Tensor:
    """Contrastive relational distillation, 1/2 (KL(p_T || p_S) image->text + text->image).

    TRACER, term CRD, as its code has it (the paper's formula lacks the 1/2); CLIP-KD (Yang et al.
    2024), CRD. Each side at its own scale; the widths of student and teacher may differ.
    """
    return _both_ways(kl_divergence, student, teacher) / 2


@register("icl", family="paired", by_rows=True)
def icl(student: PairedEmbeddings, teacher: PairedEmbeddings) -> Tensor:
    """Interactive contrastive learning, 1/2 (CE(s_S I_S T_T^t) + CE(s_S T_S I_T^t)), labels diagonal.

    TRACER eq. 24; CLIP-KD (Yang et al. 2024), ICL. With the student as its own teacher it is InfoNCE.

    Raises:
        ValueError: The widths differ.
    """
    checks.same_shape("icl", student.image, teacher.image)
    return _pairs_cross_entropy(student, _logits(student, teacher))


@register("cross_kd", family="paired", by_rows=True)
def cross_kd(student: PairedEmbeddings, teacher: PairedEmbeddings) -> Tensor:
    """Cross-KD, 1/2 (KL(p_T || softmax(s_S I_S T_T^t)) + KL(p_T' || softmax(s_S T_S I_T^t))).

    TRACER, term Cross-KD; p_T is the teacher's image->text and p_T' its text->image distribution.

    Raises:
        ValueError: The widths differ.
    """
    checks.same_shape("cross_kd", student.image, teacher.image)
    crossed, target = _logits(student, teacher), _logits(teacher, teacher)
    return (kl_divergence(crossed[0], target[0]) + kl_divergence(crossed[1], target[1])) / 2


@register("gd", family="paired", by_rows=True)
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
    """The derivatives of the whole batch's `_info_nce` with respect to the rows' image and text."""
    image_to_text, text_to_image = _logits(embeddings, embeddings)
    images, texts = columns(embeddings)
    # The other direction's softmax runs down this one's columns: its normalisers are all rows'.
    over_texts, over_images = image_to_text.logsumexp(-1), text_to_image.logsumexp(-1)
    first = 0
    if isinstance(embeddings, _Rows):
        first = embeddings.ranks.first
        both = embeddings.ranks.gather_columns(torch.stack([over_texts, over_images], -1))
        over_texts, over_images = both.unbind(-1)
    factor = embeddings.logit_scale / (2 * len(images))

    def derivative(logits: Tensor, normalisers: Tensor, others: Tensor) -> Tensor:
        excess = logits.softmax(-1) + (logits - normalisers).exp()
        excess.diagonal(first).sub_(2)
        return factor * (excess @ others)

    return derivative(image_to_text, over_images, texts), derivative(text_to_image, over_texts, images)


@register("paired_ce", family="paired", by_rows=True)
def paired_ce(student: PairedEmbeddings, teacher: PairedEmbeddings) -> Tensor:
    """Cross-entropy distillation, -sum p_T log p_S over both directions, not halved, batch mean.

    CaRot (Oh et al. 2024), its self-distillation term. It is 2 crd plus the teacher's entropies; the
    widths of student and teacher may differ.
    """
    return _both_ways(soft_cross_entropy, student, teacher)


@register("temperature_kl", family="paired", by_rows=True)
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


@register("afd", family="paired", by_rows=True)
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
        fused = PairedEmbeddings(image, text, student.logit_scale)
        return _info_nce(_Rows.of(fused, student.ranks) if isinstance(student, _Rows) else fused)


def _fuse(fusion: nn.Linear, student: Tensor, teacher: Tensor) -> Tensor:
    both = torch.cat([student, teacher], dim=-1)
    # A criterion that was moved to half precision with the model still computes in the inputs' dtype.
    return F.normalize(F.linear(both, fusion.weight.to(both.dtype)), dim=-1)
