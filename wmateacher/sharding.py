"""What a tensor or a module that is spread over processes is made of: DTensors and FSDP2's modules.

Averaging is linear and acts on each entry by itself, so that every process averages its own shards and
none has to hear of the others'. Nothing here communicates, or imports what the user has not.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

shard = attrgetter("_local_tensor")
"""The part of a DTensor that this process holds: the tensor itself, which FSDP2 may replace."""


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether it is a DTensor."""
    kind = _loaded("torch.distributed.tensor", "DTensor")
    return kind is not None and isinstance(tensor, kind)


def local(tensor: Tensor) -> Tensor:
    """The memory of this process's part: a DTensor's shard, off the graph, any other tensor as it is."""
    return shard(tensor).detach() if is_sharded(tensor) else tensor


def spread(values: Tensor, like: Tensor) -> Tensor:
    """Local values as what `like` is: the shard of a DTensor of its shape, or just themselves."""
    if not is_sharded(like):
        return values
    kind: Any = type(like.detach())
    # With the shape given: from the shards alone an uneven one would be guessed wrong.
    return kind.from_local(
        values, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def match(teacher: Mapping[str, Tensor], student: Mapping[str, Tensor]) -> None:
    """Check that tensors of equal names and shapes are also spread alike over the processes.

    Raises:
        ValueError: One is sharded and the other is not, or they are sharded differently.
    """
    for name, ours in teacher.items():
        theirs = student[name]
        if not alike(ours, theirs):
            raise ValueError(
                f"the student's {name!r} is {describe(theirs)}, the teacher's is {describe(ours)}: shard "
                "both alike, with the same fully_shard calls over the same mesh (in the function passed as "
                "module_factory=, where the teacher is built)"
            )


def norms(local_norms: Tensor, like: Sequence[Tensor]) -> Tensor:
    """The Euclidean norms of whole tensors `like`, from those of their shards; one collective a sharding.

    Args:
        local_norms: [n], of the local parts.
        like: The n tensors; of those that are not sharded the norm stays.
    """
    groups: dict[Any, list[int]] = {}
    for i, tensor in enumerate(like):
        if is_sharded(tensor):
            groups.setdefault((tensor.device_mesh, tensor.placements), []).append(i)
    for (mesh, placements), members in groups.items():
        kinds = sys.modules["torch.distributed.tensor"]
        summed = [kinds.Partial() if p.is_shard() else p for p in placements]
        squares = kinds.DTensor.from_local(local_norms[members].square(), mesh, summed, run_check=False)
        local_norms[members] = squares.full_tensor().sqrt()
    return local_norms


def consolidate(state: dict[str, Any]) -> dict[str, Any]:
    """A state with whole tensors on the CPU of rank 0, empty on other ranks; a collective."""
    dist = torch.distributed
    first = not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
    gathered = {}
    for key, value in state.items():
        whole = value.full_tensor() if isinstance(value, Tensor) and is_sharded(value) else value
        if first:
            gathered[key] = whole.cpu() if isinstance(whole, Tensor) else whole
    return gathered


def refuse_fsdp1(model: nn.Module) -> None:
    """Raise a ValueError if a module holds FullyShardedDataParallel, whose parameters are flattened."""
    kind = _loaded("torch.distributed.fsdp", "FullyShardedDataParallel")
    if kind is not None and any(isinstance(m, kind) for m in model.modules()):
        raise ValueError(
            "the student is wrapped in FullyShardedDataParallel (FSDP1), which flattens parameters of "
            "several tensors into one: shard it with FSDP2's torch.distributed.fsdp.fully_shard instead, and "
            "build the teacher with module_factory=FACTORY, which shards its module the same way"
        )


def reshard(modules: Iterable[nn.Module]) -> None:
    """Have `fully_sharded` modules let go of the whole parameters that a forward left in them."""
    for module in modules:
        module.reshard()  # type: ignore[operator]


def fully_sharded(model: nn.Module) -> list[nn.Module]:
    """The modules in it that `fully_shard` was applied to."""
    kind = _loaded("torch.distributed.fsdp", "FSDPModule")
    return [] if kind is None else [m for m in model.modules() if isinstance(m, kind)]


def refuse_uneven(name: str, tensor: Tensor) -> None:
    """Raise a ValueError where FSDP2 would pad a shard, in memory that two modules cannot share."""
    if is_sharded(tensor):
        mesh = tensor.device_mesh
        for axis, placement in enumerate(tensor.placements):
            cut = getattr(placement, "dim", None)  # of replicas, none
            if cut is not None and tensor.shape[cut] % mesh.size(axis):
                raise ValueError(
                    f"the student's frozen {name!r} of shape {tuple(tensor.shape)} is {describe(tensor)} "
                    "in uneven shards, which FSDP2 pads in memory of each module's own: pass "
                    "frozen='copy' to give the teacher its own"
                )


def alike(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape are cut into shards alike, or not at all."""
    if not is_sharded(one) or not is_sharded(other):
        return is_sharded(one) == is_sharded(other)
    mine, theirs = one.device_mesh, other.device_mesh
    return (
        one.placements == other.placements
        and (mine is theirs or torch.equal(mine.mesh, theirs.mesh))
        and shard(one).shape == shard(other).shape
    )


def describe(tensor: Tensor) -> str:
    """Whether and how a tensor is sharded, in words."""
    if not is_sharded(tensor):
        return "not sharded"
    placements = ", ".join(map(str, tensor.placements))
    return f"sharded ({placements}) over {tuple(tensor.device_mesh.shape)} processes"


def _loaded(module: str, name: str) -> Any:
    """A class that exists only if somebody has imported its module."""
    return getattr(sys.modules.get(module), name, None)
