"""The fused update, whose Triton kernel is interpreted here; and its machine code, compiled without a GPU."""

import importlib
import re
import sys
import warnings
from collections import Counter
from importlib.util import find_spec

import pytest
import torch
from oracle import realised
from torch import nn

from wmateacher import WMATeacher
from wmateacher.averaging import Average, Update, fused, side_by_side, steps

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")

KINDS = {  # dtypes of the student, the module and the average
    "float32": (torch.float32, torch.float32, torch.float32),
    "float64": (torch.float64, torch.float64, torch.float64),
    "bfloat16 in itself": (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "bfloat16 -> float32": (torch.bfloat16, torch.bfloat16, torch.float32),
    "bfloat16 -> float64": (torch.bfloat16, torch.bfloat16, torch.float64),
    "float16 -> float32": (torch.float16, torch.float16, torch.float32),
    "float32 -> float64": (torch.float32, torch.float32, torch.float64),
    "bfloat16, split": (torch.bfloat16, torch.bfloat16, "split"),
    "float32 -> bfloat16, split": (torch.float32, torch.bfloat16, "split"),
    "float64 -> float32": (torch.float64, torch.float32, torch.float32),
    "float32 -> bfloat16": (torch.float32, torch.float32, torch.bfloat16),
    "float32 -> float16": (torch.float32, torch.float32, torch.float16),
}
BLOCK = 64


@pytest.fixture
def interpreted(monkeypatch):
    """Let Triton interpret the kernel, in small chunks, on the CPU."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(fused, "BLOCK", BLOCK)
    forget()
    with warnings.catch_warnings():
        # numpy, which computes here, warns of infinity minus infinity.
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton|numpy")
        yield
    forget()


def forget():
    """Have Triton decide anew whether it compiles or interprets."""
    sys.modules.pop("wmateacher.averaging.one_pass", None)


def made(kind, shapes=((), (3,), (4, 5), (0,), (3 * BLOCK,), (5 * BLOCK + 17,), (2, 3, 8, 5))):
    """Averages of a kind, some of them in unusual places in memory, and values to move them towards."""
    value_dtype, own_dtype, held = KINDS[kind]
    wide = torch.float32 if held == "split" else held
    averages, values = [], []
    for shape in shapes:
        start, value = torch.randn(shape, dtype=wide), torch.randn(shape).to(value_dtype)
        own = torch.empty(shape, dtype=own_dtype)
        if len(shape) == 4:
            value, own = (t.to(memory_format=torch.channels_last) for t in (value, own))
        averages.append(Average.of(start, own, split=held == "split"))
        values.append(value)
    odd = torch.randn(2 * BLOCK + 1).to(value_dtype)[1:]  # 16 does not divide its address
    averages.append(
        Average.of(torch.randn(2 * BLOCK, dtype=wide), odd.to(own_dtype, copy=True), split=held == "split")
    )
    values.append(odd)
    return averages, values


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_is_the_float64_formula(kind, interpreted):
    averages, values = made(kind)
    update = Update(averages, values)
    assert [type(step) for step in update._steps] == [fused.FusedStep]
    expected = [a.read().double().clone() for a in averages]
    for omega in (0.3, 1e-4, 0.9):
        update(omega)
        expected = [e + omega * (v.double() - e) for e, v in zip(expected, values, strict=True)]
    tolerance = {torch.bfloat16: 0.03, torch.float16: 4e-3, torch.float64: 1e-14}.get(KINDS[kind][2], 1e-6)
    for average, e in zip(averages, expected, strict=True):
        torch.testing.assert_close(average.read().double(), e, rtol=tolerance, atol=tolerance)
        assert torch.equal(average.own, average.read().to(average.own.dtype))
    update(1.0)
    for average, value in zip(averages, values, strict=True):
        assert torch.equal(average.read(), value.to(average.read().dtype))


@pytest.mark.parametrize("on_device", [False, True], ids=["on the host", "on the device"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_and_a_share_on_the_device_are_followed(kind, on_device, interpreted):
    averages, values = made(kind, shapes=((3,), (2 * BLOCK + 5,)))
    update = Update(averages, values, masked=True)
    assert [type(step) for step in update._steps] == [fused.FusedStep]
    share = torch.tensor(0.25, dtype=torch.float64) if on_device else 0.25
    before = [a.read().clone() for a in averages]
    expected = [b.double() + 0.25 * (v.double() - b.double()) for b, v in zip(before, values, strict=True)]
    kept = [v.clone() for v in values]
    for value in values:
        value.fill_(torch.nan)
    update(share, torch.tensor(False))
    for average, b in zip(averages, before, strict=True):
        assert torch.equal(average.read(), b)
        assert torch.equal(average.own, b.to(average.own.dtype))
    for value, k in zip(values, kept, strict=True):
        value.copy_(k)
    update(share, torch.tensor(True))
    tolerance = {torch.bfloat16: 0.02, torch.float16: 2e-3}.get(KINDS[kind][2], 1e-6)
    for average, e in zip(averages, expected, strict=True):
        torch.testing.assert_close(average.read().double(), e, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("omega", [0.4, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_infinities_and_nan_end_as_with_torchs_operations(kind, omega, interpreted):
    def ends(fuse):
        value_dtype, own_dtype, held = KINDS[kind]
        numbers = [1.0, torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 1e-42, 6e4, -1.00390625]
        start, value = torch.meshgrid(*2 * [torch.tensor(numbers, dtype=torch.float64)], indexing="ij")
        start = start.to(torch.float32 if held == "split" else held).contiguous()
        average = Average.of(start, torch.empty(9, 9, dtype=own_dtype), split=held == "split")
        Update([average], [value.to(value_dtype).contiguous()], fuse=fuse)(omega)
        return average.read(), average.own

    for found, expected in zip(ends(True), ends(False), strict=True):
        torch.testing.assert_close(found, expected, equal_nan=True)


def test_other_layouts_and_dtypes_go_the_plain_way_and_end_as_well(interpreted):
    held = [torch.zeros(4, 6), torch.zeros(4, 6), torch.zeros(4, 6), torch.zeros(3, dtype=torch.complex64)]
    values = [torch.ones(4, 6), torch.ones(6, 4).t(), torch.ones(4, 12)[:, ::2], torch.ones(3) * 1j]
    update = Update([Average(t) for t in held], values)
    assert {type(step) for step in update._steps} == {fused.FusedStep, steps.Step}
    update(0.5)
    assert [len(step.held) for step in update._steps] == [1, 2, 1]
    assert all((t == 0.5 * v).all() for t, v in zip(held, values, strict=True))


def test_vectors_that_lie_end_to_end_need_no_launch_each(interpreted):
    owns = {str(n): torch.randn(n).bfloat16() for n in (1, 5, 70, 200)}
    averages = side_by_side({n: Average.of(o.double(), o.clone()) for n, o in owns.items()})
    values = [torch.full_like(o, 2.0) for o in owns.values()]
    update = Update(list(averages.values()), values)
    (step,) = update._steps
    assert len(step._tables) <= 2
    update(0.5)
    for name, average in averages.items():
        torch.testing.assert_close(average.read(), 0.5 * owns[name].double() + 1.0)


def test_autograd_notices_the_write(interpreted):
    weight, x = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    update = Update([Average(weight)], [torch.zeros(3)])
    product = (weight * x).sum()
    update(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize("dtype", ["auto", "split"])
@pytest.mark.parametrize("kernel", ["beta(0.5,0.5)", "ema(0.9)", "tail(0.25)"])
def test_every_state_has_its_kernels_weight(kernel, dtype, interpreted, monkeypatch):
    launched = []
    monkeypatch.setattr(
        fused.FusedStep, "move", lambda s, *a, f=fused.FusedStep.move: launched.append(f(s, *a))
    )
    student, total = nn.Linear(13, 1).bfloat16(), 12

    def show(step):
        with torch.no_grad():
            student.weight.zero_()[0, step] = 1

    show(0)
    teacher = WMATeacher(student, kernel, total, dtype=dtype)
    for step in range(1, total + 1):
        show(step)
        teacher.update()
    assert launched
    found = {name: average for name, _, average in teacher.averaged_pairs()}["weight"].double().reshape(-1)
    torch.testing.assert_close(
        found, torch.from_numpy(realised(kernel, total, 1, total).copy()), rtol=1e-6, atol=1e-7
    )


def test_fused_false_launches_nothing(interpreted, monkeypatch):
    monkeypatch.setattr(fused, "FusedStep", None)
    student = nn.Linear(3, 2)
    teacher = WMATeacher(student, "uniform", fused=False)
    teacher.update()


def test_a_compiled_function_may_update(interpreted):
    def trained(wrap):
        torch.manual_seed(0)
        student = nn.Linear(5, 3)
        teacher = WMATeacher(student, "beta(0.5,0.5)", 4)

        def step():
            with torch.no_grad():
                student.weight.mul_(0.9)
            teacher.update()
            return student.weight.sum()

        step = wrap(step)
        for _ in range(4):
            step()
        return teacher.module.weight

    compiled = trained(lambda step: torch.compile(step, backend="eager"))
    torch.testing.assert_close(compiled, trained(lambda step: step), rtol=0, atol=0)


@pytest.mark.parametrize("omega", [1e-320, 5e-324, 1e-200])
def test_a_tiny_share_moves_nothing(omega, interpreted):
    average = Average(torch.ones(3))
    Update([average], [torch.full((3,), 5.0)])(omega)
    assert average.read().tolist() == [1.0] * 3


def test_the_interpreter_reads_no_addresses_of_a_gpu(monkeypatch):
    for value in ("1", "true", "YES", "on"):
        monkeypatch.setenv("TRITON_INTERPRET", value)
        assert not fused._is_available(torch.device("cuda"))
        assert fused._is_available(torch.device("cpu"))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert not fused._is_available(torch.device("cpu"))


def test_without_an_interpreter_the_cpu_goes_the_plain_way(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert {type(step) for step in Update([Average(torch.zeros(3))], [torch.ones(3)])._steps} == {steps.Step}


@pytest.mark.parametrize("fault", ["raises", "is wrong"])
def test_a_kernel_that_does_not_work_here_is_not_used(fault, interpreted, monkeypatch):
    monkeypatch.setattr(fused, "differs", fused.differs.__wrapped__)
    if fault == "raises":
        monkeypatch.setattr(fused.FusedStep, "move", lambda *_: (_ for _ in ()).throw(OSError("no compiler")))
    else:
        monkeypatch.setattr(fused.FusedStep, "move", lambda *_: None)
    average = Average(torch.zeros(3))
    said = {"raises": "OSError: no compiler", "is wrong": "AssertionError: Tensor-likes are not close"}[fault]
    with pytest.warns(UserWarning, match=rf"not used \({said}.*more slowly. Pass fused=False to silence"):
        update = Update([average], [torch.ones(3)])
    update(0.5)
    assert average.read().tolist() == [0.5] * 3


@pytest.fixture
def machine_code(tmp_path, monkeypatch):
    """A function that compiles the kernel for an H100 and returns the assembly by its kind."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    forget()
    move = importlib.import_module("wmateacher.averaging.one_pass").move

    def compiled(kind, omega="*i64", mask="*i64", **options):
        constants = fused.constants(kind, **options)
        signature = {"table": "*i64", "chunks": "i32", "omega_bits": "i64", "omega": omega, "mask": mask}
        source = ASTSource(move, signature | dict.fromkeys(constants, "constexpr"), constants)
        target = GPUTarget("cuda", 90, 32)
        return triton.compile(source, target=target, options={"num_warps": fused.WARPS}).asm

    return compiled


def test_the_kernel_compiles_with_a_mask_and_a_share_on_the_device(machine_code):
    kind = fused.Kind(torch.float32, torch.bfloat16, torch.bfloat16, beside=True)
    assert machine_code(kind, "*fp32", "*i1", full=False, aligned=False, masked=True, omega_on_device=True)[
        "cubin"
    ]


@pytest.mark.parametrize("kind", ["float32", "bfloat16 -> float32", "bfloat16 -> float64", "bfloat16, split"])
def test_the_kernel_compiles_and_moves_16_bytes_at_a_time(kind, machine_code):
    value, own, held = (torch.int16 if dtype == "split" else dtype for dtype in KINDS[kind])
    code = machine_code(
        fused.Kind(held, value, own, beside=held != own), full=True, aligned=True, masked=False
    )
    assert code["cubin"]
    moves = Counter(re.findall(r"(ld|st)\.global\.(\S+)", code["ptx"]))
    elements = fused.BLOCK // (32 * fused.WARPS)
    read = elements * (value.itemsize + held.itemsize + (own.itemsize if held == torch.int16 else 0))
    written = elements * (held.itemsize + (own.itemsize if held != own else 0))
    wide = {"v4.b32", "v2.b64"}
    assert sum(n for (kind, how), n in moves.items() if kind == "ld" and how in wide) == read // 16
    assert sum(n for (kind, how), n in moves.items() if kind == "st" and how in wide) == written // 16
    assert {how for _, how in moves} - wide == {"b64"}  # the addresses
