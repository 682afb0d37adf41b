"""Measure how far an average of LoRA factors is from the average of their products.

    python benchmarks/adapter_products.py

A LoRA layer adds the product BA of two factors. `WMATeacher` averages B and A, and mean(B) mean(A) is not
mean(BA) unless one factor is frozen. A small causal transformer learns 200 key-value facts, and then 100 new
ones through LoRA. The averages of the products are kept exactly, in full matrices. Reported for each rank,
learning rate and kernel, at the end of the run:

- *factors*: ||mean(B) mean(A) - mean(BA)|| / ||mean(BA)||, the norm over all adapted layers;
- *student*: ||B_T A_T - mean(BA)|| / ||mean(BA)||, the distance that the teacher exists for;
- *KL factors* and *KL student*: the mean divergence of their answers from those of the exact average.

A dash stands for a distance from 0, the product of `static`, whose factor B starts at 0.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wmateacher import WMATeacher
from wmateacher.integrations.engine.results import environment, write_json

PACKAGES = ("transformers", "peft")
KERNELS = ("ema(0.95)", "ema(0.99)", "beta(0.5,0.5)", "uniform")
KEYS, VALUES, ANSWER = 64, 64, 3
COLUMNS = ("factors", "student", "kl_factors", "kl_student")


def main() -> None:
    """Measure, print, and write results.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", nargs="+", type=int, default=[4, 16])
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-3, 5e-3])
    parser.add_argument("--kernels", nargs="+", default=list(KERNELS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pretraining", type=int, default=400, help="steps of the base model (default: 400)")
    parser.add_argument("--steps", type=int, default=300, help="steps of each LoRA run (default: 300)")
    parser.add_argument("--output", type=Path, default=Path("runs/adapter-products"))
    arguments = parser.parse_args()
    results: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "environment": environment("cpu", PACKAGES),
        "runs": [],
    }
    for seed in range(arguments.seeds):
        base, new = pretrain(seed, arguments.pretraining)
        for rank in arguments.ranks:
            for rate in arguments.rates:
                results["runs"] += run(base, new, rank, rate, arguments.kernels, arguments.steps, seed)
                write_json(results, arguments.output / "results.json")
                print(results["runs"][-1], flush=True)
    print(table(results))


def facts(count: int, generator: torch.Generator) -> Tensor:
    """Return key-value facts `[count, 3 + ANSWER]`: three tokens of a key, and those of its answer."""
    keys = torch.randperm(KEYS**3, generator=generator)[:count]
    key = torch.stack([keys // KEYS**2, keys // KEYS % KEYS, keys % KEYS], 1)
    return torch.cat([key, KEYS + torch.randint(VALUES, (count, ANSWER), generator=generator)], 1)


def answers(model: nn.Module, rows: Tensor) -> Tensor:
    """Return the logits of the answers' tokens, `[rows, ANSWER, vocabulary]`."""
    return model(input_ids=rows[:, :-1]).logits[:, -ANSWER:]


def loss_of(model: nn.Module, rows: Tensor) -> Tensor:
    """Return the cross-entropy of the answers."""
    return F.cross_entropy(answers(model, rows).flatten(0, 1), rows[:, -ANSWER:].flatten())


def pretrain(seed: int, steps: int) -> tuple[nn.Module, Tensor]:
    """Return a transformer that knows 200 facts, and 100 new facts."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    known, new = facts(300, generator).split([200, 100])
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=KEYS + VALUES, hidden_size=96, num_hidden_layers=3, num_attention_heads=4,
            intermediate_size=256, max_position_embeddings=16,
        )
    )  # fmt: skip
    train(model, known, 1e-3, steps, generator)
    return model, new


def train(
    model: nn.Module, rows: Tensor, rate: float, steps: int, generator: torch.Generator, *after: Any
) -> None:
    """Train the parameters that require grad; call the functions in `after` after every step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate)
    for _ in range(steps):
        batch = rows[torch.randint(len(rows), (48,), generator=generator)]
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
        for call in after:
            call()


def products(model: nn.Module) -> dict[str, Tensor]:
    """Return what each adapted layer adds to its weights, in float64."""
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            found[name] = module.scaling["default"] * (b.detach().double() @ a.detach().double())
    return found


def run(
    base: nn.Module, new: Tensor, rank: int, rate: float, kernels: list[str], steps: int, seed: int
) -> list[dict[str, Any]]:
    """Train one LoRA student with a teacher for each kernel, and return the distances at the end."""
    import peft

    torch.manual_seed(seed)
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    model = peft.get_peft_model(copy.deepcopy(base), config)
    teachers = {kernel: WMATeacher(model, kernel, steps) for kernel in kernels}
    exact = {kernel: products(model) for kernel in kernels}

    def update() -> None:
        now = products(model)
        for kernel, teacher in teachers.items():
            teacher.update()
            for name, value in exact[kernel].items():
                value.lerp_(now[name], teacher.omega)

    train(model, new, rate, steps, torch.Generator().manual_seed(seed), update)
    model.eval()
    with torch.no_grad():
        student, rows = answers(model, new), []
        right = (student.argmax(-1) == new[:, -ANSWER:]).all(1).double().mean().item()
        for kernel, teacher in teachers.items():
            mean = exact[kernel]
            merged = copy.deepcopy(base).eval()
            for name, value in mean.items():
                merged.get_submodule(name.removeprefix("base_model.model.")).weight.add_(value)
            target = answers(merged, new)
            rows.append(
                {
                    "rank": rank, "rate": rate, "kernel": kernel, "seed": seed, "right": right,
                    "factors": distance(products(teacher.module), mean),
                    "student": distance(products(model), mean),
                    "kl_factors": divergence(answers(teacher, new), target),
                    "kl_student": divergence(student, target),
                }
            )  # fmt: skip
    return rows


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float | None:
    """Return the norm of the difference, relative to that of `other`, over all layers; None if that is 0."""
    squares = sum((one[n] - other[n]).square().sum().item() for n in other)
    size = sum(v.square().sum().item() for v in other.values())
    return (squares / size) ** 0.5 if size else None


def divergence(logits: Tensor, target: Tensor) -> float:
    """Return the mean KL divergence of the answers' distributions from the target's, in float64."""
    p, q = target.double().log_softmax(-1), logits.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


def table(results: dict[str, Any]) -> str:
    """Return the means over the seeds, as printed and as shown in benchmarks/results."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in results["runs"]:
        groups.setdefault((row["rank"], row["rate"], row["kernel"]), []).append(row)
    lines = [
        f"{'rank':>4} {'rate':>6} {'kernel':14} {'right %':>8} {'factors':>9} {'student':>9} "
        f"{'KL factors':>11} {'KL student':>11}"
    ]
    for (rank, rate, kernel), rows in groups.items():
        known = {c: [r[c] for r in rows if r[c] is not None] for c in ("right", *COLUMNS)}
        right, *means = (statistics.fmean(values) if values else None for values in known.values())
        cells = [
            f"{'-' if mean is None else format(mean, form):>{width}}"
            for mean, form, width in zip(means, (".4f", ".4f", ".2g", ".2g"), (9, 9, 11, 11), strict=True)
        ]
        lines.append(f"{rank:4} {rate:6g} {kernel:14} {100 * (right or 0):8.1f} {' '.join(cells)}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
