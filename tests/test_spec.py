import pytest
from hypothesis import given
from hypothesis import strategies as st

from wmateacher import kernels, losses, spec

names = st.from_regex(r"[a-z][a-z_0-9]{0,8}", fullmatch=True).filter(lambda s: s.isidentifier() and s not in {
    "as", "if", "in", "is", "or", "and", "def", "del", "for", "not", "try", "elif", "else", "from", "pass",
    "with", "while", "yield", "class", "break", "async", "await", "raise", "except", "import", "lambda",
    "return", "assert", "global", "finally", "nonlocal", "continue",
})  # fmt: skip
numbers = st.integers(-1000, 1000) | st.floats(allow_nan=False, allow_infinity=False)
values = numbers | names
calls = st.builds(
    spec.Call,
    names,
    st.tuples() | st.tuples(values) | st.tuples(values, values),
    st.dictionaries(names, values, max_size=2),
)


@given(calls)
def test_a_call_prints_back_to_itself(call):
    assert spec.parse_call(str(call)) == call


@given(st.lists(st.tuples(st.floats(0, 1e6), calls), min_size=1, max_size=4))
def test_a_sum_parses_to_its_terms(terms):
    text = " + ".join(f"{coefficient!r}*{call}" for coefficient, call in terms)
    assert spec.parse_sum(text) == terms


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("beta(0.5", "does not parse"),
        ("beta 0.5", "does not parse"),
        ("", "does not parse"),
        ("beta(1+1)", r"'1 \+ 1' is not a number or a name"),
        ("beta(**x)", "'\\*\\*' is not allowed"),
        ("(lambda: 0)()", "is not a name"),
        ("3", "'3' is not a name"),
        ("open('x').read()", "is not a name"),
    ],
)
def test_what_is_not_in_the_grammar_is_refused_and_never_run(text, why):
    with pytest.raises(ValueError, match=f"cannot read .*{why}.*; write name"):
        spec.parse_call(text)


def test_a_sum_takes_only_numbers_as_coefficients():
    with pytest.raises(ValueError, match="'a' is not a number"):
        spec.parse_sum("a*fd")


def test_arguments_that_do_not_fit_show_the_usage():
    def f(a, *, b, c=1.0):
        raise AssertionError

    with pytest.raises(TypeError, match=r"f\(1,2\): too many positional arguments; write f\(a,b=...,c=1.0\)"):
        spec.parse_call("f(1,2)").build(f)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("+".join(["kl"] * 100_000), "it has 299999 characters, more than 10000"),
        ("(" * 100_000 + "kl" + ")" * 100_000, "it has 200002 characters"),
        ("a" * 10**7, "it has 10000000 characters"),
        ("+".join(["kl"] * 3000), "it has too many levels or terms"),
        ("a" + ".b" * 4000, "it has too many levels or terms"),
        ("(" * 4000 + "kl" + ")" * 4000, "it "),
        ("kl(" + "-" * 9000 + "1)", "it "),
        ("kl(" + "not " * 2000 + "1)", "it "),
        ("f(" * 4000 + ")" * 4000, "it "),
        ("kl(x=[" + "1," * 4000 + "])", "is not a number or a name"),
        ("kl(1" + "0" * 5000 + ")", "it does not parse"),
    ],
    ids=range(11),
)
def test_a_text_that_is_too_long_or_too_deep_is_refused_in_a_short_message(text, why):
    for read in (spec.parse_call, spec.parse_sum):
        with pytest.raises(ValueError, match=f"cannot read .*{why}.*; write name") as caught:
            read(text)
        assert len(str(caught.value)) < 700


def test_whole_numbers_beyond_every_float_are_out_of_range():
    huge = "1" + "0" * 400
    for build, text, message in [
        (kernels.build, f"beta({huge},1)", "beta: a must be a finite number above 0"),
        (losses.build, f"kl({huge})", "kl: temperature must be a finite number > 0"),
        (losses.build, f"{huge}*kl", "the coefficient of 'kl' must be finite and >= 0, got inf"),
        (losses.build, {"kl": int(huge)}, "the coefficient of 'kl' must be finite and >= 0, got 1000"),
    ]:
        with pytest.raises(ValueError, match=message):
            build(text)


@pytest.mark.parametrize(
    ("build", "text", "name"),
    [
        (kernels.build, "ema(decay=0.9,decay=0.999)", "decay"),
        (kernels.build, "beta(0.5,b=0.5,b=3)", "b"),
        (kernels.build, "power(sigma_rel=0.1,sigma_rel=0.1)", "sigma_rel"),
        (losses.build, "kl(temperature=2,temperature=3)", "temperature"),
        (losses.build, "mse + 2*kl(temperature=2,temperature=3)", "temperature"),
    ],
)
def test_an_argument_that_is_given_twice_is_refused(build, text, name):
    with pytest.raises(ValueError, match=f"it has '{name}' twice; write name"):
        build(text)


def test_an_argument_by_position_and_by_name_is_refused():
    for build, text in ((kernels.build, "beta(0.5,a=3)"), (losses.build, "kl(2,temperature=3)")):
        with pytest.raises(TypeError, match="multiple values for argument"):
            build(text)
