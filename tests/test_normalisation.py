"""Teachers in train mode: whose statistics normalise, and which running statistics result."""

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

from wmateacher import WMATeacher, kernels, modes, normalisation, recalibrate
from wmateacher.schedule import Clock


class Everything(nn.Module):
    """Every kind of layer with batch statistics, one after another; dropout before the output."""

    def __init__(self):
        super().__init__()
        self.lazy = nn.LazyBatchNorm2d()
        self.flat = nn.BatchNorm1d(3, momentum=None)
        self.image = nn.BatchNorm2d(3, affine=False)
        self.volume = nn.BatchNorm3d(3)
        self.synced = nn.SyncBatchNorm(3)
        self.untracked = nn.BatchNorm2d(3, track_running_stats=False)
        self.instance = nn.InstanceNorm2d(3, affine=True, track_running_stats=True)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        x = self.flat(self.lazy(x).flatten(2)).view_as(x)
        x = self.volume(self.image(x)[..., None])[..., 0]
        x = self.instance(self.untracked(self.synced(x)) + 0.1 * x)
        return self.dropout(x.sin())


TRACKING = ("lazy", "flat", "image", "volume", "synced", "instance")


def batch(seed):
    torch.manual_seed(seed)
    return torch.randn(6, 3, 4, 4, dtype=torch.float64) * (seed + 1) + seed


def build():
    torch.manual_seed(0)
    student = Everything().double()
    student(batch(0))
    return student


def train(student, step):
    """Change every parameter, and every running statistic by a forward pass."""
    student.train()(batch(step))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


def buffers(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def equal(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("policy", ["copy", "average", "keep"])
@pytest.mark.parametrize("dropout", [False, True])
def test_train_mode_is_a_call_of_the_averaged_weights_in_train_mode(policy, dropout):
    student = build()
    teacher = WMATeacher(student, "uniform", 10, mode="train", dropout=dropout, buffers=policy)
    reference = WMATeacher(student, "uniform", 10)
    oracle = build()  # a student of its own, whose running statistics are the expected ones
    oracle.load_state_dict(student.state_dict())
    oracle.train().dropout.train(dropout)
    for step in range(1, 5):
        train(student, step)
        teacher.update()
        reference.update()
        held = buffers(student)
        for view in range(2):
            torch.manual_seed(view)
            out = teacher(x := batch(10 * step + view))
            torch.manual_seed(view)
            weights = dict(reference.module.named_parameters())
            batch(10 * step + view)  # takes as many random numbers
            expected = functional_call(oracle, {**weights, **dict(oracle.named_buffers())}, x)
            torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
            assert not out.requires_grad
        assert equal(buffers(student), held)  # the student's have not changed
        assert not torch.equal(teacher.module.image.running_mean, student.image.running_mean)
        for name, value in oracle.named_buffers():
            torch.testing.assert_close(teacher.module.get_buffer(name), value, rtol=1e-9, atol=1e-9)
    for name, average in teacher.module.named_parameters():
        assert torch.equal(average, reference.module.get_parameter(name)), name
    assert (teacher.trajectory_weights() == reference.trajectory_weights()).all()


def test_layers_with_statistics_of_every_kind_are_found():
    assert tuple(normalisation.layers(build())) == TRACKING


def test_eval_uses_the_teachers_own_running_statistics_and_train_returns():
    student = build()
    teacher = WMATeacher(student, "ema(0.5)", mode="train")
    train(student, 1)
    teacher.update()
    x = batch(7)
    in_train = teacher(x)
    held = buffers(teacher.module)
    in_eval = teacher.eval()(x)
    assert equal(buffers(teacher.module), held)
    assert torch.equal(in_eval, teacher.module.eval()(x))
    assert not torch.allclose(in_eval, in_train)
    with teacher.swap():
        assert torch.equal(student.eval()(x), in_eval)
    exported = build()
    teacher.copy_to(exported)
    assert torch.equal(exported.eval()(x), in_eval)
    exported.load_state_dict(teacher.averaged_state_dict())
    assert torch.equal(exported.eval()(x), in_eval)
    # An evaluation of the module from outside does not end the mode.
    teacher.train()
    teacher.module.eval()
    torch.testing.assert_close(teacher(x), in_train)


def test_a_teacher_in_eval_mode_ignores_train():
    student = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
    teacher = WMATeacher(student, "ema(0.9)")
    x, held = torch.randn(8, 3), buffers(teacher.module)
    expected = teacher(x)
    assert torch.equal(teacher.train()(x), expected)
    assert torch.equal(teacher.eval()(x), expected)
    assert equal(buffers(teacher.module), held)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))])
@pytest.mark.parametrize("saved", [False, True])
def test_a_run_in_train_mode_goes_on_bit_for_bit(duplicate, saved):
    def steps(student, teacher, span):
        for step in span:
            train(student, step)
            teacher(batch(20 + step))
            teacher.update()

    student = build()
    teacher = WMATeacher(student, "beta(0.5,0.5)", 6, mode="train")
    steps(student, teacher, range(1, 4))
    if saved:
        twin = build()
        twin.load_state_dict(student.state_dict())
        again = WMATeacher(twin, "beta(0.5,0.5)", 6, mode="train")
        again.load_state_dict(copy.deepcopy(teacher.state_dict()))
    else:
        again = duplicate(teacher)
        twin = again.student
    steps(student, teacher, range(4, 7))
    steps(twin, again, range(4, 7))
    assert equal(buffers(teacher.module), buffers(again.module))
    assert torch.equal(teacher(batch(9)), again(batch(9)))


def test_layers_that_the_student_keeps_in_eval_mode_stay_so():
    class Frozen(nn.Sequential):
        def train(self, mode=True):
            super().train(mode)
            self[2].eval()
            return self

    student = Frozen(nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    student.train()[1].eval()
    teacher = WMATeacher(student, "ema(0.9)", mode="train")
    with torch.no_grad():
        student[1].running_mean.fill_(5)
    teacher.update()
    teacher(torch.randn(8, 3) + 2)
    assert [layer.running_mean.abs().min().item() > 0.1 for layer in teacher.module] == [True, True, False]
    assert teacher.module[1].running_mean.eq(5).all()  # follows `buffers`, as the weights do
    student[0].eval()
    with warnings.catch_warnings():  # running statistics that do not change fit any kernel
        warnings.simplefilter("error")
        WMATeacher(student, "uniform")
    student[0].train()
    with pytest.warns(UserWarning, match="normalises with running statistics"):
        WMATeacher(student, "uniform")


@pytest.mark.parametrize("policy", ["copy", "average", "keep"])
@pytest.mark.parametrize("every", [1, 3])
def test_layers_that_are_frozen_and_unfrozen_in_the_middle_of_a_run_are_followed(policy, every):
    """A frozen layer has the student's statistics from then on; an unfrozen one goes on from those."""
    student = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)).double()
    student[2].eval()
    options = {"mode": "train", "buffers": policy, "update_every": every}
    teacher = WMATeacher(student, "ema(0.5)", **options)
    reference = WMATeacher(student, "ema(0.5)", update_every=every)

    def step(seed):
        torch.manual_seed(seed)
        x = torch.randn(8, 3, dtype=torch.float64) + seed
        with torch.no_grad():
            student(x)
            student[1].weight.add_(0.1)
        teacher.update()
        reference.update()
        return teacher(2 * x), 2 * x

    def normalised(x, *modes):
        """The averaged weights, each norm with the batch's statistics or the given running ones."""
        for place, running in zip((0, 2), modes, strict=True):
            if running is None:
                x = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()
            else:
                x = (x - running[0]) / (running[1] + 1e-5).sqrt()
            x = x if place else reference.module[1](x)
        return x

    def statistics(layer):
        return layer.running_mean.clone(), layer.running_var.clone()

    frozen = statistics(student[2])
    out, x = step(1)
    torch.testing.assert_close(out, normalised(x, None, frozen))
    student[0].eval()
    student[2].train()
    out, x = step(2)
    own, theirs = statistics(teacher.module[0]), statistics(student[0])
    assert all(map(torch.equal, own, theirs)) == (policy != "keep")
    torch.testing.assert_close(out, normalised(x, own, None))
    assert not torch.equal(teacher.module[2].running_mean, frozen[0])  # it collects again
    assert not torch.equal(teacher.module[2].running_mean, student[2].running_mean)
    student.train()
    before = statistics(teacher.module[0])
    out, x = step(3)
    torch.testing.assert_close(out, normalised(x, None, None))
    torch.testing.assert_close(teacher.module[0].running_mean, 0.9 * before[0] + 0.1 * x.mean(0))
    student.eval()  # which does not tell what is frozen in training
    out, x = step(4)
    torch.testing.assert_close(out, normalised(x, None, None))
    student.train()[0].eval()
    out = teacher(x)  # before the next update
    own = statistics(teacher.module[0])
    assert all(map(torch.equal, own, statistics(student[0]))) == (policy != "keep")
    torch.testing.assert_close(out, normalised(x, own, None))
    twin = copy.deepcopy(teacher)
    twin.student[0].train()
    torch.testing.assert_close(twin(x), normalised(x, None, None))
    for name, average in teacher.module.named_parameters():
        assert torch.equal(average, reference.module.get_parameter(name)), name


def test_a_compiled_teacher_normalises_by_its_batch():
    student = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
    teacher = WMATeacher(student, "ema(0.9)", mode="train")
    plain = copy.deepcopy(teacher)
    compiled = torch.compile(teacher, backend="eager")
    x = torch.randn(8, 3)
    for step in range(3):
        torch.testing.assert_close(compiled(x), plain(x))
        assert torch.equal(teacher.module[1].running_var, plain.module[1].running_var)
        if step == 1:
            teacher.module.eval()  # evaluated from outside
            plain.module.eval()
    torch.testing.assert_close(compiled.eval()(x), plain.eval()(x))


@pytest.mark.parametrize(
    ("kernel", "total", "warns"),
    [
        ("ema(0.999)", 20_000, False),
        ("ema(0.999)", 1_000, True),
        ("ema(0.9999)", None, False),
        ("power(sigma_rel=0.1)", None, False),
        ("tail(0.25)", 400, False),
        ("beta(0.5,0.5)", 400, True),
        ("uniform", None, True),
        ("static", 400, True),
    ],
)
def test_statistics_that_will_not_fit_are_warned_of(kernel, total, warns):
    age = Clock(kernels.build(kernel), total).relative_mean_age()
    steps = total or 100_000
    assert age == pytest.approx(kernels.build(kernel).summary(steps).mean_age / steps, rel=1e-9)
    assert (age > modes.FAR) == warns
    student = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for options in ({"mode": "train"}, {"buffers": "keep"}, {"buffers": "average"}):
            WMATeacher(student, kernel, total, **options)
        WMATeacher(nn.BatchNorm1d(2, track_running_stats=False), kernel, total)
        if not warns:
            WMATeacher(student, kernel, total)
    if warns:
        with pytest.warns(
            UserWarning, match=r"pass mode='train', .* wmateacher.recalibrate\(teacher, loader\)"
        ):
            WMATeacher(student, kernel, total)


def test_narrow_densities_and_kernels_of_its_own_are_looked_at_over_the_whole_run():
    class Slow(kernels.Kernel):  # an EMA of 20,000 steps, which does not stretch with the run
        def retention(self, steps, total_steps):
            return np.where(steps > 0, 1 - 1 / 20_000, 0.0)

    student = nn.BatchNorm1d(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        WMATeacher(student, Slow(), 200_000)
        WMATeacher(student, lambda tau: tau > 1 - 2e-6, 300_000)  # the last step has all mass
    with pytest.warns(UserWarning, match="running statistics"):
        WMATeacher(student, Slow(), 20_000)


def stay(student, teacher):
    """No remedy."""


def load(student, teacher):
    teacher.load_state_dict(teacher.state_dict())


def update_bn(student, teacher):
    torch.optim.swa_utils.update_bn([torch.randn(8, 2)], teacher.train())


def freeze(student, teacher):
    student[1].eval()


@pytest.mark.parametrize("kernel", ["static", "ema(0.9)"])
@pytest.mark.parametrize(
    "remedy", [stay, load, update_bn, freeze, lambda _, teacher: recalibrate(teacher, [torch.randn(8, 2)])]
)
def test_a_call_with_statistics_of_the_start_is_warned_of_once_the_average_has_moved(kernel, remedy):
    student = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    teacher = WMATeacher(student, kernel, buffers="keep")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        teacher(torch.randn(8, 2))
        assert not caught  # the student has not moved
        teacher.update()
        remedy(student, teacher)
        for _ in range(2):
            teacher(torch.randn(8, 2))
    warned = kernel != "static" and remedy is stay
    assert [str(w.message)[:35] for w in caught] == ["the teacher normalises with the run"] * warned
    assert all(w.filename == __file__ for w in caught)


def test_a_warning_names_the_option_that_copies_the_statistics():
    student = nn.BatchNorm1d(2)
    with pytest.warns(UserWarning, match="which buffers='copy' copies to the teacher, but they do not fit"):
        WMATeacher(student, "uniform")
    with pytest.warns(UserWarning, match="which exclude= copies to the teacher"):
        WMATeacher(student, "uniform", buffers="keep", exclude=["running_*"])


def test_a_layer_that_stopped_tracking_normalises_with_its_batch_as_in_the_student():
    student = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    student[1].track_running_stats = False
    held = buffers(student)
    teacher = WMATeacher(student, "uniform", mode="train")
    x = torch.randn(8, 3) + 3
    assert torch.equal(teacher(x), student(x))
    assert equal(buffers(teacher.module), held)
    assert not teacher.eval().module[1].training


def test_unknown_modes_and_dropout_in_eval_mode_are_errors():
    with pytest.raises(ValueError, match="unknown mode 'training'"):
        WMATeacher(nn.Linear(2, 2), "uniform", mode="training")
    with pytest.raises(ValueError, match="dropout=True needs mode='train', got mode='eval'"):
        WMATeacher(nn.Linear(2, 2), "uniform", dropout=True)
