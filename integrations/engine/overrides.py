"""Any value of a nested configuration by its name: listed, and changed from text."""

from __future__ import annotations

import ast
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, Literal, TypeVar

from wmateacher.checks import nearest

ConfigT = TypeVar("ConfigT")


def listed(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted name and the value of everything in a dataclass, inner ones and mappings taken apart."""
    for name, value in _parts(config).items():
        if _parts(value):
            yield from listed(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def changed(config: ConfigT, assignments: Sequence[str]) -> ConfigT:
    """A dataclass with values changed, all of them at once, so that those that go together may.

    Args:
        config: What to change.
        assignments: `NAME=VALUE`, the names as `listed` has them; numbers, `None`, `True` and tuples as in
            Python, text as it is.

    Raises:
        ValueError: There is no such name, or the value is not of its type; or what the dataclass says.
    """
    tree: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or not name.strip():
            raise ValueError(f"a change must be NAME=VALUE, got {assignment!r}")
        *path, last = name.strip().split(".")
        branch = tree
        for part in path:
            branch = branch.setdefault(part, {})
            if not isinstance(branch, dict):
                raise ValueError(f"unknown setting {name.strip()!r}: {part!r} has no parts")
        branch[last] = text.strip()
    return _changed(config, tree, "")


def _changed(config: Any, tree: Mapping[str, Any], prefix: str) -> Any:
    parts, made = _parts(config), {}
    for name, change in tree.items():
        whole = prefix + name
        if name not in parts:
            raise ValueError(f"unknown setting {whole!r}; {nearest(whole, [prefix + p for p in parts])}")
        inner = _parts(parts[name])
        if isinstance(change, Mapping):
            if not inner:
                raise ValueError(
                    f"unknown setting {whole + '.' + next(iter(change))!r}: {whole!r} has no parts"
                )
            made[name] = _changed(parts[name], change, f"{whole}.")
        elif is_dataclass(parts[name]) or isinstance(parts[name], Mapping):
            names = ", ".join(f"{whole}.{p}" for p in inner)
            raise ValueError(f"{whole!r} is not one value: set one of its parts, {names}")
        else:
            of_mapping = isinstance(config, Mapping)
            kind = type(parts[name]) if of_mapping else typing.get_type_hints(type(config))[name]
            made[name] = _read(change, kind, whole)
    return {**config, **made} if isinstance(config, Mapping) else replace(config, **made)


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
