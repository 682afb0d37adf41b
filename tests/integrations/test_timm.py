"""timm's own saver, loader, task and ModelEmaV3; the loops are the parts of its scripts that touch them.

timm's scripts are not in its package. If `TIMM_SCRIPTS` names the folder that has its `train.py` and
`legacy_train.py`, they are run, too.
"""

import logging
import os
import re
import runpy
import sys
from pathlib import Path

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d
from timm.models import load_checkpoint, resume_checkpoint
from timm.task import ClassificationTask, load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import CheckpointSaver, ModelEmaV3, get_state_dict
from torch import nn
from torch.nn import functional as F

from wmateacher import WMATeacher, kernels, recalibrate
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


def train_task(folder, epochs=EPOCHS, resume=None, compiled=False, accumulate=1, kernel="beta(0.5,0.5)"):
    """What train.py does with a task; the task, and the state that the model had after each update."""
    task = ClassificationTask(
        network(), torch.nn.CrossEntropyLoss(), device=torch.device("cpu"), verbose=False
    )
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), 0.05, momentum=0.9)
    start = 0 if resume is None else resume_task_checkpoint(task, resume, optimizer, log_info=False)
    task.trainable_module_ema = ModelWma(
        task.get_trainable_module(), kernel, device="cpu", dtype=torch.float32
    )
    states = [{k: v.double() for k, v in task.get_trainable_module().state_dict().items()}]
    if resume is not None:
        load_task_ema_checkpoint(task, resume)
    if compiled:
        task.compile(backend="eager")
        task.compile_ema(backend="eager")
    folder.mkdir(exist_ok=True)
    saver = CheckpointSaver(task.get_trainable_module(), optimizer, checkpoint_dir=str(folder), task=task)
    task.trainable_module_ema.set_total_steps(EPOCHS * UPDATES)
    for epoch in range(start, epochs):
        task.get_trainable_module().train()
        num_updates = epoch * UPDATES
        for _ in range(UPDATES):
            generator = torch.Generator().manual_seed(num_updates)
            for _ in range(accumulate):
                images = torch.randn(4, 1, 32, 32, generator=generator)
                loss = task(images, (images.mean((1, 2, 3)) > 0).long())["loss"] / accumulate
                loss.backward()
            optimizer.step()
            num_updates += 1
            optimizer.zero_grad()
            task.update_ema(step=num_updates)
            states.append({k: v.double() for k, v in get_state_dict(task.get_trainable_module()).items()})
        task.get_eval_model(ema=True).eval()
        with torch.inference_mode():
            output = task.get_eval_model(ema=True)(images)
            torch.testing.assert_close(output, task.trainable_module_ema.module(images))
        saver.save_checkpoint(epoch, metric=float(epoch))
    return task, states


@pytest.mark.parametrize(("compiled", "accumulate"), [(False, 2), (True, 1)])
def test_a_task_has_the_kernels_average_also_in_a_resumed_run(tmp_path, compiled, accumulate):
    options = {"compiled": compiled, "accumulate": accumulate}
    task, states = train_task(tmp_path / "whole", **options)
    if not compiled:
        train_task(tmp_path / "stopped", epochs=2, **options)
        again, _ = train_task(tmp_path / "stopped", resume=tmp_path / "stopped/last.pth.tar", **options)
        same(task.trainable_module_ema, again.trainable_module_ema)
    weights = kernels.Beta(0.5, 0.5).profile(EPOCHS * UPDATES)
    file = torch.load(tmp_path / "whole/last.pth.tar", weights_only=True)
    for name, value in file["state_dict_ema"].items():
        if value.is_floating_point():
            expected = sum(w * state[name] for w, state in zip(weights, states, strict=True))
            torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)


def test_the_horizon_may_be_set_until_the_first_update():
    model = network()
    late, known = ModelWma(model, "beta(0.5,0.5)"), ModelWma(model, "beta(0.5,0.5)", 9)
    assert late.kernel == known.kernel == kernels.Beta(0.5, 0.5)
    with pytest.raises(
        RuntimeError, match=r"'beta\(0.5,0.5\)' needs total_steps.*set_total_steps\(num_epochs"
    ):
        late.update(model, step=1)
    assert late.step == 0
    assert late.get_decay() == known.get_decay() == 0  # the start counts alone
    with pytest.raises(RuntimeError, match=r"without it: first call its set_total_steps\(num_epochs"):
        late.get_decay(1)
    late.set_total_steps(9)
    weights = kernels.Beta(0.5, 0.5).profile(9)
    assert late.get_decay(5) == known.get_decay(5) == pytest.approx(1 - weights[5] / weights[:6].sum())
    for step, message in (
        (10, "step must be at most total_steps=9, got 10"),
        (-1, "step must be a whole number of at least 0, got -1"),
        (1.5, "step must be a whole number of at least 0, got 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            known.get_decay(step)
    for step in range(1, 10):
        with torch.no_grad():
            [p.add_(1) for p in model.parameters()]
        late.update(model, step=step)
        known.update(model, step=step)
    same(known, late)
    assert late.get_extra_state() == known.get_extra_state()
    with pytest.raises(ValueError, match="after the end of a run of total_steps=5: lower start_step"):
        ModelWma(model, "ema(0.5,1.0,schedule=cosine,start_step=7)").set_total_steps(5)


KERNEL_AND_DEVICE = '"beta(0.5,0.5)", device="cpu" if args.model_ema_force_cpu else None, dtype=torch.float32'
CHANGES = {  # a script, what builds its average, what does instead, and the average's name
    "train.py": (
        r"task\.setup_ema\(.*?\n {8}\)",
        f"task.trainable_module_ema = ModelWma(task.get_trainable_module(), {KERNEL_AND_DEVICE})",
        "task.trainable_module_ema",
    ),
    "legacy_train.py": (
        r"model_ema = utils\.ModelEmaV3\(.*?\n {8}\)",
        f"model_ema = ModelWma(model, {KERNEL_AND_DEVICE})",
        "model_ema",
    ),
}


@pytest.fixture
def run_script(tmp_path, monkeypatch):
    """A function that changes one of timm's scripts, runs it, and returns its average and its folder."""
    folder = os.environ.get("TIMM_SCRIPTS")
    if not folder:
        pytest.skip("TIMM_SCRIPTS does not name a folder with timm's train.py and legacy_train.py")
    images = pytest.importorskip("torchvision").datasets.FakeData(24, (3, 32, 32), 2, random_offset=3)
    for index, (image, label) in enumerate(images):
        place = tmp_path / "data" / ("train" if index < 16 else "validation") / str(int(label))
        place.mkdir(parents=True, exist_ok=True)
        image.save(place / f"{index}.png")

    def run(script, experiment, *options):
        pattern, instead, average = CHANGES[script]
        text, built = re.subn(pattern, instead, (Path(folder) / script).read_text(), flags=re.DOTALL)
        schedule = "    start_epoch = 0\n"
        assert built == text.count(schedule) == 1
        known = (
            f"    {average}.set_total_steps(num_epochs * updates_per_epoch)\n    averages.append({average})\n"
        )
        head = "from wmateacher.integrations.timm import ModelWma\n"
        changed = tmp_path / script
        changed.write_text(head + text.replace(schedule, known + schedule))
        averages = Averages()
        arguments = [
            "--data-dir", tmp_path / "data", "--model", "test_resnet", "--num-classes", 2, "--device", "cpu",
            "--workers", 0, "--batch-size", 2, "--img-size", 32, "--epochs", 4, "--warmup-epochs", 0,
            "--lr", 0.05, "--no-aug", "--model-ema", "--output", tmp_path / "out", "--experiment", experiment,
        ]  # fmt: skip
        monkeypatch.setattr(sys, "argv", [str(a) for a in [script, *arguments, *options]])
        handlers, level = logging.root.handlers[:], logging.root.level
        try:
            runpy.run_path(str(changed), {"averages": averages}, run_name="__main__")
        finally:
            logging.root.handlers[:] = handlers
            logging.root.setLevel(level)
        return averages, tmp_path / "out" / experiment

    return run


class Averages(list):
    """The average of a run, and how often it computed."""

    calls = 0

    def append(self, average):
        super().append(getattr(average, "_orig_mod", average))
        if self[0] is average:  # torch.compile does not trace the hook
            average.module.register_forward_hook(lambda *a: setattr(self, "calls", self.calls + 1))


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("script", CHANGES)
def test_timms_scripts_run_with_it(script, run_script):
    options = {
        "plain": [], "cpu": ["--model-ema-force-cpu"], "accumulated": ["--grad-accum-steps", 3],
        "compiled": ["--torchcompile", "eager"],
    }  # fmt: skip
    for experiment, more in options.items():
        averages, folder = run_script(script, experiment, *more)
        average, steps = averages[0], 4 * (3 if experiment == "accumulated" else 8)
        assert (average.step, average.total_steps) == (steps, steps)
        assert average.trajectory_weights() == pytest.approx(kernels.Beta(0.5, 0.5).profile(steps))
        # The script validates the student if the average is forced to the CPU.
        if experiment != "compiled":
            assert averages.calls == (0 if experiment == "cpu" else 4 * 4)
        file = torch.load(folder / "last.pth.tar", weights_only=False)
        assert all(torch.equal(v, average.module.state_dict()[k]) for k, v in file["state_dict_ema"].items())
        # The images of each epoch are drawn anew, so that a resumed run has other steps, at the same weights.
        cut = folder / "checkpoint-1.pth.tar"
        again, _ = run_script(script, f"{experiment}-resumed", "--resume", cut, *more)
        assert again[0].step == steps
        assert again[0].trajectory_weights() == pytest.approx(average.trajectory_weights())
