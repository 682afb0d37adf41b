"""CLIP's two towers, built by open_clip, as one module that gives `PairedEmbeddings`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

from wmateacher.checks import nearest
from wmateacher.losses import PairedEmbeddings

Tokenizer = Callable[[Sequence[str]], Tensor]

# Small configurations of this package, next to open_clip's own under their names.
open_clip.add_model_config(Path(__file__).parent / "configs")


class Towers(nn.Module):
    """An open_clip model whose forward gives the embeddings of image-text pairs.

    Attributes:
        clip: The open_clip model.
    """

    clip: Any

    def __init__(self, clip: nn.Module):
        super().__init__()
        self.clip = clip

    def forward(self, images: Tensor, tokens: Tensor, caption: Tensor | None = None) -> PairedEmbeddings:
        """Embed a batch of pairs.

        Args:
            images: `[B, 3, H, W]`, normalised as the model expects.
            tokens: int64 `[U, L]`, each distinct caption once.
            caption: int64 `[B]`, the row of `tokens` that belongs to each image; None: row i to image i.

        Returns:
            L2-normalised features `[B, d]` of images and texts, and the logit scale, the exponential of
            the learned parameter, unclamped.
        """
        text = self.encode_text(tokens, normalize=True)
        if caption is not None:
            text = text[caption]
        return PairedEmbeddings(self.encode_image(images, normalize=True), text, self.logit_scale)

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        """Image features `[B, d]`."""
        return self.clip.encode_image(images, normalize=normalize)

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        """Text features `[U, d]`."""
        return self.clip.encode_text(tokens, normalize=normalize)

    @property
    def logit_scale(self) -> Tensor:
        """The multiplier of the cosine similarities, 0-d."""
        return self.clip.logit_scale.exp()

    @property
    def image_size(self) -> int:
        """Height and width of the images, in pixels."""
        size = self.clip.visual.image_size
        return int(size if isinstance(size, int) else size[0])

    @property
    def image_projection(self) -> Tensor:
        """The linear map from the image tower's width to the embedding, `[width, d]`.

        ViT `visual.proj`, CLIP's ResNets `visual.attnpool.c_proj`, timm towers `visual.head.proj`.

        Raises:
            ValueError: The tower ends in something else.
        """
        visual = self.clip.visual
        last, name = visual, "proj"
        if hasattr(visual, "attnpool"):
            last, name = visual.attnpool, "c_proj"
        elif hasattr(visual, "head"):
            last = visual.head
        return _projection(getattr(last, name, None), f"image tower ({type(visual).__name__})")

    @property
    def text_projection(self) -> Tensor:
        """The linear map from the text tower's width to the embedding, `[width, d]`.

        Raises:
            ValueError: The tower ends in something else.
        """
        owner = getattr(self.clip, "text", self.clip)
        found = getattr(owner, "text_projection", getattr(owner, "proj", None))
        return _projection(found, f"text tower ({type(owner).__name__})")

    def freeze_text(self) -> None:
        """Train the image tower and the logit scale only."""
        images = {id(p) for p in self.clip.visual.parameters()}
        for parameter in self.parameters():
            parameter.requires_grad_(id(parameter) in images or parameter is self.clip.logit_scale)


def _projection(found: Any, where: str) -> Tensor:
    if isinstance(found, nn.Linear):
        return found.weight.mT
    if isinstance(found, Tensor) and found.ndim == 2:
        return found
    raise ValueError(
        f"the {where} has no linear projection to regularise: set cross_frobenius and orthogonality "
        "to 0, or take a model with one"
    )


def build(
    model: str, pretrained: str | None = None, *, device: torch.device | str = "cpu"
) -> tuple[Towers, Tokenizer]:
    """Build towers and their tokenizer through open_clip.

    Args:
        model: A name that open_clip knows, or one of this package's small configurations
            (`tiny-conv-32`, `tiny-vit-16`, `tiny-resnet-32`, `light-vit-28`).
        pretrained: A tag or a checkpoint file; None: initialised at random.
        device: Where its tensors are; `"meta"`: nowhere, for their shapes.

    Raises:
        ValueError: A model or a tag that open_clip does not know.
    """
    known = open_clip.list_models()
    if model not in known and ":" not in model:
        raise ValueError(f"unknown model {model!r}; {nearest(model, known)}")
    tags = open_clip.list_pretrained_tags_by_model(model)
    if pretrained is not None and pretrained.lower() not in tags and not Path(pretrained).exists():
        raise ValueError(
            f"unknown weights {pretrained!r} for {model!r}: neither a file nor a tag; "
            f"{nearest(pretrained, tags)}"
        )
    if "init_logit_bias" in (open_clip.get_model_config(model) or {}):
        raise ValueError(
            f"model {model!r} has a logit bias (SigLIP); the contrastive objective here has none: take a "
            "CLIP model"
        )
    with _quiet_about_random_weights(pretrained is None), torch.device(device):
        try:
            clip = open_clip.create_model(
                model, pretrained=pretrained, load_weights=pretrained is not None, device=device
            )
        except (RuntimeError, UnpicklingError, KeyError, EOFError) as error:
            if pretrained is None:
                raise
            raise ValueError(
                f"cannot read weights {pretrained!r} for {model!r} ({type(error).__name__}: "
                f"{str(error).splitlines()[0] if str(error) else ''}): give a checkpoint of that model"
            ) from error
    return Towers(clip), open_clip.get_tokenizer(model)


@contextmanager
def _quiet_about_random_weights(quiet: bool) -> Iterator[None]:
    """Silence open_clip's warning that no pretrained weights were loaded, where none were asked for."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING) if quiet else before)
    try:
        yield
    finally:
        logging.disable(before)


@torch.no_grad()
def zero_shot_head(
    towers: Towers, tokenizer: Tokenizer, classes: Sequence[str], templates: Sequence[str]
) -> Tensor:
    """The linear classifier that the text tower gives: mean over templates, normalised, times the scale.

    Returns:
        `[d, classes]`; `image features @ head` are the logits.
    """
    device = next(towers.parameters()).device
    training = towers.training
    towers.eval()
    weights = open_clip.build_zero_shot_classifier(towers, tokenizer, classes, templates, device=device)
    towers.train(training)
    return weights * towers.logit_scale
