"""Losses by name: registering one, and building a weighted sum of them from a spec.

A *family* says what its losses take and prepares it once for all terms of a criterion; nothing else
here knows what a loss computes.
"""

from __future__ import annotations

import copy
import inspect
import keyword
import math
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, TypeVar, overload

import torch
from torch import Tensor, nn

from wmateacher.checks import nearest
from wmateacher.losses.gathering import BatchLayout, Gather, GatherMode
from wmateacher.losses.numerics import full_precision
from wmateacher.spec import Call, parse_call, parse_sum

LossT = TypeVar("LossT", bound=Callable[..., Any])


@dataclass(frozen=True)
class Family:
    """Losses that take the same inputs.

    Attributes:
        name: As given to `register(family=...)`.
        takes: What student and teacher must be, in words.
        prepare: (student, teacher) -> both, checked, in float32 or float64, ready for every term.
        spread: (student, teacher, across) -> both with what other ranks hold, and where the terms are
            then means over this rank's rows only, its `BatchLayout`. None: batches are never joined.
    """

    name: str
    takes: str
    prepare: Callable[[Any, Any], tuple[Any, Any]]
    spread: Callable[[Any, Any, GatherMode], tuple[Any, Any, BatchLayout | None]] | None = None


@dataclass(frozen=True)
class _Entry:
    factory: Callable[..., nn.Module]
    family: Family | None
    by_rows: bool


_FAMILIES: dict[str, Family] = {}
_ENTRIES: dict[str, _Entry] = {}


def add_family(
    name: str,
    takes: str,
    prepare: Callable[[Any, Any], tuple[Any, Any]],
    spread: Callable[[Any, Any, GatherMode], tuple[Any, Any, BatchLayout | None]] | None = None,
) -> None:
    """Make a family known, so that losses can be registered in it."""
    _FAMILIES[name] = Family(name, takes, prepare, spread)


def register(
    name: str, *, family: str | None = None, override: bool = False, by_rows: bool = False
) -> Callable[[LossT], LossT]:
    """Decorator that makes a loss available to `build` under `name`.

    Example:
        >>> @register("largest", family="logits", override=True)
        ... def largest(student, teacher):
        ...     return (student.amax(1) - teacher.amax(1)).square().mean()
        >>> build("2*largest")(torch.zeros(2, 3), torch.ones(2, 3)).item()
        2.0

    It decorates a function `(student, teacher, *, parameters) -> 0-d tensor`, or an `nn.Module` class
    whose `forward` takes (student, teacher) and whose `__init__` takes the parameters. In a spec the
    parameters may be given by position or by keyword: `name(2.0)`, `name(temperature=2.0)`.

    Args:
        name: A Python identifier.
        family: "paired", "logits" or "features": the loss gets the family's checked inputs in float32
            (float64 kept), for "paired" with image and text L2-normalised. None: it takes anything
            and gets what the caller passed, the teacher detached.
        override: Replace a loss of the same name.
        by_rows: A paired loss can be built with `gather="rows"`: it is a mean over the rows it is given
            and takes its candidates from `wmateacher.losses.paired.columns`.

    Raises:
        TypeError: `name` is not a string, or what is decorated is not callable.
        ValueError: `name` is not an identifier or is taken, the family is unknown, or a function's
            signature does not have the form above.
    """
    if not isinstance(name, str):
        raise TypeError(f"register needs the loss's name, got {name!r}; write @register('my_loss')")
    # A term is a submodule of the criterion, so it cannot be called what a container already has.
    if not name.isidentifier() or keyword.iskeyword(name) or hasattr(nn.ModuleDict, name):
        raise ValueError(f"a loss's name must be a free identifier such as my_loss, got {name!r}")
    known = None if family is None else _family(family)

    def add(loss: LossT) -> LossT:
        if name in _ENTRIES and not override:
            raise ValueError(
                f"a loss named {name!r} is registered already; choose another name, or pass "
                "override=True to replace it"
            )
        _ENTRIES[name] = _Entry(_factory(name, loss), known, by_rows)
        return loss

    return add


def available(family: str | None = None) -> list[str]:
    """Names of the registered losses, sorted; those of one family where it is given.

    Raises:
        ValueError: The family is unknown.
    """
    wanted = None if family is None else _family(family)
    return sorted(n for n, e in _ENTRIES.items() if wanted is None or e.family == wanted)


def build(
    spec: str | Mapping[str, float] | Criterion, *, gather: Gather = "full", group: Any = None
) -> Criterion:
    """Build a criterion: a weighted sum of registered losses.

    With an initialised process group the paired losses are those of all ranks' batches as one, also
    where these are of different sizes: every rank gets the loss of the concatenated batch, and gradients
    whose average over the ranks, which DDP and FSDP2 take, is its gradient. `dino` moves its centre by
    the mean over all ranks. The other losses are means over the rank's own batch. Every rank must call
    the criterion, with at least one row; sizes are exchanged at each call, for which the host waits.

    Example:
        >>> criterion = build("kl + 0.5*mse(logits)")
        >>> criterion(torch.zeros(2, 3), torch.zeros(2, 3)).item()
        0.0
        >>> loss, terms = criterion(torch.zeros(2, 3), torch.ones(2, 3), return_terms=True)
        >>> sorted(terms)
        ['kl', 'mse']

    Args:
        spec: "3.90625*fd + crd + temperature_kl(2.0)", or a mapping of term to coefficient such as
            {"fd": 3.90625, "temperature_kl(2.0)": 1.0}, or a criterion, which is returned as it is.
        gather: "full": each rank computes the whole loss, B x B logits, with no communication backward;
            "rows": each its own rows' part, B_r x B logits, with one sum of B x 2 d numbers backward;
            "off": ranks stay apart, as without a process group.
        group: The `torch.distributed.ProcessGroup` whose ranks hold different rows; None: all.

    Raises:
        TypeError: `spec` is none of these, a coefficient is not a number, or a term's arguments do not
            fit.
        ValueError: The spec cannot be read, is empty, names an unknown loss or one loss twice, mixes
            families, or has a coefficient that is negative or not finite; `gather` is none of the
            three, or "rows" with a loss that was not registered for it.
    """
    if isinstance(spec, Criterion):
        return spec
    across = GatherMode(gather, group)
    if isinstance(spec, Mapping):
        return Criterion(((coefficient, parse_call(term)) for term, coefficient in spec.items()), across)
    if isinstance(spec, str):
        return Criterion(parse_sum(spec), across)
    raise TypeError(
        "spec must be a string such as '0.5*fd + crd', a mapping of term to coefficient, or a "
        f"Criterion, got {type(spec).__name__}"
    )


class Criterion(nn.Module):
    """The weighted sum sum_i c_i l_i(student, teacher); made by `build`.

    The teacher is detached here, for every loss. Autocast is switched off inside and the inputs are
    raised to float32 (float64 stays), so that logits are never rounded to half precision. Losses with
    parameters or buffers (`afd`, `dino`) are submodules: move the criterion to the device, give its
    parameters to the optimizer and save its `state_dict`.

    Attributes:
        coefficients: Name -> coefficient, read at every call. A term with coefficient 0 is computed
            and reported.
        terms: Name -> the loss as a module.
        family: The family of its losses; None where all of them take anything.
        across: Which processes' batches it takes as one.
    """

    def __init__(self, terms: Iterable[tuple[float, Call]], across: GatherMode | None = None) -> None:
        """Build the terms.

        Args:
            terms: (coefficient, call) pairs, as `wmateacher.spec.parse_sum` gives.
            across: Which processes' batches it takes as one; None: all.

        Raises:
            TypeError: As in `build`.
            ValueError: As in `build`.
        """
        super().__init__()
        self.across = across or GatherMode()
        self.coefficients: dict[str, float] = {}
        self.family: str | None = None
        self._calls: dict[str, Call] = {}
        families: dict[str, Family | None] = {}
        modules: dict[str, nn.Module] = {}
        for coefficient, call in terms:
            if call.name in modules:
                raise ValueError(
                    f"the loss {call.name!r} is given twice; write it once with one coefficient, or "
                    "build a second criterion"
                )
            entry = _entry(call.name)
            if self.across.gather == "rows" and entry.family and entry.family.spread and not entry.by_rows:
                raise ValueError(
                    f"gather='rows' with {call.name!r}, which was not registered with by_rows=True: build it "
                    "with gather='full', which any loss of the family works with"
                )
            self.coefficients[call.name] = _coefficient(call.name, coefficient)
            self._calls[call.name] = call
            families[call.name] = entry.family
            modules[call.name] = call.build(entry.factory)
            if isinstance(getattr(modules[call.name], "across", None), GatherMode):
                vars(modules[call.name])["across"] = self.across
        if not modules:
            raise ValueError("a criterion needs at least one term, got none; write such as 'fd + crd'")
        self.terms = nn.ModuleDict(modules)
        self._with_family = frozenset(n for n, f in families.items() if f is not None)
        family = _one_family(families)
        self.family = None if family is None else family.name

    @property
    def spec(self) -> str:
        """The text from which `build` makes an equal criterion."""
        return " + ".join(
            str(self._calls[name]) if c == 1 else f"{c!r}*{self._calls[name]}"
            for name, c in self.coefficients.items()
        )

    def __str__(self) -> str:
        return self.spec

    def extra_repr(self) -> str:
        """The spec, shown in the module's repr."""
        return self.spec

    @overload
    def __call__(self, student: Any, teacher: Any, *, return_terms: Literal[False] = False) -> Tensor: ...

    @overload
    def __call__(
        self, student: Any, teacher: Any, *, return_terms: Literal[True]
    ) -> tuple[Tensor, dict[str, Tensor]]: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call `forward`; declared for type checkers, which cannot see through `nn.Module.__call__`."""
        return super().__call__(*args, **kwargs)

    def forward(
        self, student: Any, teacher: Any, *, return_terms: bool = False
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Compute the weighted sum of the terms.

        Args:
            student: The student's output, of the kind that the family takes.
            teacher: The teacher's output, which receives no gradient.
            return_terms: Also return the value of each term, for logging.

        Returns:
            The loss, a 0-d tensor with the student's gradient. With `return_terms`, the pair of the
            loss and a dictionary from name to term: 0-d, detached, *before* its coefficient, and
            still on the device.

        Raises:
            TypeError: An input is not what the family takes, or a registered function does not return
                a tensor.
            ValueError: Shapes that do not match, an empty batch, or a registered function that returns
                more than one number.
        """
        teacher = _detach(teacher)
        values: dict[str, Tensor] = {}
        with full_precision(student):
            prepared, ranks = self._prepare(student, teacher)
            for name, term in self.terms.items():
                value = term(*(prepared if name in self._with_family else (student, teacher)))
                values[name] = _scalar(name, value)
            if ranks is not None:
                parts = [name for name in values if name in self._with_family]
                whole = ranks.mean(torch.stack([values[name] for name in parts]))
                values |= dict(zip(parts, whole, strict=True))
            weighted = [self.coefficients[name] * value for name, value in values.items()]
            total = torch.stack(weighted).sum()
        if not return_terms:
            return total
        return total, {name: value.detach() for name, value in values.items()}

    def _prepare(self, student: Any, teacher: Any) -> tuple[tuple[Any, Any], BatchLayout | None]:
        if self.family is None:
            return (student, teacher), None
        family = _FAMILIES[self.family]
        student, teacher = family.prepare(student, teacher)
        if family.spread is None:
            return (student, teacher), None
        student, teacher, ranks = family.spread(student, teacher, self.across)
        return (student, teacher), ranks


class _FunctionLoss(nn.Module):
    """A registered function with its parameters."""

    def __init__(self, function: Callable[..., Tensor], parameters: Mapping[str, Any]) -> None:
        super().__init__()
        self.function = function
        self.keywords = dict(parameters)

    def forward(self, student: Any, teacher: Any) -> Tensor:
        return self.function(student, teacher, **self.keywords)

    def extra_repr(self) -> str:
        return ", ".join([self.function.__name__, *(f"{k}={v!r}" for k, v in self.keywords.items())])


def _factory(name: str, loss: Any) -> Callable[..., nn.Module]:
    if isinstance(loss, type) and issubclass(loss, nn.Module):
        return loss
    if not inspect.isfunction(loss):
        raise TypeError(f"{name}: register a function or an nn.Module class, got {loss!r}")
    inputs, parameters = _split(list(inspect.signature(loss).parameters.values()))
    if len(inputs) != 2 or any(p.kind in _VARIADIC for p in parameters):
        raise ValueError(
            f"{name}: a loss function takes (student, teacher, *, named parameters), got "
            f"{loss.__name__}{inspect.signature(loss)}"
        )
    signature = inspect.Signature(
        [p.replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD) for p in parameters]
    )

    def factory(*args: Any, **kwargs: Any) -> nn.Module:
        return _FunctionLoss(loss, signature.bind(*args, **kwargs).arguments)

    # `Call.build` reads it to check a spec's arguments and to say what is allowed.
    factory.__signature__ = signature  # type: ignore[attr-defined]
    return factory


_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)

Parameters = list[inspect.Parameter]


def _split(parameters: Parameters) -> tuple[Parameters, Parameters]:
    inputs = [p for p in parameters[:2] if p.kind in _POSITIONAL]
    return inputs, parameters[len(inputs) :]


def _family(name: str) -> Family:
    if name not in _FAMILIES:
        raise ValueError(f"unknown family {name!r}; {nearest(str(name), _FAMILIES)}")
    return _FAMILIES[name]


def _entry(name: str) -> _Entry:
    if name not in _ENTRIES:
        raise ValueError(f"unknown loss {name!r}; {nearest(name, _ENTRIES)}")
    return _ENTRIES[name]


def _coefficient(name: str, value: Any) -> float:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"the coefficient of {name!r} must be a number, got {value!r}")
    if not math.isfinite(value) or value < 0:
        raise ValueError(
            f"the coefficient of {name!r} must be finite and >= 0, got {value!r}; "
            "write such as 0.5*fd, or leave the term out"
        )
    return float(value)


def _one_family(families: Mapping[str, Family | None]) -> Family | None:
    found = {f.name: f for f in families.values() if f is not None}
    if len(found) > 1:
        who = "; ".join(
            f"{', '.join(n for n, g in families.items() if g == f)} ({f.name}) takes {f.takes}"
            for f in found.values()
        )
        raise ValueError(
            f"these losses take different inputs: {who}. Build one criterion for each family and add "
            "the losses"
        )
    return next(iter(found.values()), None)


def _scalar(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"the loss {name!r} must return a 0-d tensor, got {type(value).__name__}")
    if value.ndim != 0:
        raise ValueError(
            f"the loss {name!r} must return a 0-d tensor, got shape {list(value.shape)}; "
            "reduce it, for instance with .mean()"
        )
    return value


def _detach(value: Any) -> Any:
    """`value` with every tensor in its tuples, lists and dictionaries detached."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_detach, value))
    if isinstance(value, tuple | list):
        return type(value)(map(_detach, value))
    if isinstance(value, MutableMapping):
        detached = copy.copy(value)
        for key in value:
            detached[key] = _detach(value[key])
        return detached
    return value
