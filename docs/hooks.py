"""Add to the site the pages that live elsewhere in the repository: results, contributing, changelog."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import sweep_explorer  # noqa: E402
from gpu import report  # noqa: E402

GPU = ROOT / "benchmarks/results/gpu"
PAGES = {
    "results.md": "benchmarks/results/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
LINK = re.compile(r"\[([^\]]*)\]\(([^)#:\s]+)(#[^)]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and their pictures, with links rewritten to point into the site."""
    for page, source in PAGES.items():
        files.append(File.generated(config, page, content=_relinked(ROOT / source)))
    explorer = sweep_explorer.page(sweep_explorer.recorded())
    files.append(File.generated(config, "sweep_explorer.html", content=explorer))
    page = f"{_relinked(GPU / 'README.md')}\n{report.page(GPU)}"
    files.append(File.generated(config, "gpu.md", content=page))
    for picture in sorted((ROOT / "benchmarks/results").glob("*/*.png")):
        name = f"results/{picture.parent.name}/{picture.name}"
        files.append(File.generated(config, name, content=picture.read_bytes()))
    return files


def _relinked(source: Path) -> str:
    """Return a page's text; a link to a file that is not on the site becomes plain text."""

    def target(match: re.Match[str]) -> str:
        text, path, anchor = match[1], (source.parent / match[2]).resolve(), match[3] or ""
        inside = path.relative_to(ROOT).as_posix()
        if path.suffix == ".png":
            return f"[{text}](results/{path.parent.name}/{path.name}{anchor})"
        if path == sweep_explorer.TEMPLATE:
            return f"[{text}]({path.name})"
        if inside.startswith("docs/"):
            return f"[{text}]({inside.removeprefix('docs/')}{anchor})"
        return text

    return LINK.sub(target, source.read_text(encoding="utf-8"))
