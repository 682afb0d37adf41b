import pytest
from hypothesis import given
from hypothesis import strategies as st

from wmateacher import spec

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
