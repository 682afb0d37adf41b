"""An update of many averages, prepared once; and copies of many tensors."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from wmateacher import caches
from wmateacher.averaging import fused, steps
from wmateacher.averaging.average import Average
from wmateacher.transfers import moved

__all__ = ["Update", "copy_"]


class Update:
    """The step `average <- average + omega (value - average)`, prepared for a fixed set of tensors."""

    def __init__(
        self,
        averages: Sequence[Average],
        values: Sequence[Tensor],
        *,
        masked: bool = False,
        fuse: bool = True,
    ):
        """Group the tensors by dtype and device, cut them into batches and lay out the scratch buffers.

        Args:
            averages: The averages to move.
            values: The tensors to move them towards, of the same shapes and of any dtype and device.
            masked: Whether calls have a mask, or an omega on a device, which needs room for a second value of
                each average.
            fuse: Whether one kernel may move many averages where the device has one.
        """
        groups: dict[tuple[object, ...], list[tuple[Average, Tensor]]] = {}
        for average, value in zip(averages, values, strict=True):
            held = average.held
            is_direct = average.beside is None
            key = (is_direct, average.own.dtype, held.dtype, held.device, value.dtype, value.device)
            groups.setdefault(key, []).append((average, value.detach()))
        self._steps: list[fused.FusedStep | steps.Step] = []
        for group in groups.values():
            at_once, rest = fused.take(group, masked) if fuse else ([], group)
            self._steps += [*at_once, *steps.prepare(rest, masked)]

    @torch.no_grad()
    def __call__(self, omega: float | Tensor, mask: Tensor | None = None) -> None:
        """Move every average towards its value.

        Args:
            omega: The share in (0, 1] by which it moves; 1 copies exactly. A 0-d tensor on any device is
                allowed together with a mask, and the host does not wait for it.
            mask: A 0-d bool tensor on any device: with False, no average changes. The host does not wait for
                it.
        """
        arrived: dict[Any, Tensor] = {}

        def there(value: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
            key = (id(value), device, dtype)
            if key not in arrived:
                arrived[key] = moved(value, device, dtype)
            return arrived[key]

        # The next batch is on its way from its device while this one moves.
        for i, step in enumerate(self._steps):
            if i == 0:
                step.fetch()
            if i + 1 < len(self._steps):
                self._steps[i + 1].fetch()
            if mask is None:
                assert not isinstance(omega, Tensor)
                step.move(omega, None)
            else:
                device = step.held[0].device
                share = there(omega, device, step.dtype) if isinstance(omega, Tensor) else omega
                step.move(share, there(mask, device, mask.dtype))


@torch.no_grad()
def copy_(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy every source into its target, converting dtype and device, and clear torch's caches of weights."""
    # Buffers that a forward pass has made in inference mode can only be written to in inference mode.
    with torch.inference_mode() if any(map(Tensor.is_inference, targets)) else nullcontext():
        steps.write(list(targets), list(sources))
    caches.clear()


def __dir__() -> list[str]:
    return __all__
