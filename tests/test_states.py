"""Loading: completely or not at all, from whatever is passed."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from wmateacher import WMATeacher, migration
from wmateacher.posthoc import Recorder


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 2)


def trained(steps, kernel="uniform", total=10):
    student = Net()
    teacher = WMATeacher(student, kernel, total, buffers="average")
    for _ in range(steps):
        with torch.no_grad():
            for tensor in (*student.parameters(), student.norm.running_mean):
                tensor.add_(torch.rand(tensor.shape))
            student.norm.num_batches_tracked.add_(1)
        teacher.update()
    return teacher


def everything(teacher):
    """What a load may change."""
    return copy.deepcopy(
        [teacher.state_dict(), teacher.omega, teacher.step, list(teacher.trajectory_weights())]
    )


def assert_same(one, other):
    assert one[1:] == other[1:]
    for key, value in one[0].items():
        same = torch.equal(value, other[0][key]) if torch.is_tensor(value) else value == other[0][key]
        assert same, key


def with_(**entries):
    return lambda good: good | {key.replace("__", "."): value for key, value in entries.items()}


def clock(**entries):
    return lambda good: good | {"_extra_state": good["_extra_state"] | entries}


BAD = {
    "the last tensor has another shape": (with_(module__head__bias=torch.zeros(3)), r"'module.head.bias' has shape \(3,\) there and \(2,\) here"),
    "integers for weights": (with_(module__head__bias=torch.zeros(2, dtype=torch.int64)), "'module.head.bias' is torch.int64 there and torch.float32 here"),
    "weights for integers": (with_(module__norm__num_batches_tracked=torch.tensor(3.0)), "is torch.float32 there and torch.int64 here"),
    "a mask for weights": (with_(module__head__bias=torch.zeros(2, dtype=torch.bool)), "is torch.bool there and"),
    "complex for real": (with_(module__norm__running_mean=torch.zeros(4, dtype=torch.complex64)), "is torch.complex64 there"),
    "a list for a tensor": (with_(module__head__bias=[0.0, 0.0]), "'module.head.bias' is a list there and a tensor here"),
    "None for a tensor": (with_(module__norm__running_var=None), "'module.norm.running_var' is a NoneType there"),
    "no values": (with_(module__head__bias=torch.zeros(2, device="meta")), "'module.head.bias' is on the meta device"),
    "an unknown name": (with_(module__tail=torch.zeros(2)), "unexpected 'module.tail'"),
    "an unknown name beside the module": (with_(tail=torch.zeros(2)), "unexpected 'tail'"),
    "no omega": (lambda good: good | {"_extra_state": {k: v for k, v in good["_extra_state"].items() if k != "omega"}}, "omega must be a weight in \\[0, 1\\], got None"),
    "an omega of NaN": (clock(omega=float("nan")), "omega must be a weight in \\[0, 1\\], got nan"),
    "an omega that is text": (clock(omega="0.5"), "omega must be a weight in \\[0, 1\\], got '0.5'"),
    "a clock that is a tensor": (with_(_extra_state=torch.zeros(3)), "holds no clock"),
    "the student": (lambda good: Net().state_dict(), "To start an average from plain weights, load them into the student"),
    "another library's average": (lambda good: AveragedModel(Net()).state_dict(), "use wmateacher.migration.load"),
    "a checkpoint with a teacher in it": (lambda good: {"teacher." + k: v for k, v in good.items()}, "There is one under 'teacher.'"),
    "an optimizer": (lambda good: torch.optim.Adam(Net().parameters()).state_dict(), "holds no clock"),
    "numbers for names": (lambda good: dict(enumerate(good.values())), "holds no clock"),
}  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"assign": True}, {"strict": False}], ids=str)
@pytest.mark.parametrize(("spoil", "message"), BAD.values(), ids=BAD)
def test_a_load_that_fails_changes_nothing(spoil, message, options):
    teacher, good = trained(2), trained(5).state_dict()
    before = everything(teacher)
    with pytest.raises(ValueError, match=message):
        teacher.load_state_dict(spoil(good), **options)
    assert_same(everything(teacher), before)
    teacher.load_state_dict(good, **options)
    assert teacher.step == 5


def test_an_entry_of_a_submodule_that_is_missing_is_noticed_before_anything_is_written():
    class Counting(nn.Linear):
        def get_extra_state(self):
            return {"seen": 1}

        def set_extra_state(self, state):
            pass

    teacher, other = (WMATeacher(nn.Sequential(Counting(2, 2)), "ema(0.9)") for _ in range(2))
    state = other.state_dict()
    del state["module.0._extra_state"]
    before = everything(teacher)
    with pytest.raises(ValueError, match="missing 'module.0._extra_state'"):
        teacher.load_state_dict(state)
    assert_same(everything(teacher), before)


AVERAGES = {
    "another shape": ({"head.bias": torch.zeros(3)}, "'head.bias' has shape"),
    "integers": ({"body.weight": torch.zeros(4, 3, dtype=torch.int32)}, "'body.weight' is torch.int32 there"),
    "numbers": ({"head.bias": 0.0}, "'head.bias' is a float there"),
    "an unknown name": ({"tail": torch.zeros(1)}, "unexpected 'tail'"),
}


@pytest.mark.parametrize(("changes", "message"), AVERAGES.values(), ids=AVERAGES)
def test_an_average_that_does_not_fit_changes_nothing(changes, message):
    teacher = trained(2)
    before = everything(teacher)
    with pytest.raises(ValueError, match=message):
        teacher.load_average(Net().state_dict() | changes, 4)
    with pytest.raises(ValueError, match="total_steps=10, got 11"):
        teacher.load_average(Net().state_dict(), 11)
    assert_same(everything(teacher), before)


FOREIGN = {
    "a module": (nn.Linear(2, 2), "state must be a state dict"),
    "a path": ("ema.pt", "state must be a state dict"),
    "a teacher": (trained(1).state_dict(), "a WMATeacher's own state: .*load_state_dict"),
    "no count": ({"n_averaged": None, "module.w": torch.zeros(1)}, "of torch is incomplete or damaged"),
    "diffusers without its decay": ({"shadow_params": [], "optimization_step": 3}, "of diffusers is incomplete or damaged"),
    "Lightning without its count": ({"averaging_state": {}, "state_dict": {}}, "of lightning is incomplete or damaged"),
    "ema-pytorch with a text": ({"initted": True, "step": "last"}, "of ema-pytorch is incomplete or damaged"),
    "diffusers with numbers for weights": (
        {"shadow_params": [1.0] * 6, "optimization_step": 3, "decay": 0.9, "use_ema_warmup": False, "inv_gamma": 1.0, "power": 0.75, "min_decay": 0.0, "update_after_step": 0},
        "of diffusers is damaged: a float is among its weights",
    ),
    "timm without weights": ({"state_dict_ema": None}, "of timm has no weights: a NoneType is in their place"),
    "something else": ({"epoch": 3}, "'epoch' belongs to none of the known libraries"),
}  # fmt: skip


@pytest.mark.parametrize(("state", "message"), FOREIGN.values(), ids=FOREIGN)
def test_states_that_migration_cannot_read(state, message):
    teacher = trained(2)
    before = everything(teacher)
    with pytest.raises((ValueError, TypeError), match=message):
        migration.load(teacher, state, 3)
    assert_same(everything(teacher), before)


def test_a_recorder_whose_second_state_does_not_fit_keeps_both(tmp_path):
    def recorder(steps):
        model = nn.Linear(2, 2)
        made = Recorder(model, 10, folder=tmp_path / str(steps), every=20)
        for _ in range(steps):
            with torch.no_grad():
                model.weight.add_(1)
            made.update()
        return made

    one, state = recorder(2), recorder(5).state_dict()
    before = [everything(teacher) for teacher in one.teachers]
    spoilt = copy.deepcopy(state)
    list(spoilt["teachers"].values())[1]["module.bias"] = torch.zeros(3)
    for bad in (spoilt, {}, {"teachers": None}, [state]):
        with pytest.raises(ValueError, match="has shape|was recorded with kernels none"):
            one.load_state_dict(bad)
        for teacher, own in zip(one.teachers, before, strict=True):
            assert_same(everything(teacher), own)
    one.load_state_dict(state)
    assert one.step == 5


# --- averages that were made elsewhere ------------------------------------------------------------------


def test_a_given_average_of_a_parameter_that_is_frozen_now_is_taken():
    student = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    average = {name: value + 1 for name, value in student.state_dict().items()}
    average["0.bias"] = student[0].bias.detach().clone()
    student[0].requires_grad_(False)
    teacher = WMATeacher(student, "uniform", 10)
    teacher.load_average(average, 4)
    assert teacher.roles.shared == ("0.bias",)
    for name, value in teacher.averaged_state_dict().items():
        assert torch.equal(value, average[name]), name
    frozen = {name: value for name, value in average.items() if not name.startswith("0")}
    again = WMATeacher(student, "uniform", 10)
    again.load_average(frozen, 4)  # what is frozen may be missing
    assert again.module[0].weight is student[0].weight


class TiedModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight


def test_of_tied_tensors_one_is_enough_and_two_must_agree():
    student = TiedModel()
    teacher = WMATeacher(student, "uniform", 10)
    average = {"embed.weight": student.embed.weight.detach() + 1}
    teacher.load_average(average, 3)
    assert torch.equal(teacher.module.head.weight, average["embed.weight"])
    with pytest.raises(ValueError, match="'embed.weight' and 'head.weight' are one tensor .*not tied"):
        teacher.load_average({**average, "head.weight": average["embed.weight"] + 1}, 3)
    state = copy.deepcopy(teacher.state_dict())
    state["module.head.weight"] = state["module.head.weight"] + 1
    with pytest.raises(ValueError, match="are one tensor in this model and have different values"):
        teacher.load_state_dict(state)


def test_a_given_average_with_nan_is_refused_where_nan_is_kept_out():
    student = nn.Linear(2, 2)
    average = {name: value * torch.nan for name, value in student.state_dict().items()}
    for policy in ("skip", "raise"):
        with pytest.raises(ValueError, match=f"NaN .* in 'weight', 'bias', which nonfinite='{policy}'"):
            WMATeacher(student, "uniform", 10, nonfinite=policy).load_average(average, 3)


@pytest.mark.parametrize("field", ["shared", "unfrozen", "changed_buffers"])
def test_a_damaged_list_in_a_state_is_named(field):
    teacher = WMATeacher(nn.Linear(2, 2), "uniform", 10)
    state = copy.deepcopy(teacher.state_dict())
    state["_extra_state"][field] = 5
    with pytest.raises(ValueError, match=f"damaged: {field} is 5, not a list"):
        teacher.load_state_dict(state)
