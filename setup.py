"""Where setuptools finds `wmateacher.integrations`; everything else is in pyproject.toml."""

from pathlib import Path

from setuptools import setup

# Through the symbolic link, so that an editable install is a path, which type checkers and editors follow. A
# clone without symbolic links has a text file in its place.
linked = Path(__file__).with_name("wmateacher") / "integrations"
setup(package_dir={"": "."} if linked.is_dir() else {"": ".", "wmateacher.integrations": "integrations"})
