"""Write the tables of evidence in the documentation, from the recorded results.

    python benchmarks/evidence.py

The advice on kernels goes into docs/guides/which-kernel.md, the paper's claims into docs/claims.md. A row
names pairs of methods; each number is the mean of their paired differences with half its 95% t interval, and
a claim's verdict follows from the intervals. A new results folder only has to be named here.
"""

from __future__ import annotations

import json
import re
import statistics
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from wmateacher.integrations.engine.comparison import Run, half_width, is_above_noise
from wmateacher.integrations.engine.tables import look_up

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"


@dataclass(frozen=True)
class Comparison:
    """One method minus another in a figure of recorded results; above 0 is what the row says.

    Attributes:
        folder: The folder of the results.
        one: The name of a method, or of a kernel of a sweep.
        other: The name of the method or kernel that it is compared with.
        figure: The dotted path of the figure in a run's record.
        name: The figure's name for readers.
        digits: The number of digits after the point.
    """

    folder: str
    one: str
    other: str
    figure: str = "ood"
    name: str = "OOD"
    digits: int = 1

    def paired(self) -> dict[Run, float]:
        """Return the differences of all pairs of runs, none where the results are not recorded."""
        ours, theirs = (_runs(self.folder, name, self.figure) for name in (self.one, self.other))
        return {run: ours[run] - theirs[run] for run in ours if run in theirs}

    @property
    def mean(self) -> float:
        """The mean of the differences."""
        return statistics.fmean(self.paired().values())

    def __str__(self) -> str:
        values = list(self.paired().values())
        what = f"`{self.one}` - `{self.other}`, {self.name}"
        if not values:
            return f"{what}: not recorded yet"
        mean = f"{self.mean:+.{self.digits}f}"
        if len(values) == 1:
            return f"{what}: {mean} (one run)"
        return f"{what}: {mean} ±{half_width(values):.{self.digits}f} ({len(values)} pairs)"


def ID(folder: str, one: str, other: str) -> Comparison:
    """Return a comparison of accuracies on the domain of fine-tuning."""
    return Comparison(folder, one, other, "id", "ID")


def OOD(folder: str, one: str, other: str) -> Comparison:
    """Return a comparison of mean accuracies on the shifted domains."""
    return Comparison(folder, one, other)


def ECE(folder: str, one: str, other: str) -> Comparison:
    """Return a comparison of calibration errors under shift; `other` is the better calibrated one."""
    return Comparison(folder, one, other, "ece", "OOD ECE", 3)


@dataclass(frozen=True)
class Advice:
    """A row of the table of advice.

    Attributes:
        run: The kind of run.
        use: The advice.
        evidence: The comparisons that it rests on.
        note: A sentence for the reader, such as a limit of the evidence.
    """

    run: str
    use: str
    evidence: tuple[Comparison, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Claim:
    """A claim of the paper on one task.

    Attributes:
        claim: The claim.
        command: The command that measures it.
        evidence: Comparisons that are above 0 if it holds.
        verdict: The verdict of a claim that is not about differences between runs.
        note: A sentence for the reader, such as a limit of the evidence.
    """

    claim: str
    command: str
    evidence: tuple[Comparison, ...] = ()
    verdict: str = ""
    note: str = ""

    def judged(self) -> str:
        """Return the verdict that the intervals give."""
        if self.verdict:
            return self.verdict
        if not all(comparison.paired() for comparison in self.evidence):
            return "not tried"
        # What is shown as 0.0 has no direction.
        if min(round(c.mean, c.digits) for c in self.evidence) <= 0:
            return "not seen"
        clear = all(is_above_noise(c.paired()) for c in self.evidence)
        return "holds" if clear else "holds in direction"


@cache
def _results(folder: str) -> dict[str, Any]:
    file = RESULTS / folder / "results.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def _runs(folder: str, name: str, figure: str) -> dict[Run, float]:
    """Return a figure of each run by pre-training and seed."""
    results = _results(folder)
    runs = [cell for cell in results.get("cells", ()) if cell["kernel"] == name]
    runs = runs or results.get("methods", {}).get(name, {}).get("runs", [])
    found = {(run.get("pretraining", 0), run["seed"]): look_up(run, figure) for run in runs}
    return {run: value for run, value in found.items() if value is not None}


def _ratio(over: str) -> float:
    """Return how much longer a step of TRACER takes than one of another method."""
    ratios = _results("train-throughput")["ratios"]
    return float(next(r["median"] for r in ratios if (r["of"], r["over"]) == ("tracer", over)))


def _anchor(folder: str) -> str:
    """Return the anchor of the section of the results that shows a folder."""
    text = (RESULTS / "README.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.*)$", text, re.M)
    # A section of its own comes before one of several folders.
    for heading in sorted(headings, key=lambda heading: heading.partition(":")[0] != folder):
        names = (
            heading.partition(":")[0]
            .replace(" and -", f" and {heading.split('-groupnorm')[0]}-")
            .split(" and ")
        )
        if any(re.fullmatch(name.replace("*", ".*"), folder) for name in names):
            return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())
    raise ValueError(f"benchmarks/results/README.md has no section about {folder!r}")


DIGITS, MNIST, ANYTIME = "kernel-sweep-digits", "kernel-sweep-mnist", "kernel-sweep-anytime"
BETA, OPEN = "beta(0.5,0.5)", "power(exponent=-0.5)"
PAPERS_EMA = "ema(0.996,1.0,schedule=cosine)"
MEAN_TEACHER = ("accuracy", "test accuracy")
KNN = ("teacher.knn", "k-NN accuracy")
KEPT = ("student.kept", "kept")
NEW = ("student.new", "new")

ADVICE = (
    Advice(
        "pretrained weights, no BatchNorm, a short run (CLIP on digits and MNIST, 400 steps)",
        "`beta(0.5,0.5)`",
        (
            OOD(DIGITS, BETA, "none"),
            ID(DIGITS, BETA, "static"),
            OOD(DIGITS, BETA, "tail(0.25)"),
            OOD(DIGITS, BETA, "uniform"),
            OOD(MNIST, BETA, "none"),
            ID(MNIST, BETA, "static"),
            OOD(MNIST, BETA, "tail(0.25)"),
            OOD(MNIST, BETA, "uniform"),
            ID(MNIST, BETA, "uniform"),
        ),
        "Three pre-trainings of the digits, one of MNIST. Any kernel that remembers the start does; its "
        "shape is above noise on MNIST only.",
    ),
    Advice(
        "pretrained weights, with BatchNorm, a short run (CLIP on pictograms, 300 steps)",
        f"`{BETA}` with `mode=\"train\"`",
        (
            OOD("clip-emoji", "tracer", "flyp"),
            OOD("clip-emoji", "tracer", "ema"),
            OOD("clip-emoji", "tracer", "static-sd"),
            ID("clip-emoji", "tracer", "static-sd"),
            OOD("clip-ablation-kernel-emoji", BETA, "beta(1.0,1.0)"),
            ID("clip-ablation-kernel-emoji", BETA, "beta(1.0,1.0)"),
        ),
        "`tracer` has this kernel, `ema` a short EMA, `flyp` no teacher. Two pre-trainings.",
    ),
    Advice(
        "pretrained weights, a long run or an open end",
        f"`{OPEN}`",
        (
            *(
                Comparison("kernel-gap", f"{OPEN}, long", f"{BETA}, {plan}, long", *figure)
                for plan in ("planned", "held", "extended")
                for figure in (KEPT, NEW)
            ),
            OOD(DIGITS, OPEN, BETA),
            ID(DIGITS, OPEN, BETA),
            *(of(f"{ANYTIME}-{data}", OPEN, BETA) for data in ("mnist", "emoji") for of in (OOD, ID)),
            *(
                Comparison(f"{ANYTIME}-{data}", OPEN, BETA, figure, figure)
                for data in ("facts", "skill")
                for figure in ("kept", "new")
            ),
        ),
        "In the long runs, a small network learns for twice the planned length. The kernel leans on the "
        "start: a language model learns fewer facts with it. `uniform` has no horizon, either.",
    ),
    Advice(
        "random weights, with BatchNorm and `mode=\"train\"`, a short run (mean teacher, 400 steps)",
        "an EMA with a window of 5% of the run, or `power(sigma_rel=0.1)`",
        tuple(
            Comparison(folder, "mean-teacher", other, *MEAN_TEACHER)
            for folder in ("mean-teacher-digits", "mean-teacher-mnist", "mean-teacher-fashion-mnist")
            for other in ("power(sigma_rel=0.1)", "uniform", BETA)
        ),
        "`mean-teacher` is `ema(0.95)`.",
    ),
    Advice(
        "random weights, with BatchNorm and copied statistics (`mode=\"eval\"`)",
        "a short window only; better: `mode=\"train\"`",
        tuple(
            Comparison(folder, "mean-teacher", other, *MEAN_TEACHER)
            for folder in ("mean-teacher-digits-eval", "mean-teacher-mnist-eval")
            for other in ("power(sigma_rel=0.1)", "uniform", BETA)
        ),
    ),
    Advice(
        "random weights, no BatchNorm (DINO, 1,000 steps; mean teacher with group normalisation)",
        "an EMA with a window of 3 to 5% of the run",
        (
            *(
                Comparison("dino-digits", "ema(0.97)", other, *KNN)
                for other in ("power(sigma_rel=0.1)", "uniform", BETA, PAPERS_EMA)
            ),
            *(Comparison("dino-mnist", "ema(0.97)", other, *KNN) for other in (BETA, PAPERS_EMA)),
            *(
                Comparison("mean-teacher-digits-groupnorm", "mean-teacher", other, *MEAN_TEACHER)
                for other in ("power(sigma_rel=0.1)", "uniform", BETA)
            ),
        ),
    ),
    Advice(
        "random weights, a long run or an open end",
        "`power(sigma_rel=0.1)`",
        note="By its form only: its window grows with the run.",
    ),
    Advice(
        "a language model, all weights, a short run (200 steps)",
        f"`static` or `{BETA}`",
        (
            Comparison("lm-facts", f"sft-teacher {BETA}", "sft", *KEPT),
            Comparison("lm-facts", "sft-teacher static", f"sft-teacher {BETA}", *KEPT),
            Comparison("lm-facts", f"sft-teacher {BETA}", "sft-teacher ema(0.95)", *KEPT),
            Comparison("lm-skill", f"sdft {BETA}", "sdft ema(0.95)", *NEW),
            Comparison("lm-skill", f"sdft {BETA}", "sdft ema(0.95)", *KEPT),
            Comparison("lm-skill", f"sdft {BETA}", "sdft static", *NEW),
        ),
    ),
    Advice(
        "LoRA, a short run (a language model)",
        f"`static` or `{BETA}`",
        (
            Comparison("lm-lora", f"sft-teacher {BETA}", "sft", *KEPT),
            Comparison("lm-lora", f"sft-teacher {BETA}", "sft-teacher static", *KEPT),
        ),
    ),
)  # fmt: skip

ALL = "python examples/clip_tracer.py --methods all --seeds 3"
TERMS = "python examples/clip_tracer.py --ablate terms --seeds 3"
LAMBDA = "python examples/clip_tracer.py --ablate lambda --seeds 3"
KERNEL = "python examples/clip_tracer.py --ablate kernel --seeds 3"
INTERVAL = "python examples/clip_tracer.py --ablate interval --seeds 3"
SWEEP = "python benchmarks/kernel_sweep.py --seeds 3 --pretrainings 3"
ON_MNIST = " --data mnist --data-root DIR"
REPEATED = "python examples/clip_tracer.py --seeds 3 --pretrainings 3"
KERNELS = f"{KERNEL} --pretrainings 3"
EMOJI_KERNEL = (
    "python examples/clip_tracer.py emoji --data-root DIR --ablate kernel --seeds 3 --pretrainings 2"
)
PICTOGRAMS = "python examples/clip_tracer.py emoji --data-root DIR --seeds 3 --pretrainings 2"
TOY = "python examples/clip_tracer.py colored-mnist --data-root DIR"
IMAGENET = (
    "python examples/clip_tracer.py imagenet-vit-b-16 --data-root DATA_ROOT --methods flyp tracer --seeds 3"
)


def _on_both(
    claim: str, command: str, digits: tuple[Comparison, ...], mnist: str = "clip-mnist"
) -> tuple[Claim, ...]:
    """Return a claim on the digits and the same on MNIST."""
    return (
        Claim(f"{claim} (digits)", command, digits),
        Claim(f"{claim} (MNIST)", command + ON_MNIST, tuple(replace(c, folder=mnist) for c in digits)),
    )


def _everywhere(
    claim: str, evidence: tuple[Comparison, ...], repeated: tuple[Comparison, ...]
) -> tuple[Claim, ...]:
    """Return a claim of the main table on digits, MNIST and pictograms.

    Args:
        claim: The claim.
        evidence: The comparisons on the digits from one pre-training, and on MNIST.
        repeated: Those on the digits from three pre-trainings, and on pictograms from two.
    """

    def of(folder: str) -> tuple[Comparison, ...]:
        return tuple(replace(c, folder=folder) for c in repeated)

    return (
        *_on_both(claim, ALL, evidence),
        Claim(f"{claim} (digits, three pre-trainings)", REPEATED, of("clip-digits-pretrainings")),
        Claim(f"{claim} (pictograms)", PICTOGRAMS, of("clip-emoji")),
    )


CLAIMS = (
    *_everywhere(
        "TRACER is better under shift than fine-tuning without a teacher",
        (OOD("clip-digits", "tracer", "ft"), OOD("clip-digits", "tracer", "flyp")),
        (OOD("", "tracer", "flyp"),),
    ),
    *_everywhere(
        "... and better calibrated there",
        (ECE("clip-digits", "flyp", "tracer"),),
        (ECE("", "flyp", "tracer"),),
    ),
    *_everywhere(
        "TRACER is better in distribution and under shift than a static teacher",
        (ID("clip-digits", "tracer", "static-sd"), OOD("clip-digits", "tracer", "static-sd")),
        (ID("", "tracer", "static-sd"), OOD("", "tracer", "static-sd")),
    ),
    *_everywhere(
        "TRACER is better under shift than an EMA teacher",
        (OOD("clip-digits", "tracer", "ema"), OOD("clip-digits", "tracer", "carot")),
        (OOD("", "tracer", "ema"),),
    ),
    Claim(
        "TRACER is better under shift than Lipsum-FT and WiSE-FT (pictograms)",
        f"{PICTOGRAMS} --methods tracer lipsum-ft wise-ft",
        (OOD("clip-emoji", "tracer", "lipsum-ft"), OOD("clip-emoji", "tracer", "wise-ft")),
        note="Lipsum-FT is better in distribution, too.",
    ),
    *_on_both("More weight at the ends of the run is better under shift", KERNEL, (
        OOD("clip-ablation-kernel", BETA, "beta(1.0,1.0)"),
        OOD("clip-ablation-kernel", "beta(1.0,1.0)", "beta(1.5,1.5)"),
    ), "clip-ablation-kernel-mnist"),
    Claim("More weight at the ends of the run is better under shift (digits, three pre-trainings)", KERNELS, (
        OOD("clip-ablation-kernel-digits-pretrainings", BETA, "beta(1.0,1.0)"),
        OOD("clip-ablation-kernel-digits-pretrainings", "beta(1.0,1.0)", "beta(1.5,1.5)"),
    )),
    Claim("... and better calibrated there (digits, three pre-trainings)", KERNELS, (
        ECE("clip-ablation-kernel-digits-pretrainings", "beta(1.0,1.0)", BETA),
        ECE("clip-ablation-kernel-digits-pretrainings", "beta(1.5,1.5)", "beta(1.0,1.0)"),
    )),
    Claim("More weight at the ends of the run is better under shift (pictograms)", EMOJI_KERNEL, (
        OOD("clip-ablation-kernel-emoji", BETA, "beta(1.0,1.0)"),
        OOD("clip-ablation-kernel-emoji", "beta(1.0,1.0)", "beta(1.5,1.5)"),
    )),
    *_on_both("... and costs accuracy in distribution", KERNEL, (
        ID("clip-ablation-kernel", "beta(1.0,1.0)", BETA), ID("clip-ablation-kernel", BETA, "beta(0.2,0.2)"),
    ), "clip-ablation-kernel-mnist"),
    Claim("... and costs accuracy in distribution (digits, three pre-trainings)", KERNELS, (
        ID("clip-ablation-kernel-digits-pretrainings", "beta(1.0,1.0)", BETA),
        ID("clip-ablation-kernel-digits-pretrainings", BETA, "beta(0.2,0.2)"),
    )),
    Claim("... and costs accuracy in distribution (pictograms)", EMOJI_KERNEL, (
        ID("clip-ablation-kernel-emoji", "beta(1.0,1.0)", BETA),
        ID("clip-ablation-kernel-emoji", BETA, "beta(0.2,0.2)"),
    )),
    *_on_both("A larger lambda costs accuracy in distribution", LAMBDA, (
        ID("clip-ablation-lambda", "lambda=0.1", "lambda=1"),
        ID("clip-ablation-lambda", "lambda=1", "lambda=10"),
    ), "clip-ablation-lambda-mnist"),
    *_on_both("Under shift, lambda near 1 is best", LAMBDA, (
        OOD("clip-ablation-lambda", "lambda=0.9", "lambda=0.1"),
        OOD("clip-ablation-lambda", "lambda=0.9", "lambda=10"),
    ), "clip-ablation-lambda-mnist"),
    *(
        Claim(f"The term {term} alone helps under shift", TERMS, (OOD("clip-ablation-terms", term, "none"),))
        for term in ("fd", "crd", "cross_kd", "icl")
    ),
    Claim("All terms together are better under shift than feature distillation alone", TERMS, (
        OOD("clip-ablation-terms", "all", "fd"),
    )),
    Claim("Rare updates cost accuracy in distribution", INTERVAL, (
        ID("clip-ablation-interval", "every 1", "every 40, published clock"),
    )),
    Claim("The teacher of TRACER keeps its distance, that of a fast EMA does not (digits)", SWEEP, (
        Comparison(DIGITS, BETA, "ema(0.9)", "final_gap", "final gap", 4),
    ), note="It depends on the decay: the next row."),
    Claim("An EMA ends on its student, whatever its decay", SWEEP, (
        Comparison(DIGITS, BETA, "ema(0.999)", "final_gap", "final gap", 4),
    ), note="A slow EMA is further from its student than TRACER's teacher."),
    Claim("In the toy experiment, a dynamic teacher forgets less than a penalty and plain fine-tuning", TOY, (
        OOD("colored-mnist", "tracer", "l2-sp"), OOD("colored-mnist", "tracer", "flyp"),
    )),
    Claim("... and less than a static teacher", TOY, (OOD("colored-mnist", "tracer", "static-sd"),)),
    Claim(
        "An epoch of TRACER takes 1.38 times as long as one of direct fine-tuning",
        "python benchmarks/train_throughput.py",
        verdict="not tried",
        note=f"Not on a GPU. On a CPU, a step takes {_ratio('ft'):.2f} times that of FT, "
        f"{_ratio('flyp'):.2f} times that of FLYP "
        f"([train-throughput](results.md#{_anchor('train-throughput')})).",
    ),
    Claim(
        "The bias under a weighted average vanishes",
        "wmateacher kernel 'beta(0.5,0.5)' --total-steps 25030",
        verdict="not seen",
        note="Only in the limit: see [theory](theory.md#what-it-does-not-say).",
    ),
    Claim("The representations stay closer to the pretrained ones than without a teacher (pictograms)",
          "python benchmarks/representations.py RUN DIR/test/*", (
        Comparison("representations-emoji", "tracer", "flyp", "mean", "mean CKA of the layers", 3),
        Comparison("representations-emoji", "tracer", "flyp", "embedding", "CKA of the embedding", 3),
    )),
    Claim("ImageNet and its shifts, ViT-B/16", IMAGENET, verdict="not tried",
          note="We have neither the data nor the weights."),
)  # fmt: skip


def advice() -> str:
    """Return the table of advice."""
    lines = ["| run | kernel | evidence |", "|---|---|---|"]
    for row in ADVICE:
        parts = [row.note] if row.note else []
        if row.evidence:
            differences = f"{len(row.evidence)} differences" if len(row.evidence) > 1 else "One difference"
            folded = _cell(row.evidence, "", "../")
            parts.append(f"<details><summary>{differences}</summary>{folded}</details>")
        else:
            parts.insert(0, "No results yet.")
        lines.append(f"| {row.run} | {row.use} | {' '.join(parts)} |")
    return "\n".join(lines)


def claims() -> str:
    """Return the table of the paper's claims."""
    lines = ["| claim | verdict | evidence | command |", "|---|---|---|---|"]
    for row in CLAIMS:
        evidence = _cell(row.evidence, row.note, "")
        lines.append(f"| {row.claim} | **{row.judged()}** | {evidence} | `{row.command}` |")
    return "\n".join(lines)


def _cell(evidence: tuple[Comparison, ...], note: str, up: str) -> str:
    parts = []
    for folder in dict.fromkeys(comparison.folder for comparison in evidence):
        found = "<br>".join(str(c) for c in evidence if c.folder == folder)
        parts.append(f"[{folder}]({up}results.md#{_anchor(folder)}):<br>{found}")
    return "<br>".join([*parts, *([note] if note else [])])


def main() -> None:
    """Replace the tables between their markers."""
    for page, name, table in (
        ("docs/guides/which-kernel.md", "advice", advice()),
        ("docs/claims.md", "claims", claims()),
    ):
        file = ROOT / page
        marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
        text = file.read_text(encoding="utf-8")
        file.write_text(marked.sub(lambda match: f"{match[1]}\n{table}\n\n{match[2]}", text), "utf-8")  # noqa: B023


if __name__ == "__main__":
    main()
