"""The wheel: built, installed apart from the source tree, imported and type-checked there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def run(*command, cwd, **environment):
    result = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return result.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with nothing but what the wheel installs."""
    wheels, target = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("site")
    source = tmp_path_factory.mktemp("source") / "tree"
    run("git", "clone", "--quiet", str(ROOT), str(source), cwd=ROOT)
    # What is being worked on, not only what is committed.
    run(
        "bash",
        "-c",
        f"git ls-files -co --exclude-standard | tar -cf - -T - | tar -xf - -C {source}",
        cwd=ROOT,
    )
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
    run(*pip, "wheel", "--no-deps", "--wheel-dir", str(wheels), str(source), cwd=wheels)
    (wheel,) = wheels.glob("wmateacher-*.whl")
    run(*pip, "install", "--no-deps", "--target", str(target), str(wheel), cwd=wheels)
    return target


def test_the_wheel_installs_one_package_with_its_data(installed):
    top = {p.name for p in installed.iterdir() if not p.name.endswith(".dist-info")}
    assert top == {"wmateacher", "bin"}
    assert [p.name for p in (installed / "bin").iterdir()] == ["wmateacher"]  # the command line
    packages = {str(p.parent.relative_to(installed)) for p in installed.rglob("__init__.py")}
    expected = {
        "wmateacher"
        + ("/integrations" if base == "integrations" else "")
        + ("" if rest == "." else f"/{rest}")
        for base in ("wmateacher", "integrations")
        for rest in (str(p.parent.relative_to(ROOT / base)) for p in (ROOT / base).rglob("__init__.py"))
    }
    assert packages == expected
    assert (installed / "wmateacher" / "py.typed").exists()
    configs = {p.name for p in (ROOT / "integrations/clip/configs").glob("*.json")}
    assert {p.name for p in (installed / "wmateacher/integrations/clip/configs").glob("*.json")} == configs


def test_the_installed_copy_works(installed, tmp_path):
    code = f"""
import torch, wmateacher
from wmateacher.integrations.clip.model import build
assert wmateacher.__file__.startswith({str(installed)!r}), wmateacher.__file__
towers, tokenizer = build("tiny-vit-16")
teacher = wmateacher.WMATeacher(towers, total_steps=3)
teacher.update()
print(teacher.step)
"""
    assert run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(installed)).strip() == "1"


def test_types_check(installed):
    out = run(
        sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "-p", "wmateacher",
        cwd=installed,
    )  # fmt: skip
    assert "Success" in out


@pytest.mark.parametrize("example", sorted(p.name for p in (ROOT / "examples").glob("*.py")))
def test_examples_type_check(installed, example):
    config, file = str(ROOT / "pyproject.toml"), str(ROOT / "examples" / example)
    out = run(sys.executable, "-m", "mypy", "--config-file", config, file, cwd=installed)
    assert "Success" in out


def test_style_is_clean():
    run(sys.executable, "-m", "ruff", "check", ".", cwd=ROOT)
    run(sys.executable, "-m", "ruff", "format", "--check", ".", cwd=ROOT)
