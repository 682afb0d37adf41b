"""Micro batches for losses that see the whole batch: the memory of a part, the gradients of the whole.

Gradient caching (Gao et al. 2021, "Scaling deep contrastive learning batch size under memory limited setup"):
embed every micro batch without a graph, compute the loss of all embeddings and its gradient at them, then
embed every micro batch again with a graph and backpropagate that gradient through it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from wmateacher.integrations.clip.data.batches import Batch

__all__ = ["Cached", "embed", "split"]

Context = Callable[[], AbstractContextManager[Any]]


def split(batch: Batch, size: int) -> list[Batch]:
    """Split a batch into as few micro batches of at most `size` pairs as possible, of about equal size."""
    count = len(batch.images)
    parts = -(-count // size)
    edges = [count * i // parts for i in range(parts + 1)]
    return [batch.rows(slice(first, end)) for first, end in pairwise(edges)]


@torch.no_grad()
def embed(model: Callable[..., Any], parts: list[Batch]) -> Any:
    """Return a model's output for all micro batches, without a graph.

    The fields of the outputs are concatenated; of 0-d fields the last is returned.
    """
    outputs = [model(*part[:3]) for part in parts]
    fields = zip(*outputs, strict=True)
    return type(outputs[0])(*(torch.cat(f) if f[0].ndim else f[-1] for f in fields))


class Cached:
    """The embeddings of a batch, computed in micro batches, at which a loss can be differentiated.

    Args:
        model: A model that returns a NamedTuple of tensors for `(images, tokens, caption)`. If it is wrapped
            in DDP, the wrapper's forward is called for the last micro batch only, so that gradients are
            reduced once, with those of the other micro batches already summed.
        parts: The micro batches.
        context: A function that returns the context of a forward pass, such as autocast.

    Attributes:
        answers: The model's output for the whole batch, as leaves that accumulate gradients.
    """

    def __init__(self, model: nn.Module, parts: list[Batch], context: Context = nullcontext):
        self._model, self._parts, self._context = model, parts, context
        self._inner = model.module if isinstance(model, DistributedDataParallel) else model
        self._device = parts[0].images.device
        self._random: list[tuple[Tensor, Tensor | None]] = []
        statistics = [b.clone() for b in model.buffers()]

        def drawing(*inputs: Any) -> Any:
            self._random.append(self._random_state())
            return self._inner(*inputs)

        # A context of its own: the weights that autocast caches in a pass without graph have none.
        with context():
            found = embed(drawing, parts)
        # The second pass updates running statistics; this one must not.
        with torch.no_grad():
            for buffer, before in zip(model.buffers(), statistics, strict=True):
                buffer.copy_(before)
        self.answers = type(found)(*(t.detach().requires_grad_() for t in found))

    def backward(self) -> None:
        """Backpropagate the gradient of `answers` to the model's parameters."""
        after = self._random_state()
        first = 0
        for number, (part, state) in enumerate(zip(self._parts, self._random, strict=True)):
            last = number == len(self._parts) - 1
            # The same dropout masks as in the first pass.
            self._set_random_state(state)
            with self._context():
                given = (self._model if last else self._inner)(*part[:3])
            rows = slice(first, first + len(part.images))
            pairs = [
                (own, whole.grad[rows] if whole.ndim else whole.grad)
                for own, whole in zip(given, self.answers, strict=True)
                if own.requires_grad and whole.grad is not None and (whole.ndim or last)
            ]
            torch.autograd.backward([own for own, _ in pairs], [gradient for _, gradient in pairs])
            first = rows.stop
        self._set_random_state(after)

    def _random_state(self) -> tuple[Tensor, Tensor | None]:
        cuda = torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else None
        return torch.get_rng_state(), cuda

    def _set_random_state(self, state: tuple[Tensor, Tensor | None]) -> None:
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1], self._device)
