"""What the pages show is what lies in benchmarks/results."""

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
import evidence  # noqa: E402
import frameworks  # noqa: E402
import kernel_gap  # noqa: E402
import memory  # noqa: E402
import posthoc_synthesis  # noqa: E402
import representations  # noqa: E402
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
    if folder == "kernel-gap":
        return kernel_gap.texts(results)
    if folder.startswith("representations-"):
        return representations.texts(results)
    makers = {
        "posthoc-synthesis": posthoc_synthesis.table,
        "adapter-products": adapter_products.table,
        "adapter-teacher": adapter_teacher.table,
        "checkpoint-memory": checkpoint_memory.table,
        "frameworks": frameworks.table,
        "train-throughput": train_throughput.table,
        "kernel-gap-clip": sweep_report.table,
    }
    if folder.startswith("kernel-sweep-"):
        shown = [sweep_report.table, sweep_report.differences]
        if not folder.startswith("kernel-sweep-anytime-"):
            shown.append(sweep_report.correlations)
        return [maker(results) for maker in shown]
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
    if folder in ("dino-digits", "dino-mnist"):
        scores = dict(list(dino.COLUMNS.items())[:4])
        others = [name for name in results["methods"] if name != "ema(0.97)"]
        return [comparison.differences(results, scores, [(n, "ema(0.97)") for n in others])]
    if "mean-teacher" not in folder or folder.endswith(("-eval", "-averaged-buffers")):
        return []
    others = [name for name in results["methods"] if name != "mean-teacher"]
    return [comparison.differences(results, {"test": ("accuracy", 1)}, [(n, "mean-teacher") for n in others])]


@pytest.mark.parametrize("file", RESULTS, ids=lambda p: p.parent.name)
def test_results_are_complete_and_shown(file):
    results = json.loads(file.read_text())
    assert {"config", "command"} & set(results)
    assert "environment" in results
    shown = (ROOT / "benchmarks/results/README.md").read_text()
    for table in tables(file.parent.name):
        assert table in shown


def test_the_guides_memory_of_a_teacher_is_the_computed_one():
    results = json.loads((ROOT / "benchmarks/results/adapter-teacher/results.json").read_text())
    guide = (ROOT / "docs/guides/language-models.md").read_text()
    assert list(results["published"]) == ["1B", "8B", "70B"]
    for name, r in results["published"].items():
        cells = f"{r['model_gib']:.1f} | {r['lora_gib']:.2f} | {r['full_gib']:.1f} | {r['split_gib']:.1f}"
        assert f"| {name} | {cells} |" in guide


@pytest.mark.parametrize(
    ("page", "table"), [("guides/which-kernel.md", evidence.advice), ("claims.md", evidence.claims)]
)
def test_the_pages_of_evidence_are_what_the_results_give(page, table):
    assert table() in (ROOT / "docs" / page).read_text(), "run python benchmarks/evidence.py"


def test_a_verdict_follows_from_the_intervals(monkeypatch):
    runs = {
        "a": [3.0, 3.1, 3.2],
        "b": [1.0, 1.1, 1.2],
        "c": [0.0, 3.0, 6.0],
        "d": [3.0],
        "e": [3.02, 3.12, 3.22],
    }
    found = {name: {(0, seed): value for seed, value in enumerate(values)} for name, values in runs.items()}
    monkeypatch.setattr(evidence, "_runs", lambda folder, name, figure: found.get(name, {}))

    def verdict(*pairs):
        return evidence.Claim("", "", tuple(evidence.OOD("", *pair) for pair in pairs)).judged()

    assert verdict("ab") == "holds"
    assert verdict("ab", "cb") == "holds in direction"
    assert verdict("db") == "holds in direction"
    assert verdict("ab", "ba") == "not seen"
    assert verdict("ea") == "not seen"
    assert verdict("ab", "az") == "not tried"
    assert str(evidence.OOD("", "a", "b")) == "`a` - `b`, OOD: +2.0 ±0.0 (3 pairs)"
    assert str(evidence.OOD("", "d", "b")) == "`d` - `b`, OOD: +2.0 (one run)"
    assert str(evidence.OOD("", "a", "z")) == "`a` - `z`, OOD: not recorded yet"
