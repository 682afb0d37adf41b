"""FSDP2: every rank averages its own shards, and hears of no other's."""

import copy

import pytest
import torch
from pool import device
from ranks import on_ranks
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from wmateacher import WMATeacher, recalibrate
from wmateacher.diagnostics import module_gaps, parameter_gap

STEPS = 6


class Block(nn.Module):
    """Shapes that no world size of more than one divides; a norm, buffers, tied weights."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(2))
        self.norm = nn.BatchNorm1d(5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + layer(x).relu()
        return self.head(self.norm(x))


class Even(Block):
    """The same with shapes that 1, 2 and 4 divide."""

    def __init__(self):
        nn.Module.__init__(self)
        self.embed = nn.Embedding(8, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 8, bias=False)
        self.head.weight = self.embed.weight


class LayerNormed(Block):
    """Without the buffers of a batch norm, which a CPU wants in its parameters' dtype."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(5)


def shard(model, **options):
    for layer in model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def tokens(rank=None):
    rank = torch.distributed.get_rank() if rank is None else rank
    return torch.arange(6, device=device()).add(rank) % 7


def pair(kind=Block, dtype=torch.float32, meta=True, kernel="uniform", mode="eval", **options):
    """A sharded student, its teacher, and the same two in one piece, all from the same start."""
    torch.manual_seed(0)
    whole = kind().to(device(), dtype)
    student = shard(copy.deepcopy(whole), **options)

    def build():
        with torch.device("meta" if meta else device()):
            return shard(kind().to(dtype), **options)

    teacher = WMATeacher(student, kernel, STEPS, module_factory=build, mode=mode)
    return student, teacher, whole, WMATeacher(whole, kernel, STEPS, mode=mode)


def move(student, whole, seed):
    """The same random step for both."""
    student.reshard()
    generator = torch.Generator(device()).manual_seed(seed)
    for sharded, single in zip(student.parameters(), whole.parameters(), strict=True):
        with torch.no_grad():
            single.add_(torch.randn(single.shape, generator=generator, device=device()).to(single.dtype))
            rank, shards = sharded.device_mesh.get_local_rank(), sharded.device_mesh.size()
            parts = single.chunk(shards)
            part = parts[rank] if rank < len(parts) else single[:0]
            sharded.to_local().copy_(part)


def whole_state(teacher):
    state = teacher.state_dict()
    return {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in state.items()}


def assert_same_teachers(sharded, single):
    ours, theirs = whole_state(sharded), single.state_dict()
    assert ours.keys() == theirs.keys()
    assert ours.pop("_extra_state") == theirs.pop("_extra_state")
    for key, value in theirs.items():
        assert ours[key].dtype == value.dtype, key
        assert torch.equal(ours[key], value), key


@on_ranks(1, 2, 4)
def test_the_sharded_average_is_the_whole_one_bit_for_bit(folder):
    for kind in (Block, Even):
        for dtype in (torch.float32, torch.bfloat16):
            student, teacher, whole, single = pair(kind, dtype, meta=kind is Block)
            for step in range(STEPS):
                move(student, whole, step)
                teacher.update()
                single.update()
            assert_same_teachers(teacher, single)
            assert teacher.module.head.weight is teacher.module.embed.weight


@on_ranks(1, 2)
def test_a_measured_distance_is_that_of_the_whole_model(folder):
    for dtype in (torch.float32, torch.bfloat16):
        student, teacher, whole, single = pair(dtype=dtype, kernel="gap(0.5)")
        for step in range(STEPS):
            move(student, whole, step)
            with CommDebugMode() as comm:
                teacher.update()
            # All tensors are sharded alike; a single rank has nobody to ask.
            assert comm.get_total_counts() == int(torch.distributed.get_world_size() > 1)
            single.update()
        weights = torch.tensor(teacher.trajectory_weights())
        torch.testing.assert_close(weights, torch.tensor(single.trajectory_weights()), rtol=1e-5, atol=1e-6)
        everyone = [torch.zeros_like(weights) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather_object(everyone, weights)
        assert all(torch.equal(theirs, weights) for theirs in everyone)
        ours, theirs = whole_state(teacher), single.state_dict()
        for key in ours.keys() - {"_extra_state"}:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=1e-5, msg=key)
            assert key.startswith("module.") or torch.equal(ours[key], theirs[key])
        other, resumed, _, _ = pair(dtype=dtype, kernel="gap(0.5)", meta=False)
        with torch.no_grad():
            for p in other.parameters():
                p.mul_(2)
        resumed.load_state_dict(teacher.state_dict())
        for each in (teacher, resumed):
            each.set_total_steps(STEPS + 1)
        with torch.no_grad():
            for p in student.parameters():
                p.add_(1)
        teacher.update()
        resumed.update(student)
        assert (resumed.trajectory_weights() == teacher.trajectory_weights()).all()


@on_ranks(1, 2)
def test_a_split_average_is_sharded_too(folder):
    torch.manual_seed(0)
    whole = Block().to(device(), torch.bfloat16)
    student = shard(copy.deepcopy(whole))
    teacher = WMATeacher(
        student, "uniform", dtype="split", module_factory=lambda: shard(Block().to(device(), torch.bfloat16))
    )
    single = WMATeacher(whole, "uniform", dtype="split")
    for step in range(STEPS):
        move(student, whole, step)
        teacher.update()
        single.update()
    assert_same_teachers(teacher, single)


@on_ranks(2, 4)
def test_an_update_issues_no_collective(folder):
    for dtype in (torch.float32, torch.bfloat16):
        student, teacher, whole, _ = pair(dtype=dtype)
        teacher(tokens())
        with CommDebugMode() as comm:
            for step in range(3):
                move(student, whole, step)
                teacher.update()
        assert comm.get_total_counts() == 0
        with CommDebugMode() as comm:
            teacher(tokens())
        assert comm.get_total_counts() > 0  # the mode does see FSDP's


@on_ranks(1, 2, 4)
def test_training_forward_and_attach(folder):
    """A real loop: the teacher's forward is that of its own average, at every step."""
    student, teacher, whole, single = pair(kernel="beta(0.5,0.5)")
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    teacher.attach(optimizer)
    student.train()
    for step in range(STEPS):
        before = teacher(tokens())
        assert all(isinstance(p, DTensor) for p in teacher.module.parameters())
        student(tokens()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        student.eval()
        with torch.no_grad():
            student(tokens())  # leaves the root gathered
        student.train()
        assert teacher.step == step + 1
        full = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in student.state_dict().items()}
        whole.load_state_dict(full)
        single.update()
        assert_same_teachers(teacher, single)
        torch.testing.assert_close(teacher(tokens()), single(tokens()))
        assert not torch.equal(before, teacher(tokens()))
    assert not teacher(tokens()).requires_grad


@on_ranks(1, 2)
def test_mixed_precision(folder):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    student, teacher, whole, single = pair(LayerNormed, mp_policy=policy)
    student.eval()
    assert torch.equal(teacher(tokens()), student(tokens()))
    assert teacher(tokens()).dtype == torch.bfloat16
    move(student, whole, 0)
    teacher.update()
    single.update()
    assert_same_teachers(teacher, single)
    torch.testing.assert_close(teacher(tokens()).float(), single(tokens()), rtol=0.1, atol=0.1)


@on_ranks(1, 2, 4)
def test_swap_and_copy_to(folder):
    student, teacher, whole, single = pair()
    student.eval()
    student(tokens())
    for step in range(2):
        move(student, whole, step)
        teacher.update()
        single.update()
    own = student(tokens())
    student.reshard()
    before = [p.to_local().clone() for p in student.parameters()]
    student(tokens())
    with torch.no_grad(), teacher.swap():
        averaged = student(tokens())
        assert torch.equal(averaged, teacher(tokens()))
        with teacher.swap():
            assert torch.equal(student(tokens()), averaged)
        with pytest.raises(RuntimeError, match="state_dict"):
            student.state_dict()
    assert not torch.equal(own, averaged)  # and now it is in shards again
    assert all(torch.equal(a, p.to_local()) for a, p in zip(before, student.parameters(), strict=True))
    assert torch.equal(student(tokens()), own)
    with pytest.raises(IndexError), torch.no_grad(), teacher.swap():
        student(tokens())[100]
    assert torch.equal(student(tokens()), own)
    with pytest.raises(RuntimeError, match="were written inside swap"), torch.no_grad(), teacher.swap():
        next(student.parameters()).mul_(2)
    teacher.copy_to(student)
    assert torch.equal(student(tokens()), averaged)


@on_ranks(1, 2, 4)
def test_gaps_are_those_of_the_whole_model(folder):
    student, teacher, whole, single = pair()
    move(student, whole, 0)
    teacher.update()
    single.update()
    torch.testing.assert_close(parameter_gap(teacher), parameter_gap(single))
    torch.testing.assert_close(module_gaps(teacher), module_gaps(single))


@on_ranks(1, 2)
def test_what_runs_in_python_does_not_grow_with_the_number_of_tensors(folder):
    import gc
    import sys

    counts = []
    for layers in (3, 60):

        def build(layers=layers):
            return fully_shard(nn.Sequential(*(nn.Linear(4, 4) for _ in range(layers))).to(device()))

        teacher = WMATeacher(build(), "ema(0.9)", module_factory=build)
        teacher.update()
        count = 0

        def profile(frame, event, argument):
            nonlocal count
            count += event in ("call", "c_call")

        gc.collect()
        gc.disable()
        sys.setprofile(profile)
        try:
            teacher.update()
        finally:
            sys.setprofile(None)
            gc.enable()
        counts.append(count)
    assert counts[0] == counts[1] < 200, counts


@on_ranks(1, 2)
def test_frozen_parameters_are_shared_where_shards_are_even(folder):
    def build():
        torch.manual_seed(0)
        model = Even().to(device())
        model.layers.requires_grad_(False)
        return shard(model)

    student = build()
    teacher = WMATeacher(student, "uniform", module_factory=build)
    student.eval()
    assert teacher.module.layers[0].weight is student.layers[0].weight
    assert not any("layers" in key for key in teacher.state_dict())
    assert torch.equal(teacher(tokens()), student(tokens()))
    with torch.no_grad():
        student.layers[0].weight.mul_(2)
    teacher.update()
    assert torch.equal(teacher(tokens()), student(tokens()))


@on_ranks(1, 2)
def test_unfrozen_parameters_are_averaged_from_the_value_that_they_had(folder):
    def build():
        torch.manual_seed(0)
        model = Even().to(device())
        model.layers.requires_grad_(False)
        return shard(model)

    student = build().eval()
    teacher = WMATeacher(student, "uniform", module_factory=build)
    before = teacher(tokens())
    student.requires_grad_(True)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    starts = {name: p.full_tensor().detach().clone() for name, p in student.named_parameters()}
    student(tokens()).sum().backward()
    optimizer.step()
    assert torch.equal(teacher(tokens()), before)
    teacher.update()
    assert teacher.roles.shared == ()
    state = teacher.averaged_state_dict()
    for name, parameter in student.named_parameters():
        expected = (starts[name] + parameter.full_tensor()) / 2
        torch.testing.assert_close(state[name].full_tensor(), expected)
        assert not torch.equal(starts[name], expected), name
    whole = Even().to(device())
    whole.load_state_dict({k: getattr(v, "full_tensor", v.clone)() for k, v in state.items()})
    torch.testing.assert_close(teacher(tokens()), whole.eval()(tokens()))


@on_ranks(2, 4)
def test_uneven_frozen_parameters_are_not_shared(folder):
    def build():
        model = Block().to(device())
        model.layers.requires_grad_(False)
        return shard(model)

    student = build()
    with pytest.raises(
        ValueError, match=r"frozen 'layers.0.weight' of shape \(5, 5\) is sharded .*frozen='copy'"
    ):
        WMATeacher(student, "uniform", module_factory=build)
    teacher = WMATeacher(student, "uniform", module_factory=build, frozen="copy")
    teacher.update()
    student.eval()
    assert torch.equal(teacher(tokens()), student(tokens()))


@on_ranks(1, 2)
def test_the_shard_that_the_first_forward_replaces_is_followed(folder):
    """FSDP2 pads uneven shards, in new memory, when it first runs."""
    student, teacher, whole, single = pair()
    teacher.update()
    single.update()
    for _ in range(2):
        student(tokens())
        teacher(tokens())
        move(student, whole, 1)
        teacher.update()
        single.update()
    for (name, ours), theirs in zip(
        teacher.module.named_parameters(), single.module.parameters(), strict=True
    ):
        assert torch.equal(ours.full_tensor(), theirs), name


@on_ranks(1, 2)
def test_a_full_state_is_refused_before_anything_is_written(folder):
    _, teacher, _, single = pair()
    before = whole_state(teacher)
    with pytest.raises(ValueError, match=r"'module.embed.weight' is not sharded, the teacher's is sharded"):
        teacher.load_state_dict(single.state_dict())
    after = whole_state(teacher)
    assert all(torch.equal(v, after[k]) for k, v in before.items() if k != "_extra_state")


@on_ranks(1, 2)
def test_resuming_from_the_sharded_state_is_bit_identical(folder):
    for dtype in (torch.float32, torch.bfloat16):
        student, teacher, whole, single = pair(dtype=dtype)
        move(student, whole, 0)
        teacher.update()
        single.update()
        state = copy.deepcopy(teacher.state_dict())
        resumed = WMATeacher(
            student,
            "uniform",
            STEPS,
            module_factory=lambda dtype=dtype: shard(Block().to(device(), dtype)),
        )
        resumed.load_state_dict(state)
        for step in range(1, 4):
            move(student, whole, step)
            resumed.update()
            single.update()
        assert_same_teachers(resumed, single)


@on_ranks(1, 2)
def test_what_cannot_be_averaged_says_so(folder):
    torch.manual_seed(0)
    student = shard(Block().to(device()))
    with pytest.raises(
        ValueError,
        match="sharded by fully_shard, which prevents deep copies: pass module_factory=FACTORY",
    ):
        WMATeacher(student, "uniform")
    with pytest.raises(
        ValueError, match=r"student's 'embed.weight' is sharded \(.*the teacher's is not sharded: shard both"
    ):
        WMATeacher(student, "uniform", module_factory=lambda: Block().to(device()))
    teacher = WMATeacher(student, "uniform", module_factory=lambda: shard(Block().to(device())))
    with pytest.raises(ValueError, match="student's 'embed.weight' is not sharded, the teacher's is sharded"):
        teacher.update(Block().to(device()))
    assert teacher.step == 0
    with pytest.raises(ValueError, match="is not sharded, the teacher's is sharded"):
        teacher.copy_to(Block().to(device()))
    if device().type == "cuda" or torch.distributed.get_world_size() > 1:
        flat = FullyShardedDataParallel(Block().to(device()), device_id=device())
        with pytest.raises(ValueError, match=r"FSDP1.*fully_shard instead"):
            WMATeacher(flat, "uniform")
        with pytest.raises(ValueError, match=r"FSDP1.*fully_shard instead"):
            WMATeacher(nn.Sequential(flat), "uniform")


@on_ranks(2)
def test_another_placement_is_another_sharding(folder):
    from torch.distributed.tensor import Shard

    def build(dim):
        return fully_shard(nn.Linear(4, 4, bias=False).to(device()), shard_placement_fn=lambda p: Shard(dim))

    with pytest.raises(ValueError, match=r"'weight' is sharded \(S.*0.*the teacher's is sharded \(S.*1"):
        WMATeacher(build(0), "uniform", module_factory=lambda: build(1))
    student = build(1)
    teacher = WMATeacher(student, "ema(0.5)", module_factory=lambda: build(1))
    with torch.no_grad():
        student.weight.zero_()
    before = teacher.module.weight.full_tensor()
    teacher.update()
    assert torch.equal(teacher.module.weight.full_tensor(), before / 2)


@on_ranks(1, 2)
def test_a_shard_that_is_not_finite_counts_on_every_rank(folder):
    for policy in ("skip", "raise"):
        torch.manual_seed(0)
        student = shard(Block().to(device()))
        teacher = WMATeacher(
            student, "uniform", 5, nonfinite=policy, module_factory=lambda: shard(Block().to(device()))
        )
        before = copy.deepcopy(teacher.averaged_state_dict(full=True))
        name, parameter = next((n, p) for n, p in student.named_parameters() if p.to_local().dim() > 1)
        if torch.distributed.get_rank() == 0:
            parameter.to_local().detach().view(-1)[0] = torch.nan
        kind = pytest.raises(RuntimeError, match=name) if policy == "raise" else pytest.warns(match=name)
        with kind:
            teacher.update()
            assert teacher.skipped == (1,)
        assert teacher.skipped == (1,)
        after = teacher.averaged_state_dict(full=True)
        assert all(torch.equal(after[key], before[key]) for key in before)


@on_ranks(2)
def test_a_sharded_teacher_normalises_and_recalibrates_as_one_in_one_piece(folder):
    student, teacher, whole, reference = pair(mode="train")
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for step in range(2):
        for model, average in ((student, teacher), (whole, reference)):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.1 * (step + 1))
            average.update()
        torch.testing.assert_close(teacher(tokens()), reference(tokens()))
    for statistic in ("running_mean", "running_var"):
        own, held = getattr(teacher.module.norm, statistic), getattr(student.norm, statistic)
        torch.testing.assert_close(own, getattr(reference.module.norm, statistic))
        assert not torch.equal(own, held)
    state = copy.deepcopy(teacher.state_dict())
    recalibrate(teacher, [tokens(), tokens(rank + 3)])
    everyones = [tokens(shift) for shift in [*range(size), *(r + 3 for r in range(size))]]
    torch.optim.swa_utils.update_bn(everyones, reference)
    for statistic in ("running_mean", "running_var"):
        expected = getattr(reference.module.norm, statistic)
        torch.testing.assert_close(getattr(teacher.module.norm, statistic), expected)
    assert all(isinstance(p, DTensor) for p in teacher.module.parameters())
    teacher.load_state_dict(state)
    assert torch.equal(teacher.module.norm.running_mean, state["module.norm.running_mean"])
