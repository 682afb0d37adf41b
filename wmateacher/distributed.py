"""A teacher on many processes, beside PyTorch's own DDP, FSDP2 and distributed checkpoints.

Nothing here is needed for averaging, which never communicates: `check_ranks_agree` proves that replicas are
equal, and `load` reads a teacher from a distributed checkpoint, all or nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from wmateacher import pairing, sharding
from wmateacher.collectives import world_size

if TYPE_CHECKING:
    from wmateacher.teacher import WMATeacher


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
    first = everyone[0]
    differing: dict[str, list[int]] = {}
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
            f"ranks disagree: not as on rank 0 are {shown}{more}. Build the student from one seed or "
            "broadcast it before building the teacher, step all ranks alike, and call update() on every one"
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


def load(
    teacher: WMATeacher, checkpoint_id: str | PathLike[str], key: str = "teacher", **options: Any
) -> None:
    """Read a teacher from a distributed checkpoint, all of it or nothing.

    The checkpoint holds the teacher's state under a key, as `torch.distributed.checkpoint.save({"teacher":
    teacher.state_dict()}, checkpoint_id=...)` or `async_save` writes it, beside the student's and the
    optimizer's if you like. It may have been written by any number of processes, sharded or not. A
    collective: every rank calls it. It needs the teacher's memory once more while it reads, in shards where
    the teacher is sharded; `torch.distributed.checkpoint.load` does not, and writes before it checks.

    Args:
        teacher: Built as the one that was saved.
        checkpoint_id: The checkpoint's folder, which all ranks see.
        key: What the teacher's state is saved under.
        options: For `torch.distributed.checkpoint.load`, such as `storage_reader` or `process_group`.

    Raises:
        ValueError: On every rank: the checkpoint is not there, incomplete or damaged, or is another kernel's,
            horizon's or architecture's. The teacher is as it was.
    """
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    own = teacher.state_dict()
    clock = own.pop("_extra_state")
    reader = options.pop("storage_reader", None) or dcp.FileSystemReader(checkpoint_id)
    try:
        written = reader.read_metadata().state_dict_metadata
    except Exception as error:  # depends on the storage, and on which byte is wrong
        raise ValueError(
            f"no complete checkpoint in {str(checkpoint_id)!r} ({type(error).__name__}: {error}): a save "
            "writes its metadata last, so that one that was interrupted has none; read the one before it"
        ) from error
    _check_names(key, written, {f"{key}.{n}": t for n, t in own.items()}, clock)
    state = {name: torch.empty_like(tensor) for name, tensor in own.items()} | {"_extra_state": dict(clock)}
    try:
        dcp.load({key: state}, checkpoint_id=checkpoint_id, storage_reader=reader, **options)
    except (CheckpointException, Exception) as error:  # the first is no Exception
        raise ValueError(
            f"the checkpoint in {str(checkpoint_id)!r} cannot be read ({_reason(error)}): a file of it is "
            "missing or damaged; read the one before it"
        ) from error
    teacher.load_state_dict(state)


def _check_names(
    key: str, written: Mapping[str, Any], own: Mapping[str, Tensor], clock: Mapping[str, Any]
) -> None:
    """Compare a checkpoint's contents with what a teacher holds, before anything is read."""
    if not any(name.startswith(f"{key}.") for name in written):
        raise ValueError(
            f"the checkpoint holds nothing under {key!r}, but "
            f"{', '.join(sorted({n.partition('.')[0] for n in written}))}: pass what the teacher was saved "
            "under as key="
        )
    expected = {*own, *(f"{key}._extra_state.{field}" for field in clock)}
    missing = sorted(expected - written.keys())
    extra = sorted(n for n in written if n.startswith(f"{key}.") and n not in expected)
    shapes = [n for n in own if n in written and tuple(written[n].size) != tuple(own[n].shape)]
    if missing or extra or shapes:
        reason = pairing.describe_difference(missing, extra) or (
            f"{shapes[0]!r} has shape {tuple(written[shapes[0]].size)} there and "
            f"{tuple(own[shapes[0]].shape)} here"
        )
        raise ValueError(f"the checkpoint was written for another architecture: {reason}")


def _reason(error: BaseException) -> str:
    """The first failure of any rank, in one line; that of a checkpoint holds all ranks' tracebacks."""
    failures = getattr(error, "failures", None) or {0: (error, None)}
    rank, (first, _) = min(failures.items())
    return f"rank {rank}: {type(first).__name__}: {' '.join(str(first).split())[:300]}"
