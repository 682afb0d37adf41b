"""Raise where the host waits for the device."""

import contextlib
import warnings
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from wmateacher.losses import tokens

WAITING = {
    torch.ops.aten._local_scalar_dense,
    torch.ops.aten.equal,
    torch.ops.aten.lift_fresh,  # torch.tensor(numbers), which an accelerator would be sent and waited for
}


class Forbid(TorchDispatchMode):
    """Raises at whatever makes the host wait for a tensor's value."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in WAITING, func
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def forbidden(device):
    """No operation in the block may wait for the device.

    On a CPU, none may read a tensor's value, and losses between logits compute as on an accelerator.
    """
    if device.type != "cuda":
        with Forbid(), mock.patch.object(tokens, "_on_host", return_value=False):
            yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its first use warns that it is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
