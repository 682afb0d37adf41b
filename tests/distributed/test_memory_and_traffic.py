"""What a sharded teacher holds and receives, as the scaling guide says."""

import torch
from pool import device
from ranks import on_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from wmateacher import WMATeacher

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
        model = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(LAYERS))).to(
            device(), torch.bfloat16
        )
        for layer in model:
            fully_shard(layer)
        return fully_shard(model)

    student = build()
    parameters = sum(p.numel() for p in student.parameters())
    teacher = WMATeacher(student, "uniform", module_factory=build)
    held = sum(p.to_local().nbytes for p in teacher.module.parameters())
    held += sum(t.nbytes for t in teacher._shadow._beside.values())
    assert held == 6 * parameters / size
    x = torch.ones(2, 16, device=device(), dtype=torch.bfloat16)
    teacher(x)
    with Gathered() as gathered:
        teacher(x)
    assert size == 1 or gathered.bytes == 2 * parameters
    assert size == 1 or gathered.largest == 2 * parameters / LAYERS
    with Gathered() as gathered:
        teacher.update()
    assert gathered.bytes == 0
