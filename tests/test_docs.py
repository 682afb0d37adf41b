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
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import programs
import pytest
import torch
from torch import nn

from wmateacher import WMATeacher, kernels
from wmateacher.theory import predict

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


# The pages about other libraries run beside the tests of these libraries, which have imported them.
HERE = [p for p in PAGES if blocks(p, "python") and p.parent.name != "migration"]


@pytest.mark.parametrize("page", HERE, ids=name)
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
            # A package shows what it takes up from those of its modules that have no place of their own.
            origin = getattr(value, "__module__", None)
            taken_up = hasattr(module, "__path__") and key in module.__all__ and origin not in shown
            own = origin == path or taken_up
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
    pages = {page.stem: page.read_text() for page in (site / "results").glob("*.html")}
    assert len(pages) == (ROOT / "benchmarks/results/README.md").read_text().count("\n## ")
    overview = (site / "results.html").read_text()
    for name, page in pages.items():
        assert f'href="results/{name}.html"' in overview
        assert all(
            (site / "results" / src).exists() for src in re.findall(r'src="([^"#:]+\.png)(?:#[\w-]+)?"', page)
        )
        assert not re.search(r"(methods|ablation)\.png", page)
    assert all(
        'class="chart"' in pages[name] for name in ("clip-digits", "clip-emoji", "lm-lora", "colored-mnist")
    )
    assert pages["clip-ablation"].count('class="chart"') == 7
    assert 'src="lm-lora/courses.png"' in pages["lm-lora"]
    assert any('href="../sweep_explorer.html"' in page for page in pages.values())
    assert '"kernel-sweep-digits"' in (site / "sweep_explorer.html").read_text()
    claims = (site / "claims.html").read_text()  # a link to a section leads to its page
    assert 'href="results/clip-digits.html"' in claims
    assert 'href="results.html#' not in claims


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


@pytest.fixture(scope="module")
def pages_of_results():
    sys.path.insert(0, str(DOCS))
    try:
        yield importlib.import_module("charts"), importlib.import_module("recorded")
    finally:
        sys.path.remove(str(DOCS))


def made_results(**methods):
    """Results of runs with the given figures, as (ID, its deviation, OOD, its deviation)."""
    records = {
        name: {"id": a, "ood": c, "std": {"id": b, "ood": d}, "runs": [{}, {}]}
        for name, (a, b, c, d) in methods.items()
    }
    return {"methods": records}


def test_a_chart_shows_means_and_deviations_on_the_scale_of_its_ticks(pages_of_results):
    charts, _ = pages_of_results
    values = {
        "zero-shot": (90.0, 0.0, 40.0, 0.0),
        "a<b": (96.0, 1.5, 44.0, 2.0),
        "tracer": (97.0, 1, 47, 0.5),
    }
    svg = ElementTree.fromstring(charts.chart(made_results(**values)).replace(" data-search-exclude", ""))[0]
    shown = {"id": {}, "ood": {}}
    for side, inside in (("id", lambda x: x < 195), ("ood", lambda x: x > 195)):
        at = [(float(t.get("x")), float(t.text)) for t in svg.iter("text") if t.get("class") == "number"]
        (x0, v0), *_, (x1, v1) = [tick for tick in at if inside(tick[0])]
        for group in svg.iter("g"):
            x = float(group.find("circle").get("cx"))
            if inside(x):
                name, _, text = group.find("title").text.partition(": ")
                ends = [float(line.get(f"x{n}")) for line in group.iter("line") for n in (1, 2)] or [x]
                numbers = [v0 + (v1 - v0) * (end - x0) / (x1 - x0) for end in (x, min(ends), max(ends))]
                shown[side][name] = (numbers, text, group.get("class"))
    for name, (inner, inner_std, outer, outer_std) in values.items():
        for side, mean, std in (("id", inner, inner_std), ("ood", outer, outer_std)):
            numbers, text, kind = shown[side][name]
            np.testing.assert_allclose(numbers, [mean, mean - std, mean + std], atol=0.02)
            assert text == f"{mean:.1f} ±{std:.1f}"
            assert (kind == "marked") == (name == "tracer")
    assert charts.chart({"models": {}}) is None
    assert charts.chart({"methods": {"x": {"seconds": 1, "std": {}, "runs": [{}]}}}) is None


def test_a_chart_stands_below_the_table_that_shows_its_numbers(pages_of_results):
    charts, recorded = pages_of_results
    one, two = (
        made_results(a=(90, 1, 40, 1), b=(91, 1, 41, 1)),
        made_results(a=(80, 1, 30, 1), b=(81, 1, 31, 1)),
    )
    tables = [recorded.tables.table(r, {"ID": ("id", 1), "OOD": ("ood", 1)}) for r in (one, two)]
    other = "```text\nmethod  seconds\na       1\nb       2\n```\n"
    text = "".join(f"```text\n{table}\n```\n\n![x](f/methods.png)\n\n" for table in tables) + other
    found = recorded.with_charts(text, {"y": two, "x": one})
    assert found.count('class="chart"') == 2
    assert "methods.png" not in found
    assert found.index(charts.chart(one)) < found.index(tables[1]) < found.index(charts.chart(two))
    assert found.endswith(other)


def test_each_section_of_the_results_becomes_a_page_with_its_own_pictures(pages_of_results, tmp_path):
    _, recorded = pages_of_results
    pair = "![A](clip-a/p.png#only-light)\n![A](clip-a/p-dark.png#only-dark)\n"
    own = "![B](new-b/p.png)\n"
    (tmp_path / "README.md").write_text(
        f"# R\n\nintro\n\n## clip-a: one\n\nx\n\n## new-b: two\n\n{pair}\n{own}\ny\n"
    )
    start, (first, second) = recorded.sections(tmp_path / "README.md")
    assert (first.page, second.page) == ("results/clip-a.md", "results/new-b.md")
    assert first.text == f"\nx\n\n{pair}"
    assert second.text == f"\n{own}\ny\n"
    page = recorded.overview(start, recorded.by_group([second, first]))
    assert page.index("## CLIP fine-tuning\n\n- [clip-a](results/clip-a.md): one") < page.index(
        f"## {recorded.OTHER}\n\n- [new-b](results/new-b.md): two"
    )


def test_every_recorded_result_that_has_a_chart_shows_it(pages_of_results):
    charts, recorded = pages_of_results
    _, sections = recorded.sections()
    results = recorded.recorded()
    drawn = "".join(recorded.with_charts(section.text, results) for section in sections)
    found = {folder: chart for folder, result in results.items() if (chart := charts.chart(result))}
    assert {folder for folder, chart in found.items() if chart not in drawn} == set()
    assert len(found) > 20


FOLLOWED = """
import sys
import wmateacher.kernels.registry, wmateacher.losses.registry
from wmateacher import kernels, losses
for entries in (kernels.registry._FACTORIES, losses.registry._ENTRIES):  # free the names, should the library have them by now
    for name in ("triangle", "top_logit"):
        entries.pop(name, None)

{page}

import loss_oracle, oracle, pytest
from wmateacher.losses import logits

kernels.__all__.append("Triangle")
oracle.DENSITIES["triangle(0.7)"] = oracle.density_steps(lambda tau: min(tau / 0.7, (1 - tau) / 0.3))
oracle.KERNELS.append("triangle(0.7)")
loss_oracle.ORACLES["top_logit"] = lambda student, teacher: loss_oracle.mean(
    (max(s) - max(t)) ** 2 for s, t in zip(*map(loss_oracle.rows_of, (student, teacher)), strict=True)
)
logits.top_logit = top_logit
logits.__all__.append("top_logit")
METHODS[mine.name] = mine
entries = "triangle or top_logit or mine or registered or available"
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "--rootdir", "{root}", "-k", entries, *{files}]))
"""
CHECKS = [
    *("tests/test_kernels.py", "tests/test_schedule.py", "tests/losses/test_losses_values.py"),
    *("tests/losses/test_losses_masked.py", "tests/integrations/clip/test_clip_methods.py"),
]


def test_contributing_is_followed_to_a_kernel_a_loss_and_a_method_that_pass_the_tests_of_all(tmp_path):
    page = "\n\n".join(blocks(ROOT / "CONTRIBUTING.md", "python"))
    registered = '@losses.register("top_logit", family="logits")'
    assert registered in page
    page = page.replace(registered, f"{registered}\n@losses.logits._family.standalone")
    code = FOLLOWED.format(page=page, root=ROOT, files=[str(ROOT / file) for file in CHECKS])
    (tmp_path / "followed.py").write_text(code)
    paths = os.pathsep.join(map(str, [ROOT, ROOT / "tests", ROOT / "tests/losses"]))
    done = subprocess.run(
        [sys.executable, "followed.py"], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_contributings_hook_is_the_plain_loop_and_resumes():
    (block,) = (b for b in blocks(ROOT / "CONTRIBUTING.md", "python") if "class TeacherHook" in b)
    hook_of = {}
    exec(block, hook_of)

    def train(hook, trainer, steps):
        hook.on_train_start(trainer)
        for _ in range(steps):
            trainer.model(torch.ones(1, 3)).sum().backward()
            trainer.optimizer.step()
        hook.on_train_end(trainer)

    def parts():
        model = nn.Linear(3, 2)
        nn.init.ones_(model.weight)
        nn.init.zeros_(model.bias)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return SimpleNamespace(model=model, optimizer=optimizer, total_steps=6)

    plain, whole, resumed = parts(), parts(), parts()
    teacher = WMATeacher(plain.model, total_steps=6)
    for _ in range(6):
        plain.model(torch.ones(1, 3)).sum().backward()
        plain.optimizer.step()
        teacher.update()
    hooks = [hook_of["TeacherHook"]() for _ in range(3)]
    train(hooks[0], whole, 6)
    train(hooks[1], resumed, 4)
    hooks[2].load_state_dict(hooks[1].state_dict())
    train(hooks[2], resumed, 2)
    for hook, trainer in ((hooks[0], whole), (hooks[2], resumed)):
        assert hook.teacher.step == 6
        assert torch.equal(hook.teacher.module.weight, teacher.module.weight)
        with hook.on_evaluate(trainer):
            assert torch.equal(trainer.model.weight, teacher.module.weight)
        assert torch.equal(trainer.model.weight, plain.model.weight)


def test_the_animation_shows_the_kernels_weights_and_the_linear_world():
    animation = runpy.run_path(str(DOCS / "animation.py"))
    steps, frames = animation["STEPS"], animation["frames"]()
    assert frames[0] == 0
    assert frames[-1] == steps
    for kernel in animation["SHOWN"]:
        found = animation["weights"](kernel)
        np.testing.assert_allclose(found[-1], kernels.build(kernel).profile(steps), atol=1e-14)
        np.testing.assert_allclose(found.sum(1), 1, atol=1e-12)
    np.testing.assert_allclose(
        animation["weights"]("uniform")[frames[9], : frames[9] + 1], 1 / (frames[9] + 1)
    )
    number = re.compile(r"-?\d+(?:\.\d+)?")
    for page in ("light", "dark"):
        drawn, there = animation["picture"](page), (DOCS / f"assets/run-{page}.svg").read_text()
        assert number.sub("", drawn) == number.sub("", there), "run python docs/animation.py"
        numbers = [[float(n) for n in number.findall(re.sub("#[0-9a-f]{6}", "", s))] for s in (drawn, there)]
        np.testing.assert_allclose(*numbers, atol=0.11)
        assert len(drawn) < 200_000
    root = ElementTree.fromstring(drawn)
    moving = [e for e in root.iter() if e.tag.rpartition("}")[2].startswith("animate")]
    assert len(moving) > 10
    for element in moving:
        times = [float(time) for time in element.get("keyTimes").split(";")]
        assert (times[0], times[-1]) == (0, 1)
        assert times == sorted(times)
        assert len(times) == len(element.get("values").split(";"))
    # The dots stop where `predict` has teacher and student, between the optimum and the start.
    optimum, start = animation["_OPTIMUM"], animation["_START"]
    places = [float(e.get("cy")) for e in root.iter() if e.tag.endswith("circle")]
    expected = []
    for kernel in animation["SHOWN"]:
        end = predict(kernel, steps, animation["DISTILL_WEIGHT"])
        expected += [
            optimum + (start - optimum) * left for left in (end.student_residual, end.teacher_residual)
        ]
    np.testing.assert_allclose(places, expected * 2, atol=0.06)


def test_contributing_is_followed_to_a_kernel_a_loss_and_a_method(tmp_path):
    assert "top_logit" in execute("\n\n".join(blocks(ROOT / "CONTRIBUTING.md", "python")), tmp_path)
