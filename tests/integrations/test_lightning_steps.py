"""Which optimizer steps count: schedules of accumulation, epochs, several optimizers, tuners, unfreezing."""

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
)
from lightning.pytorch.tuner import Tuner
from lightning_students import (
    IGNORED,
    Adversaries,
    Network,
    Plain,
    Stop,
    assert_average,
    data,
    expected,
    fitted,
    trainer,
    weights,
)
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from wmateacher import kernels
from wmateacher.integrations.lightning import TeacherCallback

pytestmark = [
    *(pytest.mark.filterwarnings(line) for line in IGNORED),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]


def test_the_horizon_follows_a_schedule_of_gradient_accumulation(tmp_path):
    schedule = GradientAccumulationScheduler({0: 1, 1: 2, 3: 5})
    module, run = fitted(tmp_path, TeacherCallback(), None, schedule, max_epochs=4)
    assert module.teacher.step == module.teacher.total_steps == run.global_step == 5 + 3 + 3 + 1
    assert_average(module, module.teacher)
    module, run = fitted(tmp_path, TeacherCallback(), None, schedule, max_epochs=4, max_steps=9)
    assert module.teacher.step == module.teacher.total_steps == 9


def test_one_snapshot_an_epoch(tmp_path):
    """The window and the horizon stay in steps: each snapshot has the mass of the steps nearest to it."""
    saves = ModelCheckpoint(tmp_path, save_last=True)
    options = {"accumulate_grad_batches": 2, "max_epochs": 4}
    module, _ = fitted(tmp_path, TeacherCallback("uniform", update_every="epoch"), **options)
    teacher = module.teacher
    assert (teacher.step, teacher.total_steps) == (12, 12)  # three steps an epoch
    taken = teacher.trajectory_weights()
    # Of 13 states, the steps 0 and 1 go to the start, 2 to 4 to the first epoch's end, and so on.
    np.testing.assert_allclose(taken[::3] * 13, [2, 3, 3, 3, 2])
    assert np.count_nonzero(taken) == 5
    assert_average(module, teacher)
    with pytest.raises(RuntimeError, match="stopped here"):
        fitted(
            tmp_path, TeacherCallback("uniform", update_every="epoch"), None, saves, Stop(13),
            enable_checkpointing=True, **options,
        )  # fmt: skip
    path = tmp_path / "last.ckpt"
    callback = TeacherCallback("uniform", update_every="epoch", evaluate_with="teacher")
    resumed, run = fitted(tmp_path, callback, None, path=path, **options)
    assert torch.equal(weights(resumed.teacher.module), weights(teacher.module))
    run.validate(resumed, data(1), ckpt_path=path, verbose=False)
    assert not torch.equal(resumed.seen[-1], weights(teacher.module))


class Endless(IterableDataset):
    def __iter__(self):
        return iter([(torch.randn(4), 0)] * 8)


@pytest.mark.parametrize(
    ("module", "loader", "others", "why"),
    [
        (Network, DataLoader(Endless(), 8), [], "the training data has no length"),
        (Network, data(), [GradientAccumulationScheduler({1: 2})], "a GradientAccumulationScheduler changes"),
        (Adversaries, data(), [], "the module steps its optimizers itself"),
    ],
)
def test_epochs_of_unknown_or_different_lengths_are_refused(tmp_path, module, loader, others, why):
    callback = TeacherCallback("ema(0.9)", update_every="epoch", optimizer=0)
    with pytest.raises(ValueError, match=f"{why}.*: pass a number of steps, update_every=N"):
        trainer(tmp_path, callback, *others).fit(module(), loader)


def test_several_optimizers_count_together(tmp_path):
    class Alternating(Adversaries):
        def training_step(self, batch, index):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(self.critic(self.generator(batch[0])).square().mean())
                optimizer.step()

    callback = TeacherCallback("uniform", optimizer=[0, 1])
    states = []
    module = Alternating()
    states.append(weights(module))
    module.on_train_batch_end = lambda *_: states.append(weights(module))
    _, run = fitted(tmp_path, callback, module)
    assert run.global_step == 20
    assert module.teacher.step == module.teacher.total_steps == 10
    mean = torch.stack(states).double().mean(0)
    torch.testing.assert_close(weights(module.teacher.module).double(), mean, rtol=1e-5, atol=1e-6)
    # Of these, the critic steps first.
    with pytest.raises(RuntimeError, match="pass the optimizers in the order in which they step"):
        fitted(tmp_path, callback, Adversaries())
    module, _ = fitted(tmp_path, TeacherCallback("uniform", 10, optimizer=[1, 0]), Adversaries())
    assert module.teacher.step == 10
    for wrong in ([0, 2], [], [True], "0"):
        with pytest.raises(ValueError, match="optimizer must be"):
            fitted(tmp_path, TeacherCallback("uniform", 10, optimizer=wrong), Adversaries())


# --- tuners -------------------------------------------------------------------------------------------


class Tuned(Network):
    def __init__(self):
        super().__init__()
        self.lr, self.batch_size, self.trials = 1e-2, 8, 0

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(80, 4, generator=generator)
        return DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=self.batch_size)

    val_dataloader = train_dataloader

    def training_step(self, batch, index):
        self.trials += self.teacher.step == 0
        return super().training_step(batch, index)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), self.lr)
        optimizer.register_step_post_hook(lambda *_: self.states.append(weights(self)))
        return optimizer


def test_what_tuners_try_does_not_count(tmp_path):
    """`training_step` has a teacher in their trials; the run after them starts from the module as it is."""
    module = Tuned()
    run = trainer(tmp_path, TeacherCallback("uniform", evaluate_with="teacher"))
    tuner = Tuner(run)
    tuner.lr_find(module, num_training=30, early_stop_threshold=None)
    assert module.trials == 20
    assert not hasattr(module, "teacher")
    tuner.scale_batch_size(module, max_trials=2, steps_per_trial=2, init_val=16)
    assert (module.batch_size, run.global_step) == (32, 0)
    with torch.no_grad():
        module.net[0].weight.add_(1.0)
    module.states.clear()
    run.fit(module)
    assert module.teacher.step == module.teacher.total_steps == run.global_step == 6
    assert_average(module, module.teacher)


def test_tuners_inside_a_run_leave_its_average_alone(tmp_path):
    class AtSecondEpoch(LearningRateFinder):
        def on_fit_start(self, *unused):
            pass

        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                pl_module.before = pl_module.teacher.step, weights(pl_module.teacher.module)
                self.lr_find(trainer, pl_module)
                pl_module.after = pl_module.teacher.step, weights(pl_module.teacher.module)

    module = Tuned()
    finder = BatchSizeFinder(max_trials=2, steps_per_trial=2, init_val=16)
    again = AtSecondEpoch(num_training_steps=3, early_stop_threshold=None)
    run = trainer(tmp_path, finder, again, TeacherCallback("uniform", update_every="epoch"))
    module.on_train_start = module.states.clear
    module.on_train_epoch_start = lambda: module.states.append(weights(module))
    run.fit(module)
    assert module.batch_size == 32
    assert module.before[0] == module.after[0] == 3
    assert torch.equal(module.before[1], module.after[1])
    assert module.teacher.step == module.teacher.total_steps == 6
    np.testing.assert_allclose(module.teacher.trajectory_weights() * 7, [2, 0, 0, 3, 0, 0, 2])


# --- unfreezing ---------------------------------------------------------------------------------------


class Pretrained(Plain):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.backbone, self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh()), nn.Linear(8, 2)

    def forward(self, x):
        return self.net(self.backbone(x))

    def training_step(self, batch, index):
        logits = self(batch[0])
        return F.cross_entropy(logits, batch[1]) + F.mse_loss(logits, self.teacher(batch[0]))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.net.parameters(), 1e-2)
        optimizer.register_step_post_hook(lambda *_: self.states.append(weights(self)))
        return optimizer


@pytest.mark.filterwarnings("ignore:The parameter .* is frozen")
def test_a_backbone_that_unfreezes_is_averaged_from_its_frozen_value(tmp_path):
    def callbacks():
        return BackboneFinetuning(1, lambda epoch: 1.5, backbone_initial_lr=1e-2, should_align=False)

    saves = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    options = {"max_epochs": 3, "enable_checkpointing": True}
    whole, _ = fitted(tmp_path, TeacherCallback("uniform"), Pretrained(), callbacks(), saves, **options)
    assert torch.equal(whole.states[0][-40:], whole.states[5][-40:])  # the backbone's, in the first epoch
    assert not torch.equal(whole.states[5][-40:], whole.states[6][-40:])
    torch.testing.assert_close(
        weights(whole.teacher.module).double(),
        torch.stack(whole.states).double().mean(0),
        rtol=1e-5,
        atol=1e-6,
    )
    assert_average(whole, whole.teacher)
    # Lightning itself leaves the backbone frozen in runs that resume after the epoch that unfreezes it.
    again = TeacherCallback("uniform"), Pretrained(), callbacks()
    resumed, _ = fitted(tmp_path, *again, path=tmp_path / "epoch=0.ckpt", max_epochs=3)
    assert resumed.teacher.step == 15
    assert torch.equal(weights(resumed), weights(whole))
    assert torch.equal(weights(resumed.teacher.module), weights(whole.teacher.module))


# --- an average of chosen epochs ----------------------------------------------------------------------


class Chosen(kernels.Kernel):
    """The plain mean of the states after some steps, as stochastic weight averaging takes it."""

    def __init__(self, *steps):
        self.steps = steps

    @property
    def needs_horizon(self):
        return False

    def retention(self, steps, total_steps):
        taken = np.searchsorted(self.steps, steps, side="right")
        return np.where(np.isin(steps, self.steps), 1 - 1 / np.maximum(taken, 1), 1.0) * (steps > 0)

    def __str__(self):
        return f"chosen{self.steps}"


def test_a_kernel_of_ones_own_averages_chosen_epochs(tmp_path):
    module, _ = fitted(tmp_path, TeacherCallback(Chosen(20, 30, 40)), max_epochs=8)
    mean = torch.stack([module.states[i] for i in (20, 30, 40)]).double().mean(0)
    torch.testing.assert_close(weights(module.teacher.module).double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(expected(module, module.teacher), mean)
