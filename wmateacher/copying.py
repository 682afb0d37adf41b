"""The copy of a student that becomes its teacher's module: what it takes along, shares and leaves out.

`copy.deepcopy` follows everything that a module refers to. Here it is told beforehand what not to follow, and
`wmateacher.rebinding` makes what the copy calls compute with the copy.
"""

from __future__ import annotations

import copy
import functools
import pickle
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from types import FunctionType, MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from wmateacher import rebinding, walking

__all__ = ["HOOKS", "Hooks", "duplicate", "rebind", "refuse_scripted"]

Hooks = Literal["drop", "copy"]
HOOKS: tuple[Hooks, ...] = ("drop", "copy")

_HOOK_TABLES = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks"),
)
# The hooks of these packages compute weights, place tensors, or collect outputs for `forward`.
_COMPUTING = (
    *("torch.nn.utils.", "torch.distributed.tensor.", "torch.ao."),
    "transformers.utils.output_capturing",
)
# A warning names plain attributes with more bytes than this and more than a tenth of the model's.
_LARGE = 64 * 2**20
_NOT_COPIED = (RuntimeError, TypeError, NotImplementedError, AssertionError, copy.Error, pickle.PickleError)


def duplicate(student: nn.Module, memo: dict[int, Any], hooks: Hooks) -> nn.Module:
    """Return a deep copy of a student that computes with its own tensors only.

    Args:
        student: The student.
        memo: The replacements of some of the student's tensors, by their `id`, as for `copy.deepcopy`, which
            extends it.
        hooks: Whether the student's forward and backward hooks are left out or copied.

    Raises:
        ValueError: If the student cannot be copied, a part of the copy would still compute with the student,
            or an attribute holds trained tensors that are not registered.
        TypeError: If a module in an attribute is scripted.
    """
    survey = _Survey(student, memo, hooks)
    try:
        survey.copy_hooks()
        module = copy.deepcopy(student, memo)
    except _NOT_COPIED as error:
        raise ValueError(
            f"the student ({type(student).__name__}) cannot be deep-copied ({error}): pass "
            "module_factory=FACTORY, a function that builds a module of the same architecture"
        ) from error
    rebind(student, module, memo)
    return module


def rebind(model: nn.Module, twin: nn.Module, memo: dict[int, Any]) -> None:
    """Make what a deep copy of a model calls compute with the copy.

    Args:
        model: The model.
        twin: Its copy.
        memo: The memo of the deep copy.

    Raises:
        ValueError: If the copy holds the model in a way that cannot be rebound.
    """
    theirs, ours = _by_path(model), _by_path(twin)
    rebinder = rebinding.Rebinder([(old, ours[path]) for path, old in theirs.items() if path in ours], memo)
    for path, module in walking.named_modules(twin):
        rebinder(module, path)


def refuse_scripted(student: nn.Module) -> None:
    """Raise a TypeError that names the first module of a student which is scripted or traced."""
    for path, module in walking.named_modules(student):
        _refuse_scripted(module, path)


def _refuse_scripted(module: nn.Module, path: str) -> None:
    if isinstance(module, torch.jit.ScriptModule):
        place = f"the student's {path!r}" if path else "model"
        raise TypeError(
            f"{place} must not be a ScriptModule: build the teacher before scripting or tracing the student"
        )


def _by_path(model: nn.Module) -> dict[str, Any]:
    """Return a model's modules and tensors by path."""
    kinds = (walking.named_modules, walking.named_parameters, walking.named_buffers)
    return {path: x for kind in kinds for path, x in kind(model, remove_duplicate=False)}


class _Survey:
    """A walk through everything that a deep copy of a student would follow.

    It notes in the memo what the copy shares with the student or does without.
    """

    def __init__(self, student: nn.Module, memo: dict[int, Any], hooks: Hooks):
        self._memo, self._hooks = memo, hooks
        tensors = [t for kind in (walking.named_parameters, walking.named_buffers) for _, t in kind(student)]
        self._memory = rebinding.Memory(tensors)
        modules = walking.modules(student)
        self._registered = {id(x) for x in (*tensors, *modules)}
        self._members = {id(x) for m in modules for x in (m, *vars(m).values())}
        self._seen: dict[int, Any] = {}
        self._tables: list[tuple[OrderedDict[int, Any], OrderedDict[int, Any]]] = []
        memo |= {id(m): None for m in student.modules() if walking.is_teacher(m)}
        sizes: dict[str, int] = {}
        for path, module in walking.named_modules(student):
            for name, value in rebinding.attributes(self._state(module)):
                where = f"{path}.{name}".lstrip(".")
                sizes[where] = sum(self._follow(value, where))
        _warn_large(sizes, sum(map(_size, tensors)))

    def copy_hooks(self) -> None:
        """Copy the hooks that the copy needs."""
        for table, kept in self._tables:
            table.update(copy.deepcopy(kept, self._memo))

    def _state(self, module: nn.Module) -> dict[str, Any]:
        """Return what is copied of a module, and replace hooks that are not in the memo."""
        own = hasattr(module, "__deepcopy__")  # parametrised modules refuse __getstate__
        state: Any = vars(module) if own else module.__getstate__()
        state = dict(state if isinstance(state, dict) else vars(module))
        tables = {name: state[name] for name in _HOOK_TABLES if state.get(name)}
        if self._hooks == "drop" and tables:
            kept = {k for table in tables.values() for k, hook in table.items() if self._belongs(hook)}
            for name, table in tables.items():
                state[name] = OrderedDict((key, hook) for key, hook in table.items() if key in kept)
                self._memo[id(table)] = OrderedDict()
                self._tables.append((self._memo[id(table)], state[name]))
        return state

    def _belongs(self, hook: Any) -> bool:
        """Return whether a hook is a part of the model, which computes with what the hook does."""
        while isinstance(hook, functools.partial):
            hook = hook.func
        if isinstance(hook, FunctionType):
            return hook.__module__.startswith(_COMPUTING)
        if isinstance(hook, MethodType):
            return id(hook.__self__) in self._members and not self._left_out(hook.__self__)
        return any(kind.__module__.startswith(_COMPUTING) for kind in type(hook).__mro__)

    def _follow(self, value: Any, where: str) -> Iterator[int]:
        """Note what the copy shares or leaves out, and yield the sizes of tensors that it copies."""
        stack = [value]
        while stack:
            x = stack.pop()
            if id(x) in self._seen or id(x) in self._registered or id(x) in self._memo:
                continue
            self._seen[id(x)] = x
            # Fake tensors are notes in an exported graph and have no values.
            if type(x) in weakref.ProxyTypes or isinstance(x, (*rebinding.TRAINING, FakeTensor)):
                self._memo[id(x)] = x
            elif isinstance(x, Tensor):
                yield self._tensor(x, where)
            elif self._left_out(x.__self__ if isinstance(x, MethodType) else x):
                self._memo[id(x)] = None
            elif isinstance(x, nn.Module):
                _refuse_scripted(x, where)
                stack.extend(self._state(x).values())
            elif not isinstance(x, FunctionType | type | weakref.ref):
                stack.extend(rebinding.parts(x))

    def _tensor(self, x: Tensor, where: str) -> int:
        """Note how a tensor in a plain attribute is copied, and return its size if it is."""
        if self._memory.owner(x) is not None:
            self._memo[id(x)] = x  # a view of a parameter or buffer, which is rebound to the copy's
            return 0
        if x.requires_grad and x.is_leaf:
            raise ValueError(
                f"the student's {where!r} holds a tensor of shape {tuple(x.shape)} that requires grad but is "
                "no parameter of the student, so that it would not be averaged: register it (for example in "
                "an nn.ModuleList or nn.ParameterList), or freeze it with requires_grad_(False)"
            )
        if not x.is_leaf:
            self._memo[id(x)] = x.detach().clone()
        return _size(x)

    def _left_out(self, x: Any) -> bool:
        """Return whether an object is a teacher, a trainer, or a module that is more than the student."""
        if id(x) in self._registered or not isinstance(x, nn.Module):
            return _trains(x)
        if walking.is_teacher(x) or not any(id(m) in self._registered for m in x.modules()):
            return walking.is_teacher(x)
        more = any(id(t) not in self._registered for t in (*x.parameters(), *x.buffers()))
        return more or isinstance(x, DataParallel | DistributedDataParallel)


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _trains(x: Any) -> bool:
    """Return whether an object holds an optimizer, a scheduler or a data loader, as trainers do."""
    if isinstance(x, nn.Module | type) or not hasattr(x, "__dict__"):
        return False
    held: list[Any] = list(vars(x).values())
    for value in tuple(held):
        if isinstance(value, dict):
            held.extend(value.values())
        elif isinstance(value, list | tuple):
            held.extend(value)
    return any(isinstance(value, Optimizer | LRScheduler | DataLoader) for value in held)


def _warn_large(sizes: dict[str, int], model: int) -> None:
    large = {where: size for where, size in sizes.items() if size > max(_LARGE, model / 10)}
    if large:
        named = ", ".join(f"{where!r} ({size / 2**20:,.0f} MiB)" for where, size in large.items())
        warnings.warn(
            f"the teacher copies tensors that the student holds in plain attributes: {named}. If they are "
            "caches, clear them before building the teacher",
            stacklevel=8,  # the call of WMATeacher
        )


def __dir__() -> list[str]:
    return __all__
