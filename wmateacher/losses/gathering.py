"""A batch whose rows are spread over processes, and losses of the whole of it.

DDP and FSDP2 average gradients over the R ranks. What a rank differentiates has therefore the value of
the loss L of all rows, and gradients whose average over the ranks is the gradient of L:

- *full*: every rank computes L itself. Gathering multiplies the gradient of the rank's own rows by R and
  drops the others', which their ranks compute too: nothing is communicated backward.
- *rows*: a rank computes the part of L that its own rows as anchors make, against the candidates of all
  ranks: B_r x B logits instead of B x B. Gathering sums the gradients of all ranks' parts.

Parameters that are the same on all ranks (a logit scale, a learned fusion) come out right in both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd.function import once_differentiable

from wmateacher.collectives import gather_rows, row_counts, world_size

Gather = Literal["full", "rows", "off"]


@dataclass(frozen=True)
class GatherMode:
    """Which processes' batches count as one.

    Attributes:
        gather: "full", "rows", as above, or "off": each rank's batch is one of its own.
        group: A `torch.distributed.ProcessGroup`; None: all processes.
    """

    gather: Gather = "full"
    group: Any = None

    def __post_init__(self) -> None:
        if self.gather not in ("full", "rows", "off"):
            raise ValueError(f"gather must be 'full', 'rows' or 'off', got {self.gather!r}")

    @property
    def alone(self) -> bool:
        """Whether there is nothing to gather."""
        return self.gather == "off" or world_size(self.group) == 1

    def ranks(self, rows: Tensor) -> BatchLayout | None:
        """How the batch is spread, for rows [B_r, ...]; None where there is nothing to gather."""
        return None if self.alone else BatchLayout(rows, self.group)

    @torch.no_grad()
    def mean(self, rows: Tensor) -> Tensor:
        """The mean over all ranks' rows [B_r, C], every row counting the same: [C]."""
        if self.alone:
            return rows.mean(0)
        summed = torch.cat([rows.sum(0), rows.new_tensor([len(rows)])])
        dist.all_reduce(summed, group=self.group)
        return summed[:-1] / summed[-1]

    @torch.no_grad()
    def logsumexp(self, rows: Tensor) -> Tensor:
        """Log sum exp over all ranks' rows [B_r, C]: [C]."""
        own = rows.logsumexp(0)
        if self.alone:
            return own
        each = [torch.empty_like(own) for _ in range(world_size(self.group))]
        dist.all_gather(each, own, group=self.group)
        return torch.stack(each).logsumexp(0)


class BatchLayout:
    """How the rows of one batch are spread over the ranks of a group.

    Attributes:
        counts: Rows of each rank.
        first: Where this rank's rows begin among all.
        total: B, all rows.
    """

    def __init__(self, rows: Tensor, group: Any) -> None:
        """Ask all ranks how many rows they have; the host waits for the answer."""
        self.group = group
        self.counts = row_counts(len(rows), rows.device, group)
        rank = dist.get_rank(group)
        self.first, self.total = sum(self.counts[:rank]), sum(self.counts)
        self.own = slice(self.first, self.first + self.counts[rank])

    def gather_replicated(self, rows: Tensor) -> Tensor:
        """All ranks' rows, for a loss that every rank computes as a whole: [B_r, ...] to [B, ...]."""
        return _GatherReplicated.apply(rows, self)

    def gather_columns(self, rows: Tensor) -> Tensor:
        """All ranks' rows, for a loss of which every rank computes a part: [B_r, ...] to [B, ...]."""
        return _GatherColumns.apply(rows, self)

    def mean(self, means: Tensor) -> Tensor:
        """Means over this rank's rows to means over all, with the gradient of this rank's part, [n]."""
        part = means * (len(self.counts) * self.counts[dist.get_rank(self.group)] / self.total)
        value = part.detach().clone()
        dist.all_reduce(value, group=self.group)
        return part + (value / len(self.counts) - part.detach())


class _GatherReplicated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, ranks: BatchLayout) -> Tensor:
        ctx.ranks = ranks
        return gather_rows(rows, ranks.counts, ranks.group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient[ctx.ranks.own] * len(ctx.ranks.counts), None


class _GatherColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, ranks: BatchLayout) -> Tensor:
        ctx.ranks = ranks
        return gather_rows(rows, ranks.counts, ranks.group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        summed = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed, group=ctx.ranks.group)
        return summed[ctx.ranks.own], None
