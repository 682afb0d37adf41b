import warnings

import pytest
import torch
from allocations import Live
from torch import nn
from torch.nn import functional as F

from wmateacher import WMATeacher, diagnostics


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, padding=1, stride=2)
        self.body = nn.Linear(3 * 16, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        return self.head(F.relu(self.body(F.relu(self.conv(x)).flatten(1))))


X = torch.linspace(-1, 1, 5 * 2 * 8 * 8).view(5, 2, 8, 8).sin()


def moved(student_dtype=torch.float32, **options):
    student = Net().to(student_dtype)
    teacher = WMATeacher(student, "ema(0.5)", **options)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(torch.randn_like(p))
    teacher.update()
    return student, teacher


def double(model, prefix=""):
    return torch.cat(
        [p.detach().double().flatten() for n, p in model.named_parameters() if n.startswith(prefix)]
    )


@pytest.mark.parametrize(("dtype", "asked"), [(torch.float32, "auto"), (torch.bfloat16, "split")], ids=str)
def test_gaps_are_relative_distances_of_weights(dtype, asked):
    student, teacher = moved(dtype, dtype=asked)
    exact = teacher.averaged_state_dict(torch.float64)
    apart = torch.cat([(p.detach().double() - exact[n]).flatten() for n, p in student.named_parameters()])
    expected = apart.norm() / double(student).norm()
    assert diagnostics.parameter_gap(teacher).item() == pytest.approx(expected.item(), rel=1e-5)
    modules = diagnostics.module_gaps(teacher)
    assert list(modules) == ["conv", "body", "head"]
    for name, gap in modules.items():
        parts = [
            (p.detach().double() - exact[n]).flatten()
            for n, p in student.named_parameters()
            if n.startswith(name)
        ]
        assert gap.item() == pytest.approx(
            (torch.cat(parts).norm() / double(student, name).norm()).item(), rel=1e-5
        )


@pytest.mark.parametrize("asked", ["auto", "split"])
def test_the_memory_of_a_gap_is_that_of_a_few_tensors(asked, monkeypatch):
    student = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(24))).bfloat16()
    teacher = WMATeacher(student, "uniform", dtype=asked)
    teacher.update()
    monkeypatch.setattr(diagnostics, "_AT_ONCE", 2 * 32 * 32)
    state = [value for value in teacher.state_dict().values() if isinstance(value, torch.Tensor)]
    with Live(*student.parameters(), *state) as live:
        diagnostics.parameter_gap(teacher)
    assert 0 < live.peak < 8 * 4 * 32 * 32  # of 24 tensors, two at a time


def test_gaps_of_complex_weights():
    student = nn.ParameterList([nn.Parameter(torch.tensor([3 + 4j, 0j]))])
    teacher = WMATeacher(student, "ema(0.5)")
    student[0].data[:] = torch.tensor([0j, 3 + 4j])
    teacher.update()
    assert diagnostics.parameter_gap(teacher).item() == pytest.approx(0.5**0.5)


def test_a_teacher_that_averages_nothing_has_no_gap():
    with pytest.raises(ValueError, match="the teacher averages no tensor: everything is frozen"):
        diagnostics.parameter_gap(WMATeacher(nn.ReLU(), "uniform"))


def test_outputs_are_compared_in_nats_and_by_their_choice():
    student, teacher = torch.randn(7, 4), torch.randn(7, 4)
    p, q = teacher.double().softmax(-1), student.double().softmax(-1)
    expected = (p * (p / q).log()).sum(-1).mean()
    assert diagnostics.output_kl(student, teacher).item() == pytest.approx(expected.item(), rel=1e-5)
    assert diagnostics.output_kl(student, student).item() == pytest.approx(0, abs=1e-6)
    assert diagnostics.output_kl(1e4 * student.bfloat16(), teacher).isfinite()
    grouped = diagnostics.output_kl(student.view(7, 2, 2), teacher.view(7, 2, 2))
    assert grouped.item() == pytest.approx(
        diagnostics.output_kl(student.view(-1, 2), teacher.view(-1, 2)).item()
    )
    assert diagnostics.agreement(torch.eye(4), torch.eye(4)[[0, 1, 3, 2]]).item() == 0.5
    with pytest.raises(ValueError, match=r"the same shape, got \(7, 4\) and \(7, 3\)"):
        diagnostics.output_kl(student, teacher[:, :3])


def test_a_collapse_is_warned_of_once_and_the_start_is_none():
    student = nn.Linear(3, 2)
    teacher = WMATeacher(student, "ema(0.1)")
    seen = []
    monitor = diagnostics.GapMonitor(teacher, read_every=5, log=lambda step, gap: seen.append((step, gap)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        teacher.update()
        monitor.step()  # on top of its student, as it started
        for _ in range(10):
            student.weight.data.add_(0.1)
            teacher.update()
            monitor.step()
        assert min(monitor.history()[1:]) > 1e-3
    assert monitor.collapsed is None
    with pytest.warns(
        UserWarning,
        match=r"collapsed onto its student: at step 1\d .* Use a kernel with a longer memory than ema\(0.1\)",
    ) as caught:
        for _ in range(20):
            teacher.update()
            monitor.step()
    assert len(caught) == 1
    assert monitor.history()[monitor.collapsed - 1] < 1e-3 < monitor.history()[monitor.collapsed - 2]
    assert [step for step, _ in seen] == list(range(1, 32))
    assert [gap for _, gap in seen] == monitor.history()


def test_a_teacher_that_never_leaves_its_student_has_collapsed_too():
    teacher = WMATeacher(nn.Linear(3, 2), "ema(0.1)")
    monitor = diagnostics.GapMonitor(teacher, patience=3, read_every=1)
    with pytest.warns(UserWarning, match="at step 4 their relative distance is 0.0e"):
        for _ in range(6):
            teacher.update()
            monitor.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0}, "threshold must lie between 0 and 1, got 0"),
        ({"patience": -1}, "patience must be at least 0, got -1"),
        ({"read_every": 0}, "read_every must be at least 1, got 0"),
    ],
)
def test_bad_monitors(options, message):
    with pytest.raises(ValueError, match=message):
        diagnostics.GapMonitor(WMATeacher(nn.Linear(1, 1), "uniform"), **options)


def test_the_subspace_is_the_projector_of_the_linear_world():
    activations = torch.randn(4, 9) @ torch.randn(9, 9)
    basis = diagnostics.task_subspace(activations)
    x = activations.T.double()
    projector = x @ torch.linalg.pinv(x.T @ x) @ x.T
    torch.testing.assert_close((basis @ basis.T).double(), projector, rtol=1e-4, atol=1e-4)
    difference = torch.randn(5, 9)
    split = diagnostics.split_by_subspace(difference, basis)
    assert split.inside.item() == pytest.approx((difference.double() @ projector).norm().item(), rel=1e-4)
    assert (split.inside**2 + split.outside**2).item() == pytest.approx(
        (difference.norm() ** 2).item(), rel=1e-5
    )
    assert split.share.item() == pytest.approx((split.inside**2 / difference.norm() ** 2).item(), rel=1e-5)


@pytest.mark.parametrize("layer", ["conv", "body", "head"])
def test_gradient_descent_changes_a_layer_only_inside_its_subspace(layer):
    model = Net()
    before = model.get_submodule(layer).weight.detach().clone()
    x = X[:2]
    basis = diagnostics.task_subspace(diagnostics.layer_inputs(model, layer, x))
    model(x).square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    change = model.get_submodule(layer).weight.detach() - before
    split = diagnostics.split_by_subspace(change, basis)
    assert split.inside > 0
    assert split.outside < 1e-4 * split.inside
    assert diagnostics.split_by_subspace(torch.randn_like(change), basis).outside > (layer != "conv") * 0.1


def test_layers_that_cannot_be_split():
    model = Net()
    with pytest.raises(ValueError, match="unknown layer 'haed'; did you mean 'head'"):
        diagnostics.layer_inputs(model, "haed", X)
    with pytest.raises(ValueError, match="layer '' must be a Linear or Conv2d, got a Net"):
        diagnostics.layer_inputs(model, "", X)
    basis = diagnostics.task_subspace(diagnostics.layer_inputs(model, "body", X))
    with pytest.raises(ValueError, match="have 6 inputs, the basis 48: take the basis from the same"):
        diagnostics.split_by_subspace(model.head.weight, basis)
    with pytest.raises(ValueError, match=r"must be \[n, d\], got shape \(5, 2, 8, 8\): flatten"):
        diagnostics.task_subspace(X)


@pytest.mark.parametrize("widths", [(3, 4), (30, 4), (30, 40)])
def test_cka_is_its_definition(widths):
    x, y = (torch.randn(12, w) for w in widths)
    a, b = (t.double() - t.double().mean(0) for t in (x, y))
    centre = torch.eye(12, dtype=torch.float64) - 1 / 12
    k, m = a @ a.T, b @ b.T
    hsic = lambda p, q: torch.trace(p @ centre @ q @ centre)  # noqa: E731
    expected = hsic(k, m) / (hsic(k, k) * hsic(m, m)).sqrt()
    assert diagnostics.linear_cka(x, y).item() == pytest.approx(expected.item(), rel=1e-4)
    rotation = torch.linalg.qr(torch.randn(widths[0], widths[0]))[0]
    assert diagnostics.linear_cka(x, 3 * x @ rotation + 1).item() == pytest.approx(1, abs=1e-4)
    with pytest.raises(ValueError, match="of the same examples, got 12 and 11 rows"):
        diagnostics.linear_cka(x, y[:-1])


def test_layers_of_a_student_and_its_teacher():
    student, teacher = moved()
    found = diagnostics.layer_cka(student, teacher.module, X)
    assert list(found) == ["conv", "body", "head"]
    assert all(0 <= v <= 1.0001 for v in found.values())
    assert min(found.values()) < 0.999
    same = diagnostics.layer_cka(student, student, X, layers=["body"])
    assert same["body"].item() == pytest.approx(1, abs=1e-4)
    assert not student.body._forward_hooks
    with pytest.raises(ValueError, match="unknown layer 'neck'; available: body, conv, head"):
        diagnostics.layer_cka(student, teacher.module, X, layers=["neck"])


@pytest.mark.parametrize("layers", [1, 40])
def test_layers_are_looked_up_once_however_many_there_are(layers, monkeypatch):
    net, calls = nn.Sequential(*(nn.Linear(2, 2) for _ in range(layers))), []
    listed = nn.Sequential.named_modules
    monkeypatch.setattr(nn.Sequential, "named_modules", lambda *a, **k: calls.append(0) or listed(*a, **k))
    found = diagnostics.layer_cka(net, net, torch.randn(3, 2))
    assert len(found) == layers
    assert len(calls) == 2
