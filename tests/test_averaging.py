import pytest
import torch

from wmateacher import averaging

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def lerp_oracle(average, value, omega):
    average, value = average.double(), value.double()
    return average + omega * (value - average)


@pytest.mark.parametrize("value_dtype", FLOATS)
@pytest.mark.parametrize("average_dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("omega", [1.0, 0.7, 0.01, 0.0])
def test_lerp_is_the_float64_formula(average_dtype, value_dtype, omega):
    shapes = [(), (3,), (4, 5), (0,), (2**20 + 17,)]
    averages = [torch.randn(s, dtype=average_dtype) for s in shapes]
    values = [torch.randn(s).to(value_dtype) for s in shapes]
    expected = [lerp_oracle(a, v, omega) for a, v in zip(averages, values, strict=True)]
    averaging.lerp_(averages, values, omega)
    for a, e in zip(averages, expected, strict=True):
        torch.testing.assert_close(a, e.to(average_dtype), rtol=2e-7, atol=2e-7)


def test_mixed_dtypes_and_layouts_in_one_call():
    averages = [torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last), torch.randn(3, 4).t()]
    values = [torch.randn(4, 3, 5, 5).bfloat16(), torch.randn(4, 3)]
    expected = [lerp_oracle(a, v, 0.3) for a, v in zip(averages, values, strict=True)]
    averaging.lerp_(averages, values, 0.3)
    for a, e in zip(averages, expected, strict=True):
        torch.testing.assert_close(a, e.float())


def test_a_whole_step_copies_even_from_infinity():
    average = torch.tensor([float("inf"), float("nan"), 1.0])
    averaging.lerp_([average], [torch.tensor([1.0, 2.0, 3.0])], 1.0)
    assert average.tolist() == [1.0, 2.0, 3.0]


def test_nothing_to_do():
    averaging.lerp_([], [], 0.5)
    averaging.copy_([], [])
