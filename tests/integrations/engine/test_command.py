from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import pytest

from wmateacher.integrations.engine import command
from wmateacher.integrations.engine.settings import Hidden, visible


@dataclass(frozen=True)
class Method:
    name: Hidden[str] = ""
    kernel: str | None = None
    loss: str | None = None

    def __post_init__(self):
        if (self.kernel is None) != (self.loss is None):
            raise ValueError("give kernel and loss, or neither")


@dataclass(frozen=True)
class Recipe:
    summary: Hidden[str] = "a small one"
    rate: float = 0.1
    clip: float | None = None
    methods: Mapping[str, Method] = field(default_factory=lambda: {"plain": Method(), "two-b": Method()})


@dataclass(frozen=True, kw_only=True)
class Options(command.RunOptions):
    """What the program does."""

    methods: tuple[str, ...] = ()
    """Which methods run."""
    kernels: tuple[str, ...] = ("a", "b")
    """Which kernels run."""


RECIPES = {"small": Recipe(), "large": Recipe("a large one", rate=0.2)}


def parse(*arguments):
    return command.parse(Options, RECIPES, "small", arguments)


def test_without_arguments_the_default_recipe_runs_as_it_is():
    assert parse() == (Options(), RECIPES["small"])


def test_any_value_of_a_recipe_and_the_options_of_the_run_are_set():
    options, recipe = parse(
        "large", "--methods", "two-b", "--clip", "1", "--methods.two-b.kernel", "uniform",
        "--methods.two-b.loss", "kl", "--seeds", "3",
    )  # fmt: skip
    assert options == Options(methods=("two-b",), seeds=3)
    assert recipe == replace(
        RECIPES["large"], clip=1.0, methods={"plain": Method(), "two-b": Method("", "uniform", "kl")}
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rat", "1"], "--rate"),
        (["--methods.tow-b.kernel", "x"], "--methods.two-b.kernel"),
        (["--rate", "fast"], "Error parsing --rate"),
        (["--methods.plain.kernel", "x"], "give kernel and loss, or neither"),
    ],
)
def test_arguments_that_cannot_be_are_explained(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(*arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_an_unknown_recipe_and_a_bad_option_are_named():
    with pytest.raises(ValueError, match="unknown recipe 'lrge'; did you mean 'large'"):
        parse("lrge")
    with pytest.raises(ValueError, match="--seeds must be at least 1, got 0"):
        parse("--seeds", "0")


def test_an_option_with_default_values_cannot_be_emptied():
    with pytest.raises(
        ValueError, match="--kernels needs at least one value, got none; leave it out for a b"
    ):
        parse("--kernels", "--seeds", "2")
    assert parse("--methods")[0].methods == ()


def test_help_names_the_recipes_and_one_method_for_all(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = capsys.readouterr().out
    assert "What the program does." in text
    assert "large: a large one" in text
    assert "--methods.NAME.kernel" in text
    assert "--methods.two-b.kernel" not in text
    assert "NAME is one of plain, two-b." in text


def test_hidden_fields_are_neither_shown_nor_changed(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = capsys.readouterr().out
    assert "--summary" not in text
    assert "--methods.NAME.name" not in text
    with pytest.raises(SystemExit):
        parse("--summary", "another")
    assert list(visible(RECIPES["small"])) == ["rate", "clip", "methods"]


def test_an_error_ends_a_program_with_one_line():
    def main():
        raise ValueError("steps must be at least 1")

    with pytest.raises(SystemExit, match="^error: steps must be at least 1$"):
        command.run(main)
