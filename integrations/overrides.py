"""Any value of a nested configuration by its name: listed, and changed from text."""

from __future__ import annotations

import ast
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, Literal, TypeVar

from wmateacher.spec import nearest

ConfigT = TypeVar("ConfigT")


def listed(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted name and the value of everything in a dataclass, inner ones and mappings taken apart."""
    for name, value in _parts(config).items():
        if _parts(value):
            yield from listed(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def changed(config: ConfigT, assignment: str) -> ConfigT:
    """A dataclass with one value changed.

    Args:
        config: What to change.
        assignment: `NAME=VALUE`, the name as `listed` has it; numbers, `None`, `True` and tuples as in
            Python, text as it is.

    Raises:
        ValueError: There is no such name, or the value is not of its type; or what the dataclass says.
    """
    name, equals, text = assignment.partition("=")
    if not equals:
        raise ValueError(f"a change must be NAME=VALUE, got {assignment!r}")
    return _changed(config, name.strip().split("."), text.strip(), name.strip())


def _changed(config: Any, path: Sequence[str], text: str, whole: str) -> Any:
    first, *rest = path
    parts = _parts(config)
    if first not in parts:
        before = whole.rpartition(".".join(path))[0]
        raise ValueError(f"unknown setting {whole!r}; {nearest(before + first, [before + p for p in parts])}")
    if rest:
        if not _parts(parts[first]):
            raise ValueError(f"unknown setting {whole!r}: {whole[: -len('.'.join(rest)) - 1]!r} has no parts")
        value = _changed(parts[first], rest, text, whole)
    elif is_dataclass(parts[first]) or isinstance(parts[first], Mapping):
        inner = ", ".join(f"{whole}.{p}" for p in _parts(parts[first]))
        raise ValueError(f"{whole!r} is not one value: set one of its parts, {inner}")
    else:
        of_mapping = isinstance(config, Mapping)
        kind = type(parts[first]) if of_mapping else typing.get_type_hints(type(config))[first]
        value = _read(text, kind, whole)
    if isinstance(config, Mapping):
        return {**config, first: value}
    return replace(config, **{first: value})


def _parts(config: Any) -> dict[str, Any]:
    """What a dataclass or a mapping is made of; nothing for anything else."""
    if is_dataclass(config):
        return {f.name: getattr(config, f.name) for f in fields(config)}
    return dict(config) if isinstance(config, Mapping) else {}


def _read(text: str, kind: Any, name: str) -> Any:
    try:
        literal = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        literal = text
    for candidate in (literal, text):
        fitting, value = _fit(candidate, kind)
        if fitting:
            return value
    raise ValueError(f"{name} must be {_said(kind)}, got {text!r}")


def _fit(value: Any, kind: Any) -> tuple[bool, Any]:
    """Whether a value is of a type, and the value as it should be."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        found = [_fit(value, a) for a in arguments]
        return next(((True, v) for fits, v in found if fits), (False, value))
    if origin is Literal:
        return value in arguments, value
    if origin is tuple:
        if not isinstance(value, (tuple, list)):
            return False, value
        inner = [_fit(v, arguments[0]) for v in value]
        return all(fits for fits, _ in inner), tuple(v for _, v in inner)
    if kind is types.NoneType:
        return value is None, None
    if kind is float:
        numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
        return numeric, float(value) if numeric else value
    return type(value) is kind, value


def _said(kind: Any) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_said(a) for a in arguments)
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if origin is tuple:
        return f"a tuple of {_said(arguments[0])}"
    names = {int: "a whole number", float: "a number", str: "text", bool: "True or False"}
    return "None" if kind is types.NoneType else names.get(kind, str(kind))
