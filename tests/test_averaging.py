from unittest import mock

import pytest
import torch

from wmateacher import averaging
from wmateacher.averaging import Average, Update
from wmateacher.transfers import moved

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(), (3,), (4, 5), (0,), (2**20 + 17,), (3, 700_000), (96, 64, 16, 16)]


def lerp_oracle(average, value, omega):
    average, value = average.double(), value.double()
    return average + omega * (value - average)


def assert_rounded(own, average):
    """The forward's tensor is a nearest of its dtype to the average, whichever of two at a tie."""
    gap = (own.double() - average.double()).abs()
    assert (gap <= (average.to(own.dtype).double() - average.double()).abs()).all()


def tensors(dtype):
    made = [torch.randn(shape).to(dtype) for shape in SHAPES]
    made[-1] = made[-1].to(memory_format=torch.channels_last)  # larger than the scratch
    return made


@pytest.mark.parametrize(
    "value_dtype",
    [d if d in (torch.float32, torch.bfloat16) else pytest.param(d, marks=pytest.mark.slow) for d in FLOATS],
    ids=str,
)
@pytest.mark.parametrize(
    ("own_dtype", "average_dtype", "split"),
    [
        (torch.float64, torch.float64, False),
        (torch.float32, torch.float32, False),
        (torch.float32, torch.float64, False),
        (torch.bfloat16, torch.float32, False),
        (torch.float16, torch.float32, False),
        (torch.bfloat16, torch.float32, True),
    ],
    ids=["double", "direct", "wide double", "wide bf16", "wide fp16", "split"],
)
def test_an_update_is_the_float64_formula(own_dtype, average_dtype, split, value_dtype):
    starts = [torch.randn(shape, dtype=average_dtype) for shape in SHAPES]
    owns, values = tensors(own_dtype), tensors(value_dtype)
    averages = [Average.of(s, o, split=split) for s, o in zip(starts, owns, strict=True)]
    assert all(torch.equal(a.read(), s) for a, s in zip(averages, starts, strict=True))
    update = Update(averages, values)
    expected = starts
    for omega in (0.3, 1e-4, 0.9):
        update(omega)
        expected = [lerp_oracle(e, v, omega) for e, v in zip(expected, values, strict=True)]
    for average, own, e in zip(averages, owns, expected, strict=True):
        torch.testing.assert_close(average.read(), e.to(average_dtype), rtol=5e-7, atol=5e-7)
        assert_rounded(own, average.read())
    update(1.0)
    for average, own, value in zip(averages, owns, values, strict=True):
        assert torch.equal(average.read(), value.to(average_dtype))
        assert_rounded(own, average.read())


def test_tensors_of_many_kinds_in_one_update():
    owns = [
        torch.randn(3, 4).t(),
        torch.randn(4, 3),
        torch.randn(4, 3).bfloat16(),
        torch.randn(4, 3).double(),
    ]
    starts = [o.detach().to(torch.promote_types(o.dtype, torch.float32)) for o in owns]
    values = [torch.randn(4, 3), torch.randn(4, 3).bfloat16(), torch.randn(3, 4).t(), torch.randn(4, 3)]
    averages = [Average.of(s, o) for s, o in zip(starts, owns, strict=True)]
    expected = [lerp_oracle(s, v, 0.3) for s, v in zip(starts, values, strict=True)]
    Update(averages, values)(0.3)
    for average, e in zip(averages, expected, strict=True):
        torch.testing.assert_close(average.read().double(), e, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("split", [False, True], ids=["wide", "split"])
def test_a_whole_step_copies_even_from_infinity(split):
    average = Average.of(
        torch.tensor([float("inf"), float("nan"), 1.0]), torch.zeros(3).bfloat16(), split=split
    )
    Update([average], [torch.tensor([1.0, 2.0, 3.001])])(1.0)
    assert average.read().tolist() == torch.tensor([1.0, 2.0, 3.001]).tolist()


def test_splitting_keeps_every_float32_bit():
    bits = torch.randint(-(2**31), 2**31, (200_000,), dtype=torch.int64).to(torch.int32)
    corners = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1e-45, -1e-40, 3.4028234e38, 1.00390625])
    values = torch.cat([bits.view(torch.float32), corners])
    own = torch.empty(len(values), dtype=torch.bfloat16)
    average = Average.of(values, own, split=True)
    known = ~values.isnan()
    assert torch.equal(average.read().view(torch.int32)[known], values.view(torch.int32)[known])
    finite = values.isfinite() & values.bfloat16().isfinite()
    assert_rounded(own[finite], values[finite])
    assert average.beside.element_size() == 2


def test_a_gpus_nan_stays_one_when_split():
    bits = [0x7FFFFFFF, 0x7FC00000, -0x400000, -1, -0x8000, -0x7FFFFF, 0x7F800001]
    nan = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    average = Average.of(nan, torch.zeros(7).bfloat16(), split=True)
    assert average.own.isnan().all()
    assert average.read().isnan().all()
    Update([average], [nan])(1.0)
    assert average.own.isnan().all()
    assert average.read().isnan().all()


def test_complex_averages():
    own = torch.randn(5, dtype=torch.complex64)
    start, value = own.clone(), torch.randn(5, dtype=torch.complex64)
    Update([Average(own)], [value])(0.25)
    torch.testing.assert_close(own, 0.75 * start + 0.25 * value)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
def test_values_that_arrive_through_a_relay(dtypes):
    """The path of a teacher that is offloaded, with the relays in the CPU's memory."""
    held = [torch.randn(s, dtype=dtypes[0]) for s in SHAPES if 0 not in s]
    values = [torch.randn(t.shape).to(dtypes[1]) for t in held]
    expected = [lerp_oracle(h, v, 0.3) for h, v in zip(held, values, strict=True)]
    room = 2**20
    relays = [torch.empty(room, dtype=dtypes[1]) for _ in range(2)]
    scratch = torch.empty(room) if dtypes[0] != dtypes[1] else None
    update = Update([], [])
    batches = list(averaging.batched(list(zip(held, values, strict=True)), room))
    update._steps = [averaging.steps.Step(b, relays[i % 2], scratch) for i, b in enumerate(batches)]
    assert len(batches) > 3
    update(0.3)
    for h, e in zip(held, expected, strict=True):
        torch.testing.assert_close(h, e.float())


VECTORS = [(3,), (), (1, 5), (0,), (4, 1, 1), (2**17,), (7,)]


@pytest.mark.parametrize("value_dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_vectors_that_are_held_end_to_end_move_like_single_ones(value_dtype):
    owns = [torch.randn(shape) for shape in VECTORS]
    starts = [own.double() + 1e-9 for own in owns]
    values = [torch.randn(shape).to(value_dtype) for shape in VECTORS]
    values[0] = torch.randn(6).to(value_dtype)[::2]
    averages = averaging.side_by_side(
        {str(i): Average.of(s, o) for i, (s, o) in enumerate(zip(starts, owns, strict=True))}
    )
    update = Update([*averages.values()], values)
    for omega in (0.3, 1e-4, 1.0):
        update(omega)
        starts = [lerp_oracle(s, v, omega) for s, v in zip(starts, values, strict=True)]
        for average, own, start in zip(averages.values(), owns, starts, strict=True):
            assert average.own is own
            torch.testing.assert_close(average.read(), start, rtol=1e-15, atol=1e-15)
            assert torch.equal(own, average.read().float())


def test_vectors_that_are_held_end_to_end_move_in_one_call(monkeypatch):
    calls = []
    monkeypatch.setattr(averaging.steps, "_lerp_", lambda held, values, omega: calls.append(len(held)))
    owns = {str(i): torch.randn(8) for i in range(50)}
    averages = averaging.side_by_side({n: Average.of(o.double(), o) for n, o in owns.items()})
    values = [torch.randn(8) for _ in owns]
    Update([*averages.values()], values)(0.5)
    assert calls == [1]
    # In another order they no longer lie end to end: every one moves by itself, in one call for all.
    Update([*averages.values()][::-1], values)(0.5)
    assert calls == [1, 50]


def test_joined_vectors_that_arrive_through_a_relay():
    owns = {str(i): torch.randn(5) for i in range(9)}
    averages = averaging.side_by_side({n: Average.of(o.double(), o) for n, o in owns.items()})
    values = [torch.randn(5) for _ in owns]
    expected = [lerp_oracle(o, v, 0.3) for o, v in zip(owns.values(), values, strict=True)]
    rows = [(a.held, v, a.own) for a, v in zip(averages.values(), values, strict=True)]
    relays, scratch = [torch.empty(20) for _ in range(2)], torch.empty(20, dtype=torch.float64)
    update = Update([], [])
    batches = list(averaging.batched(rows, 20))
    update._steps = [averaging.steps._JoinedStep(b, relays[i % 2], scratch) for i, b in enumerate(batches)]
    assert len(batches) == 3
    update(0.3)
    for average, e in zip(averages.values(), expected, strict=True):
        torch.testing.assert_close(average.read(), e)
        assert torch.equal(average.own, e.float())


def test_batches_fill_the_scratch_and_lose_nothing():
    rows = [(torch.arange(n).view(shape),) for n, shape in [(7, (7,)), (1, ()), (60, (3, 20)), (36, (6, 6))]]
    rows.append((torch.arange(64).view(8, 8).t(),))
    batches = list(averaging.batched(rows, 10))
    assert max(sum(p[0].numel() for p in batch) for batch in batches) <= 10
    pieces = torch.cat([p[0].reshape(-1) for batch in batches for p in batch])
    assert sorted(pieces.tolist()) == sorted([*range(7), 0, *range(60), *range(36), *range(64)])


def test_nothing_to_do():
    Update([], [])(0.5)
    averaging.copy_([], [])


@pytest.mark.parametrize(("device", "waits"), [("cpu", True), ("cuda", False), ("mps", False)])
def test_the_host_waits_for_what_arrives_in_its_own_memory_alone(device, waits):
    """A mask that the host read before it arrived would average a student that is NaN."""
    tensor = mock.Mock(dtype=torch.bool)
    moved(tensor, torch.device(device))
    assert tensor.to.call_args.kwargs["non_blocking"] is not waits
