import math

import pytest

from wmateacher.integrations.engine.schedules import cosine, linear_then_flat, sigmoid_rampup, warmup_cosine


def test_cosine_ends_where_it_should():
    assert cosine(0, 10, 0.04, 0.4) == pytest.approx(0.04)
    assert cosine(5, 10, 0.04, 0.4) == pytest.approx(0.22)
    assert cosine(10, 10, 0.04, 0.4) == cosine(11, 10, 0.04, 0.4) == pytest.approx(0.4)
    assert cosine(0, 0, 1.0, 0.0) == 1.0


def test_warm_up_then_cosine():
    values = [warmup_cosine(s, 14, 4, 2.0, 0.5) for s in range(15)]
    assert values[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    assert values[9] == pytest.approx(1.25)
    assert values[14] == pytest.approx(0.5)
    assert warmup_cosine(0, 5, 0, 1.0) == 1.0


def test_teacher_temperature():
    """Caron et al. 2021: .04 to .07 over 30 epochs."""
    assert [linear_then_flat(s, 30, 0.04, 0.07) for s in (0, 10, 30, 99)] == pytest.approx(
        [0.04, 0.05, 0.07, 0.07]
    )
    assert linear_then_flat(0, 0, 0.04, 0.07) == 0.07


def test_sigmoid_ramp_up():
    """Laine & Aila 2017: exp(-5 (1 - x)^2)."""
    assert sigmoid_rampup(0, 80) == pytest.approx(math.exp(-5))
    assert sigmoid_rampup(40, 80) == pytest.approx(math.exp(-1.25))
    assert sigmoid_rampup(80, 80) == sigmoid_rampup(200, 80) == sigmoid_rampup(0, 0) == 1.0
