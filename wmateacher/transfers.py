"""Tensors on their way from one device to another, for which the host does not wait."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Transfer", "moved"]


def moved(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Return a tensor on another device, where it may be used at once.

    The host waits only for what arrives in its own memory. There it would otherwise read the values before
    they have arrived; a device finds them in the order of its stream.
    """
    return tensor.to(device, tensor.dtype if dtype is None else dtype, non_blocking=device.type != "cpu")


class Transfer:
    """A copy of a small tensor on the host, which may still be arriving. `float` reads a 0-d one."""

    def __init__(self, tensor: Tensor):
        """Start the transfer of a tensor's present values."""
        self._host, self._arrived = tensor, None
        if tensor.device.type != "cpu":
            pinned = tensor.device.type == "cuda"
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
            self._host.copy_(tensor, non_blocking=True)
            self._arrived = torch.Event(tensor.device)
            # The copy runs on a stream of the tensor's device, which need not be the current device.
            self._arrived.record(torch.accelerator.current_stream(tensor.device))

    def has_arrived(self) -> bool:
        """Return whether `read` would not wait."""
        return self._arrived is None or self._arrived.query()

    def read(self) -> Tensor:
        """Return the values, once they have arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host

    def __float__(self) -> float:
        return float(self.read())


def __dir__() -> list[str]:
    return __all__
