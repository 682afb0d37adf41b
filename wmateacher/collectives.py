"""The few collectives that losses and training loops need. Without a process group they do nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

__all__ = ["gather_rows", "row_counts", "world_size"]


def world_size(group: Any = None) -> int:
    """Return the number of processes in a group, or 1 if no process group is initialised.

    Args:
        group: A `torch.distributed.ProcessGroup`; None stands for all processes.
    """
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def row_counts(rows: int, device: torch.device | str, group: Any = None) -> list[int]:
    """Return the number of rows that each rank of a group has. This is a collective; the host waits for it.

    Args:
        rows: The number of rows on this rank.
        device: A device that the group's backend supports.
        group: The process group; None stands for all processes.
    """
    size = world_size(group)
    if size == 1:
        return [rows]
    counts = torch.zeros(size, dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(counts, torch.tensor([rows], device=device), group=group)
    return counts.tolist()


def gather_rows(rows: Tensor, counts: list[int], group: Any = None) -> Tensor:
    """Gather the rows of all ranks in the order of ranks, without gradient. This is a collective.

    Args:
        rows: This rank's rows, shape `[B_r, ...]`. Ranks may differ in the first dimension only.
        counts: The row count `B_r` of every rank, from `row_counts`.
        group: The process group; None stands for all processes.

    Returns:
        A tensor of shape `[sum of counts, ...]`.
    """
    if len(counts) == 1:
        return rows.detach()
    longest = max(counts)  # backends only gather parts of equal size
    padded = rows.detach().new_zeros(longest, *rows.shape[1:])
    padded[: len(rows)] = rows.detach()
    joined = padded.new_empty(len(counts) * longest, *rows.shape[1:])
    dist.all_gather_into_tensor(joined, padded, group=group)
    parts = joined.split(longest)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def __dir__() -> list[str]:
    return __all__
