"""Raise where the host waits for the device."""

import contextlib
import warnings

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Forbid(TorchDispatchMode):
    """Raises at whatever makes the host wait for a tensor's value."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in (torch.ops.aten._local_scalar_dense, torch.ops.aten.equal), func
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def forbidden(device):
    """No operation in the block may wait for the device. On a CPU, none may read a tensor's value."""
    if device.type != "cuda":
        with Forbid():
            yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its first use warns that it is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
