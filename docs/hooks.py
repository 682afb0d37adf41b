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
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "docs")]

import recorded  # noqa: E402
import sweep_explorer  # noqa: E402
from gpu import report  # noqa: E402

RESULTS = recorded.RESULTS
PAGES = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
SITE = {source: page for page, source in PAGES.items()} | {
    "benchmarks/results/README.md": "results.md",
    "benchmarks/results/gpu/README.md": "gpu.md",
}
INTRODUCTION, SECTIONS = recorded.sections()
GROUPS = recorded.by_group(SECTIONS)
LINK = re.compile(r"\[([^\]]*)\]\(([^)#:\s]+)(#[^)]*)?\)")
SECTION = re.compile(r"\]\(((?:\.\./)*)(?:results\.md)?(#[^)\s]+)\)")
CODE = re.compile(r"(<a [^>]*>)?<code>([\w.-]+/[\w./-]*)</code>")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.S)


def on_config(config: Any) -> Any:
    """List the pages of results below their overview."""
    pages = [{group: [{s.name: s.page} for s in members]} for group, members in GROUPS.items()]
    for tab in config.nav:
        for entries in tab.values():
            for entry in entries if isinstance(entries, list) else ():
                for title, page in entry.items():
                    if page == "results.md":
                        entry[title] = [{"Overview": page}, *pages]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and pictures that are not in the documentation's folder."""
    texts = {
        page: _relinked((ROOT / source).read_text("utf-8"), ROOT, config) for page, source in PAGES.items()
    }
    texts["results.md"] = recorded.overview(_relinked(INTRODUCTION, RESULTS, config), GROUPS)
    results = recorded.recorded()
    for section in SECTIONS:
        text = recorded.with_charts(section.text, results)
        texts[section.page] = (
            f"---\nhide: [toc]\n---\n\n# {section.title}\n{_relinked(text, RESULTS, config, up='../')}"
        )
    gpu = RESULTS / "gpu"
    texts["gpu.md"] = f"{_relinked((gpu / 'README.md').read_text('utf-8'), gpu, config)}\n{report.page(gpu)}"
    texts["sweep_explorer.html"] = sweep_explorer.page(sweep_explorer.recorded())
    for name, text in texts.items():
        files.append(File.generated(config, name, content=text))
    for picture in sorted(RESULTS.glob("*/*.png")):
        name = f"results/{picture.parent.name}/{picture.name}"
        if any(name in text for text in texts.values()):
            files.append(File.generated(config, name, content=picture.read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead links to a section of the results to its page."""
    pages = {f"#{section.anchor}": section.page for section in SECTIONS}
    up = "../" * page.file.src_uri.count("/")

    def target(match: re.Match[str]) -> str:
        return f"]({up}{pages[match[2]]})" if match[2] in pages else match[0]

    return SECTION.sub(target, markdown)


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


def _relinked(text: str, folder: Path, config: Any, up: str = "") -> str:
    """Return the text of a page with links into the site or else to the repository, if its address is known.

    Args:
        text: The text of a file of the repository.
        folder: The folder of that file.
        config: The site's configuration.
        up: The way from the page to the site's root.
    """

    def target(match: re.Match[str]) -> str:
        shown, path, anchor = match[1], (folder / match[2]).resolve(), match[3] or ""
        inside = path.relative_to(ROOT).as_posix()
        if inside in SITE:
            inside = SITE[inside]
        elif path.suffix == ".png":
            inside = f"results/{path.parent.name}/{path.name}"
        elif path == sweep_explorer.TEMPLATE:
            inside = path.name
        elif inside.startswith("docs/"):
            inside = inside.removeprefix("docs/")
        else:
            return f"[{shown}]({_address(path, config.repo_url)}{anchor})" if config.repo_url else shown
        return f"[{shown}]({up}{inside}{anchor})"

    return LINK.sub(target, text)
