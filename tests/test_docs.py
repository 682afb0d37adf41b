"""Every code block of the documentation runs, every link leads somewhere, and the site builds."""

import html
import importlib
import inspect
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import programs
import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
SETTINGS = "\n".join(path.read_text() for path in (ROOT / "integrations").rglob("*.py"))
REPOSITORY = "https://example.org/wmateacher"
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.S | re.M)


def blocks(page, language):
    return [code for kind, code in FENCE.findall(page.read_text()) if kind == language]


def name(page):
    return str(page.relative_to(DOCS))


def execute(code, folder):
    """Run code as a program in a folder of its own; what it registers is gone afterwards."""
    program = folder / "page.py"
    program.write_text(code)
    done = programs.run(program, cwd=folder)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=name)
def test_python_blocks_run_one_after_the_other(page, tmp_path):
    execute("\n\n".join(blocks(page, "python")), tmp_path)


def commands(page):
    """Each command of a page's bash blocks, one a line, without comments."""
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            if line.split("#")[0].strip():
                yield line


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "bash")], ids=name)
def test_commands_name_files_and_options_that_exist(page):
    for line in commands(page):
        words = shlex.split(line, comments=True)
        scripts = [w for w in words if w.endswith(".py")]
        for script in scripts:
            assert (ROOT / script).exists(), line
            source = (ROOT / script).read_text() + SETTINGS  # of the run, and of the recipes
            for option in (w for w in words[words.index(script) :] if w.startswith("--")):
                spelled = option.split("=")[0]
                field = spelled.removeprefix("--").replace("-", "_")
                field = field.rpartition(".")[2]
                assert f'"{spelled}"' in source or re.search(rf"^    {field}:", source, re.M), line


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site; `--strict` makes a warning an error, links and anchors are among what it checks."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "REPOSITORY_URL": REPOSITORY}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "WARNING" not in done.stderr
    return folder


def public_names():
    """Classes and functions of the modules that the reference shows, defined there."""
    shown = re.findall(r"^::: (\S+)$", "\n".join(p.read_text() for p in (DOCS / "api").glob("*.md")), re.M)
    for path in shown:
        try:
            module = importlib.import_module(path)
        except ModuleNotFoundError:
            yield path.rsplit(".", 1)
            continue
        for key, value in vars(module).items():
            own = getattr(value, "__module__", None) == path
            if own and not key.startswith("_") and (inspect.isclass(value) or inspect.isfunction(value)):
                yield path, key


@pytest.mark.slow
def test_the_site_builds_and_its_search_finds_every_public_name(site):
    found = json.loads((site / "search/search_index.json").read_text())["docs"]
    headings = {html.unescape(re.sub("<[^>]*>", "", entry["title"])).strip() for entry in found}
    anchors = {entry["location"].partition("#")[2] for entry in found}
    names = list(public_names())
    assert len(names) > 130
    for module, key in names:
        assert f"{module}.{key}" in anchors or key in headings, f"{module}.{key}"


@pytest.mark.slow
def test_results_contributing_and_changelog_are_pages_with_their_pictures(site):
    for page in ("results", "gpu", "contributing", "changelog"):
        assert (site / f"{page}.html").exists()
    shown = re.findall(r'src="([^"#]+\.png)(?:#[\w-]+)?"', (site / "results.html").read_text())
    assert len(shown) >= 3
    assert all((site / picture).exists() for picture in shown)


def built(site):
    """Each page of the site with its text, without scripts."""
    for page in sorted(site.rglob("*.html")):
        text = page.read_text(encoding="utf-8")
        yield page, re.sub(r"<script\b.*?</script>", "", text, flags=re.S)


@pytest.mark.slow
def test_examples_of_docstrings_are_highlighted_as_code(site):
    """griffe knows the section `Examples:` only; in any other, a doctest becomes a quotation in a quotation."""
    examples = 0
    for page, text in built(site):
        examples += text.count('<span class="gp">&gt;&gt;&gt; </span>')
        prose = re.sub(r"<pre\b.*?</pre>", "", text, flags=re.S)
        assert "&gt;&gt;&gt;" not in prose, page
        assert "Example:" not in prose, page
        assert not re.search("<code>&gt;&gt;&gt;", text), page
    assert examples > 50


@pytest.mark.slow
def test_formulas_are_rendered(site):
    for page, text in built(site):
        prose = re.sub(r"<(pre|code)\b.*?</\1>", "", text, flags=re.S)
        assert not re.search(r"\$\$|\\[(\[a-zA-Z]", prose), page
        assert text.count('class="arithmatex"') == text.count("<math "), page
    assert (site / "theory.html").read_text().count("<math ") > 80


@pytest.mark.slow
def test_the_site_loads_nothing_from_another_host(site):
    for page in sorted(site.rglob("*.html")):
        for tag in re.findall(
            r"<(?:script|link|img|iframe|source)\b[^>]*>", page.read_text(encoding="utf-8")
        ):
            assert 'rel="canonical"' in tag or not re.search(r'(?:src|href)="?(?:https?:)?//', tag), (
                page,
                tag,
            )
    for style in site.rglob("*.css"):
        assert not re.search(
            r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", style.read_text(encoding="utf-8")
        ), style
    for script in (DOCS / "javascripts").rglob("*.js"):
        assert not re.search(r"https?://", script.read_text(encoding="utf-8")), script
    assert (site / "search/search_index.js").exists()  # the search of a page that is opened as a file


@pytest.mark.slow
def test_links_to_the_repository_lead_to_files_that_exist(site):
    links = set()
    for _, text in built(site):
        links |= set(re.findall(rf'href="{REPOSITORY}/(blob|tree)/main/([^"#]+)', text))
    assert {("blob", "wmateacher/teacher.py"), ("blob", "tests/test_noise.py")} <= links
    for kind, path in links:
        assert (ROOT / path).is_dir() if kind == "tree" else (ROOT / path).is_file(), path


@pytest.mark.parametrize("page", sorted((DOCS / "api").glob("*.md")), ids=lambda page: page.stem)
def test_a_page_of_the_reference_starts_with_the_names_that_matter(page):
    start = page.read_text().partition("\n:::")[0]
    names = re.findall(r"^- \[`(\w+)`\]\[([\w.]+)\]", start, re.M)
    assert 1 <= len(names) <= 3
    assert all(path.endswith(f".{name}") for name, path in names)


MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "wmateacher").rglob("*.py")
    if "integrations" not in path.parts  # a symbolic link, which some versions of Python follow here
)


def test_examples_in_docstrings_run(tmp_path):
    code = f"""
import doctest, importlib, torch
for name in {MODULES}:
    torch.manual_seed(0)
    assert not doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS).failed, name
"""
    execute(code, tmp_path)


def test_the_pictures_are_drawn(tmp_path, monkeypatch):
    pictures = runpy.run_path(str(DOCS / "pictures.py"))
    for draw in ("profiles", "bias", "plane"):
        pictures[draw]().savefig(tmp_path / f"{draw}.png")
        assert (DOCS / f"assets/{draw}-light.png").exists()
        assert (DOCS / f"assets/{draw}-dark.png").exists()


def test_contributing_is_followed_to_a_kernel_a_loss_and_a_method(tmp_path):
    assert "top_logit" in execute("\n\n".join(blocks(ROOT / "CONTRIBUTING.md", "python")), tmp_path)
