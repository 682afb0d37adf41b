"""Two towers like CLIP's, from timm and torch alone, for machines without open_clip."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wmateacher.losses import PairedEmbeddings


class Towers(nn.Module):
    """A vision transformer of timm and a causal text transformer, with linear projections.

    Args:
        image: The name of the vision transformer in timm.
        embedding: The width d of the embedding.
        width: The width of the text tower.
        layers: The number of blocks of the text tower.
        context: The number of tokens of a text.
        vocabulary: The number of tokens that there are.
        **options: Options of the vision transformer.
    """

    def __init__(
        self,
        image: str = "vit_base_patch16_clip_224",
        *,
        embedding: int = 512,
        width: int = 512,
        layers: int = 12,
        context: int = 77,
        vocabulary: int = 49408,
        **options: Any,
    ):
        import timm

        super().__init__()
        self.visual = timm.create_model(image, num_classes=0, **options)
        self.image_size = self.visual.patch_embed.img_size[0]
        self.image_projection = nn.Parameter(torch.randn(self.visual.num_features, embedding) * 0.02)
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.randn(context, width) * 0.01)
        block = nn.TransformerEncoderLayer(
            width, max(1, width // 64), 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, embedding) * 0.02)
        self.log_scale = nn.Parameter(torch.tensor(100.0).log())
        mask = nn.Transformer.generate_square_subsequent_mask(context)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, images: Tensor, tokens: Tensor, caption: Tensor | None = None) -> PairedEmbeddings:
        """Embed a batch of pairs, as the towers of the CLIP integration do."""
        text = self.encode_text(tokens, normalize=True)
        if caption is not None:
            text = text[caption]
        return PairedEmbeddings(self.encode_image(images, normalize=True), text, self.log_scale.exp())

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        """Return image features, `[B, d]`."""
        features = self.visual(images) @ self.image_projection
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        """Return the features of the last token of texts `[U, L]`, `[U, d]`."""
        states = self.blocks(self.tokens(tokens) + self.positions, mask=self.mask, is_causal=True)
        features = self.norm(states[:, -1]) @ self.text_projection
        return F.normalize(features, dim=-1) if normalize else features

    def captions(self, batch: int) -> Tensor:
        """Return random texts, `[batch, L]`."""
        return torch.randint(self.tokens.num_embeddings, (batch, len(self.positions)))
