"""The grammar of kernel and loss strings: `name(arg, key=value)` and weighted sums of such calls.

Python's parser reads the text, and only names, calls, constants and (for sums) `number * call + ...` are
accepted in the syntax tree. Nothing is ever evaluated.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, TypeVar

__all__ = ["Call", "Value", "canonical", "parse_call", "parse_sum"]

Value = float | int | bool | str | None
_T = TypeVar("_T")

# Python's parser needs memory and recursion in proportion to the text. No kernel or sum of losses is longer.
_LONGEST = 10_000


@dataclass(frozen=True)
class Call:
    """A parsed `name(*args, **kwargs)`. A bare `name` is a call without arguments.

    `str` returns the canonical text, without spaces, which parses back to an equal `Call`.
    """

    name: str
    args: tuple[Value, ...] = ()
    kwargs: Mapping[str, Value] = field(default_factory=dict)

    def __str__(self) -> str:
        inside = [_text(a) for a in self.args] + [f"{k}={_text(v)}" for k, v in self.kwargs.items()]
        return f"{self.name}({','.join(inside)})" if inside else self.name

    def build(self, factory: Callable[..., _T]) -> _T:
        """Call `factory` with these arguments.

        Raises:
            TypeError: If the arguments do not fit the factory's signature; the message shows its usage.
        """
        signature = inspect.signature(factory)
        try:
            signature.bind(*self.args, **self.kwargs)
        except TypeError as error:
            usage = ",".join(_usage(p) for p in signature.parameters.values())
            raise TypeError(f"{self}: {error}; write {self.name}({usage})") from None
        return factory(*self.args, **self.kwargs)


def parse_call(text: str) -> Call:
    """Parse a single `name(arg, key=value)`.

    Raises:
        ValueError: If the text is not in the grammar.
    """
    return _read(text, _call)


def parse_sum(text: str) -> list[tuple[float, Call]]:
    """Parse `number*name(...) + name(...) + ...` into (coefficient, call) pairs, in order.

    Raises:
        ValueError: If the text is not in the grammar.
    """
    return _read(text, _terms)


def canonical(obj: Any, name: str) -> Call:
    """Return the call that rebuilds a dataclass instance, without fields that have their default value."""
    args: list[Value] = []
    kwargs: dict[str, Value] = {}
    for f in fields(obj):
        value = getattr(obj, f.name)
        if f.default is not MISSING and value == f.default:
            continue
        # A number may be positional only while no field before it is left out.
        in_order = len(args) == fields(obj).index(f) and not isinstance(value, str) and not f.kw_only
        if in_order:
            args.append(value)
        else:
            kwargs[f.name] = value
    return Call(name, tuple(args), kwargs)


def _usage(parameter: inspect.Parameter) -> str:
    if parameter.default is not parameter.empty and parameter.default is not None:
        return f"{parameter.name}={_text(parameter.default)}"
    return f"{parameter.name}=..." if parameter.kind is parameter.KEYWORD_ONLY else parameter.name


def _text(value: Value) -> str:
    if isinstance(value, str):
        return value if _is_name(value) else repr(value)
    return repr(value)


def _is_name(value: str) -> bool:
    return value.isidentifier() and value not in ("True", "False", "None")


def _read(text: str, read: Callable[[ast.expr, str], _T]) -> _T:
    """Parse a text and read its syntax tree with a function of the tree and the text."""
    if not isinstance(text, str):
        raise TypeError(f"expected a string such as 'beta(0.5,0.5)', got {text!r}")
    if len(text) > _LONGEST:
        raise _refuse(text, f"it has {len(text)} characters, more than {_LONGEST}")
    try:
        return read(_parse(text), text)
    except (RecursionError, MemoryError):
        raise _refuse(text, "it has too many levels or terms") from None


def _parse(text: str) -> ast.expr:
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError):
        raise _refuse(text, "it does not parse") from None


def _refuse(text: str, why: str) -> ValueError:
    return ValueError(
        f"cannot read {_short(text)!r}: {why}; write name, name(1.0, key=value) "
        "or, where a sum is meant, 0.5*name + name(1.0)"
    )


def _source(node: ast.expr) -> str:
    """Return a part of the text for an error message."""
    return repr(_short(ast.unparse(node)))


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}..."


def _call(node: ast.expr, text: str) -> Call:
    if not isinstance(node, ast.Call):
        return Call(_dotted(node, text))
    kwargs: dict[str, Value] = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise _refuse(text, "'**' is not allowed")
        if keyword.arg in kwargs:
            raise _refuse(text, f"it has {keyword.arg!r} twice")
        kwargs[keyword.arg] = _value(keyword.value, text)
    return Call(_dotted(node.func, text), tuple(_value(a, text) for a in node.args), kwargs)


def _dotted(node: ast.expr, text: str) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value, text)}.{node.attr}"
    raise _refuse(text, f"{_source(node)} is not a name")


def _number(node: ast.expr) -> float | int | None:
    """Return a signed number, or None if the node is something else."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        inner = _number(node.operand)
        negative = isinstance(node.op, ast.USub)
        return None if inner is None else -inner if negative else inner
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value  # type: ignore[return-value]
    return None


def _value(node: ast.expr, text: str) -> Value:
    number = _number(node)
    if number is not None:
        return number
    if isinstance(node, ast.Constant) and isinstance(node.value, str | bool | None):
        return node.value
    if isinstance(node, ast.Name):
        return node.id
    raise _refuse(text, f"{_source(node)} is not a number or a name")


def _terms(node: ast.expr, text: str) -> list[tuple[float, Call]]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _terms(node.left, text) + _terms(node.right, text)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        coefficient = _number(node.left)
        if coefficient is None:
            raise _refuse(text, f"{_source(node.left)} is not a number")
        # By way of its text, a whole number beyond every float becomes infinity, as 1e999 does.
        return [(float(str(coefficient)), _call(node.right, text))]
    return [(1.0, _call(node, text))]


def __dir__() -> list[str]:
    return __all__
