"""The loss that every method minimises: a task, terms on the weights, anchors and a distillation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wmateacher import losses
from wmateacher.integrations.clip.methods import Contexts, Method, RandomTexts, parse_guidance
from wmateacher.integrations.clip.model import (
    Classified,
    Prompts,
    Student,
    Tokenizer,
    Towers,
    towers_of,
)
from wmateacher.integrations.engine.sampling import generator
from wmateacher.losses import PairedEmbeddings

__all__ = ["Objective", "build_guide", "cross_frobenius", "orthogonality", "random_tokens", "require_prompts"]

Guide = Callable[[int], Tensor]
"""A function from a step's index to the normalised features of its texts, `[M, d]`."""

# Streams 0 and 1 of a seed draw the order of the images and the images themselves.
_TEXT_STREAM = 2


def cross_frobenius(towers: Towers) -> Tensor:
    """Return |V U^t|_F of the image and text projections V `[w_i, d]` and U `[w_t, d]`.

    TRACER's multimodal regulariser: the norm itself, not its square, as in the published code.
    """
    with torch.autocast(towers.image_projection.device.type, enabled=False):
        return torch.linalg.matrix_norm(towers.image_projection @ towers.text_projection.mT)


def orthogonality(towers: Towers) -> Tensor:
    """Return |V^t V - I|_F of the image projection V `[w, d]`, CaRot's regulariser."""
    projection = towers.image_projection
    with torch.autocast(projection.device.type, enabled=False):
        gram = projection.mT @ projection
        return torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device, dtype=gram.dtype))


class Objective(nn.Module):
    """The loss of a method.

    It holds the parameters of the method's criterion and, for an L2 pull, the weights that it pulls to. The
    terms of the criterion are in `wmateacher.losses`, such as `fd` and `crd` in `losses.paired`.

    Args:
        method: The method.
        student: The student before training.
        prompts: The texts of the task. Methods with a guidance need them.
        seed: The seed of random texts.

    Raises:
        ValueError: If the method needs prompts and gets None.
    """

    def __init__(self, method: Method, student: Student, prompts: Prompts | None = None, seed: int = 0):
        super().__init__()
        self.method = method
        self.criterion = None if method.distillation is None else losses.build(method.distillation)
        self._guide = None
        if method.guidance is not None:
            prompts = require_prompts(prompts, method.name)
            self._guide = build_guide(method.guidance, towers_of(student), prompts, seed)
        # Not buffers: checkpoints need not hold them, since the pretrained weights are always at hand.
        self._start = {
            name: p.detach().clone()
            for name, p in student.named_parameters()
            if method.l2_sp and p.requires_grad and (p.ndim > 1 or method.l2_sp_of == "all")
        }

    def forward(
        self,
        student: Student,
        answers: PairedEmbeddings | Classified,
        targets: PairedEmbeddings | Classified | None = None,
        *,
        labels: Tensor | None = None,
        anchors: PairedEmbeddings | None = None,
        step: int = 0,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, and every term before its coefficient, detached.

        Args:
            student: The model itself, for the terms on its weights.
            answers: The student's output for the batch.
            targets: The teacher's output for the batch, or None if the step has no distillation.
            labels: Class indices for a linear head, int64 `[B]`.
            anchors: The student's output for the anchor pairs.
            step: The index of the optimizer step, which seeds random texts.
        """
        method, towers = self.method, towers_of(student)
        if isinstance(answers, Classified):
            if labels is None:
                raise ValueError(
                    f"method {method.name!r} has a linear head and needs labels, the data has captions "
                    "only: choose a method with head='text'"
                )
            weighted = [("cross_entropy", 1.0, F.cross_entropy(answers.logits, labels))]
        else:
            weighted = [("info_nce", 1.0, losses.info_nce(*answers))]
        if method.cross_frobenius:
            weighted.append(("cross_frobenius", method.cross_frobenius, cross_frobenius(towers)))
        if method.orthogonality:
            weighted.append(("orthogonality", method.orthogonality, orthogonality(towers)))
        if method.l2_sp:
            now = dict(student.named_parameters())
            moved = torch._foreach_sub([now[name] for name in self._start], list(self._start.values()))
            distance = torch.stack([m.square().sum() for m in moved]).sum()
            weighted.append(("l2_sp", method.l2_sp / 2, distance))
        if anchors is not None:
            weighted.append(("anchors", method.anchors, losses.info_nce(*anchors)))
        terms = {name: value.detach() for name, _, value in weighted}
        if self.criterion is not None and step >= method.distill_from_step:
            pair = self._comparable(towers, answers, targets, step)
            distillation, parts = self.criterion(*pair, return_terms=True)
            weighted.append(("distillation", method.distill_weight, distillation))
            terms |= parts
        total = torch.stack([coefficient * value for _, coefficient, value in weighted]).sum()
        return total, terms

    def _comparable(
        self, towers: Towers, answers: object, targets: object, step: int
    ) -> tuple[object, object]:
        """Return the criterion's inputs for student and teacher: paired embeddings or logits."""
        if not (isinstance(answers, Classified) and isinstance(targets, Classified)):
            return answers, targets
        if self._guide is None:
            return answers.logits, targets.logits
        with torch.autocast(answers.logits.device.type, enabled=False):
            texts = towers.logit_scale * self._guide(step).to(answers.logits.dtype).mT
            student, teacher = (side.image.to(texts.dtype) @ texts for side in (answers, targets))
            return student, teacher


def require_prompts(prompts: Prompts | None, method: str) -> Prompts:
    """Return the prompts that a method needs.

    Raises:
        ValueError: If `prompts` is None.
    """
    if prompts is None:
        raise ValueError(
            f"method {method!r} needs the task's classes and templates: pass prompts=Prompts(...)"
        )
    return prompts


# --- guidance: texts that image features are compared on --------------------------------------------


def build_guide(guidance: str, towers: Towers, prompts: Prompts, seed: int) -> Guide:
    """Return the function that embeds the texts of each step.

    Args:
        guidance: A spec of `methods.parse_guidance`.
        towers: The pretrained towers, whose text tower must stay frozen.
        prompts: The texts of the task.
        seed: The seed of random texts.

    Raises:
        ValueError: If the spec is wrong, or the tokenizer cannot make random texts of that length.
    """
    texts = parse_guidance(guidance)
    if isinstance(texts, Contexts):
        contexts = F.normalize(prompts.embed(towers).mean(0), dim=-1)
        return lambda step: contexts
    _check_tokenizer(prompts.tokenizer, texts)

    @torch.no_grad()
    def embed(step: int) -> Tensor:
        tokens = random_tokens(prompts.tokenizer, texts, seed, step)
        return towers.encode_text(tokens.to(towers.logit_scale.device), normalize=True)

    return embed


def random_tokens(tokenizer: Tokenizer, texts: RandomTexts, seed: int, step: int) -> Tensor:
    """Return the texts of one step: start token, random ids below it, end token, zeros.

    Returns:
        int64 `[count, context length]`.
    """
    start, end = tokenizer.sot_token_id, tokenizer.eot_token_id  # type: ignore[attr-defined]
    tokens = torch.zeros(texts.count, tokenizer.context_length, dtype=torch.int64)  # type: ignore[attr-defined]
    tokens[:, 0], tokens[:, texts.length + 1] = start, end
    tokens[:, 1 : texts.length + 1] = torch.randint(
        start, (texts.count, texts.length), generator=generator(seed, _TEXT_STREAM, step)
    )
    return tokens


def _check_tokenizer(tokenizer: Tokenizer, texts: RandomTexts) -> None:
    if not all(hasattr(tokenizer, name) for name in ("sot_token_id", "eot_token_id", "context_length")):
        raise ValueError(
            f"random_texts needs a tokenizer with sot_token_id, eot_token_id and context_length, got "
            f"{type(tokenizer).__name__}: choose a model with CLIP's own"
        )
    room = tokenizer.context_length - 2  # type: ignore[attr-defined]
    if texts.length > room:
        raise ValueError(f"random_texts: length must be at most {room} for this model, got {texts.length}")
