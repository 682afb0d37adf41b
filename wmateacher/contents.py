"""Find the state dict in a checkpoint, which may hold several of them beside other things."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

__all__ = ["find", "is_clock", "is_teacher"]

_RUN = {"identity", "parts", "series"}
"""The keys of a run's checkpoint, as `wmateacher.integrations.engine` writes it."""


def find(content: Any, label: str, key: str | None = None) -> Mapping[str, Any]:
    """Return the state dict of a model in the content of a checkpoint.

    Without a key, it is the student of a run's checkpoint, or the only state dict. The states of optimizers
    and of teachers are not a model's.

    Args:
        content: The content.
        label: The checkpoint's name for error messages.
        key: The entry that is the state dict, with dots between the keys of nested ones, as in
            `"model.student"`. It may also be the beginning of names, as `"module"` is in a teacher's state:
            then it stands for the tensors with these names. `"."` is the content itself.

    Raises:
        ValueError: If there is no state dict, if there are several and `key` is None, or if `key` chooses the
            whole state of a teacher, which has a clock that no other weights have.
    """
    found = dict(_candidates(content))
    if key is not None:
        chosen = _under(content, key)
        if is_teacher(chosen):
            raise ValueError(f"{label} holds no model under {key!r}: {_explained(chosen, key)}")
        if not _holds_tensors(chosen):
            keys = [*found, *(_join(path, "module") for path in _teachers(content))]
            raise ValueError(
                f"{label} has no state dict under {key!r}; keys with a state dict: {_listed(keys) or 'none'}"
            )
        return chosen
    if _is_run(content) and "parts.student" in found:
        return found["parts.student"]
    weights = {path: state for path, state in found.items() if any(map(_is_weight, state.values()))} or found
    if len(weights) > 1:
        raise ValueError(
            f"{label} holds several state dicts, {_listed(weights)}: pass one of them, as "
            f"key={next(iter(weights))!r} (on the command line, --key)"
        )
    if not weights:
        raise ValueError(f"{label} holds no state dict: {_explained(content)}")
    return next(iter(weights.values()))


def _candidates(content: Any, path: str = ".") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield everything that may be the state dict of a model, and its key."""
    if not isinstance(content, Mapping) or is_teacher(content) or "param_groups" in content:
        return
    if _is_run(content):
        content = {"parts": content["parts"]}
    if _holds_tensors(content):
        yield path, content
    for key, value in content.items():
        if isinstance(key, str) and not key.endswith("_extra_state"):
            yield from _candidates(value, _join(path, key))


def _teachers(content: Any, path: str = ".") -> Iterator[str]:
    if isinstance(content, Mapping):
        if is_teacher(content):
            yield path
        for key, value in content.items():
            yield from _teachers(value, _join(path, str(key)))


def _under(content: Any, key: str) -> Any:
    if not isinstance(content, Mapping):
        return None
    if key == "." or key in content:
        return content if key == "." else content[key]
    for name, value in content.items():
        if isinstance(name, str) and key.startswith(f"{name}."):
            found = _under(value, key.removeprefix(f"{name}."))
            if found is not None:
                return found
    # Names of tensors that begin with the key.
    return {
        name.removeprefix(f"{key}."): value
        for name, value in content.items()
        if isinstance(name, str) and name.startswith(f"{key}.")
    } or None


def _explained(content: Any, path: str = ".") -> str:
    """Return what a content without a model's state dict is instead."""
    teachers = list(_teachers(content, path))
    if teachers:
        key = _join(teachers[0], "module")
        return (
            f"it is the state of a teacher; for the averaged weights in it, pass key={key!r} (on the command "
            "line, --key)"
        )
    if not isinstance(content, Mapping):
        return f"no tensors by name but a {type(content).__name__}"
    if "param_groups" in content:
        return "it is the state of an optimizer"
    return f"no tensors by name; its keys are {_listed(content) or 'none'}"


def _is_run(content: Any) -> bool:
    return isinstance(content, Mapping) and content.keys() >= _RUN


def is_teacher(content: Any) -> bool:
    """Return whether a content is the whole state of a teacher."""
    return isinstance(content, Mapping) and is_clock(content.get("_extra_state"))


def is_clock(value: Any) -> bool:
    """Return whether an entry of a state dict is the clock of a teacher."""
    return isinstance(value, Mapping) and {"format", "omega", "kernel"} <= value.keys()


def _is_weight(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()) and value.ndim > 0


def _holds_tensors(content: Any) -> bool:
    return isinstance(content, Mapping) and any(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    )


def _join(path: str, key: str) -> str:
    return key if path == "." else f"{path}.{key}"


def _listed(keys: Any) -> str:
    shown = ", ".join(map(repr, list(keys)[:10]))
    return shown if len(keys) <= 10 else f"{shown} and {len(keys) - 10} more"


def __dir__() -> list[str]:
    return __all__
