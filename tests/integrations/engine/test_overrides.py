from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import pytest

from wmateacher.integrations.clip import recipes
from wmateacher.integrations.engine.overrides import changed, listed


@dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    steps: int = 3
    norm: float | None = None
    kind: Literal["a", "b"] = "a"

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")


@dataclass(frozen=True)
class Outer:
    name: str = "x"
    on: bool = False
    inner: Inner = Inner()
    many: Mapping[str, Inner] = field(default_factory=lambda: {"one": Inner(), "two-b": Inner(0.1)})
    texts: tuple[str, ...] = ("p",)
    maybe: str | None = None


def test_everything_has_a_name():
    names = dict(listed(Outer()))
    assert names["name"] == "x"
    assert names["inner.rate"] == 0.5
    assert names["many.two-b.rate"] == 0.1
    assert len(names) == 4 + 3 * 4


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("name=7", "7"),
        ("name=a=b", "a=b"),
        ("on=True", True),
        ("inner.rate=1e-5", 1e-5),
        ("inner.rate=2", 2.0),
        ("inner.steps= 4", 4),
        ("inner.norm=None", None),
        ("inner.norm=1", 1.0),
        ("inner.kind=b", "b"),
        ("many.two-b.steps=9", 9),
        ("texts=('a {}', 'b')", ("a {}", "b")),
        ("texts=['a']", ("a",)),
        ("maybe=file.csv", "file.csv"),
        ("maybe=None", None),
    ],
)
def test_any_value_is_changed_by_its_name_and_nothing_else(assignment, value):
    before, name = Outer(), assignment.partition("=")[0]
    after = dict(listed(changed(before, [assignment])))
    assert after.pop(name) == value
    assert type(dict(listed(changed(before, [assignment])))[name]) is type(value)
    others = dict(listed(before))
    del others[name]
    assert after == others


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("name", "a change must be NAME=VALUE, got 'name'"),
        ("=3", "a change must be NAME=VALUE, got '=3'"),
        ("nme=x", "unknown setting 'nme'; did you mean 'name'"),
        ("inner.rte=1", "unknown setting 'inner.rte'; did you mean 'inner.rate'"),
        ("many.to-b.rate=1", "unknown setting 'many.to-b'; did you mean 'many.two-b'"),
        ("name.rate=1", "unknown setting 'name.rate': 'name' has no parts"),
        ("inner=1", "'inner' is not one value: set one of its parts, inner.rate, inner.steps"),
        ("many.one=1", "'many.one' is not one value: set one of its parts, many.one.rate"),
        ("inner.rate=fast", "inner.rate must be a number, got 'fast'"),
        ("inner.steps=1.5", "inner.steps must be a whole number, got '1.5'"),
        ("inner.norm=x", "inner.norm must be a number or None, got 'x'"),
        ("inner.kind=c", "inner.kind must be 'a' or 'b', got 'c'"),
        ("on=1", "on must be True or False, got '1'"),
        ("texts=a", "texts must be a tuple of text, got 'a'"),
        ("inner.steps=0", "steps must be at least 1, got 0"),
    ],
)
def test_bad_changes(assignment, message):
    with pytest.raises(ValueError, match=message):
        changed(Outer(), [assignment])


def test_values_that_go_together_are_changed_together():
    recipe = recipes.get("digits")
    made = recipe.changed("methods.flyp.kernel=static", "methods.flyp.distillation=crd")
    assert (made.method("flyp").kernel, made.method("flyp").distillation) == ("static", "crd")
    with pytest.raises(ValueError, match="give both or neither"):
        recipe.changed("methods.flyp.kernel=static")
    made = recipe.changed("methods.model-stock.merge.alpha=0.3", "methods.model-stock.merge.models=1")
    assert made.method("model-stock").merge.alpha == 0.3
    with pytest.raises(ValueError, match="unknown setting 'name.x'"):
        changed(Outer(), ["name=a", "name.x=b"])


@pytest.mark.parametrize("recipe", recipes.RECIPES.values(), ids=lambda r: r.name)
def test_every_number_of_every_recipe_can_be_set(recipe):
    for name, value in listed(recipe):
        if isinstance(value, int | float) and not isinstance(value, bool):
            assert dict(listed(changed(recipe, [f"{name}={value!r}"])))[name] == value
