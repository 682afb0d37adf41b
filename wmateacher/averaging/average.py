"""The average of a tensor: how it is held, read and written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Average", "is_vector", "side_by_side", "upper_half_"]

# A longer vector is worth a call of its own.
_SHORT = 2**16


@dataclass(frozen=True)
class Average:
    """The average of one tensor, and where it is held.

    Attributes:
        own: The averaged module's tensor, in the dtype of its forward pass.
        beside: None (direct), a tensor of higher precision (wide), or int16 (split).
    """

    own: Tensor
    beside: Tensor | None = None

    @classmethod
    def of(cls, value: Tensor, own: Tensor, *, split: bool = False, apart: bool = False) -> Average:
        """Return an average that starts at `value` and has its dtype, on the device of `own`.

        Args:
            value: The value.
            own: The averaged module's tensor.
            split: Whether to hold only the lower half beside the module.
            apart: Whether to hold the average beside the module even if the module has its dtype.
        """
        if own.dtype == value.dtype and not apart:
            average = cls(own)
        else:
            average = cls(own, torch.empty_like(own, dtype=torch.int16 if split else value.dtype))
        average.write(value)
        return average

    @property
    def held(self) -> Tensor:
        """The tensor that holds the average: `beside`, or `own` if that is None."""
        return self.own.detach() if self.beside is None else self.beside

    @property
    def split(self) -> bool:
        """Whether `held` has only the lower half of the average, and `own` the upper half."""
        return self.held.dtype == torch.int16

    @torch.no_grad()
    def read(self) -> Tensor:
        """Return the average at full precision: the tensor that holds it, or a new one if it is split."""
        if not self.split:
            return self.held
        return self.own.view(torch.int16).int().mul_(2**16).add_(self.held).view(torch.float32)

    @torch.no_grad()
    def write(self, value: Tensor) -> None:
        """Set the average to a value of any dtype and device."""
        if self.split:
            bits = value.to(self.own.device, torch.float32, copy=True).view(torch.int32)
            self.held.copy_(bits)
            self.own.view(torch.int16).copy_(upper_half_(bits))
        else:
            self.held.copy_(value)
            self.restore()

    @torch.no_grad()
    def restore(self) -> None:
        """Round the average into the module again, if it is held beside it and not split."""
        if self.beside is not None and not self.split:
            self.own.copy_(self.beside)


@torch.no_grad()
def side_by_side(averages: Mapping[str, Average]) -> dict[str, Average]:
    """Return the same averages, with the short vectors among the wide ones held end to end in memory."""
    result = dict(averages)
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, average in averages.items():
        held = average.held
        if average.beside is not None and not average.split and held.numel() <= _SHORT and is_vector(held):
            groups.setdefault((average.own.dtype, held.dtype, held.device), []).append(name)
    for names in groups.values():
        parts = [averages[name].held.reshape(-1) for name in names]
        for name, part in zip(names, torch.cat(parts).split([p.numel() for p in parts]), strict=True):
            own = averages[name].own
            result[name] = Average(own, part.view(own.shape))
    return result


def is_vector(tensor: Tensor) -> bool:
    """Return whether at most one dimension is longer than 1, as in norm gains, biases and logit scales."""
    return sum(length > 1 for length in tensor.shape) <= 1


def upper_half_(bits: Tensor) -> Tensor:
    """Round float32 bits to the nearest bfloat16 bits, in place. What is left is the signed lower half."""
    # Rounding a NaN whose upper bits are all set, as GPUs make them, would overflow into a zero.
    bits.view(torch.float32).nan_to_num_(math.nan, math.inf, -math.inf)
    return bits.add_(2**15).bitwise_right_shift_(16)


def __dir__() -> list[str]:
    return __all__
