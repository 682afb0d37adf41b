import argparse
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import train_throughput


def test_both_methods_are_timed_part_by_part():
    arguments = argparse.Namespace(model="tiny-vit-16", batch=4, precision="fp32", rounds=3, device="cpu")
    results = train_throughput.measure(arguments)
    flyp, tracer = results["seconds"]["flyp"], results["seconds"]["tracer"]
    assert set(flyp) == {"step", "forward+backward", "optimizer"}
    assert set(tracer) == {*flyp, "teacher", "losses", "update"}
    assert all(seconds > 0 for seconds in (*flyp.values(), *tracer.values()))
    assert results["floor"] == pytest.approx(4 / 3)
    table = train_throughput.table(results)
    assert [line.split()[0] for line in table.splitlines()] == ["method", "flyp", "tracer", "TRACER"]


def test_a_step_trains_and_averages():
    steps = train_throughput.Steps("tiny-vit-16", 4, "fp32", "cpu")
    steps.run(distils=False)
    assert steps.teacher.step == 0
    steps.run(distils=True)
    assert steps.teacher.step == 1
