"""Every code block of the documentation runs, every link leads somewhere, and the site builds."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.S | re.M)


def blocks(page, language):
    return [code for kind, code in FENCE.findall(page.read_text()) if kind == language]


def name(page):
    return str(page.relative_to(DOCS))


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=name)
def test_python_blocks_run_one_after_the_other(page, tmp_path):
    program = tmp_path / "page.py"
    program.write_text("\n\n".join(blocks(page, "python")))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "MPLBACKEND": "agg"}
    done = subprocess.run(
        [sys.executable, str(program)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


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
            source = (ROOT / script).read_text()
            for option in (w for w in words[words.index(script) :] if w.startswith("--")):
                spelled = option.split("=")[0]
                field = spelled.removeprefix("--").replace("-", "_")
                assert f'"{spelled}"' in source or re.search(rf"^    {field}:", source, re.M), line


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_to_files_exist(page):
    for target in re.findall(r"\]\(((?!http)[^)#\s]+)[^)]*\)", page.read_text()):
        assert (page.parent / target).exists(), target
