import json

import pytest

from wmateacher.integrations.engine.results import Results, environment, read_json, write_csv, write_json


def test_environment_names_versions_and_hardware():
    found = environment("cpu", ["timm", "no-such-package"])
    assert found["packages"]["torch"].split(".")[0].isdigit()
    assert found["packages"]["no-such-package"] == "not installed"
    assert found["device"] == "cpu"
    assert json.loads(json.dumps(found)) == found


def test_files_are_whole_or_old(tmp_path):
    file = tmp_path / "deep" / "results.json"
    write_json({"a": 1}, file)
    with pytest.raises(TypeError):
        write_json({"a": object()}, file)
    assert read_json(file) == {"a": 1}
    write_csv(("x", "y"), [(1, 2)], tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_text().split() == ["x,y", "1,2"]
    assert not list(tmp_path.rglob("*.partial"))


def test_damaged_json_says_what_to_do(tmp_path):
    file = tmp_path / "results.json"
    file.write_text('{"a":')
    with pytest.raises(
        ValueError, match=r"results.json is not JSON \(.*\): delete it, or choose another folder"
    ):
        read_json(file)


def test_records_of_several_seeds_become_means_and_deviations(tmp_path):
    results = Results(tmp_path, {"sizes": (1, 2)}, {})
    results.record("a", {"seed": 0, "id": 90.0, "shift": {"x": 1.0}, "note": "fine", "gap": None})
    results.record("a", {"seed": 1, "id": 94.0, "shift": {"x": 3.0}, "note": "fine", "gap": None})
    read = Results(tmp_path, {"sizes": (1, 2)}, {})
    assert read.content == results.content == json.loads((tmp_path / "results.json").read_text())
    mean = read.content["methods"]["a"]
    assert (mean["id"], mean["shift"], mean["gap"], mean["note"]) == (92, {"x": 2}, None, None)
    assert mean["std"]["id"] == pytest.approx(8**0.5)
    assert mean["std"]["shift"]["x"] == pytest.approx(2**0.5)
    assert read.recorded("a", 1)["note"] == "fine"
    assert read.recorded("a", 2) is read.recorded("b", 0) is None


def test_runs_of_two_pretrainings_are_told_apart_and_one_without_a_number_is_of_the_first(tmp_path):
    results = Results(tmp_path, {}, {})
    results.record("a", {"seed": 0, "id": 1.0})
    results.record("a", {"seed": 0, "pretraining": 1, "id": 3.0})
    assert results.recorded("a", 0)["id"] == results.recorded("a", 0, 0)["id"] == 1
    assert results.recorded("a", 0, 1)["id"] == 3
    assert results.recorded("a", 0, 2) is None
    mean = results.content["methods"]["a"]
    assert (mean["id"], "pretraining" in mean, "pretraining" in mean["std"]) == (2, False, False)


def test_results_of_another_configuration_are_refused(tmp_path):
    Results(tmp_path, {"steps": 3, "seed": 0}, {}).record("a", {"seed": 0})
    with pytest.raises(
        ValueError,
        match=r"holds results of another configuration \(different: steps\): choose another folder",
    ):
        Results(tmp_path, {"steps": 4, "seed": 0}, {})


def test_a_folder_is_claimed_before_anything_is_trained(tmp_path):
    where = environment("cpu")
    results = Results(tmp_path / "out", {"a": 1}, where)
    assert not (tmp_path / "out").exists()
    results.claim()
    with pytest.raises(ValueError, match=r"holds results of another configuration \(different: a\)"):
        Results(tmp_path / "out", {"a": 2}, where)
    results.record("m", {"seed": 0, "x": 1.0})
    Results(tmp_path / "out", {"a": 1}, where).claim()
    assert Results(tmp_path / "out", {"a": 1}, where).recorded("m", 0) == {"seed": 0, "x": 1.0}


def test_what_differs_is_named_and_what_changes_no_result_may(tmp_path):
    where = environment("cpu")
    before = {"fit": {"rate": 1, "save": 5}, "many": {str(i): i for i in range(9)}}
    Results(tmp_path, before, where, ["save"]).claim()
    Results(tmp_path, {**before, "fit": {"rate": 1, "save": 7}}, where, ["save"])
    with pytest.raises(ValueError, match=r"\(different: fit.rate\): choose another folder"):
        Results(tmp_path, {**before, "fit": {"rate": 2, "save": 5}}, where, ["save"])
    with pytest.raises(ValueError, match=r"\(different: many.0, many.1, many.2, many.3, many.4 and 4 more\)"):
        Results(tmp_path, {**before, "many": {str(i): -1 for i in range(9)}}, where, ["save"])
