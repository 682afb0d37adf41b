"""What the READMEs show is what lies in benchmarks/results."""

import json
import sys
from pathlib import Path

import pytest

from wmateacher.integrations.clip import ablations, plots, recipes
from wmateacher.integrations.dino import experiment as dino
from wmateacher.integrations.engine import comparison
from wmateacher.integrations.engine import tables as reports
from wmateacher.integrations.language import experiment as language
from wmateacher.integrations.mean_teacher import experiment as mean_teacher

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import adapter_products  # noqa: E402
import adapter_teacher  # noqa: E402
import checkpoint_memory  # noqa: E402
import frameworks  # noqa: E402
import memory  # noqa: E402
import posthoc_synthesis  # noqa: E402
import sweep_report  # noqa: E402
import token_losses  # noqa: E402
import train_throughput  # noqa: E402
import update_overhead  # noqa: E402

RESULTS = sorted((ROOT / "benchmarks/results").glob("*/results.json"))
ABLATION = "clip-ablation-"
BY_MODEL = {
    "memory": memory.table,
    "token-losses": token_losses.table,
    "update-overhead": update_overhead.table,
}


def tables(folder):
    """A folder's tables, as its results print."""
    results = json.loads((ROOT / "benchmarks/results" / folder / "results.json").read_text())
    if folder in BY_MODEL:
        return [BY_MODEL[folder](name, rows) for name, rows in results["models"].items()]
    if folder.startswith(ABLATION):
        recipe, what = recipes.get(results["config"]["name"]), folder.removeprefix(ABLATION).split("-")[0]
        steps, tracer = results["config"]["finetune"]["steps"], recipe.method("tracer")
        variants = ablations.variants(what, tracer, steps)
        table = ablations.table(results, what, variants, steps)
        return [table, ablations.compared(results, variants, tracer)] if pretrained_anew(results) else [table]
    makers = {
        "posthoc-synthesis": posthoc_synthesis.table,
        "adapter-products": adapter_products.table,
        "adapter-teacher": adapter_teacher.table,
        "checkpoint-memory": checkpoint_memory.table,
        "frameworks": frameworks.table,
        "train-throughput": train_throughput.table,
        "kernel-sweep-digits": sweep_report.table,
        "kernel-sweep-mnist": sweep_report.table,
    }
    if folder.startswith("lm-"):
        pairs = language.pairs(list(results["methods"]))
        return [
            reports.table(results, language.columns(results["config"]["skills"])),
            comparison.differences(results, language.ACCURACIES, pairs),
        ]
    columns = {"dino": dino.COLUMNS, "mean-teacher": mean_teacher.COLUMNS}
    for task, shown in columns.items():
        if folder.startswith(task):
            return [reports.table(results, shown), *paired(folder, results)]
    table = makers.get(folder, plots.table)(results)
    return [table, plots.compared(results)] if pretrained_anew(results) else [table]


def pretrained_anew(results):
    """Whether results have runs from several pre-trainings."""
    methods = results.get("methods", {}).values()
    return len({run.get("pretraining", 0) for method in methods for run in method.get("runs", [])}) > 1


def paired(folder, results):
    if folder != "mean-teacher-digits":
        return []
    others = [name for name in results["methods"] if name != "mean-teacher"]
    return [comparison.differences(results, {"test": ("accuracy", 1)}, [(n, "mean-teacher") for n in others])]


def test_the_readmes_tables_are_the_measured_ones():
    readme = (ROOT / "README.md").read_text()
    for table in tables("clip-digits"):
        assert table in readme


@pytest.mark.parametrize("file", RESULTS, ids=lambda p: p.parent.name)
def test_results_are_complete_and_shown(file):
    results = json.loads(file.read_text())
    assert {"config", "command"} & set(results)
    assert "environment" in results
    shown = (ROOT / "benchmarks/results/README.md").read_text()
    for table in tables(file.parent.name):
        assert table in shown
