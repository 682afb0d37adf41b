"""One rank of a Fabric program with a sharded student: `torchrun fabric_ranks.py FOLDER`."""

import sys
from pathlib import Path

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard

from wmateacher import WMATeacher


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def shard(model, mesh):
    return fully_shard(model, mesh=mesh["data_parallel"])


def whole(state):
    return {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in state.items()}


def main(folder):
    strategy = ModelParallelStrategy(shard, data_parallel_size=2, tensor_parallel_size=1)
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
    fabric.launch()

    def build():
        model = fabric.setup(network())
        return model, WMATeacher(
            model, "uniform", 4, module_factory=lambda: shard(network(), fabric.strategy.device_mesh)
        )

    model, teacher = build()
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), 1e-2))
    plain = WMATeacher(network(), "uniform", 4)
    assert teacher.state_dict().keys() == plain.state_dict().keys()
    states = [whole(model.state_dict())]
    with teacher.attach(optimizer):
        for _ in range(2):
            fabric.backward(model(torch.ones(3, 4)).square().mean())
            optimizer.step()
            optimizer.zero_grad()
            states.append(whole(model.state_dict()))
    average = whole(teacher.averaged_state_dict())
    for name, value in average.items():
        mean = torch.stack([state[name] for state in states]).double().mean(0)
        torch.testing.assert_close(value.double(), mean, rtol=1e-5, atol=1e-6)
    # Fabric writes one sharded module into a checkpoint, so that the teacher has its own.
    fabric.save(folder / "model", {"model": model, "optimizer": optimizer})
    fabric.save(folder / "teacher", {"teacher": teacher})
    other, restored = build()
    fabric.load(folder / "model", {"model": other})
    fabric.load(folder / "teacher", {"teacher": restored})
    assert restored.step == 2
    for name, value in whole(restored.averaged_state_dict()).items():
        assert torch.equal(value, average[name])
    print("the average is restored", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
