import pytest
import torch
from torch import nn

from wmateacher import pairing


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("cache", torch.zeros(2), persistent=False)


def roles(model=None, **changes):
    return pairing.assign(model or Tied(), **{"buffers": "copy", "frozen": "share", **changes})


BUFFERS = ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked", "cache")
PARAMETERS = ("embed.weight", "norm.weight", "norm.bias")


def test_tied_tensors_have_one_role_and_buffers_are_copied():
    assert (roles().averaged, roles().kept, roles().shared) == (PARAMETERS, (), ())
    assert set(roles().copied) == set(BUFFERS)


def test_averaged_buffers_are_the_floating_ones_that_a_checkpoint_holds():
    assert set(roles(buffers="average").averaged) == {*PARAMETERS, "norm.running_mean", "norm.running_var"}
    assert set(roles(buffers="average").copied) == {"norm.num_batches_tracked", "cache"}


def test_kept_buffers():
    assert set(roles(buffers="keep").kept) == set(BUFFERS)
    assert roles(buffers="keep").copied == ()


def test_frozen_parameters_are_shared_or_averaged():
    model = Tied()
    model.embed.requires_grad_(False)
    assert roles(model).shared == ("embed.weight",)
    assert roles(model).averaged == ("norm.weight", "norm.bias")
    assert roles(model, frozen="copy").shared == ()
    assert roles(model, frozen="copy").averaged == PARAMETERS


def test_unfrozen_parameters_are_averaged_or_copied_if_excluded():
    model = Tied()
    model.requires_grad_(False)
    frozen = roles(model, exclude=["norm.bias"])
    assert (frozen.averaged, frozen.excluded) == ((), ("norm.bias",))
    unfrozen = frozen.unfreeze({"norm.weight": model.norm.weight, "norm.bias": model.norm.bias})
    assert unfrozen.averaged == ("norm.weight",)
    assert "norm.bias" in unfrozen.copied
    assert unfrozen.shared == ("embed.weight",)
    assert set(unfrozen.share(["norm.weight", "norm.bias"]).shared) == set(PARAMETERS)


def test_freezing_and_unfreezing_keeps_a_binding():
    """GAN training freezes and unfreezes thousands of parameters at every step."""
    model = Tied()
    binding = pairing.Binding(model)
    model.requires_grad_(False)
    assert binding.is_current()


def test_excluded_tensors_are_copied_whatever_the_buffer_policy():
    for buffers in pairing.BUFFERS:
        assigned = roles(buffers=buffers, exclude=["norm.*"])
        assert {"norm.weight", "norm.bias", "norm.running_mean"} <= set(assigned.copied)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"buffers": "sync"}, ValueError, "unknown buffers policy 'sync'; available: average, copy, keep"),
        ({"frozen": True}, ValueError, "unknown frozen policy True; available: copy, share"),
        ({"exclude": ["nrm.*"]}, ValueError, r"pattern 'nrm.\*' matches no tensor; .*available: cache"),
        ({"exclude": "norm.*"}, TypeError, "exclude must be a sequence of patterns, got the string"),
    ],
)
def test_bad_policies(changes, error, message):
    with pytest.raises(error, match=message):
        roles(**changes)


def test_wrappers_are_seen_through():
    model = Tied()
    assert pairing.unwrap(nn.DataParallel(torch.compile(model))) is model
    model.head = torch.compile(model.head)
    assert "head.weight" not in pairing.tensors(model)  # tied
    model.extra = torch.compile(nn.Linear(2, 2))
    assert {"extra.weight", "extra.bias"} <= set(pairing.tensors(model))


def test_a_student_that_differs_is_an_error_that_names_the_tensors():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    ours = pairing.tensors(model)
    for student, message in [
        ([nn.Linear(3, 4)], r"missing '1.weight', '1.bias'\. Pass the model that .* build a new teacher"),
        ([nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 2)], "unexpected '2.weight', '2.bias'"),
        ([nn.Linear(3, 4), nn.Linear(4, 5)], r"'1.weight' has shape \(5, 4\), the teacher's has \(2, 4\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            pairing.match(ours, pairing.tensors(nn.Sequential(*student)))


def _replace_tensor(model):
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())


def _replace_module(model):
    model.norm = nn.BatchNorm1d(3)


def _add_module(model):
    model.more = nn.ReLU()


def _add_parameter(model):
    model.scale = nn.Parameter(torch.ones(()))


def _fill_empty_slot(model):
    model.head.bias = nn.Parameter(torch.zeros(5))


def _remove(model):
    del model.cache


def _reassign_buffer(model):
    model.cache = model.cache + 1


def _set_data(model):
    model.norm.weight.data = torch.ones(3)


def _shorten_data(model):
    model.norm.weight.data = model.norm.weight.data[:2]


def _cast(model):
    model.bfloat16()


CHANGES = [
    _replace_tensor,
    _replace_module,
    _add_module,
    _add_parameter,
    _fill_empty_slot,
    _remove,
    _reassign_buffer,
    _set_data,
    _shorten_data,
    _cast,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__.strip("_"))
def test_a_binding_notices_every_change_of_a_models_tensors(change):
    model = Tied()
    binding = pairing.Binding(model)
    assert binding.is_current()
    change(model)
    assert not binding.is_current()
    assert pairing.Binding(model).is_current()


def test_a_binding_stays_current_through_training():
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters())
    binding = pairing.Binding(model)
    model.norm(model.embed(torch.arange(5))).sum().backward()
    optimizer.step()
    model.load_state_dict(Tied().state_dict())
    model.train().eval()
    assert binding.is_current()


def test_long_differences_are_shortened():
    assert pairing.describe_difference([str(i) for i in range(9)], []).endswith("'4' and 4 more")


@pytest.mark.parametrize(
    ("own", "asked", "matrix", "vector"),
    [
        (torch.bfloat16, "auto", torch.float32, torch.float64),
        (torch.float16, "auto", torch.float32, torch.float64),
        (torch.float32, "auto", torch.float32, torch.float64),
        (torch.float64, "auto", torch.float64, torch.float64),
        (torch.float32, torch.float64, torch.float64, torch.float64),
        (torch.float32, torch.float32, torch.float32, torch.float32),
        (torch.bfloat16, "split", torch.float32, torch.float64),
        (torch.complex64, "auto", torch.complex64, torch.complex128),
        (torch.complex64, torch.float64, torch.complex128, torch.complex128),
    ],
)
def test_accumulator_dtypes(own, asked, matrix, vector):
    assert pairing.accumulator_dtype(torch.zeros(2, 2, dtype=own), asked) is matrix
    for shape in [(), (3,), (1, 3), (3, 1, 1), (1, 1)]:
        assert pairing.accumulator_dtype(torch.zeros(shape, dtype=own), asked) is vector


def test_a_device_without_float64_holds_vectors_in_float32():
    vector = torch.zeros(3)
    assert pairing.accumulator_dtype(vector, "auto", torch.device("mps")) is torch.float32
    assert pairing.accumulator_dtype(vector.bfloat16(), "auto", torch.device("mps")) is torch.float32
