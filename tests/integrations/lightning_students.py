"""Small students for Lightning, and runs of them that keep every state they passed through."""

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

IGNORED = (
    "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning",
    "ignore:.*LeafSpec.*is deprecated",
    "ignore:Be aware that when using `ckpt_path`",
    "ignore:Checkpoint directory .* exists and is not empty",
)
"""Filters for warnings of Lightning's own."""
BATCHES = 5


class Network(L.LightningModule):
    """A student that is pulled to its teacher; keeps what it passed through."""

    def __init__(self, configured=False):
        super().__init__()
        self.states, self.seen = [], []
        if not configured:
            self.net = self.layers()

    @staticmethod
    def layers():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, index):
        x, y = batch
        logits = self(x)
        return F.cross_entropy(logits, y) + F.mse_loss(logits, self.teacher(x))

    def validation_step(self, batch, index):
        self.seen.append(weights(self))

    def on_fit_start(self):
        self.states.append(weights(self))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), 1e-2)
        optimizer.register_step_post_hook(lambda *_: self.states.append(weights(self)))
        return optimizer


class Plain(Network):
    """A student without a teacher's term in its loss."""

    def training_step(self, batch, index):
        return F.cross_entropy(self(batch[0]), batch[1])


class Configured(Network):
    def __init__(self):
        super().__init__(configured=True)

    def configure_model(self):
        if not hasattr(self, "net"):
            self.net = self.layers()


class Adversaries(L.LightningModule):
    """Two optimizers, stepped by hand: the critic at each batch, the generator at every second."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.critic = nn.Linear(4, 4), nn.Linear(4, 1)

    def training_step(self, batch, index):
        generating, criticising = self.optimizers()
        for optimizer, sign in ((criticising, 1), (generating, -1)):
            if optimizer is generating and index % 2:
                continue
            optimizer.zero_grad()
            self.manual_backward(sign * self.critic(self.generator(batch[0])).mean())
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(m.parameters(), 0.1) for m in (self.generator, self.critic)]


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()]).clone()


def data(batches=BATCHES):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8 * batches, 4, generator=generator)
    return DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=8)


def trainer(tmp_path, *callbacks, **options):
    options = {"max_epochs": 2, "logger": False, "enable_checkpointing": False, **options}
    return L.Trainer(
        callbacks=list(callbacks), accelerator="cpu", devices=1, default_root_dir=tmp_path,
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip


def fitted(tmp_path, callback, module=None, *others, validate=False, path=None, **options):
    module = Network() if module is None else module
    run = trainer(tmp_path, callback, *others, **options)
    run.fit(module, data(), data(2) if validate else None, ckpt_path=path)
    return module, run


def expected(module, teacher):
    """The definition: the kernel's weights times every state that the student passed through."""
    states = torch.stack(module.states).double()
    return torch.from_numpy(teacher.trajectory_weights()) @ states


def assert_average(module, teacher):
    torch.testing.assert_close(
        weights(teacher.module).double(), expected(module, teacher), rtol=1e-5, atol=1e-6
    )


class Stop(Callback):
    """Fails in the n-th training batch."""

    def __init__(self, batch, kind=RuntimeError):
        self.batch, self.kind = batch, kind

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.fit_loop.total_batch_idx + 1 == self.batch:
            raise self.kind("stopped here")
