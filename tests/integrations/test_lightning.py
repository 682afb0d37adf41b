import importlib
import pickle
import re
import subprocess
import sys
import warnings
from pathlib import Path

import programs
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.trainer.states import TrainerFn
from lightning_students import (
    IGNORED,
    Adversaries,
    Configured,
    Network,
    Plain,
    Stop,
    assert_average,
    data,
    fitted,
    trainer,
    weights,
)
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from wmateacher import WMATeacher, kernels, migration
from wmateacher.integrations.lightning import TeacherCallback

pytestmark = [pytest.mark.filterwarnings(line) for line in IGNORED]


# --- counting -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("accumulated", "steps"), [(1, 10), (2, 6), (4, 4), (5, 2)])
@pytest.mark.parametrize("kind", [Network, Configured])
def test_optimizer_steps_count_and_the_trainer_gives_the_horizon(tmp_path, kind, accumulated, steps):
    callback = TeacherCallback()
    module, run = fitted(tmp_path, callback, kind(), accumulate_grad_batches=accumulated)
    teacher = module.teacher
    assert teacher is callback.teacher
    assert teacher.step == teacher.total_steps == run.global_step == steps
    assert_average(module, teacher)


def test_max_steps_and_a_given_horizon(tmp_path):
    module, _ = fitted(tmp_path, TeacherCallback(), max_steps=7)
    assert module.teacher.step == module.teacher.total_steps == 7
    with pytest.warns(UserWarning, match="counted 10 optimizer steps of a horizon of 20: .*total_steps=10"):
        module, _ = fitted(tmp_path, TeacherCallback(total_steps=20))
    assert (module.teacher.step, module.teacher.total_steps) == (10, 20)


def test_steps_that_a_gradient_scaler_skips_do_not_count(tmp_path):
    class Overflowing(Network):
        def training_step(self, batch, index):
            loss = super().training_step(batch, index)
            return loss * (1e30 if index in (1, 3) else 1)

    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    with pytest.warns(UserWarning, match="counted 6 optimizer steps of a horizon of 10"):
        module, _ = fitted(tmp_path, TeacherCallback(), Overflowing(), plugins=[plugin])
    assert module.teacher.step == 6
    assert len(module.states) == 7
    assert_average(module, module.teacher)


def test_the_optimizer_that_trains_the_student_is_the_one_that_counts(tmp_path):
    module, run = fitted(tmp_path, TeacherCallback("uniform", 6, student="generator"), Adversaries())
    assert run.global_step == 16
    assert module.teacher.step == 6
    assert isinstance(module.teacher.module, nn.Linear)
    with pytest.raises(
        ValueError, match=r"2 of the module's 2 optimizers train the student: .*optimizer=INDEX"
    ):
        fitted(tmp_path, TeacherCallback("uniform", 10), Adversaries())
    module, _ = fitted(tmp_path, TeacherCallback("uniform", 10, optimizer=1), Adversaries())
    assert module.teacher.step == 10


def test_the_teacher_is_not_a_submodule(tmp_path):
    names = set(Network().state_dict())
    module, run = fitted(tmp_path, TeacherCallback())
    assert set(module.state_dict()) == names
    assert {n for n, _ in module.named_modules()} == {n for n, _ in Network().named_modules()}
    trained = {id(p) for g in run.optimizers[0].param_groups for p in g["params"]}
    assert trained == {id(p) for p in module.parameters()}


def test_several_teachers_of_one_student(tmp_path):
    fast = TeacherCallback("ema(0.5)", name="fast")
    module, _ = fitted(tmp_path, TeacherCallback(), None, fast)
    assert_average(module, module.fast)
    assert_average(module, module.teacher)
    assert not torch.equal(weights(module.fast), weights(module.teacher))


def test_a_second_fit_continues_or_starts_anew(tmp_path):
    callback = TeacherCallback("ema(0.9)")
    module, run = fitted(tmp_path, callback)
    first = module.teacher
    run.fit_loop.max_epochs = 4
    with pytest.warns(UserWarning, match="the run is now 20 steps long, the teacher began with 10"):
        run.fit(module, data())
    assert module.teacher is first
    assert first.step == 20
    fitted(tmp_path, callback, module)
    assert module.teacher is not first
    assert module.teacher.step == 10


# --- evaluation ---------------------------------------------------------------------------------------


def test_the_teacher_follows_the_module_to_another_device(tmp_path):
    """Lightning moves the module to the GPU for each run, and back after it; meta stands for the GPU."""
    for options, device in (({}, "meta"), ({"device": "cpu"}, "cpu")):
        callback = TeacherCallback("uniform", **options)
        module, run = fitted(tmp_path, callback)
        run.state.fn = TrainerFn.TESTING
        module.to("meta")
        callback.on_test_start(run, module)
        assert next(module.teacher.module.parameters()).device.type == device


def test_evaluation_sees_the_average_and_training_the_student(tmp_path):
    callback = TeacherCallback(evaluate_with="teacher")
    module, run = fitted(tmp_path, callback, validate=True)
    teacher = module.teacher
    start, *epochs = module.seen[::2]  # two batches each
    assert len(epochs) == 2
    assert torch.equal(start, module.states[0])  # the sanity check, before any update
    assert torch.equal(epochs[1], weights(teacher.module))
    assert torch.equal(weights(module), module.states[-1])
    assert_average(module, teacher)
    plain, _ = fitted(tmp_path, TeacherCallback(), validate=True)
    assert torch.equal(weights(plain), weights(module))
    assert torch.equal(plain.seen[-1], weights(plain))
    module.test_step = module.predict_step = module.validation_step
    run.test(module, data(1), verbose=False)
    assert torch.equal(module.seen[-1], weights(teacher.module))
    assert torch.equal(weights(module), module.states[-1])


@pytest.mark.parametrize("kind", [ZeroDivisionError, KeyboardInterrupt])
def test_an_exception_in_validation_leaves_the_student_its_own_weights(tmp_path, kind):
    class Failing(Network):
        def validation_step(self, batch, index):
            if not self.trainer.sanity_checking:
                raise kind

    module = Failing()
    with pytest.raises((kind, SystemExit)):
        fitted(tmp_path, TeacherCallback(evaluate_with="teacher"), module, validate=True)
    assert torch.equal(weights(module), module.states[-1])
    module.teacher.update()  # neither lent nor attached any more


# --- checkpoints --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", ["student", "teacher"])
def test_a_run_that_crashed_ends_with_the_same_bits(tmp_path, kept):
    def callbacks(folder):
        saves = ModelCheckpoint(tmp_path / folder, save_last=True)
        return TeacherCallback("beta(0.5,0.5)", evaluate_with="teacher", checkpoint=kept), saves

    options = {"max_epochs": 4, "accumulate_grad_batches": 2, "validate": True, "enable_checkpointing": True}
    callback, saves = callbacks("whole")
    whole, _ = fitted(tmp_path, callback, None, saves, **options)
    callback, saves = callbacks("crashed")
    with pytest.raises(RuntimeError, match="stopped here"):
        fitted(tmp_path, callback, None, saves, Stop(13), **options)
    last = tmp_path / "crashed/last.ckpt"
    callback, saves = callbacks("crashed")
    resumed, run = fitted(tmp_path, callback, None, saves, path=last, **options)
    assert resumed.teacher.step == run.global_step == 12
    # A sanity check of the restored average, then two epochs that were left, with two batches each.
    assert len(resumed.seen) == 6
    assert all(map(torch.equal, resumed.seen, whole.seen[-6:]))
    assert torch.equal(resumed.seen[-1], weights(resumed.teacher.module))
    for name, value in whole.teacher.state_dict().items():
        ours = resumed.teacher.state_dict()[name]
        assert torch.equal(ours, value) if isinstance(value, torch.Tensor) else ours == value
    assert torch.equal(weights(resumed), weights(whole))
    loaded = Network.load_from_checkpoint(last, weights_only=True)
    assert torch.equal(weights(loaded), weights(resumed if kept == "student" else resumed.teacher.module))


def test_a_submodules_average_is_saved_under_its_name(tmp_path):
    saves = ModelCheckpoint(tmp_path, save_last=True)
    callback = TeacherCallback(student="net.0", checkpoint="teacher")

    module, _ = fitted(tmp_path, callback, Plain(), saves, enable_checkpointing=True)
    loaded = Plain.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert torch.equal(loaded.net[0].weight, module.teacher.module.weight)
    assert torch.equal(loaded.net[2].weight, module.net[2].weight)


def test_a_checkpoint_is_evaluated_without_fit(tmp_path):
    saves = ModelCheckpoint(tmp_path, save_last=True)
    module, _ = fitted(tmp_path, TeacherCallback(), None, saves, enable_checkpointing=True)
    fresh = Network()
    run = trainer(tmp_path, TeacherCallback(evaluate_with="teacher"))
    run.validate(fresh, data(1), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert torch.equal(fresh.seen[-1], weights(module.teacher.module))
    assert torch.equal(weights(fresh), weights(module))


def without_teacher(folder):
    """The checkpoint at step 10 of a run that had no teacher."""
    saves = ModelCheckpoint(folder, save_last=True)
    fitted(folder, TeacherCallback(), None, saves, enable_checkpointing=True)
    content = torch.load(folder / "last.ckpt", weights_only=True)
    content["callbacks"] = {k: v for k, v in content["callbacks"].items() if "TeacherCallback" not in k}
    torch.save(content, folder / "plain.ckpt")
    return folder / "plain.ckpt"


def test_a_longer_run_and_one_that_had_no_teacher(tmp_path):
    saves = ModelCheckpoint(tmp_path, save_last=True)
    fitted(tmp_path, TeacherCallback(), None, saves, enable_checkpointing=True)
    path = tmp_path / "last.ckpt"
    with pytest.warns(UserWarning, match="the run is now 20 steps long, the teacher began with 10"):
        module, _ = fitted(tmp_path, TeacherCallback(), path=path, max_epochs=4)
    assert module.teacher.step == module.teacher.total_steps == 20
    content = torch.load(path, weights_only=True)
    content["callbacks"] = {k: v for k, v in content["callbacks"].items() if "TeacherCallback" not in k}
    torch.save(content, path)
    with pytest.warns(UserWarning, match="checkpoint at step 10 has no teacher: .* over the 10 steps"):
        module, _ = fitted(tmp_path, TeacherCallback(), path=path, max_epochs=4)
    assert module.teacher.step == module.teacher.total_steps == 10


def test_an_average_that_started_late_in_its_run_can_be_resumed(tmp_path):
    start = without_teacher(tmp_path)
    saves = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1)
    options = {"max_epochs": 4, "enable_checkpointing": True}
    with pytest.warns(UserWarning, match="checkpoint at step 10 has no teacher: .* over the 10 steps"):
        whole, _ = fitted(tmp_path, TeacherCallback(), None, saves, path=start, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the run is now")
        again, _ = fitted(tmp_path, TeacherCallback(), path=tmp_path / "step=15.ckpt", max_epochs=4)
    assert again.teacher.step == again.teacher.total_steps == 10
    assert torch.equal(weights(again.teacher.module), weights(whole.teacher.module))


@pytest.mark.parametrize(("start_step", "steps", "averaged"), [(4, 14, 11), (10, 20, 11), (16, 20, 5)])
def test_a_late_start_in_a_run_that_had_no_teacher(tmp_path, start_step, steps, averaged):
    """From its `start_step` on, or from the first step of the resumed run if that is later."""
    path = without_teacher(tmp_path)
    kernel = f"uniform(start_step={start_step})"
    with pytest.warns(UserWarning, match="checkpoint at step 10 has no teacher"):
        module, _ = fitted(tmp_path, TeacherCallback(kernel), path=path, max_epochs=4)
    teacher = module.teacher
    assert teacher.step == teacher.total_steps == steps
    assert teacher.trajectory_weights()[-averaged:] == pytest.approx([1 / averaged] * averaged)


def test_a_given_horizon_is_the_whole_runs_also_if_it_had_no_teacher(tmp_path):
    path = without_teacher(tmp_path)
    saves = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1)
    options = {"max_epochs": 4, "enable_checkpointing": True}
    with pytest.warns(UserWarning, match="checkpoint at step 10 has no teacher: .* over the 10 steps"):
        whole, _ = fitted(tmp_path, TeacherCallback(total_steps=20), None, saves, path=path, **options)
    assert whole.teacher.step == whole.teacher.total_steps == 10
    assert whole.teacher.trajectory_weights() == pytest.approx(kernels.Beta(0.5, 0.5).profile(10))
    path = tmp_path / "step=15.ckpt"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the run is now")
        again, _ = fitted(tmp_path, TeacherCallback(total_steps=20), path=path, max_epochs=4)
    assert torch.equal(weights(again.teacher.module), weights(whole.teacher.module))
    with pytest.raises(ValueError, match="total_steps=9 ends before step 10, .* from its beginning"):
        fitted(tmp_path, TeacherCallback(total_steps=9), path=tmp_path / "plain.ckpt", max_epochs=4)


def test_one_of_several_optimizers_has_its_own_steps_left(tmp_path):
    saves = ModelCheckpoint(tmp_path, save_last=True)
    trainer(tmp_path, saves, enable_checkpointing=True).fit(Adversaries(), data())
    callback = TeacherCallback("uniform", total_steps=20, student="critic")
    with pytest.warns(UserWarning, match="step 10 has no teacher: .* over the 10 steps"):
        module, _ = fitted(tmp_path, callback, Adversaries(), path=tmp_path / "last.ckpt", max_epochs=4)
    assert module.teacher.step == module.teacher.total_steps == 10


def test_another_kernel_does_not_take_over_a_checkpoint(tmp_path):
    saves = ModelCheckpoint(tmp_path, save_last=True)
    fitted(tmp_path, TeacherCallback(), None, saves, enable_checkpointing=True)
    with pytest.raises(
        ValueError, match="written with kernel='beta.0.5,0.5.', this teacher has kernel='unif"
    ):
        fitted(tmp_path, TeacherCallback("uniform"), path=tmp_path / "last.ckpt", max_epochs=4)


# --- bad input ----------------------------------------------------------------------------------------


class Endless(IterableDataset):
    def __iter__(self):
        return iter([(torch.randn(4), 0)] * 8)


def test_an_unknown_horizon_is_an_error(tmp_path):
    message = r"cannot tell how many steps .*max_epochs=2, max_steps=-1, 1 optimizers.*total_steps=\.\.\."
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, TeacherCallback()).fit(Network(), DataLoader(Endless(), 8))
    run = trainer(tmp_path, TeacherCallback("ema(0.9)"))
    run.fit(Network(), DataLoader(Endless(), 8))
    assert run.callbacks[0].teacher.step == 2
    with pytest.raises(ValueError, match="max_steps=6, 2 optimizers"):
        fitted(tmp_path, TeacherCallback(student="critic"), Adversaries(), max_steps=6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"evaluate_with": "teachers"},
            "unknown weights for evaluate_with 'teachers'; did you mean 'teacher'",
        ),
        ({"checkpoint": True}, "unknown weights for checkpoint True; available: student, teacher"),
        ({"student": "nett"}, "unknown submodule for student 'nett'; did you mean 'net'"),
        ({"name": "net"}, "Network has an attribute 'net' of its own: pass another name"),
        ({"total_steps": 0}, "total_steps must be a whole number of at least 1, got 0"),
        ({"optimizer": 1}, "optimizer must be an index below 1, .* got 1"),
        ({"kernel": "betta(1,1)"}, "unknown kernel 'betta'; did you mean 'beta'"),
        (
            {"finish_with": "average"},
            "unknown weights for finish_with 'average'; available: student, teacher",
        ),
        ({"update_every": "epochs"}, "update_every, .* must be a whole number of at least 1, got 'epochs'"),
        ({"name": "my teacher"}, "name must be the name of an attribute, got 'my teacher'"),
        ({"buffer": "keep"}, "unknown option of TeacherCallback 'buffer'; did you mean 'buffers'"),
    ],
)
def test_bad_arguments_say_what_to_do(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        fitted(tmp_path, TeacherCallback(**options))


def test_without_lightning_the_error_names_the_extra(monkeypatch):
    for name in ("lightning", "lightning.pytorch"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "wmateacher.integrations.lightning")
    with pytest.raises(ImportError, match=r"needs Lightning: pip install 'wmateacher\[lightning\]'"):
        importlib.import_module("wmateacher.integrations.lightning")


# --- processes ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes(tmp_path, strategy):
    """Each rank asserts in the program: counts, the definition of the average, resuming."""
    for rank in programs.launch(2, Path(__file__).parent / "lightning_ranks.py", strategy, tmp_path):
        assert rank.returncode == 0, rank.stderr[-3000:]
        assert rank.stdout.count("average is right") == 2


@pytest.mark.slow
def test_the_average_comes_back_from_spawned_processes(tmp_path):
    script = Path(__file__).parent / "lightning_ranks.py"  # a process of its own, which may fork
    program = subprocess.run([sys.executable, script, "fork", tmp_path], capture_output=True, text=True)
    assert program.returncode == 0, program.stderr[-3000:]
    assert "the average came back" in program.stdout
    assert program.stderr.count("TeacherCallback(finish_with='teacher')") == 1
    pickle.loads(pickle.dumps(TeacherCallback()))  # as spawning does


def test_a_teacher_is_a_wmateacher(tmp_path):
    module, _ = fitted(tmp_path, TeacherCallback(update_every=2, buffers="average"))
    assert isinstance(module.teacher, WMATeacher)
    assert module.teacher.trajectory_weights()[1] == 0


def test_lightnings_own_average_is_continued(tmp_path):
    module, saves = Plain(), ModelCheckpoint(tmp_path, save_last=True)
    trainer(tmp_path, EMAWeightAveraging(decay=0.9), saves, enable_checkpointing=True).fit(module, data())
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    teacher = WMATeacher(Plain(), "ema(0.9)")
    found = migration.load(teacher, content)
    assert (found.source, found.step) == ("lightning", 9)  # the first of ten updates is a copy
    for name, weight in teacher.module.state_dict().items():
        assert torch.equal(weight, content["state_dict"][name])
    states = module.states[1:11]
    expected = states[0]
    for state in states[1:]:
        expected = 0.9 * expected + 0.1 * state
    torch.testing.assert_close(weights(teacher.module), expected, rtol=1e-5, atol=1e-6)


def test_the_page_for_users_of_lightnings_own_average_ends_with_equal_modules(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = Path(__file__).parents[2] / "docs/guides/migration/lightning.md"
    (block,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    assert "torch.testing.assert_close(" in block
    exec(block, {})
