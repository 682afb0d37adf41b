import json

import pytest

from wmateacher.integrations import runs


def test_environment_names_versions_and_hardware():
    found = runs.environment("cpu", ["timm", "no-such-package"])
    assert found["packages"]["torch"].split(".")[0].isdigit()
    assert found["packages"]["no-such-package"] == "not installed"
    assert found["device"] == "cpu"
    assert json.loads(json.dumps(found)) == found


def test_files_are_whole_or_old(tmp_path):
    file = tmp_path / "deep" / "results.json"
    runs.write_json({"a": 1}, file)
    with pytest.raises(TypeError):
        runs.write_json({"a": object()}, file)
    assert runs.read_json(file) == {"a": 1}
    runs.write_csv(("x", "y"), [(1, 2)], tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_text().split() == ["x,y", "1,2"]
    assert not list(tmp_path.rglob("*.partial"))


def test_damaged_json_says_what_to_do(tmp_path):
    file = tmp_path / "results.json"
    file.write_text('{"a":')
    with pytest.raises(
        ValueError, match=r"results.json is not JSON \(.*\): delete it, or choose another folder"
    ):
        runs.read_json(file)
