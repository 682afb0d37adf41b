"""The loss that every method minimises: a task, pulls on the weights, anchors and a distillation."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wmateacher import losses
from wmateacher.integrations.clip import guidance
from wmateacher.integrations.clip.heads import Classified, Prompts, Student, towers_of
from wmateacher.integrations.clip.methods import Method
from wmateacher.integrations.clip.model import Towers
from wmateacher.losses import PairedEmbeddings


def cross_frobenius(towers: Towers) -> Tensor:
    """|V U^t|_F of the image and text projections V `[w_i, d]` and U `[w_t, d]`; the norm, not squared.

    TRACER's multimodal regulariser, as in the published code.
    """
    with torch.autocast(towers.image_projection.device.type, enabled=False):
        return torch.linalg.matrix_norm(towers.image_projection @ towers.text_projection.mT)


def orthogonality(towers: Towers) -> Tensor:
    """|V^t V - I|_F of the image projection V `[w, d]` (CaRot), on its d x d Gram matrix."""
    projection = towers.image_projection
    with torch.autocast(projection.device.type, enabled=False):
        gram = projection.mT @ projection
        return torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device, dtype=gram.dtype))


class Objective(nn.Module):
    """A method's loss; holds the parameters of its criterion and the start of an L2 pull.

    Args:
        method: What to minimise.
        student: As it starts.
        prompts: Of the task; needed by methods with a guidance.
        seed: Of random texts.

    Raises:
        ValueError: The method needs prompts, and there are none.
    """

    def __init__(self, method: Method, student: Student, prompts: Prompts | None = None, seed: int = 0):
        super().__init__()
        self.method = method
        self.criterion = None if method.distillation is None else losses.build(method.distillation)
        self._guide = None
        if method.guidance is not None:
            self._guide = guidance.build(
                method.guidance, towers_of(student), needed(prompts, method.name), seed
            )
        # Not buffers: they can always be had from the pretrained weights again.
        self._start = [p.detach().clone() for p in _trained(student)] if method.l2_sp else []

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
        """The total, and every term before its coefficient, detached.

        Args:
            student: The model itself, for the terms on its weights.
            answers: What it gives for the batch.
            targets: What the teacher gives.
            labels: int64 `[B]`, for a linear head.
            anchors: What the student gives for the anchor pairs.
            step: Index of the optimizer step, for what is random.
        """
        method, towers = self.method, towers_of(student)
        if isinstance(answers, Classified):
            if labels is None:
                raise ValueError(
                    f"method {method.name!r} has a linear head and needs labels, the data has captions "
                    "only: take a method with head='text'"
                )
            weighted = [("cross_entropy", 1.0, F.cross_entropy(answers.logits, labels))]
        else:
            weighted = [("info_nce", 1.0, losses.info_nce(*answers))]
        if method.cross_frobenius:
            weighted.append(("cross_frobenius", method.cross_frobenius, cross_frobenius(towers)))
        if method.orthogonality:
            weighted.append(("orthogonality", method.orthogonality, orthogonality(towers)))
        if method.l2_sp:
            moved = torch._foreach_sub(list(_trained(student)), self._start)
            distance = torch.stack([m.square().sum() for m in moved]).sum()
            weighted.append(("l2_sp", method.l2_sp, distance))
        if anchors is not None:
            weighted.append(("anchors", method.anchors, losses.info_nce(*anchors)))
        terms = {name: value.detach() for name, _, value in weighted}
        if self.criterion is not None:
            pair = self._comparable(towers, answers, targets, step)
            distillation, parts = self.criterion(*pair, return_terms=True)
            weighted.append(("distillation", method.distill_weight, distillation))
            terms |= parts
        total = torch.stack([coefficient * value for _, coefficient, value in weighted]).sum()
        return total, terms

    def _comparable(
        self, towers: Towers, answers: object, targets: object, step: int
    ) -> tuple[object, object]:
        """What the criterion takes of both sides: paired embeddings, or logits."""
        if not (isinstance(answers, Classified) and isinstance(targets, Classified)):
            return answers, targets
        if self._guide is None:
            return answers.logits, targets.logits
        with torch.autocast(answers.logits.device.type, enabled=False):
            texts = towers.logit_scale * self._guide(step).to(answers.logits.dtype).mT
            student, teacher = (side.image.to(texts.dtype) @ texts for side in (answers, targets))
            return student, teacher


def needed(prompts: Prompts | None, method: str) -> Prompts:
    """The prompts, where they were given.

    Raises:
        ValueError: They were not.
    """
    if prompts is None:
        raise ValueError(
            f"method {method!r} needs the task's classes and templates: pass prompts=Prompts(...)"
        )
    return prompts


def _trained(student: Student) -> list[nn.Parameter]:
    return [p for p in student.parameters() if p.requires_grad]
