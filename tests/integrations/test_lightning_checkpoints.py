"""What evaluations of a Trainer's checkpoints see, and the averaged files that a Trainer writes."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_students import IGNORED, Network, Plain, data, fitted, trainer, weights

from wmateacher.integrations.lightning import TeacherCallback

pytestmark = [pytest.mark.filterwarnings(line) for line in IGNORED]


class Watched(Network):
    """Notes the weights and the teacher that each evaluation sees."""

    def __init__(self):
        super().__init__()
        self.teachers = []

    def validation_step(self, batch, index):
        super().validation_step(batch, index)
        teacher = getattr(self, "teacher", None)
        self.teachers.append(None if teacher is None else (teacher.step, weights(teacher.module)))

    test_step = validation_step

    def predict_step(self, batch, index):
        self.validation_step(batch, index)
        return 0


def average_in(path):
    """The average in a checkpoint's state of the callback, read without the library."""
    states = torch.load(path, weights_only=True)["callbacks"]
    state = next(v for k, v in states.items() if "TeacherCallback" in k)["teacher"]
    # Averages of vectors are there in float64; the module has their rounded values.
    return torch.cat([state[f"module.{name}"].flatten().float() for name, _ in Network().named_parameters()])


def student_in(path):
    content = torch.load(path, weights_only=True)
    state = content.get("student_state_dict", content["state_dict"])
    return torch.cat([state[name].flatten() for name, _ in Network().named_parameters()])


@pytest.fixture(scope="module", params=["student", "teacher"])
def finished(request, tmp_path_factory):
    """A run that kept the checkpoints of three epochs."""
    folder = tmp_path_factory.mktemp(request.param)
    saves = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_last=True)
    callback = TeacherCallback(evaluate_with="teacher", checkpoint=request.param)
    module, run = fitted(folder, callback, Watched(), saves, max_epochs=3, enable_checkpointing=True)
    return folder, module, run


def test_an_evaluation_uses_its_own_checkpoints_teacher(finished):
    folder, module, run = finished
    own, state = module.teacher, {k: v for k, v in module.teacher.state_dict().items() if torch.is_tensor(v)}
    paths = [folder / f"epoch={epoch}.ckpt" for epoch in range(3)]
    averages = [average_in(path) for path in paths]
    assert not torch.allclose(averages[0], averages[2])
    for evaluate, path, epoch in (
        (run.validate, paths[0], 0), (run.test, paths[2], 2), (run.predict, paths[1], 1),
        (run.validate, "last", 2), (run.test, "best", 2),
    ):  # fmt: skip
        evaluate(module, data(1), ckpt_path=path)
        assert torch.equal(module.seen[-1], averages[epoch])
        assert module.teachers[-1][0] == 5 * (epoch + 1)
        assert torch.equal(module.teachers[-1][1], averages[epoch])
        # Afterwards the module has the checkpoint's student, and the training's teacher is as before.
        assert torch.equal(weights(module), student_in(paths[epoch]))
        assert module.teacher is own is run.callbacks[0].teacher
        assert own.step == 15
        assert all(torch.equal(v, state[k]) for k, v in own.state_dict().items() if k in state)
    run.validate(module, data(1))
    assert torch.equal(module.seen[-1], averages[2])


def test_a_fresh_process_evaluates_several_checkpoints_in_turn(finished):
    folder, _, _ = finished
    fresh, other = Watched(), Watched()
    run = trainer(folder, TeacherCallback(evaluate_with="teacher"))
    plain = trainer(folder, TeacherCallback(evaluate_with="student"))
    for epoch in (1, 0, 2):
        path = folder / f"epoch={epoch}.ckpt"
        run.validate(fresh, data(1), ckpt_path=path, verbose=False)
        plain.test(other, data(1), ckpt_path=path, verbose=False)
        assert torch.equal(fresh.seen[-1], average_in(path))
        assert torch.equal(other.seen[-1], weights(fresh))
        assert torch.equal(other.teachers[-1][1], average_in(path))
        assert not torch.equal(weights(fresh), fresh.seen[-1])
        assert not hasattr(fresh, "teacher")
    # A run that starts after an evaluation starts its average anew.
    run.fit(fresh, data())
    assert torch.equal(fresh.states[0], student_in(folder / "epoch=2.ckpt"))
    assert fresh.teacher.step == 10


def test_without_an_average_an_evaluation_is_refused_or_says_so(tmp_path):
    saves = ModelCheckpoint(tmp_path, filename="weights", save_weights_only=True)
    callback = TeacherCallback(evaluate_with="teacher")
    module, run = fitted(tmp_path, callback, Watched(), saves, enable_checkpointing=True)
    own = module.teacher
    with pytest.raises(ValueError, match=r"weights\.ckpt has no teacher to evaluate: .*save_weights_only"):
        run.validate(module, data(1), ckpt_path=tmp_path / "weights.ckpt")
    assert module.teacher is own
    assert not module.seen
    fresh = Watched()
    with pytest.warns(
        UserWarning, match="this Watched has no teacher yet, and its own weights are evaluated"
    ):
        run.validate(fresh, data(1), verbose=False)
    assert torch.equal(fresh.seen[-1], weights(fresh))
    trainer(tmp_path, TeacherCallback()).validate(fresh, data(1), ckpt_path=tmp_path / "weights.ckpt")
    assert torch.equal(fresh.seen[-1], weights(module))
    assert fresh.teachers[-1] is None


def test_the_best_average_by_its_own_metric_is_saved_and_restored(tmp_path):
    class Judged(Watched):
        """Its teacher is best after the second of four epochs, its student after the last."""

        def validation_step(self, batch, index):
            super().validation_step(batch, index)
            is_student = torch.equal(self.seen[-1], self.states[-1])
            epoch = self.trainer.current_epoch
            self.log("score", float(epoch if is_student else -abs(epoch - 1)))

    saves = ModelCheckpoint(tmp_path, monitor="score", mode="max", filename="{epoch}")
    callback = TeacherCallback(evaluate_with="teacher", checkpoint="teacher", save_averaged=True)
    options = {"max_epochs": 4, "enable_checkpointing": True, "validate": True, "num_sanity_val_steps": 0}
    module, run = fitted(tmp_path, callback, Judged(), saves, **options)
    best = tmp_path / "epoch=1.ckpt"
    assert saves.best_model_path == str(best)
    average = average_in(best)
    loaded = Judged.load_from_checkpoint(best, weights_only=True)
    assert torch.equal(weights(loaded), average)
    run.test(ckpt_path="best", dataloaders=data(1), verbose=False)
    assert torch.equal(module.seen[-1], average)
    # The averaged file is there for the checkpoint that was kept, and for no other.
    assert [p.name for p in (tmp_path / "averaged").iterdir()] == ["epoch=1.ckpt"]
    exported = tmp_path / "averaged" / "epoch=1.ckpt"
    assert torch.equal(weights(Judged.load_from_checkpoint(exported, weights_only=True)), average)
    assert torch.load(exported, weights_only=True).keys() == {
        "epoch", "global_step", "pytorch-lightning_version", "state_dict"
    }  # fmt: skip


def test_files_of_weights_alone_hold_the_average_too(tmp_path):
    saves = ModelCheckpoint(tmp_path, filename="weights", save_weights_only=True)
    callback = TeacherCallback(checkpoint="teacher")
    module, run = fitted(tmp_path, callback, None, saves, enable_checkpointing=True)
    for name in ("weights", "by hand"):
        if name == "by hand":
            run.save_checkpoint(tmp_path / "by hand.ckpt", weights_only=True)
        content = torch.load(tmp_path / f"{name}.ckpt", weights_only=True)
        assert "student_state_dict" not in content
        loaded = Network.load_from_checkpoint(tmp_path / f"{name}.ckpt", weights_only=True)
        assert torch.equal(weights(loaded), weights(module.teacher.module))
        assert not torch.equal(weights(loaded), weights(module))


def test_averages_of_two_submodules_are_in_one_checkpoint(tmp_path):
    first = TeacherCallback(student="net.0", name="first", checkpoint="teacher")
    last = TeacherCallback(student="net.2", name="last", checkpoint="teacher")
    saves = ModelCheckpoint(tmp_path, filename="both")
    module, run = fitted(tmp_path, first, Plain(), last, saves, enable_checkpointing=True)
    loaded = Plain.load_from_checkpoint(tmp_path / "both.ckpt", weights_only=True)
    assert torch.equal(loaded.net[0].weight, module.first.module.weight)
    assert torch.equal(loaded.net[2].weight, module.last.module.weight)
    assert torch.equal(student_in(tmp_path / "both.ckpt"), weights(module))
    run.fit_loop.max_epochs = 4
    with pytest.warns(UserWarning, match="the run is now 20 steps long"):
        run.fit(module, data(), ckpt_path=tmp_path / "both.ckpt")
    assert module.last.step == 20
    same = TeacherCallback(name="same", checkpoint="teacher"), TeacherCallback(checkpoint="teacher")
    with pytest.raises(ValueError, match="two callbacks with checkpoint='teacher' average the same weights"):
        fitted(tmp_path, same[0], None, same[1], saves, enable_checkpointing=True)


def test_the_module_finishes_with_the_average_on_request(tmp_path):
    module, _ = fitted(tmp_path, TeacherCallback(finish_with="teacher"))
    assert torch.equal(weights(module), weights(module.teacher.module))
    assert not torch.equal(weights(module), module.states[-1])
