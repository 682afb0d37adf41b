"""The issue forms and the workflows: they parse, and agree with what the project says of itself."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOWS = {p.stem: p.read_text() for p in (ROOT / ".github/workflows").glob("*.yml")}
FORMS = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))
PROJECT = (ROOT / "pyproject.toml").read_text()


def jobs(name):
    return yaml.safe_load(WORKFLOWS[name])["jobs"]


def test_continuous_integration_runs_on_every_python_that_the_package_claims():
    claimed = re.findall(r"Programming Language :: Python :: (3\.\d+)", PROJECT)
    assert jobs("ci")["quick"]["strategy"]["matrix"]["python"] == claimed
    assert f'requires-python = ">={claimed[0]}"' in PROJECT


def test_a_release_is_published_after_its_tests_and_without_a_token():
    release = jobs("release")
    assert set(release["publish"]["needs"]) == {"test", "build"}
    assert release["publish"]["permissions"] == {"id-token": "write"}
    assert "secrets." not in WORKFLOWS["release"]
    assert (ROOT / release["test"]["uses"]).exists()
    assert "workflow_call:" in WORKFLOWS["ci"]


@pytest.mark.parametrize("name", WORKFLOWS)
def test_every_job_ends_in_time_and_runs_files_that_exist(name):
    for job in jobs(name).values():
        assert "uses" in job or "timeout-minutes" in job
        commands = "\n".join(step.get("run", "") for step in job.get("steps", []))
        for script in re.findall(r"bash (\S+)", commands):
            assert (ROOT / script).exists()


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.stem)
def test_an_issue_form_asks_questions(form):
    content = yaml.safe_load(form.read_text())
    assert content["name"]
    assert content["description"]
    assert content["body"]
    for question in content["body"]:
        assert question["type"] in {"textarea", "input", "dropdown", "checkboxes"}
        assert question["attributes"]["label"]
