"""Several processes that torchrun started. In a single process, every function here is trivial.

with processes.process_group("auto") as device:
    ...  # a process group, if torchrun started more than one process

Lightning Fabric and Accelerate would replace `process_group`, `parallel`, autocast and the gradient scaler,
about 30 lines. They are not used because both wrap model and optimizer, which teacher and losses need as they
are; because Fabric saves no random state and Accelerate resumes data by skipping batches, while here a step's
batch follows from its index; and because their loggers keep the steps that a resumed run repeats.
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

__all__ = [
    "all_gather_rows",
    "all_reduce_sum",
    "any_of",
    "at_most_threads",
    "broadcast_from_main",
    "check_batch",
    "is_main",
    "is_single",
    "local_slice",
    "main_process_first",
    "parallel",
    "process_group",
    "rank",
    "same_buffers",
    "shard_rows",
]

ValueT = TypeVar("ValueT")


@contextmanager
def process_group(device: str) -> Iterator[torch.device]:
    """Join the processes that torchrun started inside the block, with nccl on GPUs and gloo on CPUs.

    Args:
        device: The device. `"auto"` is a GPU if there is one; with `"cuda"` each process takes the GPU of its
            local rank.

    Yields:
        The device of this process.

    Raises:
        ValueError: If the device cannot be used.
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
        # After an error in the block, ending the group may fail too, and would hide that error.
        with suppress(RuntimeError):
            dist.destroy_process_group()


def is_main() -> bool:
    """Return whether this process prints and writes: rank 0, or the only one."""
    return rank() == 0


def rank() -> int:
    """Return the rank of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def broadcast_from_main(value: ValueT) -> ValueT:
    """Return the main process's value on every rank, such as what it found on disk; a collective."""
    if world_size() == 1:
        return value
    values: list[Any] = [value]
    dist.broadcast_object_list(values)
    return values[0]


def is_single() -> bool:
    """Return whether there is only one process."""
    return world_size() == 1


def all_reduce_sum(value: float, device: torch.device) -> Tensor:
    """Return the sum over all ranks, 0-d; a collective."""
    # Filled on the device: copying the value there would wait for the device.
    summed = torch.full((), float(value), device=device)
    if world_size() > 1:
        dist.all_reduce(summed)
    return summed


def any_of(value: bool) -> bool:
    """Return whether the value is true on any rank; a collective."""
    held = torch.tensor(float(value))
    dist.all_reduce(held, dist.ReduceOp.MAX)
    return bool(held)


@contextmanager
def main_process_first() -> Iterator[None]:
    """Let the main process run the block before the others, so that they find what it downloads."""
    if not is_main():
        broadcast_from_main(None)
    try:
        yield
    finally:
        if is_main():
            broadcast_from_main(None)


def check_batch(size: int, what: str = "batch_size", equal: bool = False) -> None:
    """Check that every process gets a part of each batch.

    Args:
        size: The batch size.
        what: The name of the setting in messages.
        equal: Whether all parts must have the same size, as losses need that are means over a rank's part.

    Raises:
        ValueError: If the batch is smaller than the number of processes, or its parts are not equal.
    """
    if size < world_size():
        raise ValueError(f"{what} must be at least the number of processes, {world_size()}, got {size}")
    if equal and size % world_size():
        raise ValueError(f"{what} must be a multiple of the number of processes, {world_size()}, got {size}")


def local_slice(count: int) -> slice:
    """Return this rank's slice of `count` rows; the sizes of the slices differ by at most one."""
    share, rest = divmod(count, world_size())
    first = rank() * share + min(rank(), rest)
    return slice(first, first + share + (rank() < rest))


def shard_rows(rows: Tensor) -> Tensor:
    """Return this rank's share of rows `[B, ...]` that all ranks have."""
    return rows[local_slice(len(rows))]


def all_gather_rows(rows: Tensor) -> Tensor:
    """Return the rows of all ranks, which undoes `shard_rows`; a collective, without gradient."""
    return gather_rows(rows, row_counts(len(rows), rows.device)) if world_size() > 1 else rows


def parallel(model: nn.Module) -> nn.Module:
    """Return the model in DDP if there are several processes, the model itself otherwise."""
    if world_size() == 1:
        return model
    return DistributedDataParallel(model)


@torch.no_grad()
def same_buffers(model: nn.Module) -> None:
    """Copy the buffers of rank 0 to every rank, because under DDP running statistics differ between ranks."""
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


@contextmanager
def at_most_threads(count: int | None) -> Iterator[None]:
    """Let torch use at most so many CPU threads inside the block; None changes nothing.

    The threads of one operation wait for each other. If the operations are small, or other programs keep the
    cores busy, several threads take longer than one.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else min(before, count))
    try:
        yield
    finally:
        torch.set_num_threads(before)
