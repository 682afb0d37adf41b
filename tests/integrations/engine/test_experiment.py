"""The experiment that all tasks share: looked up, resumed, recorded."""

import json
from dataclasses import dataclass, replace
from functools import partial

import pytest

from wmateacher.integrations.engine import console
from wmateacher.integrations.engine.experiment import Experiment, Outcome, Table


@dataclass(frozen=True)
class Recipe:
    steps: int = 3
    summary: str = ""
    checkpoint_every: int = 1


class Doubling(Experiment[Recipe]):
    trained = ()

    def train(self, name, seed):
        self.trained += ((name, seed),)
        rows = [(step, 2.0 * step) for step in range(self.recipe.steps)]
        return Outcome({"accuracy": float(10 + seed)}, {"curves": Table(("step", "accuracy"), rows)})


def test_a_run_is_recorded_with_its_tables_and_not_repeated(tmp_path):
    experiment = Doubling(Recipe(), tmp_path)
    record = experiment.run("a(1,2)", 1)
    assert record == {"seed": 1, "accuracy": 11.0}
    assert experiment.file("curves", "a(1,2)", 1).read_text().split() == [
        "step,accuracy",
        "0,0.0",
        "1,2.0",
        "2,4.0",
    ]
    again = Doubling(Recipe(), tmp_path)
    assert again.run("a(1,2)", 1) == record
    assert again.trained == ()
    again.run("a(1,2)", 0)
    assert again.trained == (("a(1,2)", 0),)
    assert json.loads((tmp_path / "results.json").read_text())["methods"]["a(1,2)"]["accuracy"] == 10.5


class Failing(Doubling):
    def train(self, name, seed):
        if name == "bad":
            raise ImportError("needs a package")
        return super().train(name, seed)


@pytest.mark.parametrize("there", ["", "checkpoints", "notes"])
def test_a_run_that_cannot_start_leaves_no_results(tmp_path, there):
    output = tmp_path / "out"
    (output / there).mkdir(parents=True)
    with pytest.raises(ImportError):
        Failing(Recipe(), output).run("bad")
    assert (output / "results.json").exists() == (there == "checkpoints")  # from which a run continues
    assert output.exists() == bool(there)
    run = Failing(Recipe(), output)
    run.run("good")
    with pytest.raises(ImportError):
        run.run("bad")
    assert list(json.loads((output / "results.json").read_text())["methods"]) == ["good"]


def test_a_folder_belongs_to_one_configuration_but_not_to_its_checkpoint_interval(tmp_path):
    Doubling(Recipe(), tmp_path).run("a")
    Doubling(replace(Recipe(), checkpoint_every=7, summary="other words"), tmp_path)
    with pytest.raises(ValueError, match=r"another configuration \(different: steps\)"):
        Doubling(Recipe(steps=4), tmp_path)


def test_every_method_and_seed_has_a_checkpoint_and_a_label_of_its_own(tmp_path):
    experiment = Doubling(Recipe(), tmp_path, progress=False)
    options = [experiment.loop_options(name, seed) for name in ("a", "a b", "a-b") for seed in (0, 1)]
    assert len({o["checkpoint"] for o in options}) == 6
    assert options[1] == {
        "checkpoint": tmp_path / "checkpoints/a-1.pt",
        "label": "a (seed 1)",
        "progress": False,
    }


def test_all_methods_run_before_the_next_start_and_seed(tmp_path, capsys):
    experiment = Doubling(Recipe(), tmp_path, progress=False)

    def start(number):
        experiment.pretraining = number

    console.conduct(
        experiment, ("a", "b"), 2, lambda r: f"{r['accuracy']:.0f}", [partial(start, n) for n in (0, 1)]
    )
    assert capsys.readouterr().out.splitlines() == [
        "a (seed 0): 10", "b (seed 0): 10", "a (seed 0, pre-training 1): 10", "b (seed 0, pre-training 1): 10",
        "a (seed 1): 11", "b (seed 1): 11", "a (seed 1, pre-training 1): 11", "b (seed 1, pre-training 1): 11",
    ]  # fmt: skip
    assert experiment.loop_options("a", 1)["checkpoint"] == tmp_path / "checkpoints/a-p1-1.pt"
    assert experiment.file("curves", "a", 1).exists()
