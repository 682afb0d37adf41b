"""Which student tensor meets which teacher tensor: by name, never by order.

Names are seen through DDP, DataParallel and torch.compile; tied tensors count once.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from wmateacher import spec

Buffers = Literal["copy", "average", "keep"]
Frozen = Literal["share", "copy"]
BUFFERS: tuple[Buffers, ...] = ("copy", "average", "keep")
FROZEN: tuple[Frozen, ...] = ("share", "copy")

# Components that wrappers inside a model add to its tensors' names.
_TRANSPARENT = frozenset({"_orig_mod", "_checkpoint_wrapped_module"})


@dataclass(frozen=True)
class Roles:
    """What becomes of each of a model's tensors, by canonical name.

    Attributes:
        averaged: Moved by the kernel's weight at each snapshot.
        copied: Set to the student's value at each snapshot.
        kept: Left as they were when the teacher was built.
        shared: The student's own tensors: frozen parameters, no copy.
    """

    averaged: tuple[str, ...]
    copied: tuple[str, ...]
    kept: tuple[str, ...]
    shared: tuple[str, ...]

    @property
    def owned(self) -> tuple[str, ...]:
        """Everything that the teacher has a tensor of its own for."""
        return self.averaged + self.copied + self.kept


def unwrap(model: nn.Module) -> nn.Module:
    """The user's module inside DDP, DataParallel and torch.compile wrappers, in any nesting."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        else:
            return model


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of an unwrapped module by canonical name; tied ones once."""
    return dict(_named(model.named_parameters()) | _named(model.named_buffers()))


def assign(model: nn.Module, *, buffers: Buffers, frozen: Frozen, exclude: Sequence[str] = ()) -> Roles:
    """Decide each tensor's role from the policies of `WMATeacher`.

    Raises:
        ValueError: A policy that does not exist, or a pattern in `exclude` that matches no tensor.
    """
    _require_choice("buffers", buffers, BUFFERS)
    _require_choice("frozen", frozen, FROZEN)
    parameters, others = _named(model.named_parameters()), _named(model.named_buffers())
    excluded = _matching(exclude, [*parameters, *others])
    shared = {n for n, p in parameters.items() if frozen == "share" and not p.requires_grad}
    excluded -= shared
    averaged = set(parameters) - shared - excluded
    if buffers == "average":
        # A counter or an index has no average, and what no checkpoint holds could not be resumed.
        lasting = _persistent(model)
        floating = {n for n, b in others.items() if b.is_floating_point() or b.is_complex()}
        averaged |= (floating & lasting) - excluded
    kept = set(others) - excluded if buffers == "keep" else set()
    copied = (set(parameters) | set(others)) - averaged - shared - kept

    def ordered(names: set[str]) -> tuple[str, ...]:
        return tuple(n for n in (*parameters, *others) if n in names)

    return Roles(ordered(averaged), ordered(copied), ordered(kept), ordered(shared))


def match(teacher: dict[str, Tensor], student: nn.Module, roles: Roles) -> dict[str, Tensor]:
    """The student's tensors by name, each checked against the teacher's.

    Raises:
        ValueError: A tensor that is missing, extra, of another shape, or trained though it was frozen
            (and therefore shared) when the teacher was built.
    """
    found = tensors(unwrap(student))
    missing = [n for n in (*roles.owned, *roles.shared) if n not in found]
    extra = [n for n in found if n not in teacher]
    if missing or extra:
        raise ValueError(
            "the student's tensors are not those that the teacher was built from: "
            + describe_difference(missing, extra)
            + ". Pass the model that the teacher was built from, or build a new teacher for this one"
        )
    for name in roles.owned:
        if found[name].shape != teacher[name].shape:
            raise ValueError(
                f"the student's {name!r} has shape {tuple(found[name].shape)}, the teacher's has "
                f"{tuple(teacher[name].shape)}: the student changed shape since the teacher was built; "
                "build a new teacher for it"
            )
    for name in roles.shared:
        if found[name].requires_grad:
            raise ValueError(
                f"the student's {name!r} was frozen when the teacher was built and shared with it, but "
                "it now requires grad: unfreeze before building the teacher, or build it with "
                "frozen='copy'"
            )
    return found


def share(teacher: nn.Module, student: nn.Module, names: Iterable[str]) -> None:
    """Put the student's own parameters in the teacher's module, wherever they are used there."""
    wanted = set(names)
    source = tensors(unwrap(student))
    for path, _ in list(teacher.named_parameters(remove_duplicate=False)):
        name = canonical_name(path)
        if name in wanted:
            owner, _, leaf = path.rpartition(".")
            teacher.get_submodule(owner)._parameters[leaf] = source[name]  # type: ignore[assignment]


def canonical_name(path: str) -> str:
    """A tensor's name without what torch.compile and checkpointing wrappers add to it."""
    return ".".join(part for part in path.split(".") if part not in _TRANSPARENT)


def _named(named: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor]:
    return {canonical_name(path): tensor for path, tensor in named}


def _persistent(model: nn.Module) -> set[str]:
    """The names of the buffers that `state_dict` holds."""
    return {
        canonical_name(f"{path}.{leaf}" if path else leaf)
        for path, owner in model.named_modules()
        for leaf in owner._buffers.keys() - owner._non_persistent_buffers_set
    }


def _matching(patterns: Sequence[str], names: Sequence[str]) -> set[str]:
    if isinstance(patterns, str):
        raise TypeError(f"exclude must be a sequence of patterns, got the string {patterns!r}")
    matched: set[str] = set()
    for pattern in patterns:
        hits = fnmatch.filter(names, pattern)
        if not hits:
            raise ValueError(
                f"exclude: pattern {pattern!r} matches no tensor; {spec.nearest(pattern, names)}"
            )
        matched.update(hits)
    return matched


def _require_choice(argument: str, value: object, options: Sequence[str]) -> None:
    if value not in options:
        raise ValueError(f"{argument} must be one of {', '.join(map(repr, options))}, got {value!r}")


def describe_difference(missing: Sequence[str], unexpected: Sequence[str]) -> str:
    """`missing 'a', 'b'; unexpected 'c'`, whichever there are."""
    both = (("missing", missing), ("unexpected", unexpected))
    return "; ".join(f"{what} {_few(names)}" for what, names in both if names)


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:5]))
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


def accumulator_dtype(tensor: Tensor, dtype: torch.dtype | Literal["auto"]) -> torch.dtype:
    """The dtype in which a tensor is averaged.

    `"auto"` is float32 for bfloat16 and float16 tensors, whose own spacing swallows small updates (at
    1.0, bfloat16 cannot take an update of 1e-3), and the tensor's own dtype otherwise.
    """
    if dtype == "auto":
        return torch.float32 if tensor.dtype in (torch.bfloat16, torch.float16) else tensor.dtype
    return tensor.dtype if tensor.is_complex() else dtype
