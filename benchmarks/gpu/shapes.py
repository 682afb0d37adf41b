"""Students that are nothing but parameters, in the shapes of well-known networks."""

from __future__ import annotations

import torch
from torch import nn

Shape = tuple[int, ...]


class Parameters(nn.Module):
    """Parameters of given shapes.

    Args:
        trained: The shapes of the parameters that are trained.
        frozen: The shapes of those that are not.
    """

    def __init__(self, trained: list[Shape], frozen: list[Shape] | None = None):
        super().__init__()
        self.trained = nn.ParameterList(nn.Parameter(torch.empty(shape)) for shape in trained)
        self.frozen = nn.ParameterList(
            nn.Parameter(torch.empty(shape), requires_grad=False) for shape in frozen or ()
        )


def transformer(width: int, layers: int, feedforward: int) -> list[Shape]:
    """Return the shapes of a transformer's blocks, as in CLIP: fused projections, biases, two norms."""
    block: list[Shape] = [
        (3 * width, width), (3 * width,), (width, width), (width,), (feedforward, width), (feedforward,),
        (width, feedforward), (width,), (width,), (width,), (width,), (width,),
    ]  # fmt: skip
    return block * layers


def clip(patch: int, width: int, layers: int, text_width: int, embedding: int) -> list[Shape]:
    """Return the shapes of both towers of a CLIP for images of 224 pixels."""
    tokens = (224 // patch) ** 2 + 1
    image: list[Shape] = [(width, 3, patch, patch), (width,), (tokens, width), (width, embedding)]
    text: list[Shape] = [(49408, text_width), (77, text_width), (text_width, embedding), ()]
    norms: list[Shape] = [(width,)] * 4 + [(text_width,)] * 2
    return [
        *image,
        *transformer(width, layers, 4 * width),
        *text,
        *transformer(text_width, 12, 4 * text_width),
        *norms,
    ]


def language_model(width: int = 2048, layers: int = 16, feedforward: int = 8192) -> list[Shape]:
    """Return the shapes of a Llama of 1.2 billion parameters: grouped attention, gated MLP, RMS norms."""
    keys = width // 4
    block: list[Shape] = [
        (width, width), (keys, width), (keys, width), (width, width),
        (feedforward, width), (feedforward, width), (width, feedforward), (width,), (width,),
    ]  # fmt: skip
    return [(128_256, width), *block * layers, (width,)]


def lora(width: int, layers: int, rank: int) -> Parameters:
    """Return a frozen ViT with trained adapters of its fused attention projections."""
    adapters: list[Shape] = [(rank, width), (3 * width, rank)] * layers
    return Parameters(adapters, transformer(width, layers, 4 * width))


def many(count: int) -> list[Shape]:
    """Return the shapes of `count` tensors with 50,000 elements on average."""
    return [(316, 316), (316,)] * (count // 2)
