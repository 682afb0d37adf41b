"""Distributed checkpoints: from any world size to any, and what goes wrong is said on every rank."""

import copy
import itertools
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from pool import RankError, device
from ranks import on_ranks
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from test_fsdp2 import Block, shard  # isort: skip
from wmateacher import WMATeacher
from wmateacher.distributed import load

STEPS = 8


def build(
    dtype=torch.float32, kernel="beta(0.5,0.5)", sharded=True, kind=Block, precision="auto", total=STEPS
):
    torch.manual_seed(0)

    def factory():
        model = kind().to(device(), dtype)
        return shard(model) if sharded else model

    student = factory()
    return student, WMATeacher(student, kernel, total, module_factory=factory, dtype=precision)


def drive(student, teacher, first, last):
    """Steps whose student depends on the step alone, and not on how it is sharded."""
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        with torch.no_grad():
            for p in student.parameters():
                value = torch.randn(p.shape, generator=generator).to(device(), p.dtype)
                if isinstance(p, DTensor):
                    parts, rank = value.chunk(p.device_mesh.size()), p.device_mesh.get_local_rank()
                    p.to_local().copy_(parts[rank] if rank < len(parts) else value[:0])
                else:
                    p.copy_(value)
        teacher.update(student)


def plain(state):
    return {k: v.full_tensor().cpu() if isinstance(v, DTensor) else v for k, v in state.items()}


def assert_equal(a, b):
    a, b = plain(a), plain(b)
    assert a.keys() == b.keys()
    for key, value in b.items():
        equal = torch.equal(a[key], value.cpu()) if isinstance(value, torch.Tensor) else a[key] == value
        assert equal, key


def shard_each(model):
    for layer in model:
        fully_shard(layer)
    return fully_shard(model)


def _wrapped(function):
    """Marks what the ranks of a pool run, looked up by its name."""
    function.__wrapped__ = function
    return function


OPTIONS = [
    {"dtype": torch.float32},
    {"dtype": torch.bfloat16},
    {"dtype": torch.bfloat16, "precision": "split"},
    {"dtype": torch.float32, "sharded": False},
]


@_wrapped
def saves(folder):
    for i, options in enumerate(OPTIONS):
        student, teacher = build(**options)
        drive(student, teacher, 0, 3)
        teacher.set_total_steps(STEPS + 4)  # the clock remembers both horizons
        drive(student, teacher, 3, 5)
        dcp.save({"teacher": teacher.state_dict(), "other": torch.ones(2)}, checkpoint_id=f"{folder}/{i}")


@_wrapped
def loads(folder):
    for i, options in enumerate(OPTIONS):
        student, expected = build(**options)
        drive(student, expected, 0, 3)
        expected.set_total_steps(STEPS + 4)
        drive(student, expected, 3, 5)
        _, resumed = build(**options, total=STEPS + 4)
        load(resumed, f"{folder}/{i}")
        assert_equal(resumed.state_dict(), expected.state_dict())
        assert resumed.step == 5
        assert (resumed.trajectory_weights() == expected.trajectory_weights()).all()
        drive(student, resumed, 5, 7)
        drive(student, expected, 5, 7)
        assert_equal(resumed.state_dict(), expected.state_dict())
        if options.get("precision") != "split":  # torch's own, which reads into the teacher's memory
            _, resumed = build(**options, total=STEPS + 4)
            dcp.load({"teacher": resumed}, checkpoint_id=f"{folder}/{i}")
            assert resumed.step == 5
    # A replica reads what shards wrote.
    _, whole = build(torch.float32, sharded=False, total=STEPS + 4)
    load(whole, f"{folder}/0")
    _, sharded = build(torch.float32, total=STEPS + 4)
    load(sharded, f"{folder}/3")
    assert_equal(sharded.state_dict(), whole.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("writers", [1, 2, 4])
def test_a_state_loads_on_any_other_number_of_processes(pools, tmp_path, writers):
    pools("gloo", writers).run(saves, str(tmp_path))
    for readers in sorted({1, 2, 4} - {writers}):
        pools("gloo", readers).run(loads, str(tmp_path))


@pytest.mark.skipif(
    not hasattr(torch.distributed.checkpoint.staging, "DefaultStager"),
    reason="this torch stages no copy of tensors that are on the CPU already",
)
@on_ranks(1, 2)
def test_an_async_save_holds_the_moment_that_it_was_asked_at(folder):
    for sharded in (True, False):
        student, teacher = build(sharded=sharded)
        drive(student, teacher, 0, 3)
        expected = copy.deepcopy(plain(teacher.state_dict()))
        done = dcp.async_save({"teacher": teacher.state_dict()}, checkpoint_id=f"{folder}/{sharded}")
        drive(student, teacher, 3, 6)
        done.result()
        _, resumed = build(sharded=sharded)
        load(resumed, f"{folder}/{sharded}")
        assert_equal(resumed.state_dict(), expected)


@on_ranks(1, 2, 4)
def test_a_full_state_for_inference(folder):
    for dtype in (torch.float32, torch.bfloat16):
        student, teacher = build(dtype)
        alone, single = build(dtype, sharded=False)
        drive(student, teacher, 0, 4)
        drive(alone, single, 0, 4)
        for wanted in (None, torch.float32):
            state = teacher.averaged_state_dict(wanted, full=True)
            if torch.distributed.get_rank():
                assert state == {}
            else:
                assert_equal(state, {k: v.cpu() for k, v in single.averaged_state_dict(wanted).items()})
                Block().to(dtype).load_state_dict(state)
        # torch's own helper sees the averaged module as any other.
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        theirs = get_model_state_dict(teacher.module, options=options)
        if not torch.distributed.get_rank():
            assert_equal(theirs, {k: v.cpu() for k, v in single.averaged_state_dict().items()})


@on_ranks(1, 2)
def test_torchs_state_helpers_take_a_teacher(folder):
    for kernel in ("beta(0.5,0.5)", "gap(0.5)"):
        student, teacher = build(kernel=kernel)
        drive(student, teacher, 0, 3)
        state = copy.deepcopy(get_model_state_dict(teacher))
        other, resumed = build(kernel=kernel)
        drive(other, resumed, 0, 1)
        set_model_state_dict(resumed, state)
        assert_equal(resumed.state_dict(), teacher.state_dict())


@on_ranks(1, 2, 4)
def test_what_does_not_fit_is_an_error_on_every_rank_and_changes_nothing(folder):
    student, teacher = build()
    drive(student, teacher, 0, 3)
    dcp.save({"teacher": teacher.state_dict()}, checkpoint_id=f"{folder}/whole")
    torch.distributed.barrier()

    class Wider(Block):
        def __init__(self):
            super().__init__()
            self.more = nn.Linear(5, 5)

    class Longer(Block):
        def __init__(self):
            super().__init__()
            self.layers[0] = nn.Linear(5, 5, bias=False)

    class Taller(Block):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(6)

    cases = [
        ({"kernel": "uniform"}, r"written with kernel='beta\(0.5,0.5\)', this teacher has kernel='uniform'"),
        ({"total": 9}, "written with total_steps=8, this teacher has total_steps=9"),
        (
            {"kind": Wider},
            "another architecture: missing 'teacher.module.more.bias', 'teacher.module.more.weight'",
        ),
        ({"kind": Longer}, "another architecture: unexpected 'teacher.module.layers.0.bias'"),
        ({"kind": Taller}, r"'teacher.module.norm.\w+' has shape \(5,\) there and \(6,\) here"),
    ]
    for options, message in cases:
        _, other = build(**options)
        before = copy.deepcopy(plain(other.state_dict()))
        with pytest.raises(ValueError, match=message):
            load(other, f"{folder}/whole")
        assert_equal(other.state_dict(), before)
    with pytest.raises(ValueError, match="holds nothing under 'tutor', but teacher: pass .* as key="):
        load(teacher, f"{folder}/whole", "tutor")
    with pytest.raises(ValueError, match="no complete checkpoint in .*nowhere"):
        load(teacher, f"{folder}/nowhere")
    if torch.distributed.get_rank() == 0:
        shutil.copytree(f"{folder}/whole", f"{folder}/damaged")
        max(Path(f"{folder}/damaged").glob("*.distcp")).unlink()
    torch.distributed.barrier()
    before = copy.deepcopy(plain(teacher.state_dict()))
    with pytest.raises(
        ValueError, match=r"cannot be read \(rank \d: .*distcp.*one of its files is missing or damaged"
    ):
        load(teacher, f"{folder}/damaged")
    assert_equal(teacher.state_dict(), before)
    load(teacher, f"{folder}/whole")  # and the ranks are still in step


class Even(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 4), nn.Linear(4, 4))


@on_ranks(1, 2)
def test_what_was_frozen_there_and_trained_here_or_the_reverse_is_read(folder):
    def build(frozen, kernel):
        def factory():
            torch.manual_seed(0)
            model = Even().to(device())
            model[0].requires_grad_(not frozen)
            return shard_each(model)

        student = factory()
        return student, WMATeacher(student, kernel, STEPS, module_factory=factory)

    for frozen, kernel in itertools.product((True, False), ("uniform", "gap(0.5)")):
        student, teacher = build(frozen, kernel)
        drive(student, teacher, 0, 1)
        dcp.save({"teacher": teacher.state_dict()}, checkpoint_id=f"{folder}/{kernel}-{frozen}")
        torch.distributed.barrier()
        other, resumed = build(not frozen, kernel)
        load(resumed, f"{folder}/{kernel}-{frozen}")
        assert_equal(resumed.state_dict(), teacher.state_dict())
        assert (resumed.module[0].weight is other[0].weight) == frozen


@on_ranks(2)
def test_a_checkpoint_of_format_1_is_read_and_one_of_a_later_version_named(folder):
    student, teacher = build()
    drive(student, teacher, 0, 3)
    state = teacher.state_dict()
    clock = dict(state["_extra_state"])
    del clock["joined"], clock["skipped"]
    for version, extra in ((1, {}), (99, {"phase": "of the moon"})):
        written = {**state, "_extra_state": {**clock, **extra, "format": version}}
        dcp.save({"teacher": written}, checkpoint_id=f"{folder}/{version}")
    torch.distributed.barrier()
    _, resumed = build()
    load(resumed, f"{folder}/1")
    assert_equal(resumed.state_dict(), state)
    with pytest.raises(ValueError, match="has format 99, but this version reads formats 1 to 2"):
        load(resumed, f"{folder}/99")


class Killed(dcp.FileSystemWriter):
    """The last rank is killed when it has begun to write."""

    def write_data(self, plan, planner):
        if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            Path(self.path).mkdir(parents=True, exist_ok=True)
            (Path(self.path) / "__1_0.distcp").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        return super().write_data(plan, planner)


@_wrapped
def saves_and_is_killed(folder):
    student, teacher = build()
    drive(student, teacher, 0, 2)
    dcp.save({"teacher": teacher.state_dict()}, checkpoint_id=f"{folder}/step-2")
    drive(student, teacher, 2, 4)
    dcp.save({"teacher": teacher.state_dict()}, storage_writer=Killed(f"{folder}/step-4"))


@_wrapped
def reads_what_is_left(folder):
    student, teacher = build()
    with pytest.raises(ValueError, match="no complete checkpoint in .*step-4.*load the previous checkpoint"):
        load(teacher, f"{folder}/step-4")
    assert teacher.step == 0
    load(teacher, f"{folder}/step-2")
    _, expected = build()
    drive(student, expected, 0, 2)
    assert_equal(teacher.state_dict(), expected.state_dict())


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_rank_killed_in_the_middle_of_a_save_leaves_the_one_before(pools, tmp_path, size):
    victims = pools("gloo", size, "victims")
    with pytest.raises(RankError, match="died"):
        victims.run(saves_and_is_killed, str(tmp_path))
    victims.stop()
    pools("gloo", size).run(reads_what_is_left, str(tmp_path))


@on_ranks(2)
def test_a_replicas_state_is_written_once(folder):
    torch.manual_seed(0)
    student = DistributedDataParallel(nn.Linear(256, 256).to(device()))
    teacher = WMATeacher(student, "uniform", STEPS)
    dcp.save({"teacher": teacher.state_dict()}, checkpoint_id=f"{folder}/one")
    size = sum(f.stat().st_size for f in Path(f"{folder}/one").glob("*.distcp"))
    assert size < 1.5 * 4 * 257 * 256
