"""DDP: every rank has the same teacher, and none has to be told."""

import copy

import pytest
import torch
from pool import device
from ranks import on_ranks
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

from wmateacher import WMATeacher, recalibrate
from wmateacher.distributed import check_ranks_agree

STEPS = 5


def build(*, norm=False):
    torch.manual_seed(0)
    middle = nn.BatchNorm1d(8) if norm else nn.LayerNorm(8)
    return nn.Sequential(nn.Linear(4, 8), middle, nn.GELU(), nn.Linear(8, 2)).to(device())


def batch(step, rank):
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(6, 4, generator=generator).to(device())


@on_ranks(1, 2, 4)
def test_teachers_are_identical_without_communication(folder):
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    # A static graph is recorded in the first backward pass, which DDP does not allow in no_sync.
    for static_graph, micro in ((False, 1), (False, 3), (True, 1)):
        student = DistributedDataParallel(build(), static_graph=static_graph)
        alone = build()
        optimizers = [torch.optim.AdamW(m.parameters(), lr=0.01) for m in (student, alone)]
        teacher = WMATeacher(student, "beta(0.5,0.5)", STEPS)
        reference = WMATeacher(alone, "beta(0.5,0.5)", STEPS)
        with teacher.attach(optimizers[0]), reference.attach(optimizers[1]):
            for step in range(STEPS):
                for i in range(micro):
                    if i + 1 < micro:
                        with student.no_sync():
                            loss(student, teacher, batch(step * micro + i, rank)).backward()
                    else:
                        loss(student, teacher, batch(step * micro + i, rank)).backward()
                    for other in range(size):
                        (loss(alone, reference, batch(step * micro + i, other)) / size).backward()
                with CommDebugMode() as comm:
                    optimizers[0].step()
                assert comm.get_total_counts() == 0
                optimizers[1].step()
                for optimizer in optimizers:
                    optimizer.zero_grad()
        assert teacher.step == STEPS  # micro-batches do not count
        check_ranks_agree(teacher)
        check_ranks_agree(student)
        for name, value in reference.module.state_dict().items():
            torch.testing.assert_close(teacher.module.state_dict()[name], value)
        with teacher.swap(), torch.no_grad():
            assert torch.equal(student.module(batch(0, 0)), teacher(batch(0, 0)))


def loss(student, teacher, inputs):
    outputs = student(inputs)
    return (outputs - 1).square().mean() + (outputs - teacher(inputs)).square().mean()


@on_ranks(1, 2, 4)
def test_ranks_that_disagree_are_named(folder):
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    student = build().bfloat16()
    teacher = WMATeacher(student, "uniform", STEPS)
    check_ranks_agree(teacher)
    if size == 1:
        return
    teacher.update()
    if rank == size - 1:
        teacher.state_dict()["module.3.weight"].view(-1)[5] += 2**-20  # the average itself, in float32
    with pytest.raises(
        RuntimeError, match=rf"not as on rank 0 are 'module.3.weight' on rank {size - 1}\. Build"
    ):
        check_ranks_agree(teacher)
    teacher = WMATeacher(student, "uniform", STEPS)
    if rank == 1:
        teacher.update()
    with pytest.raises(RuntimeError, match="'_extra_state' on rank 1. Build the student from one seed"):
        check_ranks_agree(teacher)
    other = nn.Linear(4, 2 + rank)
    with pytest.raises(RuntimeError, match="'weight' on rank 1"):
        check_ranks_agree(other)
    swapped = nn.Linear(2, 1)
    with torch.no_grad():
        swapped.weight.copy_(torch.tensor([[1.0, 2.0]] if rank else [[2.0, 1.0]]))
        swapped.bias.zero_()
    with pytest.raises(RuntimeError, match="'weight' on rank 1"):  # the order of values counts too
        check_ranks_agree(swapped)


@on_ranks(2)
def test_running_statistics_are_each_ranks_own(folder):
    """DDP keeps them so; the check tells, and buffers='keep' is a way out."""
    rank = torch.distributed.get_rank()
    for buffers in ("copy", "keep"):
        student = DistributedDataParallel(build(norm=True))
        teacher = WMATeacher(student, "uniform", STEPS, buffers=buffers)
        student(batch(0, rank)).sum().backward()
        teacher.update()
        if buffers == "keep":
            check_ranks_agree(teacher)
        else:
            with pytest.raises(RuntimeError, match="'module.1.running_mean' on rank 1"):
                check_ranks_agree(teacher)


@on_ranks(2)
def test_recalibrated_statistics_are_those_of_all_ranks_batches(folder):
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    student = DistributedDataParallel(build(norm=True))
    teacher = WMATeacher(student, "ema(0.5)", STEPS, mode="train")
    student(batch(0, rank)).sum().backward()
    teacher(batch(0, rank))
    teacher.update()
    alone = copy.deepcopy(teacher.module)
    # Ranks need not have equally many batches.
    mine = [batch(step, rank) for step in range(2 + rank)]
    everyones = [batch(step, other) for other in range(size) for step in range(2 + other)]
    for model in (teacher, student):
        assert recalibrate(model, mine) == len(everyones)
    check_ranks_agree(teacher)
    torch.optim.swa_utils.update_bn(everyones, alone)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        found = getattr(teacher.module[1], name)
        torch.testing.assert_close(found, getattr(alone[1], name))
        torch.testing.assert_close(getattr(student.module[1], name), found)
    with pytest.raises(ValueError, match="loader gave no batch"):
        recalibrate(teacher, [])


@on_ranks(2, 4)
def test_a_duplicated_teacher_stays_in_step(folder):
    student = DistributedDataParallel(build())
    teacher = WMATeacher(student, "uniform", STEPS)
    resumed = WMATeacher(student, "uniform", STEPS)
    teacher.update()
    resumed.load_state_dict(copy.deepcopy(teacher.state_dict()))
    check_ranks_agree(resumed)


@on_ranks(2)
def test_steps_of_an_optimizer_whose_state_is_sharded_count_once(folder):
    """ZeRO stage 1: each rank steps its part of the parameters and sends it to the others."""
    for kind, options in ((torch.optim.AdamW, {"lr": 0.01}), (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9})):
        rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        student, alone = DistributedDataParallel(build()), build()
        optimizer = ZeroRedundancyOptimizer(student.parameters(), optimizer_class=kind, **options)
        whole = kind(alone.parameters(), **options)
        teacher, by_hand = (WMATeacher(student, "beta(0.5,0.5)", STEPS) for _ in range(2))
        reference = WMATeacher(alone, "beta(0.5,0.5)", STEPS)
        teacher.attach(optimizer)
        reference.attach(whole)
        for step in range(STEPS):
            loss(student, teacher, batch(step, rank)).backward()
            for other in range(size):
                (loss(alone, reference, batch(step, other)) / size).backward()
            for own in (optimizer, whole):
                own.step()
                own.zero_grad()
            by_hand.update()
            assert teacher.step == reference.step == step + 1
        check_ranks_agree(teacher)
        for name, value in reference.module.state_dict().items():
            torch.testing.assert_close(teacher.module.state_dict()[name], value)
            assert torch.equal(teacher.module.state_dict()[name], by_hand.module.state_dict()[name])
