"""Measure the images per second of fine-tuning CLIP by FT, FLYP and TRACER, and the time of each part.

    python benchmarks/train_throughput.py                      # ViT-B/16, 224 px; on a GPU bf16 and batch 512
    python benchmarks/train_throughput.py --compile-teacher    # TRACER's teacher also compiled

Images and captions are synthetic; the losses are the published ones, with AdamW. Steps of all methods
alternate. Figures are medians over the rounds; a ratio is the median of one method's time over another's in
the same round. `forward+backward` is the student's, `teacher` the teacher's forward pass, `losses` the
distillation's value and gradient with respect to the embeddings (measured outside the step), `optimizer`
AdamW's step, and `update` the update of the average. TRACER takes at least 4/3 of FLYP's time, because a
forward pass is a third of a forward and backward pass. FT takes less than FLYP: it trains the image tower
alone. The paper compares TRACER with FT: 22 and 16 minutes an epoch, a ratio of 1.38.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from clip_steps import Steps

from wmateacher.integrations.clip.model import build
from wmateacher.integrations.engine import tables
from wmateacher.integrations.engine.results import environment, write_json

PACKAGES = ("open_clip_torch", "timm")
FLOOR = 4 / 3
COMPILED = "tracer, teacher compiled"
RATIOS = (("tracer", "flyp"), ("tracer", "ft"), (COMPILED, "flyp"), (COMPILED, "ft"))


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
    parser.add_argument(
        "--compile-teacher", action="store_true", help="also time TRACER with its teacher compiled"
    )
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="on a CPU, measure the process's CPU time, which other work on the machine changes less",
    )
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
    """Return the medians of all methods' steps and parts."""
    torch.manual_seed(0)
    student, tokenizer = build(arguments.model)
    texts = tokenizer([f"a photo of number {i}" for i in range(arguments.batch)])
    steps = Steps(
        student.to(arguments.device), texts, arguments.precision, ("ft", "flyp", "tracer"),
        compiled_teachers=arguments.compile_teacher,
        clock=time.process_time if arguments.cpu_time else time.perf_counter,
    )  # fmt: skip
    names = ("ft", "flyp", "tracer", *((COMPILED,) if arguments.compile_teacher else ()))
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for turn in range(arguments.rounds + 2):
        for name, rounds in taken.items():
            # One teacher serves both rows: the stance decides whether its compiled code runs.
            stance = "default" if name == COMPILED else "force_eager"
            with torch.compiler.set_stance(stance):
                seconds = steps.run("tracer" if name == COMPILED else name)
            # The first two rounds warm up.
            if turn > 1:
                rounds.append(seconds)
    methods = {
        name: {part: statistics.median(r[part] for r in rounds) for part in rounds[0]}
        for name, rounds in taken.items()
    }
    methods["tracer"]["losses"] = steps.losses("tracer")
    return {
        "batch": arguments.batch,
        "seconds": methods,
        "ratios": [
            {
                "of": of,
                "over": over,
                "median": statistics.median(
                    a["step"] / b["step"] for a, b in zip(taken[of], taken[over], strict=True)
                ),
                "fastest": min(a["step"] for a in taken[of]) / min(b["step"] for b in taken[over]),
            }
            for of, over in RATIOS
            if of in taken
        ],
        "floor": FLOOR,
    }


def table(results: dict[str, Any]) -> str:
    """Return a table with one row per method, and the ratios below it."""
    rows = []
    for name, seconds in results["seconds"].items():
        row = {"method": name, "images/s": f"{results['batch'] / seconds['step']:.2f}"}
        for part in ("step", "forward+backward", "teacher", "losses", "optimizer", "update"):
            row[f"{part} ms"] = f"{1e3 * seconds[part]:.1f}" if part in seconds else ""
        rows.append(row)
    ratios = [
        {
            "ratio": f"{r['of']} / {r['over']}",
            "median": f"{r['median']:.3f}",
            "fastest": f"{r['fastest']:.3f}",
        }
        for r in results["ratios"]
    ]
    return (
        f"{tables.aligned(rows)}\n\n{tables.aligned(ratios)}\nfloor of tracer / flyp: {results['floor']:.3f}"
    )


if __name__ == "__main__":
    main()
