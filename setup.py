"""Tell setuptools what pyproject.toml cannot: where `wmateacher.integrations` is, and the README of an index.

A package index does not have the files that README links to. A build for one is therefore told the address
of the repository in the variable `REPOSITORY_URL`, and all links become absolute.
"""

import os
import re
from pathlib import Path

from setuptools import setup

here = Path(__file__).parent
readme = here.joinpath("README.md").read_text(encoding="utf-8")
repository = os.environ.get("REPOSITORY_URL", "").rstrip("/")
if repository:
    readme = re.sub(r"\]\((?!https?:|#)", f"]({repository}/blob/main/", readme)
    readme = re.sub(r'\b(src|srcset)="(?!https?:)', rf'\1="{repository}/raw/main/', readme)

# Through the symbolic link, so that an editable install is a path, which type checkers and editors follow. A
# clone without symbolic links has a text file in its place.
linked = here / "wmateacher" / "integrations"
setup(
    package_dir={"": "."} if linked.is_dir() else {"": ".", "wmateacher.integrations": "integrations"},
    long_description=readme,
    long_description_content_type="text/markdown",
    project_urls={"Repository": repository} if repository else {},
)
