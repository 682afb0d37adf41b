"""How far the student's answers on strong views are from the target's on weak ones."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wmateacher import losses


class Agreement(NamedTuple):
    """What a consistency loss gives.

    Attributes:
        loss: Mean over all images, those left out counting 0; 0-d, with the student's gradient.
        kept: Share of the images that count, 0-d.
        target: The target's probabilities, `[B, C]`.
    """

    loss: Tensor
    kept: Tensor
    target: Tensor


class Consistency(nn.Module):
    """The registry's `mse` or `kl`, or cross-entropy against pseudo-labels, over confident images.

    Args:
        kind: One of `methods.CONSISTENCIES`.
        confidence: Images on which the target's largest probability is below it count 0, as in FixMatch;
            None: all count.
    """

    def __init__(self, kind: str, confidence: float | None = None):
        super().__init__()
        self.confidence = confidence
        self.criterion = None if kind == "pseudo" else losses.build(kind)

    def forward(self, student: Tensor, target: Tensor) -> Agreement:
        """Compare logits.

        Args:
            student: Of the strong views, `[B, C]`.
            target: Of the weak views, `[B, C]`; taken as it is, without gradient.
        """
        target = target.detach().float()
        probabilities = target.softmax(-1)
        sure, label = probabilities.max(-1)
        kept = torch.ones_like(sure) if self.confidence is None else (sure >= self.confidence).float()
        if self.criterion is None:
            each = F.cross_entropy(student.float(), label, reduction="none")
            return Agreement((kept * each).mean(), kept.mean(), probabilities)
        # Where they agree both criteria are 0, with no gradient: an image left out agrees with itself.
        student = torch.where(kept[:, None] > 0, student.float(), target)
        return Agreement(self.criterion(student, target), kept.mean(), probabilities)
