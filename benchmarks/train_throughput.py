"""Measure the images per second of CLIP fine-tuning by FLYP and TRACER, and the time of each part of a step.

    python benchmarks/train_throughput.py                      # ViT-B/16, 224 px; on a GPU bf16 and batch 512

Images and captions are synthetic; the losses are the published ones, with AdamW. Steps of both methods
alternate. Figures are medians over the rounds; the ratio is the median of TRACER's time over FLYP's in the
same round. `forward+backward` is the student's, `teacher` the teacher's forward pass, `losses` the
distillation's value and gradient with respect to the embeddings (measured outside the step), `optimizer`
AdamW's step, and `update` the update of the average. TRACER takes at least 4/3 of FLYP's time, because a
forward pass is a third of a forward and backward pass.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from clip_steps import Steps

from wmateacher.integrations.clip.model import build
from wmateacher.integrations.engine import tables
from wmateacher.integrations.engine.results import environment, write_json

PACKAGES = ("open_clip_torch", "timm")
FLOOR = 4 / 3


def main() -> None:
    """Measure, print the table, and write results.json."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="ViT-B-16", help="any that open_clip builds (default: ViT-B-16)")
    parser.add_argument("--batch", type=int, default=512 if gpu else 8, help="512 on a GPU, else 8")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16" if gpu else "fp32")
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each method (default: 9)")
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--output", type=Path, default=Path("runs/train-throughput"))
    arguments = parser.parse_args()
    for name in ("batch", "rounds"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    results: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "config": {k: str(v) for k, v in vars(arguments).items() if k != "output"},
        "environment": environment(arguments.device, PACKAGES),
        **measure(arguments),
    }
    write_json(results, arguments.output / "results.json")
    print(table(results))
    print(f"wrote {arguments.output}/results.json")


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the medians of both methods' steps and parts."""
    torch.manual_seed(0)
    student, tokenizer = build(arguments.model)
    texts = tokenizer([f"a photo of number {i}" for i in range(arguments.batch)])
    steps = Steps(student.to(arguments.device), texts, arguments.precision, ("flyp", "tracer"))
    taken: dict[str, list[dict[str, float]]] = {"flyp": [], "tracer": []}
    for turn in range(arguments.rounds + 2):
        for name, rounds in taken.items():
            seconds = steps.run(name)
            # The first two rounds warm up.
            if turn > 1:
                rounds.append(seconds)
    methods = {
        name: {part: statistics.median(r[part] for r in rounds) for part in rounds[0]}
        for name, rounds in taken.items()
    }
    methods["tracer"]["losses"] = steps.losses("tracer")
    ratios = [t["step"] / f["step"] for t, f in zip(taken["tracer"], taken["flyp"], strict=True)]
    return {
        "batch": arguments.batch,
        "seconds": methods,
        "ratio": statistics.median(ratios),
        "fastest_ratio": min(t["step"] for t in taken["tracer"]) / min(f["step"] for f in taken["flyp"]),
        "floor": FLOOR,
    }


def table(results: dict[str, Any]) -> str:
    """Return a table with one row per method, and the ratio below it."""
    rows = []
    for name, seconds in results["seconds"].items():
        row = {"method": name, "images/s": f"{results['batch'] / seconds['step']:.2f}"}
        for part in ("step", "forward+backward", "teacher", "losses", "optimizer", "update"):
            row[f"{part} ms"] = f"{1e3 * seconds[part]:.1f}" if part in seconds else ""
        rows.append(row)
    return tables.aligned(rows) + (
        f"\nTRACER / FLYP: {results['ratio']:.3f}, fastest steps {results['fastest_ratio']:.3f}, "
        f"floor {results['floor']:.3f}"
    )


if __name__ == "__main__":
    main()
