"""The library on a GPU: values against float64 oracles, and nothing that makes the host wait.

On a machine with one: `pytest tests/test_gpu.py`. To try the tests themselves: `--device cpu`.
"""

import copy
import math

import numpy as np
import pytest
import torch
from oracle import realised
from test_fused import KINDS
from torch import nn
from torch.nn import functional as F
from waiting import forbidden

from wmateacher import WMATeacher, losses
from wmateacher.averaging import Average, Update, fused
from wmateacher.diagnostics import (
    GapMonitor,
    agreement,
    layer_cka,
    linear_cka,
    module_gaps,
    output_kl,
    parameter_gap,
    split_by_subspace,
    task_subspace,
)
from wmateacher.losses import PairedEmbeddings

pytestmark = pytest.mark.gpu

STEPS = 12
KERNELS = ["beta(0.5,0.5)", "uniform", "ema(0.9)", "tail(0.25)", "ema(0.05,0.9,schedule=linear,warmup=0.2)"]
PRECISIONS = {
    "fp32": (torch.float32, {}),
    "bf16": (torch.bfloat16, {}),
    "bf16 split": (torch.bfloat16, {"dtype": "split"}),
    "fp16": (torch.float16, {}),
    "fp32, on the CPU": (torch.float32, {"device": "cpu"}),
    "bf16, on the CPU": (torch.bfloat16, {"device": "cpu"}),
    "bf16 split, on the CPU": (torch.bfloat16, {"dtype": "split", "device": "cpu"}),
}


class OneHot(nn.Module):
    """A student whose state k is the k-th unit vector, in a vector and in every column of a matrix."""

    def __init__(self, states):
        super().__init__()
        self.vector = nn.Parameter(torch.zeros(states))
        self.matrix = nn.Parameter(torch.zeros(states, 3))
        self.set_state(0)

    @torch.no_grad()
    def set_state(self, k):
        for parameter in self.parameters():
            parameter.zero_()
            parameter[k] = 1


def weights(teacher):
    """The weight of every state in each averaged tensor, float64 `[tensors, states]`."""
    found = {name: average.double().cpu() for name, _, average in teacher.averaged_pairs()}
    return torch.stack([found["vector"], *found["matrix"].unbind(1)])


# --- the average ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 5])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_state_has_its_kernels_weight(kernel, precision, every, device):
    dtype, options = PRECISIONS[precision]
    student = OneHot(STEPS + 1).to(device, dtype)
    teacher = WMATeacher(student, kernel, STEPS, update_every=every, **options)
    for step in range(1, STEPS + 1):
        student.set_state(step)
        teacher.update()
        expected = torch.zeros(STEPS + 1, dtype=torch.float64)
        expected[: step + 1] = torch.from_numpy(realised(kernel, STEPS, every, step).copy())
        torch.testing.assert_close(weights(teacher), expected.expand(4, -1), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_resumed_run_ends_with_the_same_bits(precision, device, tmp_path):
    dtype, options = PRECISIONS[precision]

    def run(teacher, student, steps):
        for step in steps:
            torch.manual_seed(step)
            with torch.no_grad():
                for p in student.parameters():
                    p.copy_(torch.randn(p.shape))
            teacher.update()

    student = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3)).to(device, dtype)
    teacher = WMATeacher(student, "beta(0.5,0.5)", STEPS, **options)
    run(teacher, student, range(4))
    torch.save({"student": student.state_dict(), "teacher": teacher.state_dict()}, tmp_path / "state.pt")
    run(teacher, student, range(4, STEPS))
    state = torch.load(tmp_path / "state.pt", map_location="cpu", weights_only=True)
    other = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3)).to(device, dtype)
    resumed = WMATeacher(other, "beta(0.5,0.5)", STEPS, **options)
    other.load_state_dict(state["student"])
    resumed.load_state_dict(state["teacher"])
    run(resumed, other, range(4, STEPS))
    ends, expected = resumed.state_dict(), teacher.state_dict()
    tensors = [key for key, value in expected.items() if torch.is_tensor(value)]
    assert tensors
    assert all(torch.equal(ends[key], expected[key]) for key in tensors)


@pytest.mark.parametrize("home", ["device", "cpu"])
@pytest.mark.parametrize("split", [False, True], ids=["plain", "split"])
@pytest.mark.parametrize("value_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_update_of_large_tensors_is_the_float64_formula(home, split, value_dtype, device):
    """Tensors larger than the scratch buffer, in other memory layouts, and of no elements."""
    shapes = [(), (3,), (0,), (2**22 + 17,), (3, 1_700_000), (96, 64, 16, 16)]
    home = torch.device("cpu") if home == "cpu" else device
    values = [torch.randn(shape, device=device).to(value_dtype) for shape in shapes]
    values[-1] = values[-1].to(memory_format=torch.channels_last)
    owns = [v.to(home, torch.bfloat16, copy=True) for v in values]
    starts = [torch.randn(shape, device=home) for shape in shapes]
    averages = [Average.of(s, o, split=split) for s, o in zip(starts, owns, strict=True)]
    update, expected = Update(averages, values), [s.double() for s in starts]
    for omega in (0.3, 1e-4, 0.9):
        update(omega)
        expected = [e + omega * (v.to(home).double() - e) for e, v in zip(expected, values, strict=True)]
    for average, own, e in zip(averages, owns, expected, strict=True):
        torch.testing.assert_close(average.read().double(), e, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(own, average.read().bfloat16(), rtol=0.01, atol=0)
    update(1.0)
    for average, value in zip(averages, values, strict=True):
        assert torch.equal(average.read(), value.float().to(home))


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_fused_update_is_that_of_torchs_operations(kind, masked, device):
    if device.type == "cpu":
        pytest.skip("needs a CUDA device; on a CPU, test_fused.py interprets the kernel")
    value, own, held = (torch.int16 if dtype == "split" else dtype for dtype in KINDS[kind])
    assert fused.differs(fused.Kind(held, value, own, held != own), device, masked) is None


def test_offloaded_values_are_those_of_the_last_step(device):
    """The copy to the host is waited for: values that are overwritten at once still arrive."""
    student = nn.Linear(2048, 2048, bias=False).to(device)
    teacher = WMATeacher(student, "ema(0.5)", device="cpu")
    expected = teacher.module.weight.double().clone()
    for step in range(5):
        with torch.no_grad():
            student.weight.fill_(float(step))
        teacher.update()
        with torch.no_grad():
            student.weight.fill_(math.nan)
        expected += 0.5 * (step - expected)
    torch.testing.assert_close(teacher.module.weight.double(), expected)


@pytest.mark.parametrize("nonfinite", ["warn", "skip"])
@pytest.mark.parametrize("kernel", ["ema(0.9)", "uniform"])
def test_a_student_on_two_devices_is_averaged_on_both(kernel, nonfinite, device):
    student = nn.Sequential(nn.Conv2d(1, 5, 3).to(device), nn.Linear(5, 10))
    teacher, states = WMATeacher(student, kernel, nonfinite=nonfinite), []
    for step in range(11):
        if step:
            with torch.no_grad():
                [p.add_(torch.randn_like(p)) for p in student.parameters()]
            teacher.update()
        states.append([p.detach().double().clone() for p in student.parameters()])
    weights = realised(kernel, 10, 1, 10)
    for index, (own, average) in enumerate(
        zip(student.parameters(), teacher.module.parameters(), strict=True)
    ):
        assert average.device == own.device
        expected = sum(w * state[index] for w, state in zip(weights, states, strict=True))
        torch.testing.assert_close(average.double(), expected, rtol=1e-5, atol=1e-6)
    assert parameter_gap(teacher) > 0


def test_a_teacher_moves_between_devices_with_its_average(device):
    student = nn.Linear(6, 6).to(device, torch.bfloat16)
    teacher = WMATeacher(student, "uniform")
    with torch.no_grad():
        student.weight.add_(0.123)
    teacher.update()
    before = {name: average.double().cpu() for name, _, average in teacher.averaged_pairs()}
    for target in ("cpu", device):
        teacher.to(target)
        after = {name: average for name, _, average in teacher.averaged_pairs()}
        for name, average in after.items():
            assert average.device == torch.empty(0, device=target).device
            assert torch.equal(average.double().cpu(), before[name])
    teacher.update()


def test_a_swap_lends_the_average_and_gives_the_weights_back(device):
    student = nn.Linear(6, 6).to(device)
    teacher = WMATeacher(student, "static", 10)
    start = student.weight.detach().clone()
    with torch.no_grad():
        student.weight.add_(1)
    with teacher.swap():
        assert torch.equal(student.weight, start)
    assert torch.equal(student.weight, start + 1)
    other = nn.Linear(6, 6).to(device)
    teacher.copy_to(other)
    assert torch.equal(other.weight, start)


# --- training -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True], ids=["default", "fused"])
def test_steps_that_a_grad_scaler_skips_do_not_count(fused, device):
    model = nn.Linear(8, 8).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    teacher = WMATeacher(model, "beta(0.5,0.5)", STEPS)
    teacher.attach(optimizer)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**8)
    states = [model.weight.detach().double().clone()]
    for step in range(STEPS + 3):
        overflows = step in (2, 5, 6)
        with torch.autocast(device.type, torch.float16):
            loss = model(torch.randn(4, 8, device=device)).float().square().mean()
        scaler.scale(loss * (math.inf if overflows else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if not overflows:
            states.append(model.weight.detach().double().clone())
    assert teacher.step == STEPS
    expected = sum(w * s for w, s in zip(realised("beta(0.5,0.5)", STEPS, 1, STEPS), states, strict=True))
    torch.testing.assert_close(teacher.module.weight.double(), expected, rtol=1e-5, atol=1e-6)


# --- losses and diagnostics -----------------------------------------------------------------------------


def paired(seed, device, dtype):
    random = torch.Generator().manual_seed(seed)
    image, text = (torch.randn(24, 16, generator=random, dtype=torch.float64) for _ in range(2))
    scale = torch.tensor(14.0, dtype=torch.float64)
    return PairedEmbeddings(*(t.to(device, dtype).requires_grad_() for t in (image, text, scale)))


def single(seed, device, dtype):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(24, 16, generator=random, dtype=torch.float64).to(device, dtype).requires_grad_()


ARGUMENTS = {"dino": "dino(16)", "afd": "afd(16)"}
LOSSES = [(f, ARGUMENTS.get(n, n)) for f in ("paired", "logits", "features") for n in losses.available(f)]


def value_and_gradients(family, spec, device, dtype):
    make = paired if family == "paired" else single
    student, teacher = make(1, device, dtype), make(2, device, dtype)
    torch.manual_seed(0)
    criterion = losses.build(spec).to(device, dtype)
    loss = criterion(student, teacher)
    inputs = list(student) if family == "paired" else [student]
    return loss, torch.autograd.grad(loss, inputs, allow_unused=True)


@pytest.mark.parametrize(("family", "spec"), LOSSES)
def test_a_loss_and_its_gradient_are_those_of_float64_on_the_host(family, spec, device):
    loss, gradients = value_and_gradients(family, spec, device, torch.float32)
    expected, theirs = value_and_gradients(family, spec, torch.device("cpu"), torch.float64)
    assert loss.device == device
    torch.testing.assert_close(loss.double().cpu(), expected, rtol=1e-4, atol=1e-6)
    for gradient, right in zip(gradients, theirs, strict=True):
        assert (gradient is None) == (right is None)
        if gradient is not None:
            torch.testing.assert_close(gradient.double().cpu(), right, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", ["paired", "logits"])
def test_a_loss_is_computed_in_float32_under_autocast(family, device):
    spec = {"paired": "fd + crd + icl", "logits": "kl"}[family]
    plain, _ = value_and_gradients(family, spec, device, torch.float32)
    with torch.autocast(device.type, torch.bfloat16):
        loss, _ = value_and_gradients(family, spec, device, torch.float32)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, plain)


def test_diagnostics_are_those_of_the_host(device):
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4))
    teacher = WMATeacher(model, "uniform")
    with torch.no_grad():
        model[0].weight.mul_(1.1)
    teacher.update()
    x, y = torch.randn(32, 8), torch.randn(32, 8)

    def figures(model, teacher, x, y):
        split = split_by_subspace(model[0].weight, task_subspace(x))
        return {
            "parameter_gap": parameter_gap(teacher),
            **module_gaps(teacher),
            "output_kl": output_kl(model(x), teacher(x)),
            "agreement": agreement(model(x), teacher(x)),
            "cka": linear_cka(x, y),
            **{f"cka {k}": v for k, v in layer_cka(model, teacher.module, x).items()},
            "inside": split.inside,
        }

    expected = figures(model, teacher, x, y)
    model.to(device)
    teacher.to(device)
    found = figures(model, teacher, x.to(device), y.to(device))
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.device == device, name
        torch.testing.assert_close(value.cpu(), expected[name], rtol=1e-4, atol=1e-5, msg=name)


# --- waiting --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"dtype": "split"}, {"buffers": "average"}, {"update_every": 2}], ids=str
)
def test_an_update_never_waits(options, device):
    student = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)).bfloat16().to(device)
    teacher = WMATeacher(student, "beta(0.5,0.5)", 20, **options)
    with forbidden(device):
        for _ in range(5):
            teacher.update()


def test_a_gap_monitor_waits_only_when_it_reads(device):
    student = nn.Linear(4, 8).to(device)
    teacher = WMATeacher(student, "static", 100)
    monitor = GapMonitor(teacher, read_every=50)
    monitor.step()  # a first use loads libraries
    with forbidden(device):
        for _ in range(20):
            teacher.update()
            monitor.step()
    assert len(monitor.history()) == 21


@pytest.mark.parametrize(("family", "spec"), LOSSES)
def test_a_loss_never_waits(family, spec, device):
    make = paired if family == "paired" else single
    student, teacher = make(1, device, torch.float32), make(2, device, torch.float32)
    criterion = losses.build(spec).to(device)
    criterion(student, teacher).backward()  # a first use loads libraries
    with forbidden(device):
        loss, terms = criterion(student, teacher, return_terms=True)
        loss.backward()
    assert all(math.isfinite(t) for t in terms.values())


@pytest.mark.parametrize("spec", ["kl", "kl(top_k=3)", "mse"])
def test_a_loss_between_slices_of_sequences_never_waits(spec, device):
    """Causal models compare `logits[:, :-1]`, whose rows are not one block of memory."""
    student = torch.randn(2, 5, 8, device=device, requires_grad=True)
    teacher, mask = torch.randn(2, 5, 8, device=device), torch.ones(2, 4, dtype=torch.bool, device=device)
    criterion = losses.build(spec)
    criterion(student[:, :-1], teacher[:, :-1], mask=mask).backward()  # a first use loads libraries
    with forbidden(device):
        criterion(student[:, :-1], teacher[:, :-1], mask=mask).backward()


def test_a_step_of_distillation_never_waits(device):
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).to(device)
    teacher = WMATeacher(model, "beta(0.5,0.5)", 20)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    teacher.attach(optimizer)
    criterion = losses.build("kl")
    x, labels = torch.randn(6, 8, device=device), torch.randint(4, (6,), device=device)

    def step():
        with torch.autocast(device.type, torch.bfloat16):
            output = model(x)
            loss = F.cross_entropy(output, labels) + criterion(output, teacher(x))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    with forbidden(device):
        for _ in range(3):
            step()
    assert teacher.step == 4


def test_what_waits_is_noticed(device):
    """The guard of the tests above sees a read of a value."""
    with forbidden(device), pytest.raises((RuntimeError, AssertionError)):
        torch.ones((), device=device).item()
    assert np.isfinite(torch.ones((), device=device).item())


# --- compiled, which takes the longest ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_compiled_teacher_answers_with_the_updated_average(dtype, device):
    """The average changes in place under a compiled graph, with CUDA graphs too."""
    student = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4)).to(device, dtype)
    teacher = WMATeacher(student, "ema(0.5)")
    options = {"mode": "reduce-overhead"} if device.type == "cuda" else {"backend": "eager"}
    teacher.module.compile(**options)
    x = torch.randn(8, 16, device=device, dtype=dtype)
    for _ in range(5):
        with torch.no_grad():
            for p in student.parameters():
                p.add_(0.05 * torch.randn_like(p))
        teacher.update()
        plain = copy.deepcopy(student)
        teacher.copy_to(plain)
        with torch.no_grad():
            expected = plain(x)
        torch.testing.assert_close(teacher(x).clone(), expected, rtol=0.02, atol=0.02)
