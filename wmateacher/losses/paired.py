"""Losses between paired image-text embeddings: those of TRACER, CLIP-KD and CaRot, and InfoNCE.

Notation: I and T `[B, d]` are L2-normalised image and text features, s is the logit scale, and the indices S
and T mean student and teacher. p = softmax over a row of the `[B, B]` logits s I T^t (image->text) or of
their transpose (text->image). The losses normalise the features, so raw ones are fine. No gradient reaches
the teacher; the student's scale receives one.

With several ranks, B is the number of rows on all of them: every rank computes with all rows
(`gather="full"`), or with its own rows against the candidates of all ranks (`gather="rows"`). A direct call
uses "full".
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wmateacher import checks
from wmateacher.losses.divergences import CrossEntropy, ForwardKL
from wmateacher.losses.gathering import BatchLayout, Gather, GatherMode
from wmateacher.losses.numerics import (
    diagonal_cross_entropy,
    full_precision,
    working_dtype,
)
from wmateacher.losses.registry import add_family, register
from wmateacher.losses.tokens import token_mean

__all__ = [
    "AFD",
    "PairedEmbeddings",
    "TemperatureKL",
    "candidates",
    "crd",
    "cross_kd",
    "fd",
    "gd",
    "icl",
    "info_nce",
    "paired_ce",
    "similarity_logits",
]


def __dir__() -> list[str]:
    return __all__


class PairedEmbeddings(NamedTuple):
    """The output of a CLIP-like model for a batch of image-text pairs.

    Attributes:
        image: The image features, shape `[B, d]`. The losses normalise them.
        text: The text features, shape `[B, d]`; row i belongs to row i of `image`.
        logit_scale: The factor s of the cosine similarities, a 0-d tensor. CLIP learns its logarithm: pass
            `model.logit_scale.exp()`.
    """

    image: Tensor
    text: Tensor
    logit_scale: Tensor


def similarity_logits(anchors: Tensor, candidates: Tensor, logit_scale: Tensor) -> Tensor:
    """Compute the logits s A C^t, a row over all candidates for each anchor.

    Args:
        anchors: The anchors, shape `[B, d]`, L2-normalised.
        candidates: The candidates, shape `[N, d]`, L2-normalised.
        logit_scale: The factor s, a 0-d tensor.

    Returns:
        The logits, shape `[B, N]`.
    """
    return logit_scale * (anchors @ candidates.mT)


def candidates(embeddings: PairedEmbeddings) -> tuple[Tensor, Tensor]:
    """Return the features that the rows are compared with, for a loss registered with `by_rows=True`.

    Args:
        embeddings: The student's or the teacher's embeddings, as a registered loss gets them.

    Returns:
        Image and text features, shape `[B, d]`: the rows of all ranks with `gather="rows"`, otherwise those
        of `embeddings` itself.
    """
    return embeddings.candidates if isinstance(embeddings, _Gathered) else (embeddings.image, embeddings.text)


class _Gathered(PairedEmbeddings):
    """Normalised embeddings together with the candidates that their rows are compared with.

    Attributes:
        candidates: Image and text features of all ranks, shape `[B, d]`.
        layout: The position of the rows among those of all ranks; None if these are all rows.
    """

    candidates: tuple[Tensor, Tensor]
    layout: BatchLayout | None

    @classmethod
    def of(cls, embeddings: PairedEmbeddings, layout: BatchLayout | None) -> _Gathered:
        """Return normalised embeddings with their candidates, which are gathered if there is a layout."""
        rows = cls(*embeddings)
        rows.layout, rows.candidates = layout, (rows.image, rows.text)
        if layout is not None:
            rows.candidates = layout.gather_columns(torch.cat(embeddings[:2], -1)).chunk(2, -1)  # type: ignore[assignment]
        return rows

    def _replace(self, **changes: Any) -> _Gathered:
        # Through `PairedEmbeddings`, because `super()._replace` returns an empty tuple under torch.compile.
        changed = _Gathered(*PairedEmbeddings(*self)._replace(**changes))
        # Other features have other candidates, which every rank gathers again.
        if changes.keys() & {"image", "text"}:
            return _Gathered.of(_normalised(PairedEmbeddings(*changed)), self.layout)
        changed.candidates, changed.layout = self.candidates, self.layout
        return changed


# --- the family -----------------------------------------------------------------------------------

_TAKES = "PairedEmbeddings(image [B, d], text [B, d], logit_scale [])"


def _checked(who: str, embeddings: Any) -> PairedEmbeddings:
    if isinstance(embeddings, _Gathered):
        return embeddings
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
            f"{who}.logit_scale must be a 0-d tensor, got shape {list(scale.shape)}; pass for "
            "example model.logit_scale.exp()"
        )
    return embeddings


def _normalised(embeddings: PairedEmbeddings, *others: Tensor) -> PairedEmbeddings:
    """Return the embeddings with rows of length 1, in the working dtype of all features."""
    if isinstance(embeddings, _Gathered):  # normalising twice would change the last bits
        return embeddings
    image, text, scale = embeddings
    dtype = working_dtype(image, text, *others)
    image, text = (F.normalize(x.to(dtype), dim=-1) for x in (image, text))
    return PairedEmbeddings(image, text, scale.to(dtype))


def _prepare(student: Any, teacher: Any) -> tuple[PairedEmbeddings, PairedEmbeddings]:
    student, teacher = _checked("student", student), _checked("teacher", teacher)
    checks.same_batch("a paired loss", student.image, teacher.image)
    if not isinstance(teacher, _Gathered):
        teacher = PairedEmbeddings(*(x.detach() for x in teacher))
    return (
        _normalised(student, teacher.image, teacher.text),
        _normalised(teacher, student.image, student.text),
    )


def _gather(
    student: PairedEmbeddings, teacher: PairedEmbeddings, gather_mode: GatherMode
) -> tuple[_Gathered, _Gathered, BatchLayout | None]:
    ready = next((side for side in (student, teacher) if isinstance(side, _Gathered)), None)
    if ready is None:
        layout = gather_mode.layout(student.image)
    else:
        # A loss is calling another one with embeddings that are gathered already. Their layout says how the
        # rows are spread. The other side, if it is not gathered yet, has to match it.
        layout, gather_mode = ready.layout, GatherMode("rows")
    student = _gathered(student, layout, gather_mode)
    return student, _gathered(teacher, layout, gather_mode), student.layout


def _gathered(embeddings: PairedEmbeddings, layout: BatchLayout | None, gather_mode: GatherMode) -> _Gathered:
    if isinstance(embeddings, _Gathered):
        return embeddings
    if layout is None or gather_mode.gather == "rows":
        return _Gathered.of(embeddings, layout)
    image, text = layout.gather_replicated(torch.cat(embeddings[:2], -1)).chunk(2, -1)
    return _Gathered.of(PairedEmbeddings(image, text, embeddings.logit_scale), None)


_family = add_family("paired", _TAKES, _prepare, _gather)


# --- the losses -----------------------------------------------------------------------------------


def info_nce(
    image: Tensor, text: Tensor, logit_scale: Tensor, *, gather: Gather = "full", group: Any = None
) -> Tensor:
    """Compute CLIP's symmetric InfoNCE, 1/2 (CE(s I T^t) + CE(s T I^t)) with the diagonal as labels.

    Radford et al. 2021, figure 3; the contrastive part of TRACER's L_MMCL. Features are normalised and
    logits computed in float32 (float64 is kept), also under autocast.

    Args:
        image: The image features, shape `[B, d]`.
        text: The text features, shape `[B, d]`.
        logit_scale: The factor s of the cosine similarities, a 0-d tensor.
        gather: The use of several ranks: "full", "rows" or "off", as in `wmateacher.losses.build`.
        group: The process group, as in `wmateacher.losses.build`.

    Returns:
        The mean over the batch, a 0-d tensor.

    Raises:
        TypeError: If an argument is not a floating-point tensor.
        ValueError: If shapes do not fit, the batch is empty, or `gather` is unknown.
    """
    gather_mode = GatherMode(gather, group)
    with full_precision(image):
        embeddings = _normalised(_checked("info_nce", PairedEmbeddings(image, text, logit_scale)))
        rows = _gathered(embeddings, gather_mode.layout(embeddings.image), gather_mode)
        loss = _info_nce(rows)
        return loss if rows.layout is None else rows.layout.mean(loss[None])[0]


def _info_nce(rows: PairedEmbeddings) -> Tensor:
    return _pairs_cross_entropy(rows, _logits(rows, rows))


def _pairs_cross_entropy(rows: PairedEmbeddings, logits: tuple[Tensor, Tensor]) -> Tensor:
    """Return half the sum of both directions' cross-entropy, with each row's own pair as its label."""
    first = _first(rows)
    return (diagonal_cross_entropy(logits[0], first) + diagonal_cross_entropy(logits[1], first)) / 2


def _layout(rows: PairedEmbeddings) -> BatchLayout | None:
    """Return the position of the rows among those of all ranks; None if these are all rows."""
    return rows.layout if isinstance(rows, _Gathered) else None


def _first(rows: PairedEmbeddings) -> int:
    """Return the index of the first row among the candidates."""
    layout = _layout(rows)
    return 0 if layout is None else layout.first


def _logits(rows: PairedEmbeddings, others: PairedEmbeddings) -> tuple[Tensor, Tensor]:
    """Return the image->text and text->image logits of the rows against the candidates of `others`."""
    images, texts = candidates(others)
    image_to_text = similarity_logits(rows.image, texts, rows.logit_scale)
    if others is rows and _layout(rows) is None:
        # One product serves both directions.
        return image_to_text, image_to_text.mT
    return image_to_text, similarity_logits(rows.text, images, rows.logit_scale)


# The mean over the rows of `[B, B]` logits, of the student and the teacher.
_kl_divergence = partial(token_mean, ForwardKL())
_soft_cross_entropy = partial(token_mean, CrossEntropy())


def _both_ways(
    measure: Callable[[Tensor, Tensor], Tensor], student: PairedEmbeddings, teacher: PairedEmbeddings
) -> Tensor:
    """Return measure(image->text logits) + measure(text->image logits), each side with its own features."""
    pairs = zip(_logits(student, student), _logits(teacher, teacher), strict=True)
    image_to_text, text_to_image = (measure(*logits) for logits in pairs)
    return image_to_text + text_to_image


@register("fd", family="paired", by_rows=True)
@_family.standalone
def fd(student: PairedEmbeddings, teacher: PairedEmbeddings) -> Tensor:
    """Compute feature distillation, mean_B |I_S - I_T|^2 + mean_B |T_S - T_T|^2.

    TRACER (Asadollahzadeh et al. 2026), term FD, in the paper's per-sample form: not divided by d.
    The authors' coefficient of 2000 on the element-wise mean is 3.90625 here at d = 512.

    Raises:
        ValueError: If the widths differ.
    """
    checks.same_shape("fd", student.image, teacher.image)
    image = (student.image - teacher.image).square().sum(-1).mean()
    return image + (student.text - teacher.text).square().sum(-1).mean()


@register("crd", family="paired", by_rows=True)
@_family.standalone
def crd(student: PairedEmbeddings, teacher: PairedEmbeddings) -> Tensor:
    """Compute contrastive relational distillation, 1/2 (KL(p_T || p_S) image->text + text->image).

    TRACER, term CRD, as in its code (the paper's formula lacks the 1/2); CLIP-KD (Yang et al. 2024), CRD.
    Each side uses its own scale; the widths of student and teacher may differ.
    """
    return _both_ways(_kl_divergence, student, teacher) / 2


@register("icl", family="paired", by_rows=True)
@_family.standalone
def icl(student: PairedEmbeddings, teacher: PairedEmbeddings) -> Tensor:
    """Compute interactive contrastive learning, 1/2 (CE(s_S I_S T_T^t) + CE(s_S T_S I_T^t)).

    The labels are the diagonal. TRACER eq. 24; CLIP-KD (Yang et al. 2024), ICL. With the student as its own
    teacher it is InfoNCE.

    Raises:
        ValueError: If the widths differ.
    """
    checks.same_shape("icl", student.image, teacher.image)
    return _pairs_cross_entropy(student, _logits(student, teacher))


@register("cross_kd", family="paired", by_rows=True)
@_family.standalone
def cross_kd(student: PairedEmbeddings, teacher: PairedEmbeddings) -> Tensor:
    """Compute Cross-KD, 1/2 (KL(p_T || softmax(s_S I_S T_T^t)) + KL(p_T' || softmax(s_S T_S I_T^t))).

    TRACER, term Cross-KD; p_T is the teacher's image->text and p_T' its text->image distribution.

    Raises:
        ValueError: If the widths differ.
    """
    checks.same_shape("cross_kd", student.image, teacher.image)
    crossed, target = _logits(student, teacher), _logits(teacher, teacher)
    return (_kl_divergence(crossed[0], target[0]) + _kl_divergence(crossed[1], target[1])) / 2


@register("gd", family="paired", by_rows=True)
@_family.standalone
def gd(student: PairedEmbeddings, teacher: PairedEmbeddings) -> Tensor:
    """Compute gradient distillation, MSE(dL_S/dI_S, dL_T/dI_T) + MSE(dL_S/dT_S, dL_T/dT_T).

    CLIP-KD (Yang et al. 2024), GD: MSE is the element-wise mean, and L is the InfoNCE loss of each side at
    its own scale, differentiated with respect to the normalised features. In closed form, with the rows of P
    summing to 1,

        dL/dI = s/(2B) [(P_i2t - 1) T + (P_t2i - 1)^t T],

    and the same for T with the roles exchanged. The closed form gives the student its second-order
    gradients in one backward pass.

    Raises:
        ValueError: If the widths differ.
    """
    checks.same_shape("gd", student.image, teacher.image)
    pairs = zip(_info_nce_gradients(student), _info_nce_gradients(teacher), strict=True)
    image, text = (F.mse_loss(own, target) for own, target in pairs)
    return image + text


def _info_nce_gradients(rows: PairedEmbeddings) -> tuple[Tensor, Tensor]:
    """Return the gradient of the whole batch's InfoNCE with respect to the rows' image and text."""
    image_to_text, text_to_image = _logits(rows, rows)
    images, texts = candidates(rows)
    # The softmax of the other direction runs down these columns, so it needs the normalisers of all rows.
    over_texts, over_images = image_to_text.logsumexp(-1), text_to_image.logsumexp(-1)
    layout = _layout(rows)
    if layout is not None:
        both = layout.gather_columns(torch.stack([over_texts, over_images], -1))
        over_texts, over_images = both.unbind(-1)
    factor = rows.logit_scale / (2 * len(images))

    def derivative(logits: Tensor, normalisers: Tensor, others: Tensor) -> Tensor:
        excess = logits.softmax(-1) + (logits - normalisers).exp()
        excess.diagonal(_first(rows)).sub_(2)  # each direction subtracts 1 at the pair's own entry
        return factor * (excess @ others)

    return derivative(image_to_text, over_images, texts), derivative(text_to_image, over_texts, images)


@register("paired_ce", family="paired", by_rows=True)
@_family.standalone
def paired_ce(student: PairedEmbeddings, teacher: PairedEmbeddings) -> Tensor:
    """Compute the cross-entropy -sum p_T log p_S of both directions, averaged over the batch.

    CaRot (Oh et al. 2024), its self-distillation term; the sum of the directions is not halved. It is 2 `crd`
    plus the teacher's entropies; the widths of student and teacher may differ.
    """
    return _both_ways(_soft_cross_entropy, student, teacher)


@register("temperature_kl", family="paired", by_rows=True)
class TemperatureKL(nn.Module):
    """`crd` with a flattened teacher, 1/2 (KL(softmax(z_T / temperature) || p_S) image->text + text->image).

    From TRACER's registry of losses; z_T are the teacher's logits. The temperature flattens the teacher only,
    and there is no factor temperature^2. At temperature 1 it is `crd`; the widths of student and teacher may
    differ.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        """Set the temperature.

        Args:
            temperature: The divisor of the teacher's logits.

        Raises:
            ValueError: If it is not a finite number above 0.
        """
        super().__init__()
        self.temperature = checks.positive("temperature_kl", "temperature", temperature)

    @_family.standalone
    def forward(self, student: PairedEmbeddings, teacher: PairedEmbeddings) -> Tensor:
        """Compute the loss of two `PairedEmbeddings`, a 0-d tensor."""
        return crd(student, teacher._replace(logit_scale=teacher.logit_scale / self.temperature))


@register("afd", family="paired", by_rows=True)
class AFD(nn.Module):
    """Augmented feature distillation, the InfoNCE of I = W_I [I_S, I_T] and T = W_T [T_S, T_T].

    CLIP-KD (Yang et al. 2024), AFD. The two fusions are learned with the student, so pass the criterion's
    parameters to the optimizer. Fused features are normalised and compared at the student's scale, where
    CLIP-KD learns another one. Like CLIP's own projections the fusions have no bias: an offset that all
    samples share only makes the normalised outputs more alike.
    """

    def __init__(self, dim: int) -> None:
        """Create the fusions, initialised as `torch.nn.Linear` does.

        Args:
            dim: The width d of student and teacher.

        Raises:
            ValueError: If it is not an integer of at least 1.
        """
        super().__init__()
        self.dim = checks.width("afd", "dim", dim)
        self.image = nn.Linear(2 * self.dim, self.dim, bias=False)
        self.text = nn.Linear(2 * self.dim, self.dim, bias=False)

    @_family.standalone
    def forward(self, student: PairedEmbeddings, teacher: PairedEmbeddings) -> Tensor:
        """Compute the loss of two `PairedEmbeddings`, a 0-d tensor.

        Raises:
            ValueError: If a width is not `dim`.
        """
        checks.same_shape("afd", student.image, teacher.image)
        checks.last_dimension("afd", "dim", self.dim, student.image)
        image = _fuse(self.image, student.image, teacher.image)
        text = _fuse(self.text, student.text, teacher.text)
        fused = PairedEmbeddings(image, text, student.logit_scale)
        return _info_nce(_Gathered.of(fused, _layout(student)))


def _fuse(fusion: nn.Linear, student: Tensor, teacher: Tensor) -> Tensor:
    both = torch.cat([student, teacher], dim=-1)
    # A criterion that was moved to half precision with the model still computes in the inputs' dtype.
    return F.normalize(F.linear(both, fusion.weight.to(both.dtype)), dim=-1)
