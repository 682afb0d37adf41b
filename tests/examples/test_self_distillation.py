import json
import sys
from pathlib import Path

import programs
import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "self_distillation.py"
sys.path.insert(0, str(EXAMPLE.parent))

import self_distillation  # noqa: E402

from wmateacher.integrations.engine import command as command_line  # noqa: E402
from wmateacher.integrations.language import recipes  # noqa: E402
from wmateacher.integrations.language.experiment import Experiment  # noqa: E402

SHORT = (
    *("--steps", "2", "--pretrain-steps", "2", "--width", "16", "--depth", "1", "--questions", "4"),
    *("--kernels", "static"),
)
METHODS = ["start", "sft", "sft-teacher static", "sdft static"]


def test_a_run_is_a_table_and_a_picture_and_continues_where_it_stopped(tmp_path, capsys):
    output = tmp_path / "whole"
    self_distillation.main([*SHORT, "--seeds", "2", "--output", str(output)])
    printed = capsys.readouterr().out
    results = json.loads((output / "results.json").read_text())
    assert list(results["methods"]) == METHODS
    rows = {line.split("  ")[0]: line for line in printed.splitlines()}
    for name, record in results["methods"].items():
        assert f"{record['student']['new']:.1f}" in rows[name]
        assert f"{name} (seed 1): new " in printed
        assert len(record["runs"]) == 2
    assert "sdft static - sft " in printed
    assert (output / "courses.png").read_bytes().startswith(b"\x89PNG")
    self_distillation.main([*SHORT, "--seeds", "1", "--output", str(tmp_path / "parts")])
    self_distillation.main([*SHORT, "--seeds", "2", "--output", str(tmp_path / "parts")])
    assert programs.measured(tmp_path / "parts/results.json") == programs.measured(output / "results.json")


def test_trls_trainers_give_the_same_table_and_finished_runs_are_kept(tmp_path, capsys, monkeypatch):
    arguments = (*SHORT, "--methods", "sdft", "--trainer", "trl", "--output", str(tmp_path))
    self_distillation.main(arguments)
    printed = capsys.readouterr().out
    assert "sdft static (seed 0): new " in printed
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["config"]["trainer"] == "trl"
    assert list(results["methods"]) == ["start", "sdft static"]
    (record,) = results["methods"]["sdft static"]["runs"]
    assert record["trainer"] == "trl"
    assert set(record["student"]) == set(results["methods"]["start"]["student"])
    assert (tmp_path / "courses.png").exists()
    monkeypatch.setattr(Experiment, "train", None)
    self_distillation.main(arguments)
    (row,) = (line for line in printed.splitlines() if line.startswith("sdft static  "))
    assert row in capsys.readouterr().out.splitlines()


@pytest.mark.slow
def test_a_killed_run_continues(tmp_path):
    killed, file = tmp_path / "killed", tmp_path / "killed/results.json"
    victim = programs.Program(EXAMPLE, *SHORT, "--output", killed)
    victim.until(file.exists)
    victim.kill()
    assert len(json.loads(file.read_text())["methods"]) < len(METHODS)
    again = programs.run(EXAMPLE, *SHORT, "--output", killed)
    assert again.returncode == 0, again.stderr
    assert list(json.loads(file.read_text())["methods"]) == METHODS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "sftt"], "unknown method 'sftt'; did you mean 'sft"),
        (["--kernels", "unifrom"], "unknown kernel 'unifrom'; did you mean 'uniform'"),
        (["--old-facts", "2000"], "old_facts=2000 and new_facts=40 need as many pairs of symbols"),
        (["fact"], "unknown recipe 'fact'; did you mean 'facts'"),
    ],
)
def test_bad_input_is_named(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        self_distillation.main([*arguments, "--output", str(tmp_path / "out")])


def test_a_weight_on_the_command_line_is_used_for_every_kernel():
    arguments = ["--methods.sft-teacher.distill-weight", "5"]
    _, recipe = command_line.parse(self_distillation.Options, recipes.RECIPES, "facts", arguments)
    found = recipe.with_kernels(["sft-teacher"], ["static", "ema(0.95)", "uniform"]).methods
    assert [m.distill_weight for m in found.values()] == [5.0, 5.0, 5.0]


@pytest.mark.parametrize("name", ["sft", "sdft"])
def test_a_weight_without_effect_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"distill_weight=5.0 has no effect on '{name}'"):
        self_distillation.main([f"--methods.{name}.distill-weight", "5", "--output", str(tmp_path / "out")])


def test_a_methods_kernel_is_not_an_option(capsys):
    with pytest.raises(SystemExit):  # --kernels replaces it, so it would have no effect
        self_distillation.main(["--methods.sft-teacher.kernel", "uniform"])
    assert "--methods.sft-teacher.kernel" in capsys.readouterr().err


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_recipe_is_the_command_lines_own(name):
    _, recipe = command_line.parse(self_distillation.Options, recipes.RECIPES, "facts", [name])
    assert recipe == recipes.RECIPES[name]
