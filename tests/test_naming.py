"""Teachers, states and averages of models that are wrapped in different ways, before or after."""

import copy

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

from wmateacher import WMATeacher, distributed, migration, naming, pairing
from wmateacher.posthoc import Recorder, average_checkpoints, interpolate, model_stock, synthesise


class Net(nn.Module):
    """A model with an attribute of its own that is called `module`, tied weights, and entries of other kinds."""

    def __init__(self):
        super().__init__()
        self.module = nn.Linear(3, 3)
        self.body = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.head = nn.Linear(3, 3)
        self.head.weight = self.module.weight

    def forward(self, x):
        return self.head(self.body(self.module(x)))

    def get_extra_state(self):
        return {"seen": 3}

    def set_extra_state(self, state):
        assert state == {"seen": 3}


def inside(*wraps):
    """Wrap the submodules `body` and `module`."""

    def apply(model):
        for wrap in wraps:
            model.body, model.module = wrap(model.body), wrap(model.module)
        return model

    return apply


def leaf(model):
    model.body[0] = nn.DataParallel(torch.compile(model.body[0]))
    return model


WRAPS = {
    "plain": lambda model: model,
    "compile": torch.compile,
    "DataParallel": nn.DataParallel,
    "checkpoint": checkpoint_wrapper,
    "DataParallel of compile": lambda model: nn.DataParallel(torch.compile(model)),
    "compile inside": inside(torch.compile),
    "DataParallel inside": inside(nn.DataParallel),
    "checkpoint inside": inside(checkpoint_wrapper),
    "compile of checkpoint inside": inside(checkpoint_wrapper, torch.compile),
    "checkpoint of DataParallel inside": inside(nn.DataParallel, checkpoint_wrapper),
    "a leaf inside a compiled body, all in one": lambda model: nn.DataParallel(
        inside(torch.compile)(leaf(model))
    ),
}
NAMES = list(naming.canonical(Net(), Net().state_dict()))
wrapped = pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)


def trained(wrap=WRAPS["plain"], steps=3):
    """A wrapped student and its teacher after some steps, which are the same for every wrapping."""
    torch.manual_seed(0)
    student = wrap(Net())
    teacher = WMATeacher(student, "uniform", 10)
    for _ in range(steps):
        move(student)
        teacher.update(student)
    return student, teacher


def move(student):
    with torch.no_grad():
        for tensor in pairing.tensors(pairing.unwrap(student)).values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand(tensor.shape))


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(value, other[key]) if torch.is_tensor(value) else value == other[key], key


@pytest.fixture(scope="module")
def plain():
    return trained()


@wrapped
def test_names_are_those_of_the_plain_model(wrap):
    model = wrap(Net())
    assert list(pairing.tensors(pairing.unwrap(model))) == list(pairing.tensors(Net()))
    assert set(naming.canonical(model, model.state_dict()).values()) == set(NAMES)
    assert {naming.saved_key(model, name) for name in NAMES} == set(model.state_dict())


@wrapped
def test_a_state_does_not_depend_on_the_wrapping_and_every_teacher_reads_it(wrap, plain):
    _, teacher = trained(wrap)
    expected = plain[1].state_dict()
    assert_equal(teacher.state_dict(), expected)
    fresh = WMATeacher(wrap(Net()), "uniform", 10)
    for options in ({}, {"assign": True}, {"strict": False}):
        fresh.load_state_dict(expected, **options)
        assert_equal(fresh.state_dict(), expected)


@wrapped
def test_a_state_with_a_wrappers_names_is_read(wrap, plain):
    """An earlier version wrote the names of nested wrappers."""
    model = wrap(Net())
    state = plain[1].state_dict()
    for name in NAMES:
        state[f"module.{naming.load_keys(model, name)[0]}"] = state.pop(f"module.{name}")
    fresh = WMATeacher(Net(), "uniform", 10)
    fresh.load_state_dict(state)
    assert_equal(fresh.state_dict(), plain[1].state_dict())


@wrapped
def test_a_student_may_be_wrapped_after_its_teacher_was_built(wrap, plain):
    torch.manual_seed(0)
    student = Net()
    teacher = WMATeacher(student, "uniform", 10)
    model = wrap(student)
    for _ in range(3):
        move(student)
        teacher.update(model)
    assert_equal(teacher.state_dict(), plain[1].state_dict())


@wrapped
def test_the_student_reads_its_average(wrap, plain):
    student, teacher = trained(wrap)
    average = teacher.averaged_state_dict()
    student = pairing.unwrap(student)
    assert average.keys() == student.state_dict().keys()
    student.load_state_dict(average)
    expected = plain[1].averaged_state_dict()
    names = naming.canonical(student, average)
    assert_equal({names[key]: value for key, value in average.items()}, expected)


@wrapped
def test_averages_are_written_into_models_that_are_wrapped_otherwise(wrap, plain):
    teacher, model = plain[1], wrap(Net())
    own = copy.deepcopy(pairing.tensors(pairing.unwrap(model)))
    expected = pairing.tensors(teacher.module)
    with teacher.swap(model):
        assert_equal(pairing.tensors(pairing.unwrap(model)), expected)
    assert_equal(pairing.tensors(pairing.unwrap(model)), own)
    teacher.copy_to(model)
    assert_equal(pairing.tensors(pairing.unwrap(model)), expected)


@wrapped
def test_averages_of_any_wrapping_are_continued(wrap, plain):
    average = {
        k: v + 1 if v.is_floating_point() else v
        for k, v in plain[1].averaged_state_dict().items()
        if torch.is_tensor(v)
    }
    model = Net()
    model.load_state_dict(average, strict=False)
    for state in (wrap(model).state_dict(), AveragedModel(copy.deepcopy(model)).module.state_dict()):
        teacher = WMATeacher(Net(), "uniform", 10)
        teacher.load_average(state, 2)
        assert_equal({k: v for k, v in teacher.averaged_state_dict().items() if torch.is_tensor(v)}, average)
    averaged = AveragedModel(Net())
    averaged.module = wrap(Net())
    averaged.n_averaged += 4
    teacher = WMATeacher(wrap(Net()), "uniform", 10)
    migration.load(teacher, averaged.state_dict())
    assert torch.equal(
        pairing.tensors(teacher.module)["body.0.weight"],
        pairing.tensors(pairing.unwrap(averaged.module))["body.0.weight"],
    )


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("nested", [False, True])
def test_ddp_students(plain, nested, group):
    ddp = nn.parallel.DistributedDataParallel
    student, teacher = trained(inside(ddp) if nested else ddp)
    assert_equal(teacher.state_dict(), plain[1].state_dict())
    pairing.unwrap(student).load_state_dict(teacher.averaged_state_dict())
    other = WMATeacher(Net(), "uniform", 10)
    other.load_average(student.state_dict(), 3)
    expected = plain[1].averaged_state_dict()
    assert_equal(dict(other.averaged_state_dict()), expected)


@pytest.mark.filterwarnings("ignore:torch.distributed is .* assuming the intent is to")
def test_a_distributed_checkpoint_with_a_wrappers_names_is_read(tmp_path):
    model, ours = (nn.Sequential(nn.Linear(3, 3)) for _ in range(2))
    teacher = WMATeacher(model, "uniform", 10)
    teacher.update()
    state = {k.replace("0.", "0._orig_mod."): v for k, v in teacher.state_dict().items()}
    checkpoint.save({"teacher": state}, checkpoint_id=tmp_path, no_dist=True)
    fresh = WMATeacher(ours, "uniform", 10)
    distributed.load(fresh, tmp_path, no_dist=True)
    assert_equal(fresh.state_dict(), teacher.state_dict())


def test_a_teacher_that_was_compiled_as_a_whole_is_read(plain):
    fresh = WMATeacher(Net(), "uniform", 10)
    fresh.load_state_dict(torch.compile(plain[1]).state_dict())
    assert_equal(fresh.state_dict(), plain[1].state_dict())


def tensors_of(state):
    return {k: v for k, v in state.items() if torch.is_tensor(v)}


@wrapped
def test_checkpoints_are_averaged_by_name_whatever_wrapped_them(wrap):
    torch.manual_seed(1)
    one, two = Net(), Net()
    expected = average_checkpoints([tensors_of(one.state_dict()), tensors_of(two.state_dict())])
    states = [tensors_of(one.state_dict()), tensors_of(wrap(two).state_dict())]
    assert_equal(average_checkpoints(states), expected)
    assert_equal(average_checkpoints(states[::-1]), expected)
    assert_equal(interpolate(*states, 0.5), expected)
    assert model_stock(states[0], states).keys() == expected.keys()


def test_a_prefix_that_all_checkpoints_share_may_be_the_models_own():
    states = [{"module.w": torch.zeros(1)}, {"module.w": torch.ones(1)}]
    assert list(average_checkpoints(states)) == ["module.w"]
    states = [{"_orig_mod.w": torch.zeros(1)}, {"_orig_mod.w": torch.ones(1)}]
    assert list(average_checkpoints(states)) == ["w"]
    states = [{"_orig_mod.w": torch.zeros(1), "_orig_mod._extra_state": {"seen": 3}}] * 2
    assert average_checkpoints(states)["_extra_state"] == {"seen": 3}


def test_a_recording_does_not_depend_on_the_wrapping(tmp_path):
    results = []
    for i, name in enumerate(("plain", "checkpoint inside", "DataParallel inside")):
        torch.manual_seed(0)
        student = WRAPS[name](Net())
        recorder = Recorder(student, 6, folder=tmp_path / str(i), every=2)
        for _ in range(6):
            move(student)
            recorder.update()
        results.append(synthesise(tmp_path / str(i), "uniform")[0])
    for result in results[1:]:
        assert_equal(result, results[0])


KEYS = {
    "the user's own module": (["module.module.w", "module.w"], ["module.w", "w"], ["module.w", "w"]),
    "only the user's own module": (["module.module.w"], ["module.w"], ["module.w"]),
    "as it is": (["module.w", "w"], ["module.w", "w"], ["module.w", "w"]),
    "wrapped inside, twice": (["a.module._orig_mod.w", "b.w"], ["a.w", "b.w"], ["a.w", "b.w"]),
    "wrapped on the other side": (["a.module.w"], ["a.module.module.w"], ["a.module.module.w"]),
    "a name that only looks like it": (["a.modules.w"], ["a.w"], [None]),
    "ambiguous": (["a.module.w", "a.w"], ["a.w"], [None, "a.w"]),
    "a part": (["module.a.w"], ["a.w", "b.w"], ["a.w"]),
}


@pytest.mark.parametrize(("keys", "names", "expected"), KEYS.values(), ids=KEYS)
def test_keys_are_paired_with_names_only_where_that_is_unambiguous(keys, names, expected):
    found = naming.resolve(keys, names)
    assert [found.get(key) for key in keys] == expected
