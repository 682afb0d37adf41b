"""Command lines: a recipe by name, changes to its values as `--PART.VALUE`, and the options of the run."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, make_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

from wmateacher.checks import lookup
from wmateacher.integrations.engine import tracking

__all__ = ["BasicOptions", "RunOptions", "parse", "run"]

OptionsT = TypeVar("OptionsT")
RecipeT = TypeVar("RecipeT")


@dataclass(frozen=True, kw_only=True)
class BasicOptions:
    """The options of every example that are not part of its recipe and change no result."""

    seeds: int = 1
    """Number of seeds. With more than one, tables show mean and sample deviation."""
    output: Path | None = None
    """Results folder, or None for a new one in runs/. An interrupted run in it is continued."""
    log_to: tuple[tracking.Tool, ...] = ()
    """Where to log losses, their terms, the gap and evaluations: tensorboard, wandb, or both."""
    device: str = "auto"
    """cpu, cuda or cuda:N. auto is a GPU if there is one; under torchrun each process uses its own."""

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ValueError(f"--seeds must be at least 1, got {self.seeds}")


@dataclass(frozen=True, kw_only=True)
class RunOptions(BasicOptions):
    """The options of every example that reads images."""

    data_root: Path | None = None
    """Folder that holds the data; not needed for the bundled digits."""
    download: bool = False
    """Download the data to --data-root if it is not there."""
    workers: int = 0
    """Worker processes that read and prepare images."""


def parse(
    options: type[OptionsT],
    recipes: Mapping[str, RecipeT],
    default: str,
    argv: Sequence[str] | None = None,
) -> tuple[OptionsT, RecipeT]:
    """Read a command line: `[RECIPE] [--OPTION VALUE ...] [--PART.VALUE VALUE ...]`.

    Args:
        options: Dataclass of the run's options. Its docstring describes the program in `--help`.
        recipes: The recipes by name, each a dataclass; nested dataclasses and mappings of them are reached by
            dots, except fields that are `Hidden`. A recipe may have a `summary`, which `--help` shows.
        default: The name of the recipe that runs if the command line names no recipe.
        argv: The arguments; those of the process by default.

    Returns:
        The options, and the recipe with the changes of the command line.

    Raises:
        ValueError: If the recipe is unknown, its dataclass rejects a value, or an option that has values by
            default is given none.
        SystemExit: `--help` was asked for, or an argument is unknown or of the wrong type.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    name = given.pop(0) if given and not given[0].startswith("-") else default
    recipe = lookup("recipe", name, recipes)
    both = make_dataclass(
        "Command",
        [
            ("options", Annotated[options, tyro.conf.arg(name="")]),
            ("recipe", Annotated[type(recipe), tyro.conf.arg(name="")]),
        ],
    )
    default_values = both(options(), recipe)
    command: Any = tyro.cli(
        both,
        args=given,
        default=default_values,
        prog=f"{Path(sys.argv[0]).name} {name}",
        description=_description(options, recipes, default),
        config=(tyro.conf.AvoidSubcommands,),
        registry=_first_entries() if {"-h", "--help"} & set(given) else None,
    )
    for part in ("options", "recipe"):
        _check_not_emptied(getattr(command, part), getattr(default_values, part))
    return command.options, command.recipe


def run(main: Callable[[], None]) -> None:
    """Run a program; bad input, missing data and a loss that is not finite end it with one line."""
    try:
        main()
    except (ValueError, TypeError, OSError, FloatingPointError, ImportError) as error:
        sys.exit(f"error: {error}")


def _check_not_emptied(given: Any, default: Any) -> None:
    for name in (f.name for f in fields(given)):
        value, before = getattr(given, name), getattr(default, name)
        if value == () != before:
            raise ValueError(
                f"--{name.replace('_', '-')} needs at least one value, got none; leave it out for "
                + " ".join(map(str, before))
            )


def _description(options: type, recipes: Mapping[str, Any], default: str) -> str:
    lines = [inspect.getdoc(options) or "", "", f"The first argument names the recipe (default: {default}):"]
    lines += [f"  {name}: {getattr(recipe, 'summary', '')}".rstrip(": ") for name, recipe in recipes.items()]
    return "\n".join(lines)


def _first_entries() -> ConstructorRegistry:
    """Show one entry, NAME, of every mapping of dataclasses: in `--help` the others would be the same."""
    registry = ConstructorRegistry()

    @registry.struct_rule
    def mapping(info: StructTypeInfo) -> StructConstructorSpec | None:
        entries = info.default
        if not isinstance(entries, Mapping) or not all(map(is_dataclass, entries.values())) or not entries:
            return None
        name, first = next(iter(entries.items()))
        text = f"NAME is one of {', '.join(entries)}. The defaults shown are those of {name}."
        return StructConstructorSpec(dict, (StructFieldSpec("NAME", type(first), first, text),))

    return registry
