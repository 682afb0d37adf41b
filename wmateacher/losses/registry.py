"""Losses by name: register a loss, and build a weighted sum of losses from a spec.

A *family* is a group of losses that take the same inputs. It checks and prepares the inputs once for all
terms of a criterion. This module does not depend on what a loss computes.
"""

from __future__ import annotations

import copy
import functools
import inspect
import keyword
import math
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from contextlib import nullcontext
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, TypeVar, cast, overload

import torch
from torch import Tensor, nn

from wmateacher import checks
from wmateacher.losses.gathering import BatchLayout, Gather, GatherMode
from wmateacher.losses.numerics import first_tensor, full_precision, working_dtype
from wmateacher.spec import Call, parse_call, parse_sum

__all__ = ["Criterion", "Family", "add_family", "available", "build", "register"]

LossT = TypeVar("LossT", bound=Callable[..., Any])


def __dir__() -> list[str]:
    return __all__


@dataclass(frozen=True)
class Family:
    """Losses that take the same inputs.

    Attributes:
        name: The name for `register(family=...)`.
        takes: A description of the inputs for error messages.
        prepare: A function that takes (student, teacher), checks both, raises them to float32 or float64 and
            detaches the teacher. Inputs that are prepared already are returned unchanged.
        gather: A function that takes the prepared (student, teacher) and a `GatherMode`. It returns both with
            the rows of other ranks, and a `BatchLayout` if the losses are then means over this rank's rows
            only. Inputs that are gathered already are returned unchanged. None if the family does not gather.
        upcast: A function that raises (student, teacher), where `prepare` keeps their dtype. Losses that
            take a mask then receive them as they are, and raise a few rows at a time. None if `prepare`
            raises them.
    """

    name: str
    takes: str
    prepare: Callable[[Any, Any], tuple[Any, Any]]
    gather: Callable[[Any, Any, GatherMode], tuple[Any, Any, BatchLayout | None]] | None = None
    upcast: Callable[[Any, Any], tuple[Any, Any]] | None = None

    def inputs(
        self, student: Any, teacher: Any, gather_mode: GatherMode
    ) -> tuple[Any, Any, BatchLayout | None]:
        """Prepare and gather both inputs; the third value is the layout that `gather` returns."""
        student, teacher = self.prepare(student, teacher)
        if self.gather is None:
            return student, teacher, None
        return self.gather(student, teacher, gather_mode)

    def standalone(self, loss: LossT) -> LossT:
        """Decorate a loss so that a direct call returns the same as a criterion built from its name.

        Args:
            loss: A function of (student, teacher), or a method of (self, student, teacher). It may take
                `mask` and `num_items` by keyword.
        """
        signature = inspect.signature(loss)
        upcast = None if _takes_mask(loss) else self.upcast

        @functools.wraps(loss)
        def call(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            *owner, student, teacher = bound.args
            with full_precision(student):
                # A criterion has prepared both for all its terms already; they pass through unchanged.
                student, teacher, _ = self.inputs(student, teacher, GatherMode())
                if upcast is not None:
                    student, teacher = upcast(student, teacher)
                return loss(*owner, student, teacher, **bound.kwargs)

        return cast(LossT, call)


@dataclass(frozen=True)
class _Entry:
    factory: Callable[..., nn.Module]
    family: Family | None
    by_rows: bool
    takes_mask: bool


_FAMILIES: dict[str, Family] = {}
_ENTRIES: dict[str, _Entry] = {}


def add_family(
    name: str,
    takes: str,
    prepare: Callable[[Any, Any], tuple[Any, Any]],
    gather: Callable[[Any, Any, GatherMode], tuple[Any, Any, BatchLayout | None]] | None = None,
    upcast: Callable[[Any, Any], tuple[Any, Any]] | None = None,
) -> Family:
    """Add a family, so that losses can be registered in it, and return it; see `Family`."""
    family = _FAMILIES[name] = Family(name, takes, prepare, gather, upcast)
    return family


def register(
    name: str, *, family: str | None = None, override: bool = False, by_rows: bool = False
) -> Callable[[LossT], LossT]:
    """Decorate a loss to make it available to `build` under `name`.

    Examples:
        >>> @register("largest", family="logits", override=True)
        ... def largest(student, teacher):
        ...     return (student.amax(1) - teacher.amax(1)).square().mean()
        >>> build("2*largest")(torch.zeros(2, 3), torch.ones(2, 3)).item()
        2.0

    The loss is a function `(student, teacher, *, parameters) -> 0-d tensor`, or an `nn.Module` class whose
    `forward` takes (student, teacher) and whose `__init__` takes the parameters. A spec gives the
    parameters by position or by keyword: `name(2.0)`, `name(temperature=2.0)`. A paired loss may call another
    one with the embeddings that it receives, or with `student._replace(image=...)`.

    Args:
        name: The loss's name, a Python identifier.
        family: "paired", "logits" or "features" for a loss that takes the family's checked inputs in float32
            (or float64), image and text of "paired" L2-normalised. None for a loss that takes anything: it
            receives what the caller passes, with the teacher detached.
        override: Whether to replace a loss of the same name.
        by_rows: Whether a paired loss can be built with `gather="rows"`: it must be a mean over the rows
            that it is given, compared with the rows of `wmateacher.losses.paired.candidates`.

    Raises:
        TypeError: If `name` is not a string, or the decorated object is not a function or a module class.
        ValueError: If `name` is not an identifier or is taken, the family is unknown, or a function does
            not have the signature above.
    """
    if not isinstance(name, str):
        raise TypeError(f"register needs the loss's name, got {name!r}; write @register('my_loss')")
    # A term is a submodule of the criterion, so its name must not hide an attribute of the container.
    if not name.isidentifier() or keyword.iskeyword(name) or hasattr(nn.ModuleDict, name):
        raise ValueError(f"a loss's name must be a free identifier such as my_loss, got {name!r}")
    known = None if family is None else checks.lookup("family", family, _FAMILIES)

    def add(loss: LossT) -> LossT:
        if name in _ENTRIES and not override:
            raise ValueError(
                f"a loss named {name!r} is registered already; choose another name, or pass "
                "override=True to replace it"
            )
        _ENTRIES[name] = _Entry(_factory(name, loss), known, by_rows, _takes_mask(loss))
        return loss

    return add


def available(family: str | None = None) -> list[str]:
    """Return the sorted names of all registered losses, or of those in one family.

    Raises:
        ValueError: If the family is unknown.
    """
    wanted = None if family is None else checks.lookup("family", family, _FAMILIES)
    return sorted(n for n, e in _ENTRIES.items() if wanted is None or e.family == wanted)


def build(
    spec: str | Mapping[str, float] | Criterion, *, gather: Gather = "full", group: Any = None
) -> Criterion:
    """Build a criterion, a weighted sum of registered losses.

    With an initialised process group, the paired losses treat the batches of all ranks as one, which may
    differ in size: every rank gets the loss of the concatenated batch, and gradients whose average over the
    ranks (which DDP and FSDP2 take) is the gradient of that loss. `dino` moves its centre by the mean over
    all ranks, and `info_nce` has the candidates of all ranks. All other losses are means over the rank's own
    batch. Every rank must call the criterion, with at least one row. Each call exchanges the batch sizes, and
    the host waits for them.

    Examples:
        >>> criterion = build("kl + 0.5*mse(logits)")
        >>> criterion(torch.zeros(2, 3), torch.zeros(2, 3)).item()
        0.0
        >>> loss, terms = criterion(torch.zeros(2, 3), torch.ones(2, 3), return_terms=True)
        >>> sorted(terms)
        ['kl', 'mse']

    Args:
        spec: A string such as "3.90625*fd + crd + temperature_kl(2.0)", or a mapping from term to
            coefficient such as {"fd": 3.90625, "temperature_kl(2.0)": 1.0}. A criterion is returned
            unchanged.
        gather: The use of several ranks by the paired losses. "full": each rank computes the whole loss from
            B x B logits, with no communication backward. "rows": each rank computes the part of its own
            rows from B_r x B logits, and sums B x 2 d numbers over the ranks backward. "off": each
            rank's batch stands alone.
        group: The `torch.distributed.ProcessGroup` of the ranks that hold different rows; None for all.

    Raises:
        TypeError: If `spec` is none of these, a coefficient is not a number, or the arguments of a term do
            not fit.
        ValueError: If the spec cannot be parsed or is empty, names an unknown loss, names a loss twice, mixes
            families, or has a coefficient that is negative or not finite. If `gather` is unknown, or is
            "rows" with a loss that was not registered for it.
    """
    if isinstance(spec, Criterion):
        return spec
    gather_mode = GatherMode(gather, group)
    if isinstance(spec, Mapping):
        return Criterion(((coefficient, parse_call(term)) for term, coefficient in spec.items()), gather_mode)
    if isinstance(spec, str):
        return Criterion(parse_sum(spec), gather_mode)
    raise TypeError(
        "spec must be a string such as '0.5*fd + crd', a mapping of term to coefficient, or a "
        f"Criterion, got {type(spec).__name__}"
    )


class Criterion(nn.Module):
    """The weighted sum sum_i c_i l_i(student, teacher) of losses, made by `build`.

    The teacher is detached for every loss. Autocast is off inside, and the inputs are raised to float32
    (float64 is kept), so that logits are never rounded to half precision. Losses with parameters or
    buffers (`afd`, `dino`) are submodules: move the criterion to the device, pass its parameters to the
    optimizer and save its `state_dict`.

    Attributes:
        coefficients: The coefficient of each term by name, read at every call. A term with coefficient 0 is
            not computed, except for the terms that `return_terms` reports, and never enters the total.
        terms: The loss of each term by name, as a module.
        family: The name of the losses' family; None if all of them take anything.
        gather_mode: The `GatherMode` that says which ranks' batches count as one.
    """

    def __init__(self, terms: Iterable[tuple[float, Call]], gather_mode: GatherMode | None = None) -> None:
        """Build the terms.

        Args:
            terms: The (coefficient, call) pairs, as `wmateacher.spec.parse_sum` returns them.
            gather_mode: The `GatherMode`; None for all ranks.

        Raises:
            TypeError: As in `build`.
            ValueError: As in `build`.
        """
        super().__init__()
        self.gather_mode = gather_mode or GatherMode()
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
            entry = checks.lookup("loss", call.name, _ENTRIES)
            gathers = entry.family is not None and entry.family.gather is not None
            if self.gather_mode.gather == "rows" and gathers and not entry.by_rows:
                raise ValueError(
                    f"gather='rows' with {call.name!r}, which was not registered with by_rows=True: build it "
                    "with gather='full', which any loss of the family works with"
                )
            self.coefficients[call.name] = _coefficient(call.name, coefficient)
            self._calls[call.name] = call
            families[call.name] = entry.family
            module: Any = call.build(entry.factory)
            if isinstance(getattr(module, "gather_mode", None), GatherMode):
                module.gather_mode = self.gather_mode
            modules[call.name] = module
        if not modules:
            raise ValueError("a criterion needs at least one term, got none; write for example 'fd + crd'")
        self.terms = nn.ModuleDict(modules)
        self._with_family = frozenset(n for n, f in families.items() if f is not None)
        self._with_mask = frozenset(n for n in modules if _ENTRIES[n].takes_mask)
        family = _one_family(families)
        self.family = None if family is None else family.name

    @property
    def spec(self) -> str:
        """The text from which `build` makes an equal criterion."""
        return " + ".join(
            str(self._calls[name]) if c == 1 else f"{c!r}*{self._calls[name]}"
            for name, c in self.coefficients.items()
        )

    @property
    def takes_mask(self) -> bool:
        """Whether every term takes `mask` and `num_items`."""
        return self._with_mask >= self.terms.keys()

    def __str__(self) -> str:
        return self.spec

    def extra_repr(self) -> str:
        """Return the spec, for the module's repr."""
        return self.spec

    @overload
    def __call__(
        self,
        student: Any,
        teacher: Any,
        *,
        mask: Tensor | None = None,
        num_items: float | Tensor | None = None,
        return_terms: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def __call__(
        self,
        student: Any,
        teacher: Any,
        *,
        mask: Tensor | None = None,
        num_items: float | Tensor | None = None,
        return_terms: Literal[True],
    ) -> tuple[Tensor, dict[str, Tensor]]: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call `forward`; declared for type checkers, which cannot see through `nn.Module.__call__`."""
        return super().__call__(*args, **kwargs)

    def forward(
        self,
        student: Any,
        teacher: Any,
        *,
        mask: Tensor | None = None,
        num_items: float | Tensor | None = None,
        return_terms: bool = False,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Compute the weighted sum of the terms.

        Args:
            student: The student's output, of the kind that the family takes.
            teacher: The teacher's output, which receives no gradient.
            mask: For logits `[..., C]`: which positions count, a boolean tensor `[...]` (or one of 0 and 1),
                as `token_mask(labels)` returns it. Each term is then the mean over these alone: whatever the
                other positions' logits are, even NaN, they change nothing and their gradient is 0. None: all
                count.
            num_items: For logits: the divisor of each term's sum over the positions that count, a number or
                a 0-d tensor. Give the number of these positions in all the batches that make one optimizer
                step (gradient accumulation), and under DDP, which averages gradients, that of all ranks
                divided by the number of ranks. None: their number in this batch. If no position of the mask
                counts, the loss is 0.
            return_terms: Whether to return the value of each term as well, for logging. This computes terms
                with coefficient 0 too, without gradient.

        Returns:
            The loss, a 0-d tensor with the student's gradient. With `return_terms`, a pair of the loss and
            a dictionary of the terms by name: 0-d tensors, detached, *before* their coefficients, still on
            the device.

        Raises:
            TypeError: If an input is not of the kind that the family takes, a term takes no mask, or a
                registered function does not return a tensor.
            ValueError: If shapes do not match, the batch is empty, the mask has other values than 0 and 1,
                or a registered function returns more than one number.
        """
        tokens = {k: v for k, v in (("mask", mask), ("num_items", num_items)) if v is not None}
        if tokens and (without := [n for n in self.terms if n not in self._with_mask]):
            able = ", ".join(sorted(n for n, e in _ENTRIES.items() if e.takes_mask))
            raise TypeError(
                f"{' and '.join(tokens)} cannot be given to {', '.join(without)}; "
                f"losses that take a mask: {able}. "
                "For others between logits, select the rows: criterion(student[mask], teacher[mask])"
            )
        teacher = _detach(teacher)
        inputs: tuple[Any, Any, BatchLayout | None] = (student, teacher, None)
        values: dict[str, Tensor] = {}
        with full_precision(student):
            family = None if self.family is None else _FAMILIES[self.family]
            if family is not None:
                inputs = family.inputs(student, teacher, self.gather_mode)
            *prepared, layout = inputs
            if family is not None and family.upcast is not None and not self._with_family <= self._with_mask:
                raised = family.upcast(*prepared)
            else:
                raised = tuple(prepared)
            for name, term in self.terms.items():
                counts = self.coefficients[name] != 0
                if counts or return_terms:
                    with nullcontext() if counts else torch.no_grad():
                        if name not in self._with_family:
                            value = term(student, teacher, **tokens)
                        else:
                            value = term(*(prepared if name in self._with_mask else raised), **tokens)
                    values[name] = _scalar(name, value)
            names = [name for name in values if name in self._with_family]
            if layout is not None and names:
                # One exchange for all terms: each is the mean over this rank's rows so far.
                means = layout.mean(torch.stack([values[name] for name in names]))
                values |= dict(zip(names, means, strict=True))
            weighted = [c * values[name] for name, c in self.coefficients.items() if c != 0]
            total = torch.stack(weighted).sum() if weighted else _zero(student)
        if not return_terms:
            return total
        return total, {name: value.detach() for name, value in values.items()}


class _FunctionLoss(nn.Module):
    """A registered function with the values of its parameters."""

    def __init__(self, function: Callable[..., Tensor], parameters: Mapping[str, Any]) -> None:
        super().__init__()
        self.function = function
        self.keywords = dict(parameters)

    def forward(self, student: Any, teacher: Any, **tokens: Any) -> Tensor:
        return self.function(student, teacher, **self.keywords, **tokens)

    def extra_repr(self) -> str:
        return ", ".join([self.function.__name__, *(f"{k}={v!r}" for k, v in self.keywords.items())])


def _factory(name: str, loss: Any) -> Callable[..., nn.Module]:
    if isinstance(loss, type) and issubclass(loss, nn.Module):
        return loss
    if not inspect.isfunction(loss):
        raise TypeError(f"{name}: register a function or an nn.Module class, got {loss!r}")
    parameters = list(inspect.signature(loss).parameters.values())
    inputs = [p for p in parameters[:2] if p.kind in _POSITIONAL]
    if len(inputs) != 2 or any(p.kind in _VARIADIC for p in parameters):
        raise ValueError(
            f"{name}: a loss function takes (student, teacher, *, named parameters), got "
            f"{loss.__name__}{inspect.signature(loss)}"
        )
    signature = inspect.Signature(
        [
            p.replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD)
            for p in parameters[2:]
            if not (_takes_mask(loss) and p.name in _OF_TOKENS)
        ]
    )

    def factory(*args: Any, **kwargs: Any) -> nn.Module:
        return _FunctionLoss(loss, signature.bind(*args, **kwargs).arguments)

    # `Call.build` checks a spec's arguments against this signature, and shows it in the error.
    factory.__signature__ = signature  # type: ignore[attr-defined]
    return factory


_OF_TOKENS = ("mask", "num_items")


def _takes_mask(loss: Any) -> bool:
    """Return whether a loss, a function or a module class, takes `mask` and `num_items`."""
    function = loss.forward if isinstance(loss, type) and issubclass(loss, nn.Module) else loss
    return inspect.isroutine(function) and all(
        k in inspect.signature(function).parameters for k in _OF_TOKENS
    )


_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def _coefficient(name: str, value: Any) -> float:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"the coefficient of {name!r} must be a number, got {value!r}")
    number = checks.as_float(value)
    if not 0 <= number < math.inf:
        raise ValueError(
            f"the coefficient of {name!r} must be finite and >= 0, got {value!r}; "
            "write for example 0.5*fd, or leave the term out"
        )
    return number


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


def _zero(student: Any) -> Tensor:
    """Return 0 with a gradient of 0 for the student's first tensor, whatever its values are."""
    tensor = first_tensor(student)
    if tensor is None:
        return torch.zeros(())
    return tensor.flatten()[:0].sum().to(working_dtype(tensor))


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
    """Return `value` with every tensor in its tuples, lists and dictionaries detached."""
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
