"""CLIP's two towers, built by open_clip, and the heads that classify on top of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
from open_clip.pretrained import get_pretrained_cfg
from timm.models import register_model
from torch import Tensor, nn

from wmateacher.checks import lookup, nearest
from wmateacher.losses import PairedEmbeddings

__all__ = [
    "Classified",
    "Classifier",
    "Prompts",
    "Student",
    "Tokenizer",
    "Towers",
    "build",
    "evaluation_view",
    "head_of",
    "towers_of",
    "zero_shot_head",
]

Tokenizer = Callable[[Sequence[str]], Tensor]


class SmallConv(nn.Module):
    """Five convolutions of 3 x 3 with batch normalisation, four of them pooled, then the mean over places.

    It learns pictograms in fewer steps than timm's small networks, and has what open_clip asks of them. It
    computes in the memory format `channels_last`, which is faster.

    Args:
        widths: The numbers of channels. The first convolution has stride 2.
    """

    def __init__(self, widths: Sequence[int] = (16, 32, 64, 128, 256)):
        super().__init__()
        layers: list[nn.Module] = []
        for i, (before, width) in enumerate(zip((3, *widths), widths, strict=False)):
            layers += [
                nn.Conv2d(before, width, 3, stride=1 if i else 2, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
            ]
            layers += [nn.MaxPool2d(2)] if i else []
        self.layers = nn.Sequential(*layers).to(memory_format=torch.channels_last)
        self.num_features = widths[-1]
        self.default_cfg: dict[str, Any] = {}

    def forward(self, images: Tensor) -> Tensor:
        """Return features, `[B, width]`."""
        return self.layers(images.contiguous(memory_format=torch.channels_last)).mean((2, 3))

    def reset_classifier(self, *args: Any, **options: Any) -> None:
        """Do nothing: there is no classifier."""


@register_model
def small_conv(pretrained: bool = False, **options: Any) -> SmallConv:
    """Return a `SmallConv`, for timm's registry."""
    return SmallConv()


# This package's small configurations join open_clip's own, under their file names.
open_clip.add_model_config(Path(__file__).parent / "configs")


# --- towers ---------------------------------------------------------------------------------------


class Towers(nn.Module):
    """An open_clip model whose forward returns the embeddings of image-text pairs.

    Args:
        clip: The open_clip model.
        config: The configuration that open_clip built it from. Saving it as a model folder needs it.

    Attributes:
        clip: The open_clip model.
        config: Its configuration.
    """

    clip: Any

    def __init__(self, clip: nn.Module, config: Mapping[str, Any] | None = None):
        super().__init__()
        self.clip, self.config = clip, config

    def forward(self, images: Tensor, tokens: Tensor, caption: Tensor | None = None) -> PairedEmbeddings:
        """Embed a batch of pairs.

        Args:
            images: Normalised images, `[B, 3, H, W]`.
            tokens: Each distinct caption once, int64 `[U, L]`.
            caption: The row of `tokens` that belongs to each image, int64 `[B]`. By default row i belongs to
                image i.

        Returns:
            L2-normalised features of images and texts, `[B, d]` each, and the logit scale: the exponential
            of the learned parameter, unclamped.
        """
        text = self.encode_text(tokens, normalize=True)
        if caption is not None:
            text = text[caption]
        return PairedEmbeddings(self.encode_image(images, normalize=True), text, self.logit_scale)

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        """Return image features, `[B, d]`."""
        return self.clip.encode_image(images, normalize=normalize)

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        """Return text features, `[U, d]`."""
        return self.clip.encode_text(tokens, normalize=normalize)

    @property
    def logit_scale(self) -> Tensor:
        """The multiplier of the cosine similarities, 0-d."""
        return self.clip.logit_scale.exp()

    @property
    def image_size(self) -> int:
        """The height and width of the images, in pixels."""
        size = self.clip.visual.image_size
        return int(size if isinstance(size, int) else size[0])

    @property
    def width(self) -> int:
        """The width d of the embeddings."""
        device = self.clip.logit_scale.device
        with torch.no_grad():
            text = torch.zeros(1, self.clip.context_length, dtype=torch.int64, device=device)
            return int(self.encode_text(text).shape[-1])

    @property
    def image_projection(self) -> Tensor:
        """The linear map from the image tower's width to the embedding, `[width, d]`.

        It is `visual.proj` in a ViT, `visual.attnpool.c_proj` in CLIP's ResNets, and `visual.head.proj` in
        towers from timm.

        Raises:
            ValueError: If the tower ends in something else.
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
            ValueError: If the tower ends in something else.
        """
        owner = getattr(self.clip, "text", self.clip)
        found = getattr(owner, "text_projection", getattr(owner, "proj", None))
        return _projection(found, f"text tower ({type(owner).__name__})")

    def freeze_text(self) -> None:
        """Freeze everything but the image tower and the logit scale."""
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
        "to 0, or choose a model with one"
    )


def build(
    model: str, pretrained: str | None = None, *, device: torch.device | str = "cpu"
) -> tuple[Towers, Tokenizer]:
    """Build towers and their tokenizer through open_clip.

    Args:
        model: A name that open_clip knows, or one of this package's small configurations
            (`small-conv-48`, `tiny-conv-32`, `tiny-vit-16`, `tiny-resnet-32`, `light-vit-28`).
            `local-dir:DIR` and `hf-hub:NAME` name a model with its weights.
        pretrained: A tag of open_clip, a checkpoint file, or `local-dir:DIR` for the weights of such a
            folder. None initialises the towers at random, unless the model has its weights.
        device: The device of the tensors; `"meta"` gives their shapes without memory.

    Raises:
        ValueError: If open_clip does not know the model or the tag, the file is not a checkpoint of it, or
            the weights were trained with another activation or in another architecture.
        FileNotFoundError: If there is no such folder.
    """
    has_weights = ":" in model
    if not has_weights:
        lookup("model", model, dict.fromkeys(open_clip.list_models()))
    elif pretrained is not None and pretrained != model:
        raise ValueError(f"model {model!r} has its own weights, got pretrained={pretrained!r}: pass None")
    config = _config(model)
    if pretrained is not None and pretrained.startswith(_FOLDER):
        if _config(pretrained) != config:
            raise ValueError(
                f"{pretrained!r} holds weights of another architecture than {model!r}: pass it as the model "
                f"(--model {pretrained})"
            )
        model, has_weights = pretrained, True
    elif pretrained is not None:
        _check_weights(model, pretrained)
    if "init_logit_bias" in config:
        raise ValueError(
            f"model {model!r} has a logit bias (SigLIP), which the contrastive objective here lacks: choose "
            "a CLIP model"
        )
    # A model with weights of its own would otherwise start at random if they are missing.
    reads = (has_weights or pretrained is not None) and torch.device(device).type != "meta"
    with _quiet_about_random_weights(not reads), torch.device(device):
        try:
            clip = open_clip.create_model(
                model, pretrained=None if has_weights else pretrained, load_weights=reads,
                require_pretrained=reads, device=device,
            )  # fmt: skip
        except Exception as error:  # what is no checkpoint makes torch's reader raise errors of many kinds
            if not reads or isinstance(error, (OSError, ImportError, MemoryError)):
                raise
            which = f"the weights of {model!r}" if has_weights else f"weights {pretrained!r} for {model!r}"
            raise ValueError(
                f"cannot read {which} ({type(error).__name__}: "
                f"{str(error).splitlines()[0] if str(error) else ''}): give a checkpoint of that model"
            ) from error
    return Towers(clip, config), open_clip.get_tokenizer(model)


def evaluation_view(towers: Towers) -> Callable[[Any], Tensor]:
    """Return the function from a PIL image to `[3, H, W]` that belongs to the weights of the towers."""
    seen = open_clip.get_model_preprocess_cfg(towers.clip)
    how = {name: seen[name] for name in ("interpolation", "resize_mode", "fill_color") if name in seen}
    view: Callable[[Any], Tensor] = open_clip.image_transform(
        towers.image_size, is_train=False, mean=seen["mean"], std=seen["std"], **how
    )
    return view


_FOLDER = "local-dir:"


def _config(model: str) -> dict[str, Any]:
    """Return the configuration of a model that open_clip knows or finds."""
    try:
        return dict(open_clip.get_model_config(model) or {})
    except FileNotFoundError as error:
        folder = model.removeprefix(_FOLDER)
        raise FileNotFoundError(
            f"no model in {folder}: {_FOLDER}DIR needs DIR/open_clip_config.json and weights beside it"
        ) from error


def _check_weights(model: str, pretrained: str) -> None:
    """Check that a tag, or else a file, has weights for a model."""
    tags = open_clip.list_pretrained_tags_by_model(model)
    if pretrained.lower() not in tags:
        if Path(pretrained).is_file():
            return
        folder = f"; for a folder pass {_FOLDER}{pretrained}" if Path(pretrained).is_dir() else ""
        raise ValueError(
            f"unknown weights {pretrained!r} for {model!r}: neither a file nor a tag; "
            f"{nearest(pretrained, tags) if tags else 'open_clip has no weights for it'}{folder}"
        )
    trained_with = bool(get_pretrained_cfg(model, pretrained).get("quick_gelu", False))
    if trained_with != bool(_config(model).get("quick_gelu", False)):
        # open_clip only warns, and the model would be worse than its figures.
        other = f"{model}-quickgelu" if trained_with else model.removesuffix("-quickgelu")
        raise ValueError(
            f"weights {pretrained!r} were trained {'with' if trained_with else 'without'} QuickGELU, "
            f"{model!r} computes {'without' if trained_with else 'with'} it: pass --model {other}"
        )


@contextmanager
def _quiet_about_random_weights(quiet: bool) -> Iterator[None]:
    """Silence open_clip's warning that no pretrained weights were loaded when none were asked for."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING) if quiet else before)
    try:
        yield
    finally:
        logging.disable(before)


# --- heads ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompts:
    """The texts of a classification task.

    Attributes:
        classes: The class names, in the order of the labels.
        templates: Captions with one `{}` for the class name.
        tokenizer: The towers' tokenizer.
    """

    classes: Sequence[str]
    templates: Sequence[str]
    tokenizer: Tokenizer

    @torch.no_grad()
    def embed(self, towers: Towers) -> Tensor:
        """Return the normalised features of every class in every template, `[classes, templates, d]`."""
        device = towers.logit_scale.device
        return torch.stack(
            [
                towers.encode_text(
                    self.tokenizer([t.format(c) for t in self.templates]).to(device), normalize=True
                )
                for c in self.classes
            ]
        )


@torch.no_grad()
def zero_shot_head(towers: Towers, prompts: Prompts) -> Tensor:
    """Return the zero-shot head: text features averaged over templates, normalised, times the logit scale.

    Returns:
        The head, `[d, classes]`: `image features @ head` are the logits.
    """
    device = next(towers.parameters()).device
    training = towers.training
    towers.eval()
    weights = open_clip.build_zero_shot_classifier(
        towers, prompts.tokenizer, prompts.classes, prompts.templates, device=device
    )
    towers.train(training)
    return weights * towers.logit_scale


class Classified(NamedTuple):
    """The output of a `Classifier` for a batch of images.

    Attributes:
        image: L2-normalised image features, `[B, d]`.
        logits: Class logits, `[B, classes]`.
    """

    image: Tensor
    logits: Tensor


class Classifier(nn.Module):
    """An image tower under a linear head that starts as the zero-shot head, logit scale included.

    The text tower and the logit scale are frozen. The head has no bias, so that it is a matrix like the
    zero-shot head; Lipsum-FT's code has none either, WiSE-FT's adds one.

    Args:
        towers: The pretrained towers.
        prompts: The texts of the zero-shot head.
        scale_outside: Whether the logit scale multiplies the output of the trained matrix, as in Lipsum-FT's
            code, instead of being part of it, as in WiSE-FT's.

    Attributes:
        towers: The towers.
        weight: The trained matrix, `[d, classes]`: the head, or the head over the logit scale.
    """

    def __init__(self, towers: Towers, prompts: Prompts, scale_outside: bool = False):
        super().__init__()
        self.towers, self.scale_outside = towers, scale_outside
        head = zero_shot_head(towers, prompts)
        self.weight = nn.Parameter(head / towers.logit_scale.detach() if scale_outside else head)
        images = {id(p) for p in towers.clip.visual.parameters()}
        for parameter in towers.parameters():
            parameter.requires_grad_(parameter.requires_grad and id(parameter) in images)

    def forward(self, images: Tensor, *texts: Any) -> Classified:
        """Return features and logits of images `[B, 3, H, W]`; texts are ignored."""
        features = self.towers.encode_image(images, normalize=True)
        with torch.autocast(images.device.type, enabled=False):
            logits = features.to(self.weight.dtype) @ self.weight
            return Classified(features, logits * self.towers.logit_scale if self.scale_outside else logits)

    @property
    def head(self) -> Tensor:
        """The matrix `[d, classes]` that maps image features to logits."""
        return self.weight * self.towers.logit_scale if self.scale_outside else self.weight

    def set_probing(self, probing: bool) -> None:
        """Train the head alone on the tower in eval mode, or train both."""
        for parameter in self.towers.clip.visual.parameters():
            parameter.requires_grad_(not probing)
        self.train()
        self.towers.train(not probing)


Student = Towers | Classifier
"""A model that is fine-tuned."""


def towers_of(student: Student) -> Towers:
    """Return the towers of a student."""
    return student.towers if isinstance(student, Classifier) else student


def head_of(student: Student, prompts: Prompts) -> Tensor:
    """Return the head of a student, `[d, classes]`: the trained one, or the zero-shot head of its towers."""
    return student.head.detach() if isinstance(student, Classifier) else zero_shot_head(student, prompts)
