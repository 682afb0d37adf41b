"""How much memory operations use, whatever the device and its allocator."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Live(TorchDispatchMode):
    """The largest number of bytes in tensors that operations made and that live at one time, beside inputs."""

    def __init__(self, *inputs):
        super().__init__()
        self.inputs = {x.untyped_storage().data_ptr() for x in inputs}
        self.made, self.peak = [], 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        outputs = result if isinstance(result, tuple | list) else [result]
        self.made += [weakref.ref(x) for x in outputs if isinstance(x, torch.Tensor)]
        self.made = [ref for ref in self.made if ref() is not None]
        storages = [ref().untyped_storage() for ref in self.made]
        sizes = {x.data_ptr(): x.nbytes() for x in storages if x.data_ptr() not in self.inputs}
        self.peak = max(self.peak, sum(sizes.values()))
        return result
