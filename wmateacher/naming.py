"""Names of tensors without what wrappers add to them, for modules and for state dicts.

DDP, DataParallel, torch.compile, activation checkpointing, DeepSpeed and Lightning Fabric wrap a module, and
the names of its tensors get a component such as `module` or `_orig_mod`. In a module, wrappers are recognised
by their type, so that an attribute of the user's own that is called `module` stays in the name. A state dict
has no types: there, a component is left out only if the names then match those on the other side.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from wmateacher import walking

__all__ = ["align", "canonical", "load_keys", "modules", "resolve", "saved_key", "unwrap"]

# The module and the name of each wrapper, the attributes that hold the wrapped module, and whether the keys
# of `state_dict` have them.
_WRAPPERS = (
    ("torch.nn.parallel", "DistributedDataParallel", ("module",), True),
    ("torch.nn.parallel", "DataParallel", ("module",), True),
    ("torch._dynamo.eval_frame", "OptimizedModule", ("_orig_mod",), True),
    ("deepspeed.runtime.engine", "DeepSpeedEngine", ("module",), True),
    (
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
        "ActivationWrapper",
        ("_checkpoint_wrapped_module",),
        False,
    ),
    ("lightning.fabric.wrappers", "_FabricModule", ("_forward_module", "_original_module"), False),
    ("lightning_fabric.wrappers", "_FabricModule", ("_forward_module", "_original_module"), False),
)

_PRIVATE = frozenset(a for *_, attributes, _ in _WRAPPERS for a in attributes if a.startswith("_"))
_COMPONENTS = _PRIVATE | {"module"}


# --- modules ------------------------------------------------------------------------------------------


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside any nesting of wrappers."""
    while found := _wrapper(model):
        model = model._modules[found[0][0]]  # type: ignore[assignment]
    return model


def canonical(model: nn.Module, keys: Iterable[str]) -> dict[str, str]:
    """Return the canonical names for paths of a module's tensors, or for keys of its `state_dict`."""
    # Only wrappers' components are left out, so that the other keys, in most models all, stay as they are.
    split = ((key, key.split(".")) for key in keys)
    return {k: k if _COMPONENTS.isdisjoint(s) else ".".join(_canonical(model, s)) for k, s in split}


def modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return a module's submodules by canonical name."""
    paths = dict(walking.named_modules(model, remove_duplicate=False))
    # A wrapper's name is also that of the module inside it, which comes later.
    return {name: paths[path] for path, name in canonical(model, paths).items()}


def saved_key(model: nn.Module, name: str) -> str:
    """Return the key of a canonical name in a module's `state_dict`."""
    return next(_spelled(model, name.split("."), lambda inner, saved: inner[:1] if saved else [None]))


def load_keys(model: nn.Module, name: str) -> list[str]:
    """Return the keys that `nn.Module.load_state_dict` looks up in a module for a canonical name."""
    # Activation checkpointing inserts its component itself. Fabric's wrapper holds its module twice, and
    # looks for both inside of another module.
    return list(
        _spelled(model, name.split("."), lambda inner, saved: inner if saved or len(inner) > 1 else [None])
    )


def _wrapper(module: nn.Module) -> tuple[tuple[str, ...], bool] | None:
    """Return the attributes of a wrapper's wrapped module and whether `state_dict` shows them."""
    kind: Any = type(module)
    # torch.compile warns of cached functions.
    return (_look_up if torch.compiler.is_compiling() else _cached)(kind)


def _look_up(kind: Any) -> tuple[tuple[str, ...], bool] | None:
    for module, name, attributes, saved in _WRAPPERS:
        # If the class of a wrapper has not been imported, nothing is an instance of it.
        base = getattr(sys.modules.get(module), name, None)
        if base is not None and issubclass(kind, base):
            return attributes, saved
    return None


_cached = functools.lru_cache(maxsize=1024)(_look_up)


def _canonical(module: nn.Module | None, parts: Sequence[str]) -> list[str]:
    names = []
    for part in parts:
        while module is not None and (found := _wrapper(module)) and part not in found[0]:
            module = module._modules[found[0][0]]  # a wrapper that the key does not show
        if module is None or not _wrapper(module):
            names.append(part)
        module = _child(module, part)
    return names


def _spelled(
    module: nn.Module | None,
    parts: Sequence[str],
    attributes: Callable[[Sequence[str], bool], Sequence[str | None]],
) -> Iterator[str]:
    """Yield the keys of a canonical name, with the attributes of each wrapper that are asked for."""
    if module is not None and (found := _wrapper(module)):
        for attribute in attributes(*found):
            inner = module._modules[found[0][0] if attribute is None else attribute]
            for rest in _spelled(inner, parts, attributes):
                yield rest if attribute is None else f"{attribute}.{rest}"
    elif len(parts) == 1:
        yield parts[0]
    else:
        for rest in _spelled(_child(module, parts[0]), parts[1:], attributes):
            yield f"{parts[0]}.{rest}"


def _child(module: nn.Module | None, name: str) -> nn.Module | None:
    return module._modules[name] if module is not None and name in module._modules else None


# --- state dicts --------------------------------------------------------------------------------------

_Renaming = Callable[[str], str]


def resolve(keys: Iterable[str], names: Collection[str]) -> dict[str, str]:
    """Pair the keys of a state dict with the canonical names of a module.

    Args:
        keys: The keys, written by the module itself or by one with more or with fewer wrappers.
        names: The canonical names.

    Returns:
        The name of each key that has one. Of the ways to leave out wrappers' components, it is the one that
            gives the most names, and the one that leaves out the least if several do.
    """
    keys, best = list(keys), dict[str, str]()
    for way in (_nothing, *_WAYS):
        theirs, ours = _renamed(keys, way(keys)), _renamed(names, way(names))
        if theirs is not None and ours is not None:
            pairs = {key: ours[name] for name, key in theirs.items() if name in ours}
            best = max(best, pairs, key=len)  # the first of equals
    return best


def plain(key: str) -> str:
    """Return a key without the components that only wrappers have, such as `_orig_mod`."""
    return ".".join(part for part in key.split(".") if part not in _PRIVATE)


def align(states: Sequence[Collection[str]]) -> list[dict[str, str]]:
    """Find common names for the keys of several state dicts.

    Components that only wrappers have, such as `_orig_mod`, are left out. `module` is left out where the
    names of the state dicts agree without it and do not agree with it.

    Args:
        states: The keys of each state dict.

    Returns:
        The names of each one's keys. If the keys do not agree in any way, only components that wrappers alone
            have are left out.
    """
    plainest = min(states, key=lambda keys: sum(map(len, keys)))
    for way in _WAYS:
        renamed = [_renamed(keys, way(keys)) for keys in states]
        ours = _renamed(plainest, way(plainest))
        if ours is not None and all(names is not None and names.keys() == ours.keys() for names in renamed):
            return [{key: plain(ours[n]) for n, key in names.items()} for names in renamed if names]
    return [
        {k: n for n, k in (_renamed(s, _private(s)) or dict(zip(s, s, strict=True))).items()} for s in states
    ]


def _nothing(keys: Collection[str]) -> _Renaming:
    return str


def _private(keys: Collection[str]) -> _Renaming:
    return plain


def _common(keys: Collection[str]) -> _Renaming:
    """Leave out a `module` in front of all keys too."""
    names = list(map(plain, keys))
    count = 0
    while names and all(name.startswith("module." * (count + 1)) for name in names):
        count += 1
    return lambda key: plain(key).removeprefix("module." * count)


def _every(keys: Collection[str]) -> _Renaming:
    """Leave out every component that a wrapper could have added."""
    return lambda key: ".".join(part for part in key.split(".") if part not in _COMPONENTS)


_WAYS: tuple[Callable[[Collection[str]], _Renaming], ...] = (_private, _common, _every)


def _renamed(keys: Iterable[str], rename: _Renaming) -> dict[str, str] | None:
    """Return the keys by their new names, or None if two keys would get the same name."""
    keys = list(keys)
    renamed = {rename(key): key for key in keys}
    return renamed if len(renamed) == len(keys) else None


def __dir__() -> list[str]:
    return __all__
