"""A teacher on many processes, beside PyTorch's own DDP, FSDP2 and distributed checkpoints.

Nothing here is needed for averaging, which never communicates: `check_ranks_agree` proves that replicas are
equal, `gather_rows` joins a batch, `load` reads a teacher from a distributed checkpoint, all or nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from wmateacher import sharding

if TYPE_CHECKING:
    pass


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


def check_ranks_agree(module: nn.Module, group: Any = None) -> None:
    """Check that a module's state (a teacher's with its clock) is the same, bit for bit, on every rank.

    For replicas, as under DDP. One collective of a few bytes a tensor, which every rank calls. Tensors are
    compared by checksums of their bits. Sharded tensors are not compared: ranks hold different parts of
    them. Running statistics of batch norms differ between ranks by DDP's nature (each sees its own part of
    the batch): convert to `nn.SyncBatchNorm`, or build the teacher with `buffers="keep"`.

    Args:
        module: A `WMATeacher`, or any module.
        group: As in `world_size`.

    Raises:
        RuntimeError: On every rank, naming tensors and the ranks that differ from rank 0.
    """
    size = world_size(group)
    if size == 1:
        return
    everyone: list[Any] = [None] * size
    dist.all_gather_object(everyone, _fingerprints(module.state_dict()), group=group)
    first, differing = everyone[0], {}
    for rank, theirs in enumerate(everyone):
        for name in {**first, **theirs}:
            if first.get(name) != theirs.get(name):
                differing.setdefault(name, []).append(rank)
    if differing:
        shown = "; ".join(
            f"{name!r} on rank {', '.join(map(str, r))}" for name, r in [*differing.items()][:5]
        )
        more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise RuntimeError(
            f"ranks disagree: not as on rank 0 are {shown}{more}. Build the student from one seed or broadcast "
            "it before building the teacher, step all ranks alike, and call update() on every one"
        )


def _fingerprints(state: Mapping[str, Any]) -> dict[str, Any]:
    """What tells the values of a state apart, in plain Python types."""
    found: dict[str, Any] = {}
    sums: dict[str, Tensor] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            found[name] = repr(value)
        elif not sharding.is_sharded(value):
            found[name] = (tuple(value.shape), str(value.dtype))
            sums[name] = _checksum(value)
    read = torch.stack([s.cpu() for s in sums.values()]).tolist() if sums else []
    return found | {name: (*found[name], *bits) for name, bits in zip(sums, read, strict=True)}


def _checksum(tensor: Tensor) -> Tensor:
    """Two sums over the bytes of a tensor, the second weighted by position, modulo 2^64: int64 [2]."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    total = torch.zeros(2, dtype=torch.int64, device=flat.device)
    for start in range(0, len(flat), 2**22):  # in pieces: an int64 copy of all would be 8 times as large
        piece = flat[start : start + 2**22].long()
        places = torch.arange(start + 1, start + 1 + len(piece), device=flat.device)
        total += torch.stack([piece.sum(), (piece * (places * places + 1)).sum()])
    return total
