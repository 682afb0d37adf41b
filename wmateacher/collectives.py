"""The few collectives that losses and training loops need; without a process group they do nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


def world_size(group: Any = None) -> int:
    """Processes in a group; 1 where no process group is initialised, or torch is built without them.

    Args:
        group: A `torch.distributed.ProcessGroup`; None: all processes.
    """
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def row_counts(rows: int, device: torch.device | str, group: Any = None) -> list[int]:
    """How many rows each rank of a group has; a collective whose result the host waits for.

    Args:
        rows: How many this rank has.
        device: One that the group's backend communicates from.
        group: As in `world_size`.
    """
    size = world_size(group)
    if size == 1:
        return [rows]
    counts = torch.zeros(size, dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(counts, torch.tensor([rows], device=device), group=group)
    return counts.tolist()


def gather_rows(rows: Tensor, counts: list[int], group: Any = None) -> Tensor:
    """All ranks' rows in the order of ranks, without gradient; a collective.

    Args:
        rows: [B_r, ...], of equal shape but for the first dimension on all ranks.
        counts: B_r of every rank, as `row_counts` gives.
        group: As in `world_size`.

    Returns:
        [sum of counts, ...].
    """
    if len(counts) == 1:
        return rows.detach()
    longest = max(counts)  # backends gather equal parts only
    padded = rows.detach().new_zeros(longest, *rows.shape[1:])
    padded[: len(rows)] = rows.detach()
    joined = padded.new_empty(len(counts) * longest, *rows.shape[1:])
    dist.all_gather_into_tensor(joined, padded, group=group)
    parts = joined.split(longest)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
