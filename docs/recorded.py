"""The recorded results as pages: one for each section of their README, with charts, and an overview."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import charts
from markdown.extensions.toc import slugify

from wmateacher.integrations.engine import tables

RESULTS = Path(__file__).parents[1] / "benchmarks/results"
GROUPS = {
    "clip": "CLIP fine-tuning",
    "colored": "CLIP fine-tuning",
    "representations": "CLIP fine-tuning",
    "kernel": "Kernels",
    "mean-teacher": "Semi-supervised",
    "dino": "Self-supervised",
    "lm": "Language models",
}
OTHER = "Time, memory and more"
REDRAWN = re.compile(r"^!\[[^\]]*\]\([\w.-]+/(?:methods|ablation)\.png\)\n", re.M)
PICTURE = re.compile(r"^!\[[^\]]*\]\((?P<folder>[\w.-]+)/[^)]+\)\n(?:!\[.*\n)?\n?", re.M)
BLOCK = re.compile(r"^```text\n(.*?)^```\n", re.S | re.M)


class Section(NamedTuple):
    """A section of the README: its title, its text, and the page that it becomes."""

    title: str
    text: str

    @property
    def name(self) -> str:
        """The folders that it shows, as they stand in the title: `clip-digits`."""
        return self.title.partition(":")[0]

    @property
    def page(self) -> str:
        """The address of its page on the site."""
        return f"results/{slugify(self.name, '-').strip('-')}.md"

    @property
    def anchor(self) -> str:
        """Its anchor in the README."""
        return slugify(self.title, "-")

    @property
    def group(self) -> str:
        """What it is about, by the start of its name."""
        return next((group for start, group in GROUPS.items() if self.name.startswith(start)), OTHER)


def sections(readme: Path = RESULTS / "README.md") -> tuple[str, list[Section]]:
    """Return the README's introduction and its sections, each with the pictures of its folder."""
    start, *rest = re.split(r"^## ", readme.read_text(encoding="utf-8"), flags=re.M)
    found = {section.name: section for section in (Section(*part.split("\n", 1)) for part in rest)}
    for name, section in found.items():
        for picture in PICTURE.finditer(section.text):
            folder = picture["folder"]
            if folder in found and folder != name:
                found[name] = found[name]._replace(text=found[name].text.replace(picture[0], ""))
                moved = f"{found[folder].text.rstrip()}\n\n{picture[0].strip()}\n"
                found[folder] = found[folder]._replace(text=moved)
    return start, list(found.values())


def by_group(found: list[Section]) -> dict[str, list[Section]]:
    """Return the sections of each group, the group of other things last."""
    groups: dict[str, list[Section]] = {group: [] for group in (*GROUPS.values(), OTHER)}
    for section in found:
        groups[section.group].append(section)
    return {group: members for group, members in groups.items() if members}


def overview(start: str, groups: Mapping[str, list[Section]]) -> str:
    """Return the page that leads to the others."""
    lines = [start.rstrip()]
    for group, members in groups.items():
        lines += [f"\n## {group}\n"]
        for section in members:
            title = section.title.partition(": ")[2]
            lines.append(f"- [{section.name}]({section.page}): {title}")
    return "\n".join(lines) + "\n"


def with_charts(text: str, results: Mapping[str, tables.Results]) -> str:
    """Put the chart of each result below the table that shows its numbers; drop the pictures that it redraws.

    Args:
        text: The text of a section.
        results: For each folder the content of its `results.json`.
    """
    drawn = []
    for result in results.values():
        pair = charts.figures(result)
        if pair is not None:
            rows = [[name, *(tables.figure(record, path, 1) for path in pair)]
                    for name, record in result["methods"].items()]  # fmt: skip
            drawn.append((rows, charts.chart(result)))

    def below(match: re.Match[str]) -> str:
        lines = match[1].splitlines()
        shown = [
            chart for rows, chart in drawn if all(any(_shows(line, row) for line in lines) for row in rows)
        ]
        return f"{match[0]}\n{shown[0]}\n" if shown else match[0]

    completed = BLOCK.sub(below, text)
    return REDRAWN.sub("", completed)


def _shows(line: str, row: list[str]) -> bool:
    name, *figures = row
    return line.startswith(f"{name}  ") and all(figure in line for figure in figures)


def recorded() -> dict[str, tables.Results]:
    """Return the content of every `results.json`, by folder."""
    files = sorted(RESULTS.glob("*/results.json"))
    return {file.parent.name: json.loads(file.read_text(encoding="utf-8")) for file in files}
