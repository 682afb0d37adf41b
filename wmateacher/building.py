"""Build the module that holds a teacher's average: a deep copy of the student, or what a factory returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from wmateacher import averaging, copying, pairing, sharding, walking
from wmateacher.pairing import Binding, Roles

__all__ = ["build"]


def build(
    student: nn.Module,
    roles: Roles,
    device: torch.device | str | None,
    hooks: copying.Hooks,
    factory: Callable[[], nn.Module] | None,
) -> nn.Module:
    """Return a module with the student's values, in eval mode, which uses the parameters that it shares.

    Args:
        student: The unwrapped student.
        roles: The role of each of its tensors.
        device: The module's device; None stands for the student's.
        hooks: Whether the student's hooks are left out or copied.
        factory: A function that builds the module; None stands for a deep copy.

    Raises:
        ValueError: If the student cannot be copied, or the factory's module does not match it.
    """
    named, shared = pairing.tensors(student), roles.shared
    # A tensor's device has an index, so that "cuda" compares equal to "cuda:0".
    target = None if device is None else torch.empty(0, device=device).device
    if sharding.fully_sharded(student):
        if factory is None:
            raise ValueError(
                "the student is sharded by fully_shard, which prevents deep copies: pass "
                "module_factory=FACTORY, a function that builds the module and shards it like the "
                "student (it may do so on the meta device and leave it there)"
            )
        for name in shared:
            sharding.refuse_uneven(name, named[name])
    if target is not None and any(named[n].device != target for n in shared):
        raise ValueError(
            f"device={device!r} differs from that of the student's frozen parameters, which "
            "frozen='share' uses in place: pass frozen='copy' to give the teacher its own"
        )
    if factory is None:
        module = _deep_copy(student, roles, named, target, hooks)
    else:
        module = _call_factory(factory, student, roles, named, target)
    own = pairing.tensors(module)
    common = [name for name in roles.owned if _same_memory(own[name], named[name])]
    if common:
        raise ValueError(
            f"the copy would be trained with the student, as it has the student's own {common[0]!r}: "
            "module_factory must build a new module. Without one, a module's __deepcopy__ shares the tensor"
        )
    pairing.densify(module)
    module.requires_grad_(False)
    if device is not None:
        module.to(device)
    module.eval()  # which many modules that override `train` forget to return
    return module


def _deep_copy(
    student: nn.Module,
    roles: Roles,
    named: Mapping[str, Tensor],
    device: torch.device | None,
    hooks: copying.Hooks,
) -> nn.Module:
    """Copy the student, straight to `device` if given: its own may have no room for a copy."""
    memo = {id(named[n]): named[n] for n in roles.shared}
    if device is not None:
        memo |= {id(named[n]): pairing.clone(named[n], device) for n in roles.owned}
    # An 8-bit layer of bitsandbytes keeps its weights in the parameter and, from its first forward pass on,
    # in `state`, where its copy must find them if the parameter is shared.
    shared = {id(named[n]) for n in roles.shared}
    for layer in walking.modules(student):
        state = vars(layer).get("state")
        if hasattr(state, "SCB") and id(getattr(layer, "weight", None)) in shared:
            memo[id(state)] = state  # type: ignore[assignment]
    return copying.duplicate(student, memo, hooks)


def _call_factory(
    factory: Callable[[], nn.Module],
    student: nn.Module,
    roles: Roles,
    named: Mapping[str, Tensor],
    device: torch.device | None,
) -> nn.Module:
    """Build a module with the factory and copy the student's values into it."""
    module, owned = factory(), roles.owned
    own = pairing.tensors(module)
    missing, extra = [n for n in named if n not in own], [n for n in own if n not in named]
    shapes = [
        f"{n!r} of shape {tuple(own[n].shape)}, the student's has {tuple(t.shape)}"
        for n, t in named.items()
        if n in own and own[n].shape != t.shape
    ]
    if missing or extra or shapes:
        raise ValueError(
            "module_factory must build a module with the student's tensors, but what it returned has "
            + (pairing.describe_difference(missing, extra) or shapes[0])
        )
    sharding.match(own, named)
    pairing.densify(module)
    pairing.share(module, student, roles.shared)
    home = next((t.device for t in named.values()), torch.device("cpu"))
    pairing.materialise(module, device or home)
    targets, sources = Binding(module).local, Binding(student).local
    averaging.copy_([targets[n] for n in owned], [sources[n] for n in owned])
    return module


def _same_memory(one: Tensor, other: Tensor) -> bool:
    if one is other:
        return True
    plain = all(t.layout == torch.strided and not is_traceable_wrapper_subclass(t) for t in (one, other))
    return plain and one.numel() > 0 and one.device == other.device and one.data_ptr() == other.data_ptr()


def __dir__() -> list[str]:
    return __all__
