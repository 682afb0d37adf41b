"""A batch embedded in parts, for losses that see all of it: memory of a part, gradients of the whole.

Gradient caching (Gao et al. 2021, "Scaling deep contrastive learning batch size under memory limited setup"):
embed every part without a graph, take the loss of all embeddings and its gradient at them, then embed every
part again with a graph, and send that gradient through it.
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

Context = Callable[[], AbstractContextManager[Any]]


def parts_of(batch: Batch, size: int) -> list[Batch]:
    """A batch in as few parts of at most `size` pairs as can be, of about one size."""
    count = len(batch.images)
    parts = -(-count // size)
    edges = [count * i // parts for i in range(parts + 1)]
    return [batch.rows(slice(first, end)) for first, end in pairwise(edges)]


@torch.no_grad()
def embedded(model: Callable[..., Any], parts: list[Batch]) -> Any:
    """What a model gives for all parts, without a graph: each field joined, 0-d ones as they are."""
    return _joined([model(*part[:3]) for part in parts])


class Cached:
    """The embeddings of a batch, computed in parts, at which a loss can be differentiated.

    Args:
        model: Gives a NamedTuple of tensors for `(images, tokens, caption)`; may be in DDP, whose own forward
            is then called once, for the last part: gradients of the others are summed before it.
        parts: Of the batch.
        context: Makes the context of every forward, such as autocast.

    Attributes:
        answers: As the model gives for the whole batch; leaves that take gradients.
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

        with context():  # of its own: what autocast keeps of a pass without graph has none
            found = embedded(drawing, parts)
        with torch.no_grad():  # the second pass will update them
            for buffer, before in zip(model.buffers(), statistics, strict=True):
                buffer.copy_(before)
        self.answers = type(found)(*(t.detach().requires_grad_() for t in found))

    def backward(self) -> None:
        """Send the gradient that `answers` have got on to the model's parameters."""
        after = self._random_state()
        first = 0
        for number, (part, state) in enumerate(zip(self._parts, self._random, strict=True)):
            last = number == len(self._parts) - 1
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


def _joined(given: list[Any]) -> Any:
    fields = zip(*given, strict=True)
    return type(given[0])(*(torch.cat(f) if f[0].ndim else f[-1] for f in fields))
