"""timm's own saver, loader, task and ModelEmaV3; the loop is the part of its train.py that touches them."""

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d
from timm.models import load_checkpoint, resume_checkpoint
from timm.task import ClassificationTask
from timm.utils import CheckpointSaver, ModelEmaV3, get_state_dict
from torch import nn
from torch.nn import functional as F

from wmateacher import WMATeacher, recalibrate
from wmateacher.integrations.timm import ModelWma
from wmateacher.migration import PeerEMA

EPOCHS, UPDATES = 4, 3


def network(dtype=torch.float32):
    torch.manual_seed(1)
    return timm.create_model("test_resnet", num_classes=2, in_chans=1).to(dtype)


def train(average, folder, epochs=EPOCHS, resume=None, model=None):
    """`epochs` of three updates, saved after each; the model and its average."""
    model = network() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    start = 0
    if resume is not None:
        start = resume_checkpoint(model, str(resume), optimizer, log_info=False)
    model_ema = average(model)
    if resume is not None:
        load_checkpoint(model_ema.module, str(resume), use_ema=True)
    folder.mkdir(exist_ok=True)
    saver = CheckpointSaver(model, optimizer, model_ema=model_ema, checkpoint_dir=str(folder))
    num_updates = start * UPDATES
    for epoch in range(start, epochs):
        model.train()
        for _ in range(UPDATES):
            generator = torch.Generator().manual_seed(num_updates)
            images = torch.randn(4, 1, 32, 32, generator=generator).to(next(model.parameters()).dtype)
            F.cross_entropy(model(images), (images.mean((1, 2, 3)) > 0).long()).backward()
            optimizer.step()
            optimizer.zero_grad()
            num_updates += 1
            model_ema.update(model, step=num_updates)
        saver.save_checkpoint(epoch, metric=float(epoch))
    return model, model_ema


def same(one, other, **tolerance):
    one, other = (m.module.state_dict() for m in (one, other))
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, **{"rtol": 0, "atol": 0, **tolerance})


@pytest.mark.parametrize(
    ("theirs", "kernel"),
    [
        ({"decay": 0.8}, PeerEMA(0.8)),
        ({"decay": 0.8, "use_warmup": True, "warmup_power": 0.75}, PeerEMA(0.8, "inverse_gamma", power=0.75)),
    ],
)
def test_it_averages_as_model_ema_v3_does(tmp_path, theirs, kernel):
    _, peer = train(lambda m: ModelEmaV3(m, **theirs), tmp_path / "peer")
    _, ours = train(lambda m: ModelWma(m, kernel), tmp_path / "ours")
    same(peer, ours, rtol=1e-5, atol=1e-6)
    files = [torch.load(tmp_path / d / "last.pth.tar", weights_only=True) for d in ("peer", "ours")]
    assert files[0].keys() == files[1].keys()
    assert files[0]["state_dict_ema"].keys() == files[1]["state_dict_ema"].keys()
    assert ours.get_decay(EPOCHS * UPDATES) == pytest.approx(peer.get_decay(EPOCHS * UPDATES))


@pytest.mark.parametrize("kernel", ["beta(0.5,0.5)", "ema(0.9)"])
@pytest.mark.parametrize(
    ("every", "dtype"), [(1, torch.float32), (2, "auto"), (4, torch.float32), (5, torch.float32)]
)
def test_a_run_that_stopped_ends_with_the_same_weights(tmp_path, kernel, every, dtype):
    """To the last bit in the model's dtype; timm's file rounds vectors once that are averaged in float64."""

    def average(model):
        return ModelWma(model, kernel, EPOCHS * UPDATES, update_every=every, dtype=dtype)

    model, whole = train(average, tmp_path / "whole")
    train(average, tmp_path / "stopped", epochs=2)
    again, resumed = train(average, tmp_path / "stopped", resume=tmp_path / "stopped/last.pth.tar")
    assert resumed.step == whole.step == EPOCHS * UPDATES
    same(whole, resumed, **({"rtol": 1e-6, "atol": 1e-7} if dtype == "auto" else {}))
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in again.state_dict().items())


def test_it_is_the_teacher_of_the_same_kernel(tmp_path):
    teachers = []

    def average(model):
        teachers.append(WMATeacher(model, "beta(0.5,0.5)", EPOCHS * UPDATES, buffers="average"))
        ours = ModelWma(model, "beta(0.5,0.5)", EPOCHS * UPDATES)
        update = ours.update
        ours.update = lambda m, step: (update(m, step), teachers[0].update())
        return ours

    _, ours = train(average, tmp_path)
    same(teachers[0], ours)


def test_a_state_of_model_ema_v3_is_continued(tmp_path):
    train(lambda m: ModelEmaV3(m, decay=0.8), tmp_path / "a", epochs=2)
    file = tmp_path / "a/last.pth.tar"
    _, peer = train(lambda m: ModelEmaV3(m, decay=0.8), tmp_path / "b", resume=file)
    _, ours = train(lambda m: ModelWma(m, "ema(0.8)"), tmp_path / "c", resume=file)
    same(peer, ours, rtol=1e-5, atol=1e-6)


def test_a_gap_in_the_count_gives_the_kernels_mass_to_what_is_there():
    model = network()
    ours = ModelWma(model, "beta(0.5,0.5)", 20)
    ours.update(model, step=1)
    ours.update(model, step=12)
    assert ours.step == 12
    ours.update(model)
    assert ours.step == 13
    with pytest.raises(
        ValueError, match="step=13 was counted already, the last was 13: step is the number of"
    ):
        ours.update(model, step=13)


def test_half_precision_continues_what_timm_saved(tmp_path):
    model = network(torch.bfloat16)
    _, ours = train(lambda m: ModelWma(m, "ema(0.9)"), tmp_path, epochs=2, model=model)
    again = ModelWma(model, "ema(0.9)")
    load_checkpoint(again.module, str(tmp_path / "last.pth.tar"), use_ema=True)
    again.update(model, step=7)
    ours.update(model, step=7)
    same(ours, again, rtol=2e-2, atol=1e-3)  # the file has 8 bits of what the average has 24 of


def test_other_calls_of_timms_scripts():
    model = network()
    ours = ModelWma(model, "ema(0.9)")
    with torch.no_grad():
        [p.add_(1) for p in model.parameters()]
    ours.set(model)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in get_state_dict(ours).items())
    assert ours(torch.randn(2, 1, 32, 32)).shape == (2, 2)
    assert [n for n, _ in ours.module.named_buffers()] == [n for n, _ in model.named_buffers()]


def test_it_is_a_tasks_average(tmp_path):
    task = ClassificationTask(network(), torch.nn.CrossEntropyLoss(), device=torch.device("cpu"))
    task.trainable_module_ema = ModelWma(task.get_trainable_module(), "uniform", 10)
    optimizer = torch.optim.SGD(task.parameters(), 0.1)
    for step in range(1, 4):
        task(torch.randn(4, 1, 32, 32), torch.tensor([0, 1, 0, 1]))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        task.update_ema(step=step)
    assert task.trainable_module_ema.step == 3
    state = task.get_checkpoint_state(ema=True)
    assert state["state_dict_ema"].keys() == network().state_dict().keys()
    other = ClassificationTask(network(), torch.nn.CrossEntropyLoss(), device=torch.device("cpu"))
    other.trainable_module_ema = ModelWma(other.get_trainable_module(), "uniform", 10)
    other.load_checkpoint_state(state["state_dict_ema"], ema=True)
    same(task.trainable_module_ema, other.trainable_module_ema)


def test_layers_of_normalisation_and_activation_use_the_teachers_batch():
    model = nn.Sequential(BatchNormAct2d(3), FrozenBatchNormAct2d(3))
    model[0].drop = nn.Dropout(0.5)
    teacher, x = WMATeacher(model, "ema(0.9)", mode="train"), torch.randn(6, 3, 4, 4) + 2
    expected = model[1](model[0].act(F.batch_norm(x, None, None, training=True)))
    torch.testing.assert_close(teacher(x), expected)
    recalibrate(teacher, [x])
    torch.testing.assert_close(teacher.module[0].running_mean, x.mean((0, 2, 3)))
    assert not teacher.module[1].running_mean.any()
    assert not model[0].running_mean.any()
