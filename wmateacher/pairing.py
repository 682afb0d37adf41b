"""Pairing of student and teacher tensors by canonical name, never by order.

Names do not include what wrappers add (`wmateacher.naming`), and tied tensors count once.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from operator import attrgetter, getitem, is_
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from wmateacher import averaging, checks, naming, sharding, walking, zero
from wmateacher.naming import unwrap

__all__ = [
    "BUFFERS",
    "FROZEN",
    "Binding",
    "Buffers",
    "Frozen",
    "Precision",
    "Roles",
    "accumulator_dtype",
    "assign",
    "at_least_float32",
    "check_precision",
    "clone",
    "densify",
    "describe_difference",
    "few",
    "hidden",
    "match",
    "materialise",
    "put",
    "share",
    "state_names",
    "tensors",
    "unexpanded",
    "unwrap",
]

Buffers = Literal["copy", "average", "keep"]
Frozen = Literal["share", "copy"]
Precision = torch.dtype | Literal["auto", "split"]
BUFFERS: tuple[Buffers, ...] = ("copy", "average", "keep")
FROZEN: tuple[Frozen, ...] = ("share", "copy")

_REQUIRES_GRAD = attrgetter("requires_grad")


@dataclass(frozen=True)
class Roles:
    """The role of each tensor of a student in its teacher, by canonical name.

    Attributes:
        averaged: Tensors that move by the kernel's weight at each snapshot.
        copied: Tensors that are set to the student's value at each snapshot.
        kept: Tensors that stay as they were when the teacher was built.
        shared: Frozen parameters, for which the teacher uses the student's own tensors.
        excluded: Shared parameters and buffers that are None, which are to be copied, not averaged, once they
            are unfrozen or have a value.
        buffers: The policy for buffers, also for those that appear later.
    """

    averaged: tuple[str, ...]
    copied: tuple[str, ...]
    kept: tuple[str, ...]
    shared: tuple[str, ...]
    excluded: tuple[str, ...]
    buffers: Buffers = "copy"

    @property
    def owned(self) -> tuple[str, ...]:
        """The names for which the teacher has its own tensor."""
        return self.averaged + self.copied + self.kept

    def unfreeze(self, parameters: Mapping[str, Tensor]) -> Roles:
        """Return the roles after some shared parameters were unfrozen: they are averaged, or copied."""
        averaged = {n for n, p in parameters.items() if _is_continuous(p) and n not in self.excluded}
        return replace(
            self,
            averaged=(*self.averaged, *(n for n in parameters if n in averaged)),
            copied=(*self.copied, *(n for n in parameters if n not in averaged)),
            shared=tuple(n for n in self.shared if n not in parameters),
        )

    def share(self, names: Collection[str]) -> Roles:
        """Return the roles in which parameters of the teacher's own are shared with the student instead."""

        def others(role: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(name for name in role if name not in names)

        return replace(
            self,
            averaged=others(self.averaged),
            copied=others(self.copied),
            kept=others(self.kept),
            shared=(*self.shared, *names),
        )

    def give(self, kept: Collection[str], copied: Collection[str]) -> Roles:
        """Return the roles in which some buffers of the teacher's own are kept, and others copied."""
        new = {*kept, *copied}
        return replace(
            self,
            averaged=tuple(n for n in self.averaged if n not in new),
            copied=(*(n for n in self.copied if n not in new), *copied),
            kept=(*(n for n in self.kept if n not in new), *kept),
        )


class Binding:
    """A model's tensors by name, looked up once, with a test for whether they are still the same.

    Attributes:
        model: The unwrapped module.
        tensors: Its parameters and buffers by canonical name.
        local: The same, with the local shard of each sharded tensor.
    """

    def __init__(self, model: nn.Module):
        """Look up the tensors of an unwrapped module."""
        self.model = model
        self.tensors = tensors(model)
        self.local = {name: sharding.local(tensor) for name, tensor in self.tensors.items()}
        self._tables = [
            table for m in walking.modules(model) for table in (m._parameters, m._buffers, m._modules)
        ]
        slots = [(table, key) for table in self._tables for key in table]
        self._where, self._keys = [table for table, _ in slots], [key for _, key in slots]
        self._objects = [table[key] for table, key in slots]
        self._sharded = [t for t in self.tensors.values() if sharding.is_sharded(t)]
        self._shards = list(map(sharding.shard, self._sharded))
        # Sparse tensors and wrappers around other tensors (such as quantised weights) have no data_ptr.
        wrapped = {n for n, t in self.local.items() if is_traceable_wrapper_subclass(t)}
        self._plain = [t for n, t in self.local.items() if t.layout == torch.strided and n not in wrapped]
        self._opaque = [self.tensors[n] for n in wrapped]
        self._fingerprint = self._take_fingerprint()

    def is_current(self) -> bool:
        """Return whether the model still has these tensors and no others.

        A model that contains trained wrappers around other tensors is never current, because the inner
        tensors cannot be checked.
        """
        # This runs at every update of models with thousands of tensors, so that a Python loop over them would
        # cost more than the averaging. `map` over C functions compares, with no bytecode per tensor:
        # - that every slot of every module holds the same object; a KeyError means that one was removed;
        # - that each DTensor has the same local tensor, which FSDP2 may replace;
        # - that no slot was added, by counting them;
        # - that memory and layout are unchanged, since `tensor.data = ...` changes these while the tensor
        #   stays the same object.
        try:
            same = all(map(is_, map(getitem, self._where, self._keys), self._objects))
        except KeyError:
            return False
        return (
            same
            and not any(map(_REQUIRES_GRAD, self._opaque))
            and all(map(is_, map(sharding.shard, self._sharded), self._shards))
            and sum(map(len, self._tables)) == len(self._objects)
            and self._take_fingerprint() == self._fingerprint
        )

    def _take_fingerprint(self) -> list[object]:
        return [
            *map(Tensor.data_ptr, self._plain),
            *map(Tensor.stride, self._plain),
            *map(Tensor.size, self.tensors.values()),
        ]


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of an unwrapped module by canonical name; tied ones once."""
    parameters, buffers = _named(model)
    return parameters | buffers


def assign(
    model: nn.Module,
    *,
    buffers: Buffers,
    frozen: Frozen,
    exclude: Sequence[str] = (),
    keep: Collection[str] = (),
) -> Roles:
    """Decide each tensor's role from the policies of `WMATeacher`, and keep the named buffers in any case.

    Raises:
        ValueError: If a policy is unknown, a pattern in `exclude` matches no tensor, or a tensor has no value
            yet.
    """
    checks.one_of("buffers policy", buffers, BUFFERS)
    checks.one_of("frozen policy", frozen, FROZEN)
    parameters, others = _named(model)
    for name, tensor in (parameters | others).items():
        if is_lazy(tensor):
            raise ValueError(
                f"the student's {name!r} belongs to a lazy module and is not initialised yet: run one batch "
                "through the student before building the teacher, whose average starts at its weights"
            )
        if tensor.is_meta:
            raise ValueError(
                f"the student's {name!r} is on the meta device and has no value: materialise and initialise "
                "the student before building the teacher, whose average starts at its weights"
            )
        if frozen == "copy" and not tensor.requires_grad and _is_quantised(tensor):
            raise ValueError(
                f"the student's {name!r} is quantised ({type(tensor).__name__}), so that it can be neither "
                "averaged nor saved in the teacher's state: pass frozen='share', with which the teacher uses "
                "the student's own"
            )
    empty = [n for n in _empty_buffers(model) if n not in others]
    excluded = _matching(exclude, [*parameters, *others, *empty])
    shared = {n for n, p in parameters.items() if frozen == "share" and not p.requires_grad}
    once_unfrozen, excluded = excluded & shared, excluded - shared
    # The average of a buffer that is not saved could not be resumed.
    continuous = {n for n, t in (parameters | others).items() if _is_continuous(t)}
    persistent = set(naming.canonical(model, _persistent(model)).values())
    kept = set(keep) | (set(others) - excluded if buffers == "keep" else set())
    candidates = set(parameters) | (persistent if buffers == "average" else set())
    averaged = (candidates & continuous) - shared - excluded - kept
    copied = (set(parameters) | set(others)) - averaged - shared - kept

    def ordered(names: set[str]) -> tuple[str, ...]:
        return tuple(n for n in (*parameters, *others) if n in names)

    return Roles(
        averaged=ordered(averaged),
        copied=ordered(copied),
        kept=ordered(kept),
        shared=ordered(shared),
        excluded=(*ordered(once_unfrozen), *(n for n in empty if n in excluded)),
        buffers=buffers,
    )


def _empty_buffers(model: nn.Module) -> list[str]:
    """Return the canonical names of the buffers that are None."""
    return [
        f"{name}.{leaf}" if name else leaf
        for name, module in naming.modules(model).items()
        for leaf, buffer in module._buffers.items()
        if buffer is None
    ]


def _is_continuous(tensor: Tensor) -> bool:
    """Whether a tensor has an average. Counters have none, and sparse and expanded tensors hold none."""
    numbers = tensor.is_floating_point() or tensor.is_complex()
    return numbers and tensor.layout == torch.strided and unexpanded(tensor) is tensor


def _is_quantised(tensor: Tensor) -> bool:
    """Whether a parameter is of a class that packs its values, such as bitsandbytes' and torchao's."""
    if not isinstance(tensor, nn.Parameter) or sharding.is_sharded(tensor):
        return False
    packs = type(tensor) is not nn.Parameter and not (tensor.is_floating_point() or tensor.is_complex())
    return packs or is_traceable_wrapper_subclass(tensor)


def match(teacher: Mapping[str, Tensor], student: Mapping[str, Tensor]) -> None:
    """Check that a student has the teacher's tensors.

    Raises:
        ValueError: If a tensor is missing, extra or of another shape.
    """
    missing = [n for n in teacher if n not in student]
    extra = [n for n in student if n not in teacher]
    if missing or extra:
        raise ValueError(
            "the student's tensors are not those that the teacher was built from: "
            + describe_difference(missing, extra)
            + ". Pass the model that the teacher was built from; if it has changed since, build a new "
            "teacher for it (add and remove parameters before)"
        )
    zero.refuse_partitioned(student)
    for name, tensor in teacher.items():
        if student[name].shape != tensor.shape:
            raise ValueError(
                f"the student's {name!r} has shape {tuple(student[name].shape)}, the teacher's has "
                f"{tuple(tensor.shape)}: the student changed shape since the teacher was built; "
                "build a new teacher for it"
            )


def share(teacher: nn.Module, student: nn.Module, names: Iterable[str]) -> None:
    """Put the student's own parameters into the teacher's module, wherever it uses them."""
    source = tensors(unwrap(student))
    put(teacher, {name: source[name] for name in names})


def put(model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
    """Put parameters into a module by canonical name, wherever it uses them."""
    names = {id(tensor): name for name, tensor in tensors(model).items()}
    for path, parameter in list(walking.named_parameters(model, remove_duplicate=False)):
        name = names[id(parameter)]  # tied ones have one name
        if name in parameters:
            owner, _, leaf = path.rpartition(".")
            # By setattr, with which recurrent networks renew their list of weights.
            setattr(model.get_submodule(owner), leaf, parameters[name])


def unexpanded(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that has its own memory: the first entry along expanded dimensions."""
    for dim in range(tensor.dim() if tensor.layout == torch.strided else 0):
        if tensor.stride(dim) == 0 and tensor.shape[dim] > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def materialise(model: nn.Module, device: torch.device) -> None:
    """Allocate uninitialised memory for a model's tensors on the meta device; tied ones stay tied."""
    made: dict[Tensor, Tensor] = {}
    for module in walking.modules(model):
        tables: list[dict[str, Any]] = [module._parameters, module._buffers]
        for table in tables:
            for name, tensor in table.items():
                if tensor is not None and tensor.is_meta:
                    if tensor not in made:
                        empty = torch.empty_like(tensor, device=device)
                        made[tensor] = nn.Parameter(empty) if isinstance(tensor, nn.Parameter) else empty
                    table[name] = made[tensor]


def densify(model: nn.Module) -> None:
    """Replace buffers that cannot be written to: expanded ones, and those made in inference mode."""
    for module in walking.modules(model):
        for name, buffer in module._buffers.items():
            if buffer is not None and (unexpanded(buffer) is not buffer or buffer.is_inference()):
                with torch.inference_mode(False):
                    module._buffers[name] = buffer.clone(memory_format=torch.contiguous_format)


@contextmanager
def hidden(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Remove parameters from a model inside a `with` block."""
    wanted = {id(tensor) for name, tensor in tensors(model).items() if name in set(names)}
    parameters = walking.named_parameters(model, remove_duplicate=False)
    split = [path.rpartition(".") for path, tensor in parameters if id(tensor) in wanted]
    slots = [(model.get_submodule(owner), leaf) for owner, _, leaf in split]
    kept = [owner._parameters[leaf] for owner, leaf in slots]
    # By setattr, with which recurrent networks renew their list of weights.
    for owner, leaf in slots:
        setattr(owner, leaf, None)
    try:
        yield
    finally:
        for (owner, leaf), parameter in zip(slots, kept, strict=True):
            setattr(owner, leaf, parameter)


def state_names(model: nn.Module) -> dict[str, str]:
    """Return the canonical names of a module's tensors by the canonical keys of its state."""
    names = {id(tensor): name for name, tensor in tensors(model).items()}
    # A tied tensor has one canonical name but a key for every place that uses it.
    persistent = _persistent(model)
    parameters, buffers = walking.named_tensors(model, remove_duplicate=False)
    kept = parameters | {path: buffer for path, buffer in buffers.items() if path in persistent}
    keys = naming.canonical(model, kept)
    return {keys[path]: names[id(tensor)] for path, tensor in kept.items()}


def clone(tensor: Tensor, device: torch.device | None) -> Tensor:
    """Return a frozen copy of a parameter or buffer on a device."""
    values = tensor.detach().to(device, copy=True)
    return nn.Parameter(values, requires_grad=False) if isinstance(tensor, nn.Parameter) else values


def _named(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the parameters and the buffers of a module by canonical name; tied ones once."""
    parameters, buffers = walking.named_tensors(model)
    names = naming.canonical(model, [*parameters, *buffers])
    return {names[p]: t for p, t in parameters.items()}, {names[p]: t for p, t in buffers.items()}


def _persistent(model: nn.Module) -> set[str]:
    """Return the keys of the buffers that `state_dict` includes."""
    return {
        f"{path}.{leaf}" if path else leaf
        for path, owner in walking.named_modules(model, remove_duplicate=False)
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
                f"exclude: pattern {pattern!r} matches no tensor; {checks.nearest(pattern, names)}"
            )
        matched.update(hits)
    return matched


def describe_difference(missing: Sequence[str], unexpected: Sequence[str]) -> str:
    """Return a text such as `missing 'a', 'b'; unexpected 'c'`, without an empty part."""
    both = (("missing", missing), ("unexpected", unexpected))
    return "; ".join(f"{what} {few(names)}" for what, names in both if names)


def few(names: Sequence[str]) -> str:
    """Return the first five names as text, and how many more there are."""
    shown = ", ".join(map(repr, names[:5]))
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


def check_precision(dtype: object) -> None:
    """Raise a ValueError if `dtype` is not one that averages may have."""
    wide = isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1
    if dtype not in ("auto", "split") and not wide:
        raise ValueError(
            "dtype must be 'auto', 'split' or a floating-point torch.dtype of at least 16 bits, got "
            f"{dtype!r}"
        )


def accumulator_dtype(tensor: Tensor, dtype: Precision, device: torch.device | None = None) -> torch.dtype:
    """Return the dtype in which a tensor is averaged.

    For `"auto"` and `"split"` it is float64 for scalars and vectors. These are cheap, and norm gains and
    logit scales lie so far from 0 that float32 swallows the small updates of a long run. Other tensors are
    averaged in float32 if they are bfloat16, float16 or narrower (at 1.0, bfloat16 cannot represent an update
    of 1e-3), and otherwise in their own dtype. Complex tensors get the complex dtype of that precision.

    Args:
        tensor: The tensor.
        dtype: The precision that the user asked for.
        device: The device that holds the average; None stands for the tensor's.
    """
    if not isinstance(dtype, torch.dtype):
        is_vector = averaging.is_vector(tensor)
        has_double = (device or tensor.device).type != "mps"
        own = tensor.dtype.to_real()
        dtype = torch.float64 if is_vector and has_double else at_least_float32(own)
    return dtype.to_complex() if tensor.is_complex() else dtype


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Return a real dtype, or float32 if that is wider."""
    return torch.float32 if dtype.itemsize < torch.float32.itemsize else dtype


def __dir__() -> list[str]:
    return __all__
