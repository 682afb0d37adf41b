"""Weighted sums of checkpoints, computed a part at a time.

Sums are float64. Besides the result in CPU memory, this takes about a third of the result's size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from wmateacher import pairing
from wmateacher.files import TensorSpec
from wmateacher.kernels import Array
from wmateacher.posthoc.sources import Source

__all__ = ["combine", "matched", "parts", "pieces", "refuse_nonfinite", "wide"]


def __dir__() -> list[str]:
    return __all__


# The size of a part in float64, as a share of the size of all averaged tensors. Files are reopened for each
# part, because the pages of a mapped file count as memory of this process until it is closed.
_SHARE = 1 / 16
_LEAST_BYTES = 2**20
# Elements of a part that are summed at once, so that they stay in the processor's cache.
_PIECE = 2**16

_Rows = tuple[str, int, int]
"""A tensor's name, and the first row and the end of a range of its rows."""


@torch.no_grad()
def combine(
    sources: Sequence[Source],
    coefficients: Callable[[str], Sequence[float] | Array],
    *,
    last: int = -1,
    only: frozenset[str] | None = None,
) -> dict[str, Any]:
    """Return `sum_i coefficients(name)[i] * source_i[name]` for every floating-point tensor.

    Args:
        sources: The checkpoints.
        coefficients: The function that returns the coefficient of each source, given a tensor's name. Sources
            with coefficient 0 are not read.
        last: The index of the source whose dtypes the result has, and from which it takes everything that is
            not averaged.
        only: The names of the tensors to average. Default: all floating-point tensors.

    Raises:
        ValueError: If the sources have different tensors, one that is averaged has NaN or infinite values, or
            a sum is beyond the range of the result's dtype.
    """
    specs = matched(sources, last, only)
    names = [n for n, s in specs.items() if s.is_floating and (only is None or n in only)]
    averaged = set(names)
    with sources[last].open() as opened:
        result: dict[str, Any] = {
            name: torch.empty(spec.shape, dtype=spec.dtype)
            if name in averaged
            else opened.read(name).to("cpu", copy=True)
            for name, spec in specs.items()
        }
        result.update(opened.rest)
    factors = {name: [float(c) for c in coefficients(name)] for name in names}
    for part in parts(specs, names, _SHARE):
        sums = {
            rows: torch.zeros_like(_select(result, rows), dtype=_wide_dtype(specs[rows[0]])) for rows in part
        }
        for i, source in enumerate(sources):
            needed = [rows for rows in part if factors[rows[0]][i]]
            if needed:
                with source.open() as opened:
                    for rows in needed:
                        aligned = zip(pieces(sums[rows]), pieces(opened.read(*rows)), strict=True)
                        for total, piece in aligned:
                            total.add_(wide(piece), alpha=factors[rows[0]][i])
                            if not total.sum().isfinite():
                                refuse_nonfinite(piece, rows[0], source.label)
        for rows in part:
            _refuse_overflow(sums[rows], specs[rows[0]].dtype, rows[0], sources[last].label)
            _select(result, rows).copy_(sums[rows])
    return result


def matched(
    sources: Sequence[Source], last: int, only: frozenset[str] | None = None
) -> dict[str, TensorSpec]:
    """Return the tensors of the source with index `last`, after checking that all others have the same.

    With `only`, the others need to have just these.

    Raises:
        ValueError: If a source lacks a tensor, has another one, or has one of another shape or kind.
    """
    found = []
    for source in sources:
        with source.open() as opened:
            found.append(opened.specs)
    whole = reference = found[last]
    if only is not None:
        found = [{n: spec for n, spec in specs.items() if n in only} for specs in found]
        reference = found[last]
    labels = [source.label for source in sources]
    for this, specs in zip(labels, found, strict=True):
        missing = [n for n in reference if n not in specs]
        extra = [n for n in specs if n not in reference]
        if missing or extra:
            raise ValueError(
                f"{this} does not have the tensors of {labels[last]}: "
                f"{pairing.describe_difference(missing, extra)}; only checkpoints of one architecture can be "
                "averaged"
            )
        for name, spec in reference.items():
            if specs[name].shape != spec.shape or specs[name].is_floating != spec.is_floating:
                raise ValueError(
                    f"{name!r} is {specs[name].dtype} of shape {specs[name].shape} in {this}, and "
                    f"{spec.dtype} of shape {spec.shape} in {labels[last]}; only checkpoints of one "
                    "architecture can be averaged"
                )
    return whole


def refuse_nonfinite(tensor: Tensor, name: str, source: str) -> None:
    """Raise a ValueError if a tensor of a source has NaN or infinite values, which no average may contain."""
    if not wide(tensor).isfinite().all():  # float8 types have no isfinite
        raise ValueError(
            f"{name!r} has NaN or infinite values in {source}, and so would every average with it: leave "
            "this checkpoint out"
        )


def _refuse_overflow(total: Tensor, dtype: torch.dtype, name: str, source: str) -> None:
    """Raise a ValueError if a sum is beyond the range of the dtype that it is to have."""
    if total.dtype == dtype:
        return
    limits = torch.finfo(dtype)
    # Half a unit in the last place beyond the largest number still rounds to it.
    largest = limits.max * (1 + limits.eps / 4)
    for piece in pieces(torch.view_as_real(total) if total.is_complex() else total):
        if piece.numel() and max(-piece.min(), piece.max()) > largest:
            raise ValueError(
                f"the result of {name!r} is beyond the range of {dtype}, up to {limits.max:g}, which is its "
                f"dtype in {source}: convert it to float32 there first"
            )


def parts(specs: Mapping[str, TensorSpec], names: Sequence[str], share: float) -> Iterator[list[_Rows]]:
    """Split the named tensors into parts whose size in float64 is about `share` of their total size."""
    budget = max(sum(specs[n].bytes for n in names) * share, _LEAST_BYTES)
    part: list[_Rows] = []
    room = budget
    for name in names:
        shape = specs[name].shape or (1,)
        each = _wide_dtype(specs[name]).itemsize * math.prod(shape[1:])
        first = 0
        while first < shape[0]:
            fitting = max(int(room // each), 0 if part else 1) if each else shape[0]
            end = min(shape[0], first + fitting)
            if end > first:
                part.append((name, first, end))
                room -= (end - first) * each
                first = end
            if first < shape[0]:
                yield part
                part, room = [], budget
    if part:
        yield part


def pieces(tensor: Tensor) -> Sequence[Tensor]:
    """Split a tensor into flat pieces that fit the processor's cache."""
    return tensor.reshape(-1).split(_PIECE)


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor on the CPU in float64 or complex128."""
    return tensor.to("cpu", torch.complex128 if tensor.is_complex() else torch.float64)


def _wide_dtype(spec: TensorSpec) -> torch.dtype:
    return torch.complex128 if spec.dtype.is_complex else torch.float64


def _select(state: Mapping[str, Tensor], rows: _Rows) -> Tensor:
    name, first, end = rows
    return state[name][first:end] if state[name].ndim else state[name]
