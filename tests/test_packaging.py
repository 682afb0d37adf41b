"""The wheel and the source archive: what is in them, and that what they install works."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
HOOK = "import sys, setuptools.build_meta as backend; getattr(backend, 'build_' + sys.argv[1])(sys.argv[2])"
BUILD = (sys.executable, "-c", HOOK)
REPOSITORY = "https://example.org/wmateacher"
pytestmark = pytest.mark.slow


def run(*command, cwd, **environment):
    result = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return result.stdout


def clone(folder, *options):
    """A clone with what is being worked on, not only what is committed."""
    run("git", *options, "clone", "--quiet", str(ROOT), str(folder), cwd=ROOT)
    listed = run("git", "ls-files", "-co", "--exclude-standard", cwd=ROOT).splitlines()
    for name in listed:
        source, target = ROOT / name, folder / name
        if source.is_file() and not source.is_symlink():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    for name in set(run("git", "ls-files", cwd=folder).splitlines()) - set(listed):
        (folder / name).unlink()
    return folder


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """The source archive of the tree, and the wheel that is built of that archive."""
    tree, folder = clone(tmp_path_factory.mktemp("source") / "tree"), tmp_path_factory.mktemp("dist")
    run(*BUILD, "sdist", str(folder), cwd=tree, REPOSITORY_URL=REPOSITORY)
    (source,) = folder.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        archive.extractall(folder, filter="data")
    unpacked = folder / source.name.removesuffix(".tar.gz")
    run(*BUILD, "wheel", str(folder), cwd=unpacked, REPOSITORY_URL=REPOSITORY)
    (wheel,) = folder.glob("*.whl")
    return source, wheel


def installed_names():
    """Every file of the two source folders, where an installation has it."""
    for folder, place in (("wmateacher", "wmateacher"), ("integrations", "wmateacher/integrations")):
        for path in (ROOT / folder).rglob("*"):
            inside = path.relative_to(ROOT / folder)
            linked = folder == "wmateacher" and inside.parts[0] == "integrations"
            if path.suffix in (".py", ".json", ".txt", ".typed") and not linked:
                yield f"{place}/{inside.as_posix()}"


def test_the_wheel_has_every_file_once(archives):
    _, wheel = archives
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        entry_points = next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "wmateacher = wmateacher.cli:main" in archive.read(entry_points).decode()
    assert sorted(names) == sorted(installed_names())


def test_the_source_archive_has_every_file_once(archives):
    source, _ = archives
    with tarfile.open(source) as archive:
        names = [member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()]
    modules = [name for name in names if name.startswith(("wmateacher/", "integrations/"))]
    assert sorted(modules) == sorted(installed_names())


def test_the_readme_of_a_package_index_has_absolute_links(archives):
    with zipfile.ZipFile(archives[1]) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = archive.read(name).decode()
    links = re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset)=\"([^\"]+)\"", metadata)
    assert len(links) > 20
    for target in map("".join, links):
        assert target.startswith("https://"), target
    assert f"]({REPOSITORY}/blob/main/docs/tour.md)" in metadata
    assert f'src="{REPOSITORY}/raw/main/docs/assets/' in metadata
    assert "Description-Content-Type: text/markdown" in metadata
    assert f"Project-URL: Repository, {REPOSITORY}" in metadata


def test_an_editable_install_is_a_path_that_type_checkers_follow(tmp_path):
    tree = clone(tmp_path / "tree")
    run(*BUILD, "editable", str(tmp_path), cwd=tree)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (path,) = (name for name in archive.namelist() if name.endswith(".pth"))
        assert archive.read(path).decode().strip() == str(tree)
    assert (tree / "wmateacher/integrations/timm.py").exists()


WORKS = """
import torch, wmateacher
from wmateacher.integrations.clip.model import build
assert wmateacher.__file__.startswith({target!r}), wmateacher.__file__
towers, tokenizer = build("tiny-vit-16")
teacher = wmateacher.WMATeacher(towers, total_steps=3)
teacher.update()
print(teacher.step)
"""


def test_the_installed_wheel_works(archives, tmp_path):
    target = tmp_path / "site"
    run(*PIP, "install", "--no-deps", "--target", str(target), str(archives[1]), cwd=tmp_path)
    program = WORKS.format(target=str(target))
    assert run(sys.executable, "-c", program, cwd=tmp_path, PYTHONPATH=str(target)).strip() == "1"


def test_a_clone_without_symbolic_links_installs_and_imports(tmp_path):
    tree, target = clone(tmp_path / "tree", "-c", "core.symlinks=false"), tmp_path / "site"
    assert not (tree / "wmateacher/integrations").is_symlink()
    install = ("install", "--no-deps", "--no-build-isolation", "--target", str(target), str(tree))
    run(*PIP, *install, cwd=tmp_path)
    program = "import wmateacher.integrations.timm as m; print(m.__file__)"
    where = run(sys.executable, "-c", program, cwd=tmp_path, PYTHONPATH=str(target)).strip()
    assert where == str(target / "wmateacher/integrations/timm.py")
