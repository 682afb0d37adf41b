"""The loss that every method minimises: TRACER's L = L_MMCL + lambda_SD L_SD, plus an L2 pull."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wmateacher import losses
from wmateacher.integrations.clip.methods import Method
from wmateacher.integrations.clip.towers import Towers
from wmateacher.losses import LossOutput, PairedEmbeddings


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
        towers: The student as it starts.

    Raises:
        ValueError: A teacher without a distillation loss or the other way round, or a criterion that
            is not one of paired embeddings.
    """

    def __init__(self, method: Method, towers: Towers):
        super().__init__()
        if (method.kernel is None) != (method.distillation is None):
            raise ValueError(
                f"method {method.name!r} has kernel={method.kernel!r} and "
                f"distillation={method.distillation!r}: give both or neither"
            )
        self.method = method
        self.criterion = None if method.distillation is None else losses.build(method.distillation)
        if self.criterion is not None and self.criterion.family not in (None, "paired"):
            raise ValueError(
                f"distillation {method.distillation!r} takes {self.criterion.family}, CLIP gives paired "
                f"embeddings: choose from {', '.join(losses.available('paired'))}"
            )
        # Not buffers: they can always be had from the pretrained weights again.
        self._start = [p.detach().clone() for p in _trained(towers)] if method.l2_sp else []

    def forward(
        self, towers: Towers, student: PairedEmbeddings, teacher: PairedEmbeddings | None = None
    ) -> LossOutput:
        """The total, and every term before its coefficient, detached."""
        method = self.method
        weighted = [("info_nce", 1.0, losses.info_nce(*student))]
        if method.cross_frobenius:
            weighted.append(("cross_frobenius", method.cross_frobenius, cross_frobenius(towers)))
        if method.orthogonality:
            weighted.append(("orthogonality", method.orthogonality, orthogonality(towers)))
        if method.l2_sp:
            moved = torch._foreach_sub(list(_trained(towers)), self._start)
            distance = torch.stack([m.square().sum() for m in moved]).sum()
            weighted.append(("l2_sp", method.l2_sp, distance))
        terms = {name: value.detach() for name, _, value in weighted}
        if self.criterion is not None:
            distillation, parts = self.criterion(student, teacher)
            weighted.append(("distillation", method.strength, distillation))
            terms |= parts
        total = torch.stack([coefficient * value for _, coefficient, value in weighted]).sum()
        return LossOutput(total, terms)


def _trained(towers: Towers) -> list[nn.Parameter]:
    return [p for p in towers.parameters() if p.requires_grad]
