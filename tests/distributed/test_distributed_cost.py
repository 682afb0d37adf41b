"""The calculator against what a sharded teacher holds and receives."""

import torch
from pool import device
from ranks import on_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from wmateacher import WMATeacher
from wmateacher.cost import Model, cost

LAYERS = 4


class Gathered(TorchDispatchMode):
    """Bytes of all-gathers."""

    def __init__(self):
        super().__init__()
        self.bytes, self.largest = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "allgather" in str(function):
            output = args[0][0] if isinstance(args[0], list | tuple) else args[0]
            self.bytes += output.nbytes
            self.largest = max(self.largest, output.nbytes)
        return function(*args, **(kwargs or {}))


@on_ranks(1, 2, 4)
def test_memory_and_traffic_of_shards(folder):
    size = torch.distributed.get_world_size()

    def build():
        model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(LAYERS))).to(device(), torch.bfloat16)
        for layer in model:
            fully_shard(layer)
        return fully_shard(model)

    student = build()
    model = Model(sum(p.numel() for p in student.parameters()), LAYERS)
    teacher = WMATeacher(student, "uniform", module_factory=build)
    expected = cost(model, "fsdp2", size)
    held = sum(p.to_local().nbytes for p in teacher.module.parameters())
    held += sum(t.nbytes for t in teacher._beside.values())
    assert held == expected.device
    x = torch.ones(2, 16, device=device(), dtype=torch.bfloat16)
    teacher(x)
    with Gathered() as gathered:
        teacher(x)
    assert gathered.bytes * (size - 1) / size == expected.network
    assert 2 * gathered.largest == expected.gathered or size == 1
    with Gathered() as gathered:
        teacher.update()
    assert gathered.bytes == 0
