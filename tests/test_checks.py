import pytest
import torch

from wmateacher import checks

REGISTRY = {"beta": 1, "uniform": 2}


def test_nearest_names_come_first():
    assert checks.nearest("bta", REGISTRY) == "did you mean 'beta'? available: beta, uniform"


def test_many_names_are_counted_instead_of_listed():
    names = [f"net{i}" for i in range(1500)]
    assert checks.nearest("net12x", names).startswith("did you mean 'net12")
    assert checks.nearest("other", names) == "1500 are available"


def test_valid_values_are_returned():
    assert checks.lookup("kernel", "beta", REGISTRY) == 1
    assert checks.one_of("policy", "copy", ("copy", "keep")) == "copy"
    assert checks.positive_int("n", torch.tensor(3)) == 3
    assert checks.number("beta", "a", "0.5", lambda x: x > 0, "above 0") == 0.5
    assert checks.increasing("steps", [0, 2.0, 5]) == [0, 2, 5]
    assert checks.positive("kl", "temperature", 2) == 2.0
    assert checks.fraction("dino", "momentum", 0) == 0.0
    assert checks.width("afd", "dim", 512) == 512
    tensor = torch.zeros(2, 3)
    assert checks.floating_tensor("student", tensor, "logits") is tensor
    checks.same_shape("kl", tensor, tensor)
    checks.same_batch("gd", tensor, torch.zeros(2, 5))
    checks.last_dimension("afd", "dim", 3, tensor)


@pytest.mark.parametrize(
    ("check", "error", "message"),
    [
        (lambda: checks.lookup("kernel", "bta", REGISTRY), ValueError,
         "unknown kernel 'bta'; did you mean 'beta'? available: beta, uniform"),
        (lambda: checks.lookup("kernel", "x", REGISTRY, also="or a callable"), ValueError,
         "unknown kernel 'x'; available: beta, uniform, or a callable"),
        (lambda: checks.one_of("policy", "kep", ("copy", "keep")), ValueError,
         "unknown policy 'kep'; did you mean 'keep'? available: copy, keep"),
        (lambda: checks.positive_int("n", 1.5), ValueError, "n must be a whole number of at least 1, got 1.5"),
        (lambda: checks.positive_int("n", True), ValueError, "n must be a whole number of at least 1, got True"),
        (lambda: checks.number("beta", "a", "x", lambda x: x > 0, "above 0"), ValueError,
         "beta: a must be above 0, got 'x'"),
        (lambda: checks.number("beta", "a", float("inf"), lambda x: x > 0, "above 0"), ValueError,
         "beta: a must be above 0, got inf"),
        (lambda: checks.increasing("steps", [3, 2]), ValueError,
         "steps must be rising whole numbers of optimizer steps, from 0 on, got [3, 2]"),
        (lambda: checks.increasing("steps", []), ValueError, "from 0 on, got []"),
        (lambda: checks.positive("kl", "temperature", 0), ValueError,
         "kl: temperature must be a finite number > 0, got 0"),
        (lambda: checks.fraction("dino", "momentum", 1), ValueError,
         "dino: momentum must be a number in [0, 1), got 1"),
        (lambda: checks.width("afd", "dim", 0), ValueError, "afd: dim must be an integer >= 1, got 0; give the size"),
        (lambda: checks.floating_tensor("student", [1.0], "logits"), TypeError, "student must be logits, got list"),
        (lambda: checks.floating_tensor("student", torch.ones(2).long(), "logits"), TypeError,
         "of a floating-point dtype, got torch.int64; class indices are targets of the task loss"),
        (lambda: checks.floating_tensor("student", torch.ones(0, 3), "logits"), ValueError,
         "student must have a batch of at least 1, got shape [0, 3]"),
        (lambda: checks.same_shape("kl", torch.ones(2, 3), torch.ones(2, 4)), ValueError,
         "kl needs student and teacher of equal shape, got student [2, 3] and teacher [2, 4]; give both"),
        (lambda: checks.same_batch("gd", torch.ones(2), torch.ones(3)), ValueError,
         "gd needs student and teacher of the same batch, got student [2] and teacher [3]"),
        (lambda: checks.last_dimension("afd", "dim", 4, torch.ones(2, 3)), ValueError,
         "afd was built with dim=4, got inputs of shape [2, 3]; write afd(3)"),
    ],
)  # fmt: skip
def test_errors_name_argument_value_and_fix(check, error, message):
    with pytest.raises(error) as raised:
        check()
    assert message in str(raised.value)
