"""One rank of a Lightning run: `torchrun lightning_ranks.py ddp|fsdp2 FOLDER`.

`lightning_ranks.py fork FOLDER` starts its two processes itself, as ddp_spawn does.
"""

import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from wmateacher.integrations.lightning import TeacherCallback


def layers(mesh=None):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    return net if mesh is None else fully_shard(net, mesh=mesh)


class Network(L.LightningModule):
    def __init__(self, sharded):
        super().__init__()
        self.sharded, self.states, self.seen, self.net = sharded, [], [], None

    def configure_model(self):
        if self.net is None:
            self.net = layers(self.device_mesh["data_parallel"] if self.sharded else None)

    def training_step(self, batch, index):
        x, y = batch
        logits = self.net(x)
        return F.cross_entropy(logits, y) + F.mse_loss(logits, self.teacher(x))

    def validation_step(self, batch, index):
        self.seen.append(weights(self.net))

    def on_fit_start(self):
        self.states.append(weights(self.net))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), 1e-2)
        optimizer.register_step_post_hook(lambda *_: self.states.append(weights(self.net)))
        return optimizer


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def weights(module):
    return torch.cat([whole(p.detach()).flatten() for p in module.parameters()]).clone()


def fit(kind, folder, epochs, path=None):
    x = torch.randn(80, 4, generator=torch.Generator().manual_seed(0))
    data = DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=4)
    sharded = kind == "fsdp2"
    callback = TeacherCallback(
        student="net", total_steps=20, evaluate_with="teacher",
        module_factory=(lambda m: layers(m.device_mesh["data_parallel"])) if sharded else None,
    )  # fmt: skip
    saves = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    trainer = L.Trainer(
        strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1) if sharded else "ddp", accelerator="cpu", devices=2,
        max_epochs=epochs, callbacks=[callback, saves], logger=False, default_root_dir=folder,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    module = Network(sharded)
    trainer.fit(module, data, data, ckpt_path=path)
    return module


def forked(folder):
    """The average comes back from other processes as the module's weights."""
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    data = DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=4)
    for weights_after in ("student", "teacher"):
        module, callback = Network(sharded=False), TeacherCallback("uniform", finish_with=weights_after)
        module.training_step = lambda batch, index, m=module: F.cross_entropy(m.net(batch[0]), batch[1])
        module.configure_model()
        saves = ModelCheckpoint(folder, filename=weights_after)
        trainer = L.Trainer(
            strategy="ddp_fork", accelerator="cpu", devices=2, max_epochs=2, callbacks=[callback, saves],
            logger=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, data)
        content = torch.load(folder / f"{weights_after}.ckpt", weights_only=True)
        teacher = next(v for k, v in content["callbacks"].items() if "TeacherCallback" in k)["teacher"]
        assert teacher["_extra_state"]["step"] == 4
        state = {
            n: teacher[f"module.{n}"] if weights_after == "teacher" else v
            for n, v in content["state_dict"].items()
        }
        assert all(torch.equal(v, state[n].to(v.dtype)) for n, v in module.state_dict().items())
        assert not all(
            torch.equal(v, teacher[f"module.{n}"].to(v.dtype)) for n, v in content["state_dict"].items()
        )
    print("the average came back", flush=True)


def main(kind, folder):
    if kind == "fork":
        return forked(folder)
    module = fit(kind, folder / "a", 2)
    teacher = module.teacher
    assert teacher.step == teacher.total_steps == 20, teacher.step
    expected = torch.from_numpy(teacher.trajectory_weights()) @ torch.stack(module.states).double()
    average = weights(teacher.module)
    torch.testing.assert_close(average.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(module.seen[0], module.states[0])
    assert torch.equal(module.seen[-1], average)
    print("the average is right", flush=True)
    resumed = fit(kind, folder / "b", 2, path=folder / "a" / "epoch=0.ckpt")
    assert resumed.teacher.step == 20
    assert torch.equal(weights(resumed.teacher.module), average)
    assert torch.equal(weights(resumed.net), weights(module.net))
    print("the resumed average is right", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
