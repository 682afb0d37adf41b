"""Pages of the site that stand elsewhere in the repository: results, contributing, changelog."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {
    "results.md": "benchmarks/results/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
LINK = re.compile(r"\]\(([^)#:\s]+)(#[^)]*)?\)")


@event_priority(100)  # before mkdocstrings reads it
def on_config(config: Any) -> Any:
    """Show mkdocstrings the package as it is installed, with `integrations/` inside."""
    packages = Path(tempfile.mkdtemp(prefix="wmateacher-site-"))
    (packages / "wmateacher").mkdir()
    for part in [*(ROOT / "wmateacher").iterdir(), ROOT / "integrations"]:
        (packages / "wmateacher" / part.name).symlink_to(part)
    config.plugins["mkdocstrings"].config["handlers"]["python"]["paths"] = [str(packages)]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add them, with their pictures, and point their links into the site where they can be."""
    for page, source in PAGES.items():
        files.append(File.generated(config, page, content=_relinked(ROOT / source)))
    for picture in sorted((ROOT / "benchmarks/results").glob("*/*.png")):
        name = f"results/{picture.parent.name}/{picture.name}"
        files.append(File.generated(config, name, content=picture.read_bytes()))
    return files


def _relinked(source: Path) -> str:
    def target(match: re.Match[str]) -> str:
        path, anchor = (source.parent / match[1]).resolve(), match[2] or ""
        inside = path.relative_to(ROOT).as_posix()
        if path.suffix == ".png":
            return f"](results/{path.parent.name}/{path.name})"
        if inside.startswith("docs/"):
            return f"]({inside.removeprefix('docs/')}{anchor})"
        return f"](#)<!-- {inside} -->"

    return LINK.sub(target, source.read_text(encoding="utf-8"))
