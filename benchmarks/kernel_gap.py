"""Compare teachers that keep their distance with fixed kernels, also in a run of twice the planned length.

    python benchmarks/kernel_gap.py

A small network has learnt handwritten digits, plain, inverted, noisy and shifted, and then learns to read
mirrored ones. Its loss adds the divergence from a teacher, at one strength for all kernels. `new` is the
accuracy on mirrored digits, `kept` the mean accuracy on what it had learnt before, of the student and of the
teacher. Each seed has data, pre-training and training of its own, which take about a minute.

`gap` keeps a distance of weights. `outputs at 0.1` keeps one of outputs instead: it holds the divergence from
the teacher near 0.1 nats, as adaptive KL control does.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from wmateacher import WMATeacher
from wmateacher.integrations.engine import comparison, tables
from wmateacher.integrations.engine.results import Results, environment

KERNELS = (
    "static", "beta(0.5,0.5)", "power(exponent=-0.5)", "uniform", "ema(0.99)",
    "gap(0.3)", "gap(0.5)", "gap(0.7)", "outputs at 0.05", "outputs at 0.1", "outputs at 0.2",
)  # fmt: skip
OUTPUTS = "outputs at "
BASELINE = "beta(0.5,0.5)"
# A run that turns out twice as long: name -> kernel, planned share of it, share at which it is extended.
LONG = {
    "beta(0.5,0.5), planned": (BASELINE, 1.0, None),
    "beta(0.5,0.5), held": (BASELINE, 0.5, None),
    "beta(0.5,0.5), extended": (BASELINE, 0.5, 0.5),
    **{kernel: (kernel, None, None) for kernel in ("power(exponent=-0.5)", "gap(0.5)", "gap(0.7)", "static")},
}
COLUMNS = {
    "new": ("student.new", 1),
    "kept": ("student.kept", 1),
    "teacher new": ("teacher.new", 1),
    "kept ": ("teacher.kept", 1),
    "weight of W^0": ("start_weight", 3),
    "mean age / T": ("mean_age", 3),
}
PRETRAINING, BATCH, RATE = 1_500, 64, 1e-3


def main() -> None:
    """Run what is missing, print the tables, and write results.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400, help="planned steps (default: 400)")
    parser.add_argument("--distill-weight", type=float, default=1.0)
    parser.add_argument("--output", type=Path, default=Path("runs/kernel-gap"))
    arguments = parser.parse_args()
    steps, weight = arguments.steps, arguments.distill_weight
    config = {
        "steps": steps, "distill_weight": weight, "pretraining": PRETRAINING, "batch": BATCH, "rate": RATE,
    }  # fmt: skip
    torch.set_num_threads(1)
    results = Results(arguments.output, config, environment("cpu", ["scikit-learn"]))
    runs = {kernel: (kernel, steps, steps, None) for kernel in KERNELS}
    for name, (kernel, planned, extended) in LONG.items():
        first = None if planned is None else round(2 * steps * planned)
        runs[f"{name}, long"] = (
            kernel,
            2 * steps,
            first,
            None if extended is None else round(2 * steps * extended),
        )
    for seed in range(arguments.seeds):
        train, test = digits(seed)
        start = pretrained(train, seed)
        for name, plan in runs.items():
            if results.recorded(name, seed) is None:
                results.record(name, {"seed": seed, **run(start, train, test, seed, weight, *plan)})
        print(f"seed {seed} done", flush=True)
    print("\n\n".join(texts(results.content)))


def texts(results: tables.Results) -> list[str]:
    """Return the tables of the results: the planned length, and twice that, each with its differences."""
    found = []
    for ending, baseline in (("", BASELINE), (", long", f"{BASELINE}, planned, long")):
        names = [n for n in results["methods"] if n.endswith(", long") == bool(ending)]
        chosen = {"methods": {n: results["methods"][n] for n in names}}
        found.append(tables.table(chosen, COLUMNS, "kernel"))
        compared = {heading: COLUMNS[heading] for heading in list(COLUMNS)[:4]}
        pairs = [(n, baseline) for n in names if n != baseline]
        found.append(comparison.differences(chosen, compared, pairs))
    return found


Split = tuple[Tensor, Tensor]


def digits(seed: int) -> tuple[Split, Split]:
    """Return images `[n, 8, 8]` in [0, 1] and labels, for training and for testing."""
    data = load_digits()
    order = np.random.default_rng(seed).permutation(len(data.target))
    images = torch.tensor(data.images[order] / 16, dtype=torch.float32)
    labels = torch.tensor(data.target[order])
    return (images[:1200], labels[:1200]), (images[1200:], labels[1200:])


def domains(images: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Return what the network learns before: the images as they are, inverted, noisy and shifted."""
    noise = 0.3 * torch.randn(images.shape, generator=generator)
    return {"plain": images, "inverted": 1 - images, "noisy": images + noise, "shifted": images.roll(1, 2)}


def pretrained(train: Split, seed: int) -> nn.Module:
    """Return a network that has learnt all domains but the mirrored one."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(PRETRAINING):
        images, labels = batch(train, generator)
        mixed = torch.stack([*domains(images, generator).values()])
        kind = torch.randint(len(mixed), (len(images),), generator=generator)
        F.cross_entropy(model(mixed[kind, torch.arange(len(images))]), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def batch(train: Split, generator: torch.Generator) -> Split:
    """Return a random batch."""
    chosen = torch.randint(len(train[1]), (BATCH,), generator=generator)
    return train[0][chosen], train[1][chosen]


def run(
    start: nn.Module, train: Split, test: Split, seed: int, weight: float,
    kernel: str, steps: int, planned: int | None, extended: int | None,
) -> dict[str, Any]:  # fmt: skip
    """Train for `steps` against a teacher that was planned for `planned`, and return the scores."""
    student = copy.deepcopy(start)
    held = float(kernel.removeprefix(OUTPUTS)) if kernel.startswith(OUTPUTS) else None
    teacher = WMATeacher(student, kernel, planned) if held is None else OutputTeacher(student, held)
    optimizer = torch.optim.AdamW(student.parameters(), RATE)
    generator = torch.Generator().manual_seed(1000 + seed)
    for step in range(steps):
        if step == extended:
            teacher.set_total_steps(steps)
        images, labels = batch(train, generator)
        images = images.flip(2)
        logits, targets = student(images), teacher(images)
        apart = F.kl_div(
            logits.log_softmax(1), targets.log_softmax(1), log_target=True, reduction="batchmean"
        )
        (F.cross_entropy(logits, labels) + weight * apart).backward()
        optimizer.step()
        optimizer.zero_grad()
        if isinstance(teacher, OutputTeacher):
            teacher.update(student, float(apart.detach()))
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a teacher that is held at its horizon says so
            teacher.update()
    weights = teacher.trajectory_weights()
    ages = steps - np.arange(len(weights))
    return {
        "student": scores(student, test, seed),
        "teacher": scores(teacher, test, seed),
        "start_weight": float(weights[0]),
        "mean_age": float(weights @ ages) / steps,
    }


class OutputTeacher(nn.Module):
    """An average that moves towards the student so far that their outputs stay about as far apart.

    To first order the divergence falls with the square of the distance, so a step to the share `1 - omega` of
    the distance leaves the share `(1 - omega)^2` of the divergence.

    Args:
        student: The student.
        divergence: The divergence to hold, in nats.
    """

    def __init__(self, student: nn.Module, divergence: float):
        super().__init__()
        self.module, self.divergence = copy.deepcopy(student).requires_grad_(False), divergence
        self._weights = np.ones(1)

    def forward(self, images: Tensor) -> Tensor:
        """Return the average's logits."""
        logits: Tensor = self.module(images)
        return logits

    @torch.no_grad()
    def update(self, student: nn.Module, measured: float) -> None:
        """Move towards the student, whose outputs on the last batch were `measured` nats away."""
        omega = max(0.0, 1 - (self.divergence / measured) ** 0.5) if measured > 0 else 0.0
        for average, parameter in zip(self.module.parameters(), student.parameters(), strict=True):
            average.lerp_(parameter, omega)
        self._weights = np.append(self._weights * (1 - omega), omega)

    def trajectory_weights(self) -> np.ndarray:
        """Return the weight of every state of the student in the average."""
        return self._weights


@torch.no_grad()
def scores(model: nn.Module, test: Split, seed: int) -> dict[str, float]:
    """Return the accuracy in percent on mirrored images, and the mean one on those learnt before."""
    images, labels = test

    def accuracy(shown: Tensor) -> float:
        return 100 * float((model(shown).argmax(1) == labels).float().mean())

    before = domains(images, torch.Generator().manual_seed(seed))
    return {"new": accuracy(images.flip(2)), "kept": float(np.mean([*map(accuracy, before.values())]))}


if __name__ == "__main__":
    main()
