"""The only file that writes averaged tensors: `average <- average + omega (value - average)`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Elements cast at a time: 4 MiB of float32 stays in the cache between the cast and the average.
_SCRATCH = 2**20


@torch.no_grad()
def lerp_(averages: Sequence[Tensor], values: Sequence[Tensor], omega: float) -> None:
    """Move every average towards its value by the share `omega`, in place, in the average's dtype.

    Args:
        averages: Accumulators, any shapes, dtypes and devices.
        values: Tensors of the same shapes; other dtypes and devices are converted on the way.
        omega: The share in [0, 1]; 1 copies exactly.
    """
    if omega == 1.0:
        copy_(averages, values)
        return
    alike = [a.dtype == v.dtype and a.device == v.device for a, v in zip(averages, values, strict=True)]
    same = [i for i, equal in enumerate(alike) if equal]
    if same:
        torch._foreach_lerp_([averages[i] for i in same], [values[i] for i in same], omega)
    scratch: dict[tuple[torch.device, torch.dtype], Tensor] = {}
    for i, equal in enumerate(alike):
        if not equal:
            _lerp_converted_(averages[i], values[i], omega, scratch)


@torch.no_grad()
def copy_(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy every source into its target, converting dtype and device."""
    if targets:
        torch._foreach_copy_(list(targets), list(sources))


def _lerp_converted_(
    average: Tensor,
    value: Tensor,
    omega: float,
    scratch: dict[tuple[torch.device, torch.dtype], Tensor],
) -> None:
    if not (average.is_contiguous() and value.is_contiguous()):
        average.lerp_(value.to(average.device, average.dtype), omega)
        return
    key = (average.device, average.dtype)
    if key not in scratch:
        scratch[key] = torch.empty(_SCRATCH, device=average.device, dtype=average.dtype)
    for a, v in zip(average.view(-1).split(_SCRATCH), value.view(-1).split(_SCRATCH), strict=True):
        piece = scratch[key][: len(a)]
        piece.copy_(v)
        a.lerp_(piece, omega)
