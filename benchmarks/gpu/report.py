"""One page with the tables of all sections, from their JSON files."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

TITLES = {
    "correct": "Correct on the device: weights, resume, losses, and no waiting",
    "update": "The time of one update of the average",
    "step": "A training step of CLIP: FT, FLYP, a static teacher, TRACER",
    "losses": "Losses at large vocabularies and batches",
    "tracer": "TRACER on digits, with small and larger towers",
    "backbones": "DINO and mean teacher with larger backbones",
}
"""The sections and their titles, in order."""


def page(folder: Path, sections: Iterable[str] = tuple(TITLES)) -> str:
    """Return a page of Markdown, which says so if there are no results."""
    contents = {
        name: json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        for name in sections
        if (folder / f"{name}.json").exists()
    }
    if not contents:
        return "## Results\n\nThere are no results yet.\n"
    return "\n".join(
        ["## Results\n", overview(contents), *(part(name, content) for name, content in contents.items())]
    )


def overview(contents: dict[str, dict[str, Any]]) -> str:
    """Return a table with a row for each section: its state, and how much it measured."""
    lines = ["| section | state | seconds | measured | skipped | failed |", "|---|---|---|---|---|---|"]
    for name, content in contents.items():
        counts = [str(len(content[key])) for key in ("results", "skipped", "errors")]
        seconds = f"{content['seconds']:.0f}" if "seconds" in content else ""
        lines.append(f"| {name} | {content['state']} | {seconds} | {' | '.join(counts)} |")
    return "\n".join(lines) + "\n"


def part(name: str, content: dict[str, Any]) -> str:
    """Return the part of the page about one section."""
    lines = [f"### {name}: {TITLES[name]}", "", where(content), ""]
    if content["results"]:
        text = importlib.import_module(f"gpu.{name}").table(content["results"])
        lines += ["```text", text, "```", ""]
    for what in ("skipped", "errors"):
        if content[what]:
            found = [f"{key}: {reason}" for key, reason in content[what].items()]
            lines += [f"{what.capitalize()}:", "", "```text", *found, "```", ""]
    return "\n".join(lines)


def where(content: dict[str, Any]) -> str:
    """Return a sentence on when, where and how a section was measured."""
    environment = content["environment"]
    if not environment:
        return f"State: {content['state']}. `{content['command']}`"
    versions = environment["packages"]
    parts = [
        environment["device"],
        *(f"{key} {environment[key]}" for key in ("driver", "cuda") if environment.get(key)),
        f"torch {versions['torch']}",
        f"Python {environment['python']}",
        content["date"][:10],
        f"commit {content['commit'][:12]}{' with changes' if content['commit'].endswith('+') else ''}",
    ]
    quick = " **Tiny sizes, to see that everything runs.**" if content["quick"] else ""
    return f"State: {content['state']}. {', '.join(parts)}. `{content['command']}`{quick}"


def shown(row: dict[str, Any], key: str, form: str) -> str:
    """Return a number of a row as text, which is empty if the row does not have it."""
    return format(row[key], form) if row.get(key) is not None else ""
