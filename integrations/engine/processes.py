"""An example on several processes: started by torchrun, or alone, in which case nothing here does anything.

with processes.process_group("auto") as device:
    ...  # a process group, where torchrun started more than one process
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from wmateacher.collectives import gather_rows, row_counts, world_size

ValueT = TypeVar("ValueT")


@contextmanager
def process_group(device: str) -> Iterator[torch.device]:
    """Join the processes that torchrun started, inside the block; nccl on GPUs, gloo on CPUs.

    Args:
        device: "auto" takes a GPU where there is one; of "cuda", each process takes that of its local rank.

    Yields:
        The device of this process.

    Raises:
        ValueError: A device that cannot be used.
    """
    chosen = _device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield chosen
        return
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield chosen
    finally:
        with suppress(RuntimeError):  # of what went wrong before, if anything did
            dist.destroy_process_group()


def is_main() -> bool:
    """Whether this process is the one that prints and writes: rank 0, or alone."""
    return rank() == 0


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def broadcast_from_main(value: ValueT) -> ValueT:
    """Rank 0's value on every rank, such as what it has found on disk; a collective."""
    if world_size() == 1:
        return value
    values: list[Any] = [value]
    dist.broadcast_object_list(values)
    return values[0]


def is_single() -> bool:
    """Whether there is one process only."""
    return world_size() == 1


def all_reduce_sum(value: float, device: torch.device) -> Tensor:
    """The sum over all ranks, 0-d; a collective."""
    summed = torch.full((), float(value), device=device)  # filled there: a copy would wait for the device
    if world_size() > 1:
        dist.all_reduce(summed)
    return summed


def any_of(value: bool) -> bool:
    """Whether it holds on any rank; a collective."""
    held = torch.tensor(float(value))
    dist.all_reduce(held, dist.ReduceOp.MAX)
    return bool(held)


@contextmanager
def main_process_first() -> Iterator[None]:
    """Rank 0 goes through the block before the others, who find what it has downloaded."""
    if not is_main():
        broadcast_from_main(None)
    try:
        yield
    finally:
        if is_main():
            broadcast_from_main(None)


def check_batch(size: int, what: str = "batch_size", equal: bool = False) -> None:
    """See that every process gets a part of each batch.

    Args:
        size: Of a batch.
        what: Its name in the message.
        equal: The parts must be of one size: needed by losses that are means over the rank's own part.

    Raises:
        ValueError: There are fewer images than processes, or unequal parts.
    """
    if size < world_size():
        raise ValueError(f"{what} must be at least the number of processes, {world_size()}, got {size}")
    if equal and size % world_size():
        raise ValueError(f"{what} must be a multiple of the number of processes, {world_size()}, got {size}")


def local_slice(count: int) -> slice:
    """This rank's share of `count` rows that all ranks know; sizes differ by at most one."""
    share, rest = divmod(count, world_size())
    first = rank() * share + min(rank(), rest)
    return slice(first, first + share + (rank() < rest))


def shard_rows(rows: Tensor) -> Tensor:
    """This rank's share of rows [B, ...] that all ranks have."""
    return rows[local_slice(len(rows))]


def all_gather_rows(rows: Tensor) -> Tensor:
    """What `part` took apart, on every rank; a collective, without gradient."""
    return gather_rows(rows, row_counts(len(rows), rows.device)) if world_size() > 1 else rows


def parallel(model: nn.Module) -> nn.Module:
    """The model in DDP where there are several processes, itself where there is one."""
    if world_size() == 1:
        return model
    return DistributedDataParallel(model)


@torch.no_grad()
def same_buffers(model: nn.Module) -> None:
    """Give every rank the buffers of rank 0: running statistics are each rank's own under DDP."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used ({reason}); pass cpu, cuda or cuda:N") from None
