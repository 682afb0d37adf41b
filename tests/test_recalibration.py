"""Running statistics recomputed for the weights that there are."""

import copy
from collections import UserDict

import numpy as np
import pytest
import torch
from test_normalisation import TRACKING, batch, buffers, build, equal, train
from torch import nn
from torch.optim.swa_utils import update_bn

from wmateacher import WMATeacher, recalibrate

BATCHES = [batch(seed)[: 6 - seed % 3] for seed in range(5)]


def statistics_of_one_pass(module, batches):
    """Means over batches of each layer's mean and unbiased variance in float64, one layer after another."""
    module = copy.deepcopy(module).eval()
    for name in TRACKING:
        module.get_submodule(name).train()
    seen = {name: [] for name in TRACKING}
    for name in TRACKING:
        module.get_submodule(name).register_forward_pre_hook(lambda m, args, n=name: seen[n].append(args[0]))
    for x in batches:
        module(x)
    found = {}
    for name, inputs in seen.items():
        arrays = [np.moveaxis(x.detach().numpy(), 1, -1) for x in inputs]
        if name == "instance":  # of each image on its own
            means = [a.mean((1, 2)).mean(0) for a in arrays]
            variances = [a.var((1, 2), ddof=1).mean(0) for a in arrays]
        else:
            flat = [a.reshape(-1, a.shape[-1]) for a in arrays]
            means, variances = [a.mean(0) for a in flat], [a.var(0, ddof=1) for a in flat]
        found[f"{name}.running_mean"], found[f"{name}.running_var"] = np.mean(means, 0), np.mean(variances, 0)
    return found


def averaged(kernel="uniform", **options):
    student = build()
    teacher = WMATeacher(student, kernel, 8, **options)
    for step in range(1, 4):
        train(student, step)
        teacher.update()
    return student, teacher


@pytest.mark.parametrize(
    "options",
    [{}, {"buffers": "average"}, {"buffers": "keep"}, {"mode": "train"}, {"mode": "train", "dropout": True}],
)
def test_the_statistics_of_an_average_are_those_of_one_pass_in_float64(options):
    student, teacher = averaged(**options)
    held, weights = buffers(student), {n: p.clone() for n, p in teacher.module.named_parameters()}
    modes = [m.training for m in teacher.modules()]
    shares = teacher.trajectory_weights()
    assert recalibrate(teacher, BATCHES) == 5
    for name, expected in statistics_of_one_pass(teacher.module, BATCHES).items():
        np.testing.assert_allclose(teacher.module.get_buffer(name), expected, rtol=1e-12, atol=1e-12)
    assert teacher.module.image.num_batches_tracked == 5
    assert teacher.module.image.momentum == 0.1
    assert teacher.module.flat.momentum is None
    assert [m.training for m in teacher.modules()] == modes
    assert equal(buffers(student), held)
    assert all(torch.equal(p, weights[n]) for n, p in teacher.module.named_parameters())
    assert (teacher.trajectory_weights() == shares).all()
    # Everything that hands out the average hands out its statistics.
    statistics = buffers(teacher.module)
    with teacher.swap():
        assert equal(buffers(student), statistics)
    assert equal(buffers(student), held)
    again = averaged(**options)[1]
    again.load_state_dict(copy.deepcopy(teacher.state_dict()))
    assert equal(buffers(again.module), statistics)
    teacher.update()
    mean, of_student = teacher.module.image.running_mean, student.image.running_mean
    expected = {
        "copy": of_student,
        "average": statistics["image.running_mean"].lerp(of_student, teacher.omega),
        "keep": statistics["image.running_mean"],
    }
    policy = "keep" if options.get("mode") else options.get("buffers", "copy")
    torch.testing.assert_close(mean, expected[policy], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"buffers": "average"}, {"buffers": "keep"}, {"mode": "train"}])
@pytest.mark.parametrize("kind", ["float64", "float32", "fresh", "by hand"])
def test_update_bn_gives_what_recalibrate_gives(options, kind):
    dtype = torch.float64 if kind == "float64" else torch.float32
    layers = nn.BatchNorm1d(3), nn.BatchNorm1d(3, momentum=None)
    student = nn.Sequential(nn.Linear(3, 3), layers[0], nn.Dropout(0.5), nn.Linear(3, 3), layers[1]).to(dtype)
    teacher = WMATeacher(student, "ema(0.5)", **options)
    if kind != "fresh":  # a fresh one's statistics are as if they had been reset
        student(torch.randn(8, 3, dtype=dtype))
        nn.init.normal_(student[0].weight)
        teacher.update()
    twin = copy.deepcopy(teacher)
    batches = [torch.randn(8, 3, dtype=dtype) + i for i in range(4)]
    loader = [(x, None) for x in batches]
    recalibrate(teacher, loader)
    if kind == "by hand":
        for layer in (twin.module[1], twin.module[4]):
            layer.reset_running_stats()
            layer.momentum = None
        twin.train()
        for x in batches:
            twin(x)
        twin.eval()
        twin.train()
        twin.module[1].momentum = 0.1
    else:
        update_bn(loader, twin)
    for name, value in buffers(teacher.module).items():
        torch.testing.assert_close(twin.module.get_buffer(name), value)
    x = torch.randn(8, 3, dtype=dtype) + 9
    torch.testing.assert_close(twin(x), teacher(x))
    counted = 5 if options.get("mode") == "train" else 4  # recomputing has ended
    assert twin.module[1].num_batches_tracked == counted
    for one in (teacher, twin):
        one.update()
    for name, value in teacher.state_dict().items():
        if "running" in name:
            torch.testing.assert_close(twin.state_dict()[name], value)


@pytest.mark.filterwarnings("ignore:the teacher normalises with the running statistics of the start")
def test_a_teacher_in_train_is_no_update_bn():
    """Training frameworks call `train()` on everything, also where statistics look as if just reset."""
    student = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    for policy in ("copy", "keep"):
        teacher = WMATeacher(student, "ema(0.5)", buffers=policy)
        for _ in range(2):
            teacher.train()
            x = torch.randn(8, 3)
            torch.testing.assert_close(teacher(x), teacher.module[0](x), rtol=1e-4, atol=1e-4)
            teacher.update()
    update_bn([torch.randn(8, 3)], teacher)
    teacher.train()
    held = buffers(teacher.module)
    teacher(torch.randn(8, 3))
    assert equal(buffers(teacher.module), held)
    # An update ends what nothing else has ended.
    teacher.module[1].reset_running_stats()
    teacher.train()
    teacher(torch.randn(8, 3))
    teacher.update()
    held = buffers(teacher.module)
    teacher(torch.randn(8, 3))
    assert equal(buffers(teacher.module), held)


class Named(nn.Module):
    """Takes keyword arguments; uses one layer twice and another one never."""

    def __init__(self):
        super().__init__()
        self.norm, self.unused = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
        self.linear = nn.Linear(2, 2)

    def forward(self, x, scale=1.0, labels=None):
        return self.norm(self.linear(self.norm(x * scale)))


def test_items_may_be_tensors_tuples_or_mappings_or_go_through_a_function():
    model = Named().eval()
    x = torch.randn(8, 2)
    found = []
    for batches, options in (
        ([x, -x], {}),
        ([(x, 1), [-x]], {}),
        ([{"x": x, "labels": 3}, {"x": -x, "scale": 1.0}], {}),
        ([("id", x), ("id", -x)], {"forward": lambda m, batch: m(batch[1], scale=1.0)}),
        ({"a": x, "b": -x}.values(), {"steps": 7}),
        (iter([x, -x, x + 100]), {"steps": 2}),
    ):
        model.norm.reset_running_stats()
        model.unused.running_mean.fill_(5)
        assert recalibrate(model, batches, **options) == 2
        found.append(buffers(model))
    assert model.norm.num_batches_tracked == 4  # passes through the layer, two for each batch
    assert model.unused.running_mean.eq(5).all()
    assert model.unused.num_batches_tracked == 0
    assert all(equal(found[0], other) for other in found)
    assert not model.training


def test_batches_that_move_themselves_are_moved():
    class Encoding(UserDict):  # such as transformers' BatchEncoding
        def to(self, device):
            moved.append(device)
            return self

    moved = []
    assert recalibrate(Named(), [Encoding(x=torch.randn(8, 2))]) == 1
    assert moved == [torch.device("cpu")]


def test_a_layer_under_two_names_counts_its_batches_once():
    norm = nn.BatchNorm1d(2)
    model = nn.Sequential(norm, norm)
    recalibrate(model, [torch.randn(8, 2), torch.randn(8, 2)])
    assert norm.num_batches_tracked == 4  # two passes for each batch


def test_statistics_of_a_variance_alone_are_not_taken_for_none():
    class Evolved(nn.Module):  # timm's EvoNorm2dB0
        def __init__(self):
            super().__init__()
            self.momentum = 0.1
            self.register_buffer("running_var", torch.ones(2))

    with pytest.raises(ValueError, match="keeps running statistics as a Evolved"):
        recalibrate(nn.Sequential(Evolved()), [torch.randn(4, 2)])


def test_no_more_batches_are_taken_than_steps():
    taken = iter(BATCHES)
    assert recalibrate(build(), taken, 3) == 3
    assert len(list(taken)) == 2


def test_a_model_without_running_statistics_is_left_alone():
    def never():
        raise AssertionError("the loader was touched")
        yield

    for model in (nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False), nn.GroupNorm(1, 2)):
        assert recalibrate(model, never()) == 0
        assert recalibrate(WMATeacher(model, "ema(0.9)"), never()) == 0


def test_what_went_wrong_leaves_everything_as_it_was():
    class Inplace(nn.Module):  # such as inplace_abn's
        def __init__(self):
            super().__init__()
            self.momentum = 0.1
            self.register_buffer("running_mean", torch.zeros(2))
            self.register_buffer("running_var", torch.ones(2))

    norm = nn.BatchNorm1d(2)
    norm(torch.randn(4, 2))
    x = torch.randn(4, 2)
    for model in (norm, WMATeacher(norm, "ema(0.9)"), WMATeacher(norm, "ema(0.9)", mode="train")):
        held, modes = buffers(model), [m.training for m in model.modules()]
        for loader, options, kind, message in (
            ([], {}, ValueError, "loader gave no batch"),
            ([x, x * torch.nan], {}, ValueError, r"'running_mean' values that are not finite"),
            ([x, x[:1]], {}, ValueError, "more than 1 value per channel"),
            ([x, torch.randn(4, 5)], {}, RuntimeError, "running_mean"),
            ([x], {"forward": lambda m, b: b}, ValueError, "no batch passed through a layer .* forward="),
            ([x], {"steps": 0}, ValueError, "steps must be"),
        ):
            with pytest.raises(kind, match=message):
                recalibrate(model, loader, **options)
            assert equal(buffers(model), held)
            assert [m.training for m in model.modules()] == modes
    with pytest.raises(ValueError, match="'1' keeps running statistics as a Inplace"):
        recalibrate(nn.Sequential(norm, Inplace()), [x])
    with pytest.raises(TypeError, match="must be an nn.Module or a WMATeacher, got list"):
        recalibrate([x], norm)
    teacher = WMATeacher(norm, "ema(0.9)")
    with teacher.swap(), pytest.raises(RuntimeError, match=r"recalibrate\(\) inside swap\(\)"):
        recalibrate(teacher, [x])


def test_a_student_may_be_recalibrated_inside_a_swap():
    student, teacher = averaged()
    held = buffers(student)
    with teacher.swap():
        recalibrate(student, BATCHES)
        inside = buffers(student)
    assert equal(buffers(student), held)
    recalibrate(teacher, BATCHES)
    assert equal(buffers(teacher.module), inside)


def test_autocast_compiled_modules_and_renormalised_embeddings():
    embedding = nn.Embedding(5, 4, max_norm=1.0)
    student = nn.Sequential(embedding, nn.Linear(4, 4), nn.BatchNorm1d(4))
    teacher = WMATeacher(student, "ema(0.9)")
    weights = teacher.averaged_state_dict()
    tokens = [torch.arange(5) - i % 2 for i in range(3)]
    tokens = [t % 5 for t in tokens]
    seen = []
    handle = teacher.module[2].register_forward_pre_hook(lambda m, args: seen.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        recalibrate(teacher, tokens)
    assert seen == [torch.bfloat16] * 3
    handle.remove()
    after = teacher.averaged_state_dict()
    assert all(torch.equal(after[n], weights[n]) for n in ("0.weight", "1.weight", "2.bias"))
    # Hooks that are added to a compiled module would be ignored.
    plain = copy.deepcopy(student)
    student[1:].compile(backend="eager")
    compiled = torch.compile(student, backend="eager")
    compiled(tokens[0])
    for model in (plain, compiled):
        assert recalibrate(model, tokens) == 3
    torch.testing.assert_close(plain[2].running_var, student[2].running_var)


@pytest.mark.parametrize("options", [{}, {"buffers": "average"}, {"buffers": "keep"}, {"mode": "train"}])
@pytest.mark.parametrize("recompute", ["recalibrate", "update_bn"])
def test_frozen_layers_keep_their_statistics(options, recompute):
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    model[0].eval()
    with torch.no_grad():
        model[0].running_mean.fill_(0.5)
        model[0].running_var.fill_(2.0)
    teacher = WMATeacher(model, "ema(0.9)", **options)
    model[2].eval()  # frozen later
    teacher.update()
    x = torch.randn(8, 2) + 3
    for one in (model, teacher):
        if recompute == "recalibrate":
            recalibrate(one, [x])
        elif one is teacher:  # torch itself resets the frozen layers of other models
            update_bn([x], teacher)
    for module in (model, teacher.module) if recompute == "recalibrate" else (teacher.module,):
        assert module[0].running_mean.eq(0.5).all()
        assert module[0].running_var.eq(2.0).all()
        normalised = (x - 0.5) / (2.0 + 1e-5) ** 0.5
        torch.testing.assert_close(module[1].running_mean, normalised.mean(0))
        torch.testing.assert_close(module[1].running_var, normalised.var(0))
        assert not module[2].running_mean.any()
        assert module[2].running_var.eq(1).all()
    assert torch.equal(teacher.averaged_state_dict()["0.running_mean"], torch.full((2,), 0.5))
