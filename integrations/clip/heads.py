"""What classifies: the towers' zero-shot head, or a linear one that starts as it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from wmateacher.integrations.clip.model import Tokenizer, Towers, zero_shot_head


@dataclass(frozen=True)
class Prompts:
    """The texts of a classification task.

    Attributes:
        classes: Names, in the order of the labels.
        templates: Captions with one `{}` for the name.
        tokenizer: Of the towers.
    """

    classes: Sequence[str]
    templates: Sequence[str]
    tokenizer: Tokenizer

    @torch.no_grad()
    def embedded(self, towers: Towers) -> Tensor:
        """The features of every class in every template, of length 1: `[classes, templates, d]`."""
        device = towers.logit_scale.device
        return torch.stack(
            [
                towers.encode_text(
                    self.tokenizer([t.format(c) for t in self.templates]).to(device), normalize=True
                )
                for c in self.classes
            ]
        )


class Classified(NamedTuple):
    """What a classifier gives for a batch of images.

    Attributes:
        image: `[B, d]` image features, of length 1.
        logits: `[B, classes]`.
    """

    image: Tensor
    logits: Tensor


class Classifier(nn.Module):
    """An image tower under a linear head that starts as the zero-shot one, its scale included.

    The text tower and the logit scale are kept as they are, and not trained. The head has no bias, so
    that it is a matrix like the zero-shot one; wise-ft's code adds a bias, Lipsum-FT's does not.

    Args:
        towers: As pretrained.
        prompts: Whose zero-shot head it starts as.

    Attributes:
        towers: The towers.
        weight: The head, `[d, classes]`.
    """

    def __init__(self, towers: Towers, prompts: Prompts):
        super().__init__()
        self.towers = towers
        self.weight = nn.Parameter(zero_shot(towers, prompts))
        images = {id(p) for p in towers.clip.visual.parameters()}
        for parameter in towers.parameters():
            parameter.requires_grad_(parameter.requires_grad and id(parameter) in images)

    def forward(self, images: Tensor, *texts: Any) -> Classified:
        """Features and logits of images `[B, 3, H, W]`; texts are not looked at."""
        features = self.towers.encode_image(images, normalize=True)
        with torch.autocast(images.device.type, enabled=False):
            return Classified(features, features.to(self.weight.dtype) @ self.weight)

    def probe(self, on: bool) -> None:
        """Train the head alone, the tower in eval mode, or all again."""
        for parameter in self.towers.clip.visual.parameters():
            parameter.requires_grad_(not on)
        self.train()
        self.towers.train(not on)


Student = Towers | Classifier
"""What is fine-tuned."""


def towers_of(student: Student) -> Towers:
    """The towers in it."""
    return student.towers if isinstance(student, Classifier) else student


def head_of(student: Student, prompts: Prompts) -> Tensor:
    """What classifies image features of length 1: `[d, classes]`, the zero-shot head or the trained one."""
    return student.weight.detach() if isinstance(student, Classifier) else zero_shot(student, prompts)


def zero_shot(towers: Towers, prompts: Prompts) -> Tensor:
    """The towers' zero-shot head, `[d, classes]`."""
    return zero_shot_head(towers, prompts.tokenizer, prompts.classes, prompts.templates)
