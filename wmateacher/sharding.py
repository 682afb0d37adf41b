"""Sharded tensors and modules: DTensors and FSDP2.

Averaging is linear and acts on each entry separately, so every process averages its own shards. Only `norms`,
`total` and `consolidate` communicate. torch's distributed modules are never imported here, only used if the
user has imported them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

from wmateacher import walking

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = [
    "alike",
    "consolidate",
    "describe",
    "fully_sharded",
    "is_sharded",
    "local",
    "match",
    "norms",
    "refuse_fsdp1",
    "refuse_uneven",
    "reshard",
    "shard",
    "spread",
    "total",
]

shard = attrgetter("_local_tensor")
"""Return the part of a DTensor that this process holds: the tensor object, which FSDP2 may replace."""


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Return whether a tensor is a DTensor."""
    kind = _loaded("torch.distributed.tensor", "DTensor")
    return kind is not None and isinstance(tensor, kind)


def local(tensor: Tensor) -> Tensor:
    """Return the local shard of a DTensor, detached; other tensors are returned unchanged."""
    return shard(tensor).detach() if is_sharded(tensor) else tensor


def spread(values: Tensor, like: Tensor) -> Tensor:
    """Return local values as a DTensor with the shape and sharding of `like`, if that is a DTensor."""
    if not is_sharded(like):
        return values
    kind: Any = type(like.detach())
    # from_local would infer a wrong shape from uneven shards.
    return kind.from_local(
        values, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def match(teacher: Mapping[str, Tensor], student: Mapping[str, Tensor]) -> None:
    """Check that the tensors of a teacher and a student are sharded alike.

    Args:
        teacher: The teacher's tensors by name.
        student: The student's tensors, with the same names and shapes.

    Raises:
        ValueError: If one of a pair is sharded and the other is not, or they are sharded differently.
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
    """Return the Euclidean norms of whole tensors, given those of their shards.

    It takes one collective for each different sharding among the tensors.

    Args:
        local_norms: The norms of the local shards, shape `[n]`.
        like: The `n` tensors. Norms of tensors that are not sharded stay as they are.
    """
    groups: dict[Any, list[int]] = {}
    for i, tensor in enumerate(like):
        if is_sharded(tensor):
            groups.setdefault((tensor.device_mesh, tensor.placements), []).append(i)
    for members in groups.values():
        local_norms[members] = total(local_norms[members].square(), like[members[0]]).sqrt()
    return local_norms


def total(local_sums: Tensor, like: Tensor) -> Tensor:
    """Return sums over whole tensors that are sharded like `like`, given those over the local shards.

    It takes one collective, or none if `like` is not a DTensor.
    """
    if not is_sharded(like):
        return local_sums
    kinds = sys.modules["torch.distributed.tensor"]
    summed = [kinds.Partial() if p.is_shard() else p for p in like.placements]
    return kinds.DTensor.from_local(local_sums, like.device_mesh, summed, run_check=False).full_tensor()


def consolidate(state: dict[str, Any]) -> dict[str, Any]:
    """Gather a state's tensors on the CPU of rank 0. Other ranks get an empty state. This is a collective."""
    dist = torch.distributed
    first = not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
    gathered = {}
    for key, value in state.items():
        whole = value.full_tensor() if isinstance(value, Tensor) and is_sharded(value) else value
        if first:
            gathered[key] = whole.cpu() if isinstance(whole, Tensor) else whole
    return gathered


def refuse_fsdp1(model: nn.Module) -> None:
    """Raise a ValueError if a module contains FullyShardedDataParallel, which flattens parameters."""
    kind = _loaded("torch.distributed.fsdp", "FullyShardedDataParallel")
    if kind is not None and any(isinstance(m, kind) for m in walking.modules(model)):
        raise ValueError(
            "the student is wrapped in FullyShardedDataParallel (FSDP1), which flattens several "
            "parameters into one: shard it with FSDP2's torch.distributed.fsdp.fully_shard instead, and "
            "build the teacher with module_factory=FACTORY, which shards its module the same way"
        )


def reshard(modules: Iterable[nn.Module]) -> None:
    """Free the whole parameters that a forward pass has left gathered in `fully_sharded` modules."""
    for module in modules:
        module.reshard()  # type: ignore[operator]


def fully_sharded(model: nn.Module) -> list[nn.Module]:
    """Return the submodules that `fully_shard` was applied to."""
    kind = _loaded("torch.distributed.fsdp", "FSDPModule")
    return [] if kind is None else [m for m in walking.modules(model) if isinstance(m, kind)]


def refuse_uneven(name: str, tensor: Tensor) -> None:
    """Raise a ValueError if FSDP2 pads a tensor's shards, whose memory two modules cannot share."""
    if is_sharded(tensor):
        mesh = tensor.device_mesh
        for axis, placement in enumerate(tensor.placements):
            cut = getattr(placement, "dim", None)  # replicas have none
            if cut is not None and tensor.shape[cut] % mesh.size(axis):
                raise ValueError(
                    f"the student's frozen {name!r} of shape {tuple(tensor.shape)} is {describe(tensor)} "
                    "in uneven shards, which FSDP2 pads in separate memory for each module: pass "
                    "frozen='copy' to give the teacher its own"
                )


def alike(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors of one shape are sharded in the same way or both not sharded."""
    if not is_sharded(one) or not is_sharded(other):
        return is_sharded(one) == is_sharded(other)
    mine, theirs = one.device_mesh, other.device_mesh
    return (
        one.placements == other.placements
        and (mine is theirs or torch.equal(mine.mesh, theirs.mesh))
        and shard(one).shape == shard(other).shape
    )


def describe(tensor: Tensor) -> str:
    """Return a description of a tensor's sharding for error messages."""
    if not is_sharded(tensor):
        return "not sharded"
    placements = ", ".join(map(str, tensor.placements))
    return f"sharded ({placements}) over {tuple(tensor.device_mesh.shape)} processes"


def _loaded(module: str, name: str) -> Any:
    """Return a class if its module has been imported, otherwise None: nothing can be an instance of it."""
    return getattr(sys.modules.get(module), name, None)


def __dir__() -> list[str]:
    return __all__
