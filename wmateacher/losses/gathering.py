"""Losses of one batch whose rows are spread over several processes.

DDP and FSDP2 average gradients over the R ranks. Every rank therefore returns the loss L of all rows, with
a gradient whose average over the ranks is the gradient of L. There are two ways:

- *full*: each rank gathers all rows and computes L itself. Backward it keeps the gradient of its own rows,
  times R, and drops the others', which their own ranks compute: nothing is communicated.
- *rows*: each rank computes the part of L that has its own rows as anchors, against the candidates of all
  ranks: B_r x B logits instead of B x B. Backward the candidates' gradients are summed over the ranks.

Parameters that all ranks share (a logit scale, a learned fusion) get the right gradient in both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd.function import once_differentiable

from wmateacher import checks
from wmateacher.collectives import gather_rows, row_counts, world_size

__all__ = ["BatchLayout", "Gather", "GatherMode"]

Gather = Literal["full", "rows", "off"]


def __dir__() -> list[str]:
    return __all__


@dataclass(frozen=True)
class GatherMode:
    """Which processes' batches are treated as one, and how.

    Attributes:
        gather: "full" or "rows", as described above, or "off": each rank's batch stands alone.
        group: The `torch.distributed.ProcessGroup`; None for all processes.
    """

    gather: Gather = "full"
    group: Any = None

    def __post_init__(self) -> None:
        checks.one_of("gather mode", self.gather, ("full", "rows", "off"))

    @property
    def is_single(self) -> bool:
        """Whether this rank's batch is the whole batch."""
        return self.gather == "off" or world_size(self.group) == 1

    def layout(self, rows: Tensor) -> BatchLayout | None:
        """Return how the batch of rows `[B_r, ...]` is spread over the ranks; None if it is on this one."""
        return None if self.is_single else BatchLayout(rows, self.group)

    @torch.no_grad()
    def mean(self, rows: Tensor) -> Tensor:
        """Return the mean `[C]` over the rows `[B_r, C]` of all ranks, each row weighted equally."""
        if self.is_single:
            return rows.mean(0)
        summed = torch.cat([rows.sum(0), rows.new_tensor([len(rows)])])
        dist.all_reduce(summed, group=self.group)
        return summed[:-1] / summed[-1]

    @torch.no_grad()
    def logsumexp(self, rows: Tensor) -> Tensor:
        """Return the log-sum-exp `[C]` over the rows `[B_r, C]` of all ranks."""
        own = rows.logsumexp(0)
        if self.is_single:
            return own
        each = [torch.empty_like(own) for _ in range(world_size(self.group))]
        dist.all_gather(each, own, group=self.group)
        return torch.stack(each).logsumexp(0)


class BatchLayout:
    """How the rows of one batch are spread over the ranks of a group.

    Attributes:
        counts: The number of rows on each rank.
        first: The index of this rank's first row in the whole batch.
        total: B, the number of rows in the whole batch.
        own: The slice of this rank's rows in the whole batch.
    """

    def __init__(self, rows: Tensor, group: Any) -> None:
        """Exchange the number of rows with all ranks; the host waits for the answer.

        Args:
            rows: This rank's rows, shape `[B_r, ...]`.
            group: The process group; None for all processes.
        """
        self.group = group
        self.counts = row_counts(len(rows), rows.device, group)
        rank = dist.get_rank(group)
        self.first, self.total = sum(self.counts[:rank]), sum(self.counts)
        self.own = slice(self.first, self.first + self.counts[rank])

    def gather_replicated(self, rows: Tensor) -> Tensor:
        """Gather rows `[B_r, ...]` to `[B, ...]`, for a loss that every rank computes as a whole."""
        return _GatherReplicated.apply(rows, self)

    def gather_columns(self, rows: Tensor) -> Tensor:
        """Gather rows `[B_r, ...]` to `[B, ...]`, for a loss of which every rank computes a part."""
        return _GatherColumns.apply(rows, self)

    def mean(self, means: Tensor) -> Tensor:
        """Turn means over this rank's rows into means over all rows, shape `[n]`.

        The gradient is that of this rank's part.
        """
        part = means * (len(self.counts) * self.counts[dist.get_rank(self.group)] / self.total)
        value = part.detach().clone()
        dist.all_reduce(value, group=self.group)
        return part + (value / len(self.counts) - part.detach())


class _GatherReplicated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, layout: BatchLayout) -> Tensor:
        ctx.layout = layout
        return gather_rows(rows, layout.counts, layout.group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient[ctx.layout.own] * len(ctx.layout.counts), None


class _GatherColumns(_GatherReplicated):
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        summed = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed, group=ctx.layout.group)
        return summed[ctx.layout.own], None
