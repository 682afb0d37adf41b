"""build, register, available and the criterion."""

import copy
import importlib
import pickle
from collections import OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import SPECS, inputs_for, paired, require_grad
from torch import nn

from wmateacher import losses
from wmateacher.losses import registry

TRACER = "3.90625*fd + crd + icl + cross_kd"


@pytest.fixture
def scratch(monkeypatch):
    """A registry to register in, thrown away afterwards."""
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))


def test_the_total_is_the_weighted_sum_of_the_terms():
    student, teacher = paired(0), paired(1)
    criterion = losses.build("3.90625*fd + 0.5*crd + icl")
    total, terms = criterion(student, teacher, return_terms=True)
    assert torch.equal(criterion(student, teacher), total)
    assert list(terms) == ["fd", "crd", "icl"]
    fd, crd, icl = terms.values()
    assert total.item() == pytest.approx((3.90625 * fd + 0.5 * crd + icl).item())
    for name, term in terms.items():
        assert torch.equal(term, losses.build(name)(student, teacher))


def test_a_coefficient_scales_the_gradient_and_zero_removes_it():
    grads = []
    for spec in ("crd", "3*crd", "0*crd"):
        student = require_grad(paired(0))
        total, terms = losses.build(spec)(student, paired(1), return_terms=True)
        total.backward()
        assert terms["crd"] > 0
        grads.append(student.image.grad)
    torch.testing.assert_close(3 * grads[0], grads[1])
    assert not grads[2].any()


def test_coefficients_are_read_at_every_call():
    criterion = losses.build("fd + crd")
    criterion.coefficients["fd"] = 0.25
    assert criterion.spec == "0.25*fd + crd"
    total, terms = criterion(paired(0), paired(1), return_terms=True)
    assert total.item() == pytest.approx(0.25 * terms["fd"] + terms["crd"])


@pytest.mark.parametrize("spec", [*SPECS, TRACER, "0.0*fd + 1e-08*crd + 2.0*temperature_kl(2.5)"])
def test_a_spec_prints_back_to_itself(spec):
    criterion = losses.build(spec)
    assert str(criterion) == criterion.spec == spec
    assert str(losses.build(criterion.spec)) == spec
    assert spec in repr(criterion)


@settings(max_examples=30, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["fd", "crd", "icl", "cross_kd", "gd", "paired_ce"]),
        st.floats(0, 1e30, allow_subnormal=False),
        min_size=1,
    )
)
def test_a_mapping_and_its_printed_spec_build_the_same(mapping):
    criterion = losses.build(mapping)
    again = losses.build(str(criterion))
    assert criterion.coefficients == again.coefficients == mapping
    assert str(again) == str(criterion)
    assert again.family == "paired"


def test_a_mapping_may_have_calls_as_keys_and_numpy_coefficients():
    import numpy as np

    criterion = losses.build({"temperature_kl(2.0)": np.float32(0.5), "fd": 2})
    assert str(criterion) == "0.5*temperature_kl(2.0) + 2.0*fd"


def test_a_criterion_is_returned_as_it_is():
    criterion = losses.build(TRACER)
    assert losses.build(criterion) is criterion


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_a_criterion_can_be_copied_and_pickled(clone):
    criterion = losses.build("fd + afd(4) + temperature_kl(2.0)")
    student, teacher = paired(0), paired(1)
    copied = clone(criterion)
    assert str(copied) == str(criterion)
    assert torch.equal(copied(student, teacher), criterion(student, teacher))


def test_paired_embeddings_survive_a_module_and_its_hooks():
    class Model(nn.Module):
        def forward(self, embeddings):
            return embeddings

    model = Model()
    model.register_forward_hook(lambda module, args, output: output._replace(image=output.image * 2))
    assert isinstance(model(paired(0)), losses.PairedEmbeddings)


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("fdd", ValueError, "unknown loss 'fdd'; did you mean .*'fd'.* available: afd, ce, cosine"),
        ("fd + crd + fd", ValueError, "the loss 'fd' is given twice; write it once"),
        ("kl(1.0) + kl(4.0)", ValueError, "the loss 'kl' is given twice"),
        ("-0.5*fd", ValueError, r"the coefficient of 'fd' must be finite and >= 0, got -0\.5; write"),
        ("1e999*fd", ValueError, "the coefficient of 'fd' must be finite and >= 0, got inf"),
        ({"fd": float("nan")}, ValueError, "must be finite and >= 0, got nan"),
        ({"fd": "1"}, TypeError, "the coefficient of 'fd' must be a number, got '1'"),
        ({"fd": True}, TypeError, "the coefficient of 'fd' must be a number, got True"),
        ({}, ValueError, "a criterion needs at least one term, got none; write for example 'fd"),
        ("", ValueError, "cannot read ''"),
        ("fd - crd", ValueError, "cannot read 'fd - crd'"),
        (3.0, TypeError, "spec must be a string such as .*, got float"),
        ("fd(2.0)", TypeError, r"fd\(2\.0\): too many positional arguments.*fd\(\)"),
        ("kl(tau=2.0)", TypeError, r"kl\(tau=2\.0\): .*'tau'.*kl\(temperature"),
        ("afd", TypeError, r"afd: missing a required argument: 'dim'.*afd\(dim\)"),
        (
            "fd + kl + crd",
            ValueError,
            r"different inputs: fd, crd \(paired\) takes PairedEmbeddings\(.*; kl \(logits\) takes a "
            r"tensor of logits \[\.\.\., C\]\. Build one criterion for each family",
        ),
    ],
)
def test_build_refuses(spec, error, message):
    with pytest.raises(error, match=message):
        losses.build(spec)


def test_available_is_sorted_and_refuses_an_unknown_family():
    assert losses.available() == sorted(losses.available())
    with pytest.raises(
        ValueError, match="unknown family 'pairs'; did you mean 'paired'.*features, logits, paired"
    ):
        losses.available("pairs")


@pytest.mark.usefixtures("scratch")
class TestRegister:
    def test_a_function_with_parameters_by_position_or_keyword(self):
        @losses.register("scaled", family="features")
        def scaled(student, teacher, *, factor=1.0, power=2):
            return factor * (student - teacher).abs().pow(power).mean()

        assert "scaled" in losses.available("features")
        student, teacher = inputs_for("cosine")
        expected = 3 * (student - teacher).abs().mean()
        for spec in ("scaled(3.0,1)", "scaled(3.0,power=1)", "scaled(power=1,factor=3.0)"):
            criterion = losses.build(spec)
            assert str(criterion) == spec
            assert torch.equal(criterion(student, teacher), expected)
        with pytest.raises(TypeError, match=r"scaled\(factor.*power"):
            losses.build("scaled(1,2,3)")

    def test_a_module_class(self):
        @losses.register("projected", family="features")
        class Projected(nn.Module):
            def __init__(self, width):
                super().__init__()
                self.linear = nn.Linear(width, 1)

            def forward(self, student, teacher):
                return (self.linear(student) - self.linear(teacher)).square().mean()

        criterion = losses.build("cosine + projected(4)")
        student, teacher = inputs_for("cosine", dtype=torch.float32)
        criterion(student, teacher).backward()
        assert all(p.grad is not None for p in criterion.parameters())

    def test_a_family_gives_prepared_inputs_and_none_gives_what_was_passed(self):
        seen = {}

        @losses.register("prepared", family="paired")
        def prepared(student, teacher):
            seen["prepared"] = student, teacher
            return student.image.sum()

        @losses.register("raw")
        def raw(student, teacher):
            seen["raw"] = student, teacher
            return student.image.float().sum()

        student, teacher = (paired(s, dtype=torch.bfloat16) for s in (0, 1))
        criterion = losses.build("prepared + raw")
        assert criterion.family == "paired"
        criterion(student, require_grad(teacher))
        image = seen["prepared"][0].image
        assert image.dtype == torch.float32
        torch.testing.assert_close(image.norm(dim=-1), torch.ones(3))
        assert seen["raw"][0] is student
        assert not seen["raw"][1].image.requires_grad

    def test_a_paired_loss_may_call_another_one(self):
        @losses.register("shifted", family="paired")
        def shifted(student, teacher):
            return losses.paired.icl(student._replace(image=3 * student.image + 1), teacher)

        @losses.register("fresh", family="paired")
        def fresh(student, teacher):
            return losses.paired.icl(student, losses.PairedEmbeddings(*(2 * x for x in teacher)))

        student, teacher = paired(0), paired(1)
        image = student.image / student.image.norm(dim=-1, keepdim=True)
        expected = losses.build("icl")(student._replace(image=3 * image + 1), teacher)
        torch.testing.assert_close(losses.build("shifted")(student, teacher), expected)
        torch.testing.assert_close(
            losses.build("fresh")(student, teacher), losses.build("icl")(student, teacher)
        )

    @pytest.mark.parametrize("wrap", [dict, OrderedDict])
    def test_without_a_family_anything_is_taken_and_the_teacher_is_detached(self, wrap):
        @losses.register("nested")
        def nested(student, teacher):
            assert type(teacher) is wrap
            assert teacher["label"] == "kept"
            return (student["x"][0] - teacher["x"][0]).square().mean()

        x = torch.ones(2, requires_grad=True)
        y = torch.zeros(2, requires_grad=True)
        given_to_teacher = wrap(x=[y], label="kept")
        criterion = losses.build("nested")
        assert criterion.family is None
        with torch.autocast("cpu", torch.bfloat16):
            criterion(wrap(x=[x], label="s"), given_to_teacher).backward()
        assert x.grad is not None
        assert y.grad is None
        assert given_to_teacher["x"][0] is y

    def test_autocast_is_off_inside(self):
        @losses.register("product")
        def product(student, teacher):
            assert not torch.is_autocast_enabled("cpu")
            return (student @ teacher.mT).mean()

        with torch.autocast("cpu", torch.bfloat16):
            assert losses.build("product")(torch.ones(2, 2), torch.ones(2, 2)) == 2
            assert torch.is_autocast_enabled("cpu")

    def test_a_taken_name_needs_override(self):
        def mine(student, teacher):
            return student.sum()

        with pytest.raises(ValueError, match="a loss named 'kl' is registered already; .*override"):
            losses.register("kl")(mine)
        assert losses.register("kl", override=True)(mine) is mine
        assert losses.build("kl")(torch.ones(3), None) == 3

    @pytest.mark.parametrize("name", ["my-loss", "2x", "a.b", "", "class", "keys"])
    def test_a_name_must_be_a_free_identifier(self, name):
        with pytest.raises(ValueError, match="a loss's name must be a free identifier such as"):
            losses.register(name)

    def test_the_decorator_needs_a_name(self):
        with pytest.raises(TypeError, match=r"register needs the loss's name, .*@register\('my_loss"):
            losses.register(lambda student, teacher: student.sum())

    def test_an_unknown_family(self):
        with pytest.raises(ValueError, match="unknown family 'logit'; did you mean 'logits'"):
            losses.register("mine", family="logit")

    @pytest.mark.parametrize(
        "function",
        [
            lambda student: student.sum(),
            lambda *inputs: inputs[0].sum(),
            lambda student, teacher, **options: student.sum(),
        ],
    )
    def test_a_functions_signature(self, function):
        with pytest.raises(ValueError, match=r"mine: a loss function takes \(student, teacher, \*,"):
            losses.register("mine")(function)

    def test_neither_function_nor_module_class(self):
        with pytest.raises(TypeError, match="mine: register a function or an nn.Module class, got 3"):
            losses.register("mine")(3)

    @pytest.mark.parametrize(
        ("result", "error", "message"),
        [
            (1.0, TypeError, "the loss 'mine' must return a 0-d tensor, got float"),
            (torch.ones(2), ValueError, r"must return a 0-d tensor, got shape \[2\]; reduce it"),
        ],
    )
    def test_what_a_loss_returns(self, result, error, message):
        losses.register("mine")(lambda student, teacher: result)
        with pytest.raises(error, match=message):
            losses.build("mine")(None, None)


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".registry",
        ".paired",
        ".logits",
        ".features",
        ".gathering",
        ".numerics",
        ".divergences",
        ".tokens",
    ],
)
def test_modules_show_public_names_only(name):
    module = importlib.import_module("wmateacher.losses" + name)
    assert dir(module) == sorted(module.__all__)
    assert all(hasattr(module, public) for public in module.__all__)


def test_an_unknown_gather_mode():
    with pytest.raises(ValueError, match="unknown gather mode 'row'; did you mean 'rows'"):
        losses.build("fd", gather="row")
