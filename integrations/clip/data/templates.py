"""Templates: captions with a place for the name of the class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

__all__ = ["LISTS", "check_templates", "read_templates"]

LISTS = ("openai", "simple")
"""The names of open_clip's lists of templates."""


def read_templates(given: Sequence[str], root: Path | None = None) -> tuple[str, ...]:
    """Return captions with one `{}` for the class.

    Args:
        given: Captions, names in `LISTS`, and text files with one caption on each line.
        root: The folder that files are relative to.

    Raises:
        ValueError: If something is none of these, or there is no template.
    """
    import open_clip

    found: list[str] = []
    for entry in given:
        file = entry if root is None else root / entry
        if "{" in entry:
            found.append(entry)
        elif entry in LISTS:
            found += [t("{}") for t in getattr(open_clip, f"{entry.upper()}_IMAGENET_TEMPLATES")]
        elif Path(file).is_file():
            lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
            found += [line.strip() for line in lines if line.strip()]
        else:
            raise ValueError(
                f"templates: {entry!r} is neither a caption with {{}} for the class, nor "
                f"{' or '.join(LISTS)}, nor a file"
            )
    check_templates(found)
    if not found:
        raise ValueError(f"templates: give at least one caption with {{}} for the class, got {list(given)}")
    return tuple(dict.fromkeys(found))


def check_templates(templates: Sequence[str]) -> None:
    """Check that templates are captions with one `{}` for the class.

    Raises:
        ValueError: If one is not; the message lists those.
    """
    wrong = [t for t in templates if not _takes_a_name(t)]
    if wrong:
        raise ValueError(f"templates must be captions with one {{}} for the class, got {wrong}")


def _takes_a_name(template: str) -> bool:
    try:
        return template.count("{}") == 1 and template.format("x") == template.replace("{}", "x")
    except (LookupError, ValueError):
        return False


def __dir__() -> list[str]:
    return __all__
