"""Make what a copied module calls compute with the copy instead of the original.

`copy.deepcopy` shares functions, so a patched `forward` whose closure holds the original, or one of its bound
methods, computes with the original's weights. Here such functions are built anew around the copy.
"""

from __future__ import annotations

import copy
import dis
import functools
import gc
import inspect
import logging
import sys
import sysconfig
import types
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.data import DataLoader, Dataset

from wmateacher import walking

__all__ = ["TRAINING", "Memory", "Rebinder", "attributes", "parts"]

TRAINING = (Optimizer, LRScheduler, DataLoader, Dataset)
"""Objects that may hold a model and its data, but that no forward pass computes with."""

# Objects that hold nothing to compute with, or that lead everywhere.
_LEAVES = (
    *(Tensor, *TRAINING, logging.Logger, logging.Handler),
    *(types.ModuleType, types.FrameType, types.CodeType),
)
_ATOMS = (int, float, str, bytes, type(None))
# The globals of installed packages are not searched: their registries lead everywhere.
_INSTALLED = ("site-packages", "dist-packages", sysconfig.get_path("stdlib"))


def attributes(table: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield a module's plain attributes, except its tensors, submodules and values that hold nothing."""
    for name, value in list(table.items()):
        empty = isinstance(value, dict | list | tuple | set) and not value
        if not (empty or isinstance(value, _ATOMS) or name in ("_parameters", "_buffers", "_modules")):
            yield name, value


def parts(x: Any) -> Iterable[Any]:
    """Return the objects that an object holds, as far as it may compute with them."""
    if isinstance(x, weakref.ProxyTypes):
        return (_referent(x),)
    if isinstance(x, _LEAVES) or walking.is_teacher(x):
        return ()
    if isinstance(x, torch.jit.ScriptModule):
        return (*x.parameters(), *x.buffers())
    if isinstance(x, types.FunctionType):
        held = (x.__closure__, x.__defaults__, x.__kwdefaults__, x.__dict__)
        return (*held, *_used_globals(x).values(), *_used_attributes(x))
    if isinstance(x, type):
        users = "<locals>" in x.__qualname__ or not _is_installed(sys.modules.get(x.__module__))
        return (*_class_parts(x), *x.__bases__) if users else ()
    if isinstance(x, weakref.ref):
        return (x(), x.__callback__)
    if isinstance(x, functools._lru_cache_wrapper):
        return (x.__wrapped__,)  # without the arguments that it was called with
    if isinstance(x, types.GeneratorType):  # before Python 3.11, its values are held by its frame
        return () if x.gi_frame is None else tuple(x.gi_frame.f_locals.values())
    return gc.get_referents(x)


def _class_parts(kind: type) -> Iterator[Any]:
    """Yield what a class may compute with: what its methods enclose, and modules and functions in it."""
    for value in vars(kind).values():
        function = getattr(value, "__func__", None) or getattr(value, "fget", None) or value
        if isinstance(function, types.FunctionType):
            yield from function.__closure__ or ()
        elif isinstance(value, nn.Module | Tensor | types.MethodType | functools.partial):
            yield value


def _is_installed(module: types.ModuleType | None) -> bool:
    """Return whether a module is a builtin or in an installed package, and not the user's own."""
    file = getattr(module, "__file__", None)
    if file is None:  # a notebook has none
        return module is None or module.__name__ != "__main__"
    return any(folder in file for folder in _INSTALLED)


def _names(function: types.FunctionType) -> set[str]:
    """Return the names of globals and attributes in a function outside of installed packages."""
    names, codes = set[str](), [function.__code__]
    if any(folder in function.__code__.co_filename for folder in _INSTALLED):
        return names
    while codes:
        code = codes.pop()
        names.update(code.co_names)
        codes.extend(c for c in code.co_consts if isinstance(c, types.CodeType))
    return names


def _used_globals(function: types.FunctionType) -> dict[str, Any]:
    """Return the global variables that a function may use."""
    table = function.__globals__
    return {name: table[name] for name in _names(function) if name in table}


def _used_attributes(function: types.FunctionType) -> list[Any]:
    """Return the attributes of the user's own Python modules that a function may use."""
    names = _names(function)
    values = [*_used_globals(function).values(), *gc.get_referents(*function.__closure__ or ())]
    tables = [vars(m) for m in values if isinstance(m, types.ModuleType) and not _is_installed(m)]
    return [table[name] for table in tables for name in names if name in table]


def _loaded_globals(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """Yield the global variables that a function loads: not an attribute `self.body` if there is a `body`."""
    used, codes = _used_globals(function), [function.__code__]
    while used and codes:
        code = codes.pop()
        codes.extend(c for c in code.co_consts if isinstance(c, types.CodeType))
        loaded = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
        yield from ((name, used[name]) for name in used.keys() & loaded)


def _methods(kind: type, name: str) -> Iterator[types.FunctionType]:
    """Yield the methods and property getters of a name in a class and its bases, without decorators."""
    for base in kind.__mro__:
        value = vars(base).get(name)
        value = getattr(value, "__func__", None) or getattr(value, "fget", None) or value
        if isinstance(value, types.FunctionType):
            yield inspect.unwrap(value)


def _referent(proxy: Any) -> Any:
    """Return the object behind a weak proxy, whose attributes are the object's; None if it is gone."""
    try:
        return proxy.__reduce_ex__.__self__
    except ReferenceError:
        return None


class Memory:
    """The memory of a model's tensors, by which views of them are recognised."""

    def __init__(self, tensors: Iterable[Tensor]):
        """Look up where the tensors are stored."""
        self._tensors = {address: t for t in tensors if (address := self._address(t))}

    def owner(self, tensor: Tensor) -> Tensor | None:
        """Return a tensor of the model that uses the same memory as the given one, or None."""
        return self._tensors.get(self._address(tensor)) if self._tensors else None

    @staticmethod
    def _address(tensor: Tensor) -> int:
        plain = tensor.layout == torch.strided and not is_traceable_wrapper_subclass(tensor)
        try:
            return tensor.untyped_storage().data_ptr() if plain and not tensor.is_meta else 0
        except RuntimeError:  # such as the fake tensors in an exported graph
            return 0


class Rebinder:
    """Replaces an original's modules and tensors by their copies, in whatever a copy of it calls."""

    def __init__(self, pairs: Sequence[tuple[Any, Any]], memo: dict[int, Any]):
        """Take the result of a deep copy.

        Args:
            pairs: The original's modules and tensors with their copies. Shared ones are their own copies.
            memo: The memo of the deep copy: what it made, by the `id` of the original.
        """
        self._memo, self._own = memo, {id(new) for _, new in pairs}
        self._copies = {id(old): (old, new) for old, new in pairs if old is not new}
        self._memory = Memory(old for old, _ in self._copies.values() if isinstance(old, Tensor))
        # Objects whose ids are kept must stay alive, so that no other object gets the same id.
        self._clean: dict[int, Any] = {}
        self._done: dict[int, tuple[Any, Any]] = {}
        self._unfilled: list[tuple[types.CellType, types.CellType]] = []
        self._kinds: set[type] = set()
        self._fresh: set[int] = set()
        self._note_fresh()

    def __call__(self, module: nn.Module, path: str) -> None:
        """Rebind all attributes of a copied module, whose path in the copy is `path`.

        Raises:
            ValueError: If an attribute holds the original in a way that cannot be rebound.
        """
        for name, value in attributes(vars(module)):
            try:
                vars(module)[name] = new = self._new(value)
                if self._leads(new):
                    raise _UnboundError(new)
            except _UnboundError as error:
                raise _refusal(f"{path}.{name}", f"{type(error.args[0]).__qualname__} object") from None
        for kind in () if type(module) in self._kinds else type(module).__mro__:
            if kind.__module__.partition(".")[0] != "torch" and any(map(self._leads, _class_parts(kind))):
                raise _refusal(path, f"method or attribute of its class {kind.__qualname__}")
        if type(module) not in self._kinds:
            self._refuse_globals(type(module))
        self._kinds.add(type(module))

    def _refuse_globals(self, kind: type) -> None:
        """Refuse a class whose `forward` computes with a global variable that is a part of the original."""
        seen, stack = set[types.FunctionType](), list(_methods(kind, "forward"))
        while stack:
            function = stack.pop()
            if function in seen:
                continue
            seen.add(function)
            stack.extend(method for name in _names(function) for method in _methods(kind, name))
            for name, value in _loaded_globals(function):
                if isinstance(value, types.FunctionType):
                    stack.append(value)
                elif self._is_part(value):
                    raise ValueError(
                        f"{function.__qualname__}, which the student's {kind.__qualname__} computes with, "
                        f"uses the global variable {name!r}, which is or holds a part of the student, so "
                        "that the teacher would compute with the student's weights instead of their average: "
                        f"use the attribute of the module, such as self.{name}, in place of it"
                    )

    def _is_part(self, x: Any) -> bool:
        """Return whether an object is a part of the original, or a collection of modules with one."""
        if not isinstance(x, dict | list | tuple):
            x = (x,)
        values = list(x.values() if isinstance(x, dict) else x)
        if not all(isinstance(value, nn.Module | Tensor) for value in values):
            return False
        modules = [m for v in values if isinstance(v, nn.Module) for m in walking.modules(v)]
        tensors = [v for v in values if isinstance(v, Tensor)]
        owned = any(self._memory.owner(t) is not None for t in tensors)
        return owned or any(id(part) in self._copies for part in (*modules, *tensors))

    def _leads(self, x: Any) -> bool:
        """Return whether an object holds a part of the original, directly or through other objects."""
        seen, stack = {}, [x]
        while stack:
            x = stack.pop()
            if id(x) in seen or id(x) in self._clean or id(x) in self._own:
                continue
            if id(x) in self._copies or (issubclass(type(x), Tensor) and self._memory.owner(x) is not None):
                return True
            seen[id(x)] = x
            stack.extend(parts(x))
        self._clean |= seen
        return False

    def _new(self, x: Any) -> Any:
        """Return an object as the copy must hold it: the same one if it holds nothing of the original."""
        for known in (self._copies, self._done):
            if id(x) in known:
                return known[id(x)][1]
        if self._copied(x):
            return self._new(self._memo[id(x)])
        return self._rebuild(x) if self._leads(x) else x

    def _copied(self, x: Any) -> bool:
        """Return whether the deep copy has made another object from this one."""
        return self._memo.get(id(x), x) is not x and self._memo[id(x)] is not None

    def _rebuild(self, x: Any) -> Any:
        match x:
            case weakref.ProxyType() | weakref.CallableProxyType():
                return weakref.proxy(self._new(_referent(x)))
            case weakref.WeakMethod():
                return weakref.WeakMethod(self._new(x()))
            case weakref.ref() if type(x) is weakref.ref:
                return weakref.ref(self._new(x()), self._new(x.__callback__))
            case Tensor():
                return self._view(x)
            case types.FunctionType():
                return self._function(x)
            case types.MethodType():
                return types.MethodType(self._new(x.__func__), self._new(x.__self__))
            case types.BuiltinMethodType() | types.MethodWrapperType():
                return getattr(self._new(x.__self__), x.__name__)
            case functools.partial():
                named = {key: self._new(value) for key, value in x.keywords.items()}
                return self._fill(x, type(x)(self._new(x.func), *map(self._new, x.args), **named))
            case functools._lru_cache_wrapper():
                return functools.lru_cache(**x.cache_parameters())(self._new(x.__wrapped__))
            case tuple():
                return tuple.__new__(type(x), map(self._new, x))
            case frozenset():
                return frozenset(map(self._new, x))
            case dict() | list() | set() | deque():
                return self._container(x)
            case _:
                return self._object(x)

    def _function(self, x: types.FunctionType) -> types.FunctionType:
        closure = None if x.__closure__ is None else tuple(map(self._cell, x.__closure__))
        table, used = x.__globals__, {n: v for n, v in _used_globals(x).items() if self._leads(v)}
        if used:
            table = self._done.setdefault(id(table), (table, _Globals(table)))[1]
        # torch.compile caches by code object, without looking at whose globals a function has.
        code = x.__code__.replace()
        new = self._begin(x, types.FunctionType(code, table, x.__name__, x.__defaults__, closure))
        functools.update_wrapper(new, x, updated=())
        # A function may lead to itself, which is why it is there before what it holds.
        while self._unfilled:
            cell, original = self._unfilled.pop()
            cell.cell_contents = self._new(original.cell_contents)
        table.update({name: self._new(value) for name, value in used.items() if name not in table})
        new.__defaults__, new.__kwdefaults__ = self._new(x.__defaults__), self._new(x.__kwdefaults__)
        vars(new).clear()
        return self._fill(x, new)

    def _cell(self, x: types.CellType) -> types.CellType:
        """Return a cell that is filled later, or the same one if its value stays the same."""
        if id(x) not in self._done and (self._leads(x) or any(map(self._copied, parts(x)))):
            self._unfilled.append((self._begin(x, types.CellType()), x))
        return self._done[id(x)][1] if id(x) in self._done else x

    def _container(self, x: Any) -> Any:
        new = self._begin(x, x if id(x) in self._fresh else copy.copy(x))
        if isinstance(x, dict):
            items = [(self._new(key), self._new(value)) for key, value in x.items()]
            new.clear()
            new.update(items)
        else:
            values = list(map(self._new, x))
            new.clear()
            new.update(values) if isinstance(x, set) else new.extend(values)
        return self._fill(x, new)

    def _object(self, x: Any) -> Any:
        if id(x) in self._fresh:
            return self._fill(x, self._begin(x, x))
        if isinstance(x, nn.Module):
            known = self._copies.keys() | self._own
            more = any(id(t) not in known for t in (*x.parameters(), *x.buffers()))
            if more or isinstance(x, torch.jit.ScriptModule | nn.parallel.DistributedDataParallel):
                raise _UnboundError(x)
            new = copy.deepcopy(x, self._memo)  # a wrapper around modules that are copied already
            self._note_fresh()
            return self._new(new)
        if not callable(x) or isinstance(x, type) or not hasattr(x, "__dict__"):
            raise _UnboundError(x)
        try:
            new = object.__new__(type(x))
        except TypeError:
            raise _UnboundError(x) from None
        return self._fill(x, self._begin(x, new))

    def _view(self, x: Tensor) -> Tensor:
        """Return the same view of the copy's memory as a tensor is of the original's."""
        owner = self._memory.owner(x)
        assert owner is not None
        own = self._copies[id(owner)][1]
        theirs, ours = owner.untyped_storage(), own.untyped_storage()
        if theirs.nbytes() != ours.nbytes() or own.stride() != owner.stride():
            raise _UnboundError(x)
        view = torch.empty(0, dtype=x.dtype, device=own.device)
        return self._begin(x, view.set_(ours, x.storage_offset(), x.size(), x.stride()))

    def _fill(self, x: Any, new: Any) -> Any:
        for name, value in list(getattr(x, "__dict__", {}).items()):
            vars(new)[name] = self._new(value)
        return new

    def _begin(self, x: Any, new: Any) -> Any:
        """Note a replacement, before the parts of it are rebound, which may lead back to it."""
        self._done[id(x)] = x, new
        return new

    def _note_fresh(self) -> None:
        """Note which objects the deep copy made. Only these may be changed in place."""
        self._fresh.update(id(new) for old, new in self._memo.items() if id(new) != old)


class _Globals(dict[str, Any]):
    """The globals of a function, of which some have other values. The rest is looked up when it is used."""

    def __init__(self, base: dict[str, Any]):
        super().__init__({name: base[name] for name in ("__builtins__", "__name__") if name in base})
        self._base = base

    def __missing__(self, name: str) -> Any:
        return self._base[name]


class _UnboundError(Exception):
    """Raised with an object that holds the original and cannot be rebound."""


def _refusal(where: str, what: str) -> ValueError:
    return ValueError(
        f"the student's {where.strip('.')!r} holds the student itself in a {what}, through which a copy "
        "would compute with the student's weights instead of their average: remove it before building the "
        "teacher, or pass module_factory=FACTORY, a function that builds a module of the same architecture"
    )


def __dir__() -> list[str]:
    return __all__
