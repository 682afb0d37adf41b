import argparse
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import clip_steps
import torch
import train_throughput

from wmateacher.integrations.clip.model import build


def test_all_methods_are_timed_part_by_part(monkeypatch):
    compiling = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiling(module, backend="eager"))
    arguments = argparse.Namespace(
        model="tiny-vit-16",
        batch=4,
        precision="fp32",
        rounds=3,
        device="cpu",
        compile_teacher=True,
        cpu_time=True,
    )
    results = train_throughput.measure(arguments)
    ft, flyp, tracer, compiled = results["seconds"].values()
    assert set(ft) == set(flyp) == {"step", "forward+backward", "optimizer"}
    assert set(tracer) == {*flyp, "teacher", "losses", "losses, forward", "update"}
    assert set(compiled) | {"losses"} == set(tracer)
    assert all(seconds > 0 for parts in results["seconds"].values() for seconds in parts.values())
    ratios = {f"{r['of']} / {r['over']}": r["median"] for r in results["ratios"]}
    assert list(ratios) == [
        "tracer / flyp", "tracer / ft", "tracer, teacher compiled / flyp", "tracer, teacher compiled / ft",
    ]  # fmt: skip
    assert all(ratio > 0 for ratio in ratios.values())
    table = train_throughput.table(results)
    assert [line.split(" ")[0] for line in table.splitlines()][:4] == ["method", "ft", "flyp", "tracer"]
    assert table.endswith("floor of tracer / flyp: 1.333")


def test_a_step_trains_and_averages():
    torch.manual_seed(0)
    student, tokenizer = build("tiny-vit-16")
    steps = clip_steps.Steps(
        student, tokenizer(["one", "two"]), "fp32", ("ft", "flyp", "static-sd", "tracer")
    )
    before = [p.detach().clone() for p in student.parameters()]
    assert set(steps.teachers) == {"static-sd", "tracer"}
    for name in ("ft", "flyp"):
        parts = steps.run(name)
        assert parts.pop("step") == pytest.approx(sum(parts.values()))
        assert set(parts) == {"forward+backward", "optimizer"}
    assert not all(torch.equal(p, b) for p, b in zip(student.parameters(), before, strict=True))
    assert steps.teachers["tracer"].step == 0
    steps.run("tracer")
    assert [steps.teachers[name].step for name in ("tracer", "static-sd")] == [1, 0]
