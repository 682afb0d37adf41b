"""Helpers for teachers under DDP, FSDP2 and distributed checkpoints.

Averaging needs none of them: of all kernels only `gap` communicates, if the student is sharded.
`check_ranks_agree` verifies that replicas are equal, and `load` reads a teacher from a distributed checkpoint
either completely or not at all.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from wmateacher import naming, pairing, sharding
from wmateacher.collectives import world_size

__all__ = ["check_ranks_agree", "load"]


def check_ranks_agree(module: nn.Module, group: Any = None) -> None:
    """Check that a module's state, including a teacher's step count, is bit-identical on every rank.

    This is for replicas, as under DDP. It takes one collective of a few bytes per tensor, which every rank
    must call. Tensors are compared by checksums of their bits. Sharded tensors are not compared, because
    ranks hold different parts of them. Running statistics of batch norms differ between ranks under DDP, as
    each rank sees its own part of the batch: convert to `nn.SyncBatchNorm`, or build the teacher with
    `buffers="keep"`.

    Args:
        module: A `WMATeacher`, or any module.
        group: A `torch.distributed.ProcessGroup`; None stands for all processes.

    Raises:
        RuntimeError: If ranks differ from rank 0. Every rank raises it and names the tensors and ranks.
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
            "broadcast it before building the teacher, take the same steps and call update() on every rank"
        )


def _fingerprints(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a short description of each value in a state that differs if the value differs."""
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
    """Return two sums of a tensor's bytes modulo 2^64, the second weighted by position: int64 `[2]`."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    total = torch.zeros(2, dtype=torch.int64, device=flat.device)
    for start in range(0, len(flat), 2**22):  # in pieces, because an int64 copy is 8 times as large
        piece = flat[start : start + 2**22].long()
        places = torch.arange(start + 1, start + 1 + len(piece), device=flat.device)
        total += torch.stack([piece.sum(), (piece * (places * places + 1)).sum()])
    return total


def load(
    teacher: nn.Module, checkpoint_id: str | PathLike[str], key: str = "teacher", **options: Any
) -> None:
    """Load a teacher from a distributed checkpoint, either completely or not at all.

    The checkpoint holds the teacher's state under a key, as written by
    `torch.distributed.checkpoint.save({"teacher": teacher.state_dict()}, checkpoint_id=...)` or `async_save`.
    It may also hold other states, such as the student's and the optimizer's, and may have been written by any
    number of processes, sharded or not. This is a collective, which every rank must call. While it reads, it
    needs the teacher's memory a second time, in shards if the teacher is sharded.
    `torch.distributed.checkpoint.load` does not, but it writes into the teacher before it checks.

    Args:
        teacher: A `WMATeacher`, built in the same way as the one that was saved.
        checkpoint_id: The checkpoint's folder, visible to all ranks.
        key: The key of the teacher's state in the checkpoint.
        options: Further arguments of `torch.distributed.checkpoint.load`, such as `storage_reader` or
            `process_group`.

    Raises:
        ValueError: If the checkpoint is missing, incomplete or damaged, or was written with another kernel,
            horizon or architecture. Every rank raises it, and the teacher does not change.
    """
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    reader = options.pop("storage_reader", None) or dcp.FileSystemReader(checkpoint_id)
    try:
        written = reader.read_metadata().state_dict_metadata
    except Exception as error:  # its type depends on the storage and on the damage
        raise ValueError(
            f"no complete checkpoint in {str(checkpoint_id)!r} ({type(error).__name__}: {error}): metadata "
            "is written last, so that an interrupted save has none; load the previous checkpoint"
        ) from error
    # The clock is read as it was written, possibly in another format; the teacher then judges it.
    prefix = f"{key}._extra_state."
    fields = [name.removeprefix(prefix) for name in written if name.startswith(prefix)]
    clock: dict[str, Any] = dict.fromkeys(fields)

    def read(state: dict[str, Any]) -> None:
        try:
            dcp.load({key: state}, checkpoint_id=checkpoint_id, storage_reader=reader, **options)
        except (CheckpointException, Exception) as error:  # CheckpointException is only a BaseException
            raise ValueError(
                f"the checkpoint in {str(checkpoint_id)!r} cannot be read ({_reason(error)}): one of its "
                "files is missing or damaged; load the previous checkpoint"
            ) from error

    shared = teacher.get_extra_state()["shared"]
    if "shared" in clock:  # the names of the tensors depend on it, so that it is read before them
        first: dict[str, Any] = {"shared": None}
        read({"_extra_state": first})
        shared = first["shared"]
    own = _template(teacher, shared)
    # The state may have been saved under the names of other wrappers.
    theirs = {n.removeprefix(f"{key}.") for n in written if n.startswith(f"{key}.")}
    saved = {name: path for path, name in naming.resolve(theirs, own).items()}
    own = {saved.get(name, name): tensor for name, tensor in own.items()}
    _check_names(key, written, {f"{key}.{n}": t for n, t in own.items()}, fields)
    state: dict[str, Any] = {name: torch.empty_like(tensor) for name, tensor in own.items()}
    state["_extra_state"] = clock
    read(state)
    teacher.load_state_dict(state)


def _template(teacher: nn.Module, shared: Collection[str]) -> dict[str, Tensor]:
    """Return the tensors that a state of a teacher has in which the given parameters are the student's."""
    own = teacher.state_dict()
    del own["_extra_state"]
    module: nn.Module = teacher.module  # type: ignore[assignment]
    tensors = pairing.tensors(module)
    start = [f"start.{name}" for name in tensors if f"start.{name}" in own]
    for path, name in pairing.state_names(module).items():
        if name in shared:
            own.pop(f"module.{path}", None)
            own.pop(f"start.{name}", None)
        elif f"module.{path}" not in own:  # shared now, and the teacher's own there
            tensor = tensors[name].detach()
            own[f"module.{path}"] = tensor.to(pairing.accumulator_dtype(tensor, "auto"))
            if start and tensor.is_floating_point():
                own[f"start.{name}"] = tensor
    return own


def _check_names(
    key: str, written: Mapping[str, Any], own: Mapping[str, Tensor], fields: Sequence[str]
) -> None:
    """Check that a checkpoint has the teacher's names and shapes, before anything is read.

    Args:
        key: The key of the teacher's state in the checkpoint.
        written: The metadata of everything in the checkpoint, by name.
        own: The teacher's tensors, by their names in the checkpoint.
        fields: The names of the clock's values in the checkpoint.

    Raises:
        ValueError: If a name is missing, unknown, or of another shape.
    """
    if not any(name.startswith(f"{key}.") for name in written):
        raise ValueError(
            f"the checkpoint holds nothing under {key!r}, but "
            f"{', '.join(sorted({n.partition('.')[0] for n in written}))}: pass the key that the teacher was "
            "saved under as key="
        )
    # A teacher's clock has a format; which other fields it has depends on it.
    expected = {*own, *(f"{key}._extra_state.{field}" for field in {"format", *fields})}
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
    """Return the first rank's failure in one line; a CheckpointException holds all ranks' tracebacks."""
    failures = getattr(error, "failures", None) or {0: (error, None)}
    rank, (first, _) = min(failures.items())
    return f"rank {rank}: {type(first).__name__}: {' '.join(str(first).split())[:300]}"


def __dir__() -> list[str]:
    return __all__
