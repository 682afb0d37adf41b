"""Complete the site: pages and pictures of the rest of the repository, links to its files, and formulas."""

from __future__ import annotations

import html
import re
import sys
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
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
SITE = {source: page for page, source in PAGES.items()} | {"benchmarks/results/gpu/README.md": "gpu.md"}
LINK = re.compile(r"\[([^\]]*)\]\(([^)#:\s]+)(#[^)]*)?\)")
CODE = re.compile(r"(<a [^>]*>)?<code>([\w.-]+/[\w./-]*)</code>")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.S)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and pictures that are not in the documentation's folder."""
    for page, source in PAGES.items():
        files.append(File.generated(config, page, content=_relinked(ROOT / source, config.repo_url)))
    explorer = sweep_explorer.page(sweep_explorer.recorded())
    files.append(File.generated(config, "sweep_explorer.html", content=explorer))
    page = f"{_relinked(GPU / 'README.md', config.repo_url)}\n{report.page(GPU)}"
    files.append(File.generated(config, "gpu.md", content=page))
    for picture in sorted((ROOT / "benchmarks/results").glob("*/*.png")):
        name = f"results/{picture.parent.name}/{picture.name}"
        files.append(File.generated(config, name, content=picture.read_bytes()))
    return files


def on_page_content(content: str, config: Any, **_: Any) -> str:
    """Turn formulas into MathML, and names of the repository's files into links."""
    content = FORMULA.sub(_formula, content)
    return CODE.sub(lambda match: _linked(match, config.repo_url), content)


def _formula(match: re.Match[str]) -> str:
    tag, display = match[1], {"span": "inline", "div": "block"}[match[1]]
    return f'<{tag} class="arithmatex">{convert(html.unescape(match[2]), display=display)}</{tag}>'


def _linked(match: re.Match[str], repository: str | None) -> str:
    if repository and not match[1] and (ROOT / match[2]).exists():
        return f'<a href="{_address(ROOT / match[2], repository)}">{match[0]}</a>'
    return match[0]


def _address(path: Path, repository: str) -> str:
    kind = "tree" if path.is_dir() else "blob"
    return f"{repository.rstrip('/')}/{kind}/main/{path.resolve().relative_to(ROOT).as_posix()}"


def _relinked(source: Path, repository: str | None) -> str:
    """Return a page's text; links lead into the site or else to the repository, if its address is known."""

    def target(match: re.Match[str]) -> str:
        text, path, anchor = match[1], (source.parent / match[2]).resolve(), match[3] or ""
        inside = path.relative_to(ROOT).as_posix()
        if inside in SITE:
            return f"[{text}]({SITE[inside]}{anchor})"
        if path.suffix == ".png":
            return f"[{text}](results/{path.parent.name}/{path.name}{anchor})"
        if path == sweep_explorer.TEMPLATE:
            return f"[{text}]({path.name})"
        if inside.startswith("docs/"):
            return f"[{text}]({inside.removeprefix('docs/')}{anchor})"
        return f"[{text}]({_address(path, repository)}{anchor})" if repository else text

    return LINK.sub(target, source.read_text(encoding="utf-8"))
