"""What a loss compares in the outputs of a transformers model, and which positions of it count."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss, ForSequenceClassificationLoss
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from wmateacher.losses import PairedEmbeddings, token_mask

__all__ = ["Comparison", "align", "check_view", "is_causal", "read"]

Kind = Literal["classes", "values", "labels", "paired"]

# Language models whose labels are not shifted: decoders of encoder-decoder models, and older ones.
_NOT_SHIFTED = {
    "BartForCausalLM", "BigBirdPegasusForCausalLM", "BlenderbotForCausalLM", "BlenderbotSmallForCausalLM",
    "CpmAntForCausalLM", "FlaubertWithLMHeadModel", "MBartForCausalLM", "MarianForCausalLM",
    "MusicgenForCausalLM", "MusicgenMelodyForCausalLM", "MvpForCausalLM", "PLBartForCausalLM",
    "PegasusForCausalLM", "TrOCRForCausalLM", "WhisperForCausalLM", "XLMWithLMHeadModel", "XLNetLMHeadModel",
}  # fmt: skip
_SHIFTED = {
    name
    for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    for name in ([names] if isinstance(names, str) else names)
} - _NOT_SHIFTED
_OVERRIDE = "override outputs_to_compare to choose what to compare, or pass distillation=None"


@dataclass(frozen=True)
class Comparison:
    """What a distillation loss compares in the outputs for one batch.

    Attributes:
        values: Logits `[..., C]`, or the `PairedEmbeddings` of an image-text model.
        mask: Which positions `[...]` count, as a boolean tensor; None for all of them.
        labels: The label of each position, by which two views of a batch are aligned; None without labels.
        kind: "classes" for logits of a softmax, "labels" for pairs of logits of a yes and a no, "values" for
            a regression `[..., 1]`, "paired" for embeddings.
    """

    values: Tensor | PairedEmbeddings
    mask: Tensor | None = None
    labels: Tensor | None = None
    kind: Kind = "classes"


def is_causal(model: nn.Module) -> bool:
    """Return whether position i of a model's logits predicts label i + 1."""
    of_peft: Any = getattr(model, "get_base_model", None)
    base = of_peft() if callable(of_peft) else model
    names = {c.__name__ for c in type(base).__mro__}
    if getattr(getattr(base, "config", None), "is_encoder_decoder", False) or names & _NOT_SHIFTED:
        return False
    shifts = LOSS_MAPPING.get(getattr(base, "loss_type", None)) is ForCausalLMLoss  # type: ignore[arg-type]
    return shifts or bool(names & _SHIFTED)


def read(model: nn.Module, outputs: Any, inputs: Mapping[str, Any]) -> Comparison:
    """Return what to compare in a model's outputs.

    Args:
        model: The model, without wrappers.
        outputs: Its outputs, a mapping, or a tuple of the loss and the logits.
        inputs: Its inputs, whose labels and attention mask say which positions count.

    Raises:
        ValueError: If the outputs have neither logits nor paired embeddings, or have others besides, or the
            labels do not fit them.
    """
    found = outputs if isinstance(outputs, Mapping) else _named(outputs)
    found = {k: v for k, v in found.items() if v is not None}
    if {"image_embeds", "text_embeds", "logits_per_image"} <= found.keys():
        return Comparison(_paired(model, found), kind="paired")
    heads = [k for k in found if _is_head(k)]
    if heads == ["start_logits", "end_logits"]:
        return _span(found["start_logits"], found["end_logits"], inputs)
    if heads != ["logits"] or not isinstance(found["logits"], Tensor):
        raise ValueError(
            f"cannot tell which outputs of {type(model).__name__} to compare, among "
            f"{', '.join(found) or 'none'}: distillation compares one tensor of logits, or image_embeds and "
            f"text_embeds; {_OVERRIDE}"
        )
    return _logits(model, found["logits"], inputs)


def _named(outputs: Any) -> dict[str, Any]:
    if not isinstance(outputs, tuple | list) or len(outputs) < 2:
        raise ValueError(
            f"the model returned a {type(outputs).__name__}, not the loss and the logits; {_OVERRIDE}"
        )
    return {"loss": outputs[0], "logits": outputs[1]}


def _is_head(key: str) -> bool:
    """Return whether an output is a prediction that the model's loss trains."""
    return (key.endswith("logits") and not key.endswith("router_logits")) or key.startswith("pred_")


def _paired(model: nn.Module, outputs: Mapping[str, Any]) -> PairedEmbeddings:
    scale = getattr(model, "logit_scale", None)
    if not isinstance(scale, Tensor) or scale.numel() != 1:
        raise ValueError(
            f"{type(model).__name__} has no logit_scale for its image and text embeddings; {_OVERRIDE}"
        )
    return PairedEmbeddings(outputs["image_embeds"], outputs["text_embeds"], scale.exp().reshape(()))


def _span(start: Tensor, end: Tensor, inputs: Mapping[str, Any]) -> Comparison:
    """Return the distributions of a span's ends over the real tokens of a sequence."""
    values = torch.stack([start, end], 1)
    real = inputs.get("attention_mask")
    if isinstance(real, Tensor) and real.shape == start.shape:
        values = values.masked_fill(~real.bool()[:, None], -torch.inf)
    return Comparison(values)


def _logits(model: nn.Module, logits: Tensor, inputs: Mapping[str, Any]) -> Comparison:
    labels, leading = inputs.get("labels"), logits.shape[:-1]
    floating = isinstance(labels, Tensor) and (labels.is_floating_point() or labels.dtype == torch.bool)
    problem = _problem(model, logits, floating)
    if problem == "multi_label_classification":
        if isinstance(labels, Tensor) and labels.shape != logits.shape:
            raise _misfit(labels, logits)
        # The softmax of a logit and 0 is its sigmoid.
        return Comparison(torch.stack([logits, torch.zeros_like(logits)], -1), kind="labels")
    if problem == "regression":
        if len(leading) > 1:
            return Comparison(logits, _real(inputs, logits, causal=False), kind="values")
        return Comparison(logits.reshape(-1, logits.shape[-1], 1), kind="values")
    shifted = inputs.get("shift_labels")
    if isinstance(shifted, Tensor) and shifted.shape == leading:
        return Comparison(logits, shifted != -100, shifted)
    causal = is_causal(model)
    if isinstance(labels, Tensor) and not floating and labels.shape in (leading, (*leading, 1)):
        labels = labels.reshape(leading)
        targets = torch.nn.functional.pad(labels[..., 1:], (0, 1), value=-100) if causal else labels
        return Comparison(logits, token_mask(labels, causal=causal), targets)
    if labels is not None:
        raise _misfit(labels, logits)
    return Comparison(logits, None if len(leading) == 1 else _real(inputs, logits, causal))


def _problem(model: nn.Module, logits: Tensor, floating: bool) -> str | None:
    """Return the problem type of a classifier: the configuration's, or the one that its loss would choose."""
    problem = getattr(getattr(model, "config", None), "problem_type", None)
    if problem is not None:
        return str(problem)
    if logits.shape[-1] == 1:
        return "regression"
    loss = LOSS_MAPPING.get(getattr(model, "loss_type", None))  # type: ignore[arg-type]
    return "multi_label_classification" if floating and loss is ForSequenceClassificationLoss else None


def _real(inputs: Mapping[str, Any], logits: Tensor, causal: bool) -> Tensor:
    """Return which positions of a batch without labels count: those of real tokens."""
    real, leading = inputs.get("attention_mask"), logits.shape[:-1]
    if not isinstance(real, Tensor) or real.shape != leading:
        raise ValueError(
            f"cannot tell which positions of the logits {list(logits.shape)} count without labels or an "
            f"attention_mask of shape {list(leading)}; {_OVERRIDE}"
        )
    return token_mask(real.long() - 1, causal=causal, ignore_index=-1)


def _misfit(labels: Any, logits: Tensor) -> ValueError:
    given = type(labels).__name__
    if isinstance(labels, Tensor):
        given = f"shape {list(labels.shape)}, {labels.dtype}"
    return ValueError(
        f"the labels ({given}) do not say which positions of the logits {list(logits.shape)} count: there is "
        f"no label for each position; {_OVERRIDE}"
    )


def check_view(model: nn.Module, own: Mapping[str, Any], view: Any) -> None:
    """Check that the labels of the teacher's view of a batch say where its answers are.

    Args:
        model: The model.
        own: The model's inputs.
        view: The teacher's inputs.

    Raises:
        TypeError: If the view is not a mapping.
        ValueError: If the view of a causal model has other tokens where the model's labels mark an answer,
            and no labels of its own.
    """
    if not isinstance(view, Mapping):
        raise TypeError(
            f"teacher_inputs must return the teacher's inputs by name, got {type(view).__name__}: return the "
            "batch with what is different for the teacher, such as {**inputs, 'input_ids': ...}"
        )
    labels, tokens = own.get("labels"), view.get("input_ids")
    said = view.get("labels") is not labels or tokens is own.get("input_ids")  # where the answers are
    if labels is None or tokens is None or said or not is_causal(model):
        return
    counts = labels != -100
    if tokens.shape == labels.shape and torch.equal(tokens[counts], labels[counts]):
        return
    raise ValueError(
        "the teacher's view has other tokens than the model's labels where these mark an answer: "
        "teacher_inputs must return labels, too (or the batch have a column teacher_labels), in which the "
        "same answer is marked and all other tokens are -100"
    )


def align(student: Comparison, teacher: Comparison) -> Comparison:
    """Return the teacher's side at the student's positions, where the two saw different views of a batch.

    The answer tokens of each row, those that count, must be the same in both views.

    Raises:
        ValueError: If the views cannot be aligned.
    """
    if student.kind != teacher.kind:
        raise ValueError(
            f"the teacher's view gives {teacher.kind!r} and the student's {student.kind!r}: teacher_inputs "
            "must return inputs for the same task"
        )
    own, other = student.values, teacher.values
    if not isinstance(own, Tensor) or not isinstance(other, Tensor):
        return teacher  # the loss compares the batches' sizes
    known = student.labels is not None and teacher.labels is not None
    if own.shape == other.shape and not (known and own.ndim > 2):
        return replace(teacher, mask=student.mask)
    if not known or student.mask is None or teacher.mask is None or own.shape[-1] != other.shape[-1]:
        raise ValueError(
            f"the teacher's view gives logits {list(other.shape)} and the student's {list(own.shape)}: "
            "teacher_inputs must return labels in which the answer is marked and all other tokens are -100"
        )
    assert student.labels is not None
    assert teacher.labels is not None
    if own.shape[0] != other.shape[0]:
        raise ValueError(f"teacher_inputs must keep the batch of {own.shape[0]} rows, got {other.shape[0]}")
    numbers = student.mask.flatten(1).sum(1), teacher.mask.flatten(1).sum(1)
    for row, (ours, theirs) in enumerate(zip(*(n.tolist() for n in numbers), strict=True)):
        if ours != theirs:
            raise ValueError(
                f"row {row} of the teacher's view has {theirs} answer tokens and the student's {ours}: the "
                "labels that teacher_inputs returns must mark the same answer (was one of them truncated?)"
            )
    if not torch.equal(student.labels[student.mask], teacher.labels[teacher.mask]):
        raise ValueError(
            "the answers in the teacher's view are other tokens than the student's: the labels that "
            "teacher_inputs returns must mark the same answer"
        )
    placed = torch.zeros_like(own, dtype=other.dtype)
    placed[student.mask] = other[teacher.mask]
    return replace(teacher, values=placed, mask=student.mask, labels=student.labels)


def __dir__() -> list[str]:
    return __all__
