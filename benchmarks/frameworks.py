"""Count the lines to change from a framework's own averaging, and time a training step with each.

    python benchmarks/frameworks.py

`lines to change` counts the lines that differ between two complete programs, one with the framework's own
average and one with this library's. Both programs run. A step is a step of the framework's Trainer (for
timm, of a loop like its train.py) on an MLP of 4.2 million parameters with batches of 16. It is so small
that averaging takes a large share of it. The programs of one framework take turns. `ms a step` is the
median over the rounds. `over none` is the median of the ratios to the program without an average, in the
same round.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wmateacher.integrations.engine import tables
from wmateacher.integrations.engine.results import environment, write_json

PACKAGES = ("lightning", "timm", "transformers", "accelerate", "diffusers", "ema-pytorch")
WIDTH, BATCH = 1024, 16

LIGHTNING = """
trainer = L.Trainer(max_steps=steps, {callbacks}**quiet)
trainer.fit(module, loader)
"""
LIGHTNING_OWN = "callbacks=[EMAWeightAveraging(decay=0.999)], "
LIGHTNING_OURS = 'callbacks=[TeacherCallback("ema(0.999)")], '

TIMM = """
average = {average}
for step, (x, y) in enumerate(loader, 1):
    loss = nn.functional.mse_loss(model(x), y)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    average.update(model, step=step)
"""

TRANSFORMERS = """
trainer = Trainer(model, arguments, train_dataset=data{callbacks})
trainer.train()
"""

LOOP = """
average = {average}
for x, y in loader:
    loss = nn.functional.mse_loss(model(x), y)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    {update}
"""
BY_HAND = """with torch.no_grad():
        torch._foreach_lerp_(average, list(model.parameters()), 1 - 0.999)"""

PROGRAMS: dict[str, dict[str, str]] = {
    "lightning": {
        "none": LIGHTNING.format(callbacks=""),
        "EMAWeightAveraging": LIGHTNING.format(callbacks=LIGHTNING_OWN),
        "ours": LIGHTNING.format(callbacks=LIGHTNING_OURS),
    },
    "timm": {
        "none": TIMM.replace("average = {average}\n", "").replace(
            "    average.update(model, step=step)\n", ""
        ),
        "ModelEmaV3": TIMM.format(average="ModelEmaV3(model, decay=0.999)"),
        "ours": TIMM.format(average='ModelWma(model, "ema(0.999)")'),
    },
    "torch": {
        "none": LOOP.replace("average = {average}\n", "").replace("    {update}\n", ""),
        "AveragedModel": LOOP.format(
            average="AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))",
            update="average.update_parameters(model)",
        ),
        "by hand": LOOP.format(average="[p.detach().clone() for p in model.parameters()]", update=BY_HAND),
        "diffusers' EMAModel": LOOP.format(
            average="EMAModel(model.parameters(), decay=0.999)", update="average.step(model.parameters())"
        ),
        "ema-pytorch's EMA": LOOP.format(
            average="EMA(model, beta=0.999, update_after_step=0, update_every=1)", update="average.update()"
        ),
        "ours": LOOP.format(average='WMATeacher(model, "ema(0.999)")', update="average.update()"),
    },
    "transformers": {
        "none": TRANSFORMERS.format(callbacks=""),
        "ours": TRANSFORMERS.format(callbacks=', callbacks=[TeacherCallback("ema(0.999)")]'),
    },
}
"""The programs of each framework: without an average, with the framework's own, and with this library's."""


def main() -> None:
    """Measure, print, and write results.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--frameworks", nargs="+", choices=PROGRAMS, default=list(PROGRAMS))
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps per run (default: 40)")
    parser.add_argument("--rounds", type=int, default=9, help="runs of each program (default: 9)")
    parser.add_argument("--output", type=Path, default=Path("runs/frameworks"))
    arguments = parser.parse_args()
    for name in ("steps", "rounds"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    results: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "environment": environment("cpu", PACKAGES),
        "frameworks": {},
    }
    for framework in arguments.frameworks:
        results["frameworks"][framework] = measure(framework, arguments.steps, arguments.rounds)
        write_json(results, arguments.output / "results.json")
    print(table(results))
    print(f"wrote {arguments.output}/results.json")


def measure(framework: str, steps: int, rounds: int) -> dict[str, dict[str, float | int]]:
    """Return the time of a step of each program, and the number of lines to change from it to ours."""
    programs = PROGRAMS[framework]
    taken: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(rounds + 1):
        for name, program in programs.items():
            seconds = run(framework, program, steps)
            if turn:  # the first is a warm-up
                taken[name].append(seconds / steps)
    none = taken["none"]
    return {
        name: {
            "milliseconds": 1e3 * statistics.median(times),
            "over": statistics.median(t / n for t, n in zip(times, none, strict=True)) - 1,
            "lines": changed(program, programs["ours"]),
        }
        for (name, program), times in zip(programs.items(), taken.values(), strict=True)
    }


def changed(before: str, after: str) -> int:
    """Return the number of lines that are added or replaced."""
    difference = difflib.ndiff(before.splitlines(), after.splitlines())
    return sum(line.startswith("+ ") for line in difference)


def run(framework: str, program: str, steps: int) -> float:
    """Run a program, and return the seconds that it takes."""
    names = SETUPS[framework](steps)
    code = compile(program, f"<{framework}>", "exec")
    begin = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        exec(code, names)
    return time.perf_counter() - begin


def network() -> nn.Module:
    """Return an MLP with four square layers."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(4)))


def batches(steps: int) -> Any:
    """Return a loader of `steps` batches of inputs and targets."""
    data = torch.randn(steps * BATCH, WIDTH)
    dataset = torch.utils.data.TensorDataset(data, data)
    return torch.utils.data.DataLoader(dataset, batch_size=BATCH)


def lightning_names(steps: int) -> dict[str, Any]:
    """Return the names that the Lightning programs use."""
    import lightning as L
    from lightning.pytorch.callbacks import EMAWeightAveraging

    from wmateacher.integrations.lightning import TeacherCallback

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def training_step(self, batch: Any, index: int) -> Any:
            return nn.functional.mse_loss(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), 1e-3)

    for logger in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    quiet = {
        "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
        "enable_model_summary": False,
    }  # fmt: skip
    return {
        "L": L, "module": Module(), "loader": batches(steps), "steps": steps, "quiet": quiet,
        "EMAWeightAveraging": EMAWeightAveraging, "TeacherCallback": TeacherCallback,
    }  # fmt: skip


def timm_names(steps: int) -> dict[str, Any]:
    """Return the names that the loops like timm's train.py use."""
    from timm.utils import ModelEmaV3

    from wmateacher.integrations.timm import ModelWma

    model = network()
    return {
        "nn": nn, "model": model, "loader": batches(steps), "ModelEmaV3": ModelEmaV3, "ModelWma": ModelWma,
        "optimizer": torch.optim.AdamW(model.parameters(), 1e-3),
    }  # fmt: skip


def torch_names(steps: int) -> dict[str, Any]:
    """Return the names that the plain loops use."""
    from diffusers.training_utils import EMAModel
    from ema_pytorch import EMA
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    from wmateacher import WMATeacher

    model = network()
    return {
        "torch": torch, "nn": nn, "model": model, "loader": batches(steps), "WMATeacher": WMATeacher,
        "EMAModel": EMAModel, "EMA": EMA, "AveragedModel": AveragedModel,
        "get_ema_multi_avg_fn": get_ema_multi_avg_fn,
        "optimizer": torch.optim.AdamW(model.parameters(), 1e-3),
    }  # fmt: skip


def transformers_names(steps: int) -> dict[str, Any]:
    """Return the names that the transformers programs use."""
    from transformers import Trainer, TrainingArguments

    from wmateacher.integrations.huggingface import TeacherCallback

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            logits = self.net(x)
            return {"loss": nn.functional.mse_loss(logits, labels), "logits": logits}

    x = torch.randn(steps * BATCH, WIDTH)
    arguments = TrainingArguments(
        "runs/frameworks/transformers", max_steps=steps, per_device_train_batch_size=BATCH, use_cpu=True,
        report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    return {
        "Trainer": Trainer, "model": Model(), "arguments": arguments, "TeacherCallback": TeacherCallback,
        "data": [{"x": row, "labels": row} for row in x],
    }  # fmt: skip


SETUPS: dict[str, Callable[[int], dict[str, Any]]] = {
    "lightning": lightning_names,
    "timm": timm_names,
    "torch": torch_names,
    "transformers": transformers_names,
}


def table(results: dict[str, Any]) -> str:
    """Return a table with a row per framework and average."""
    return tables.aligned(
        [
            {
                "framework": framework,
                "average": name,
                "ms a step": f"{row['milliseconds']:.2f}",
                "over none": "" if name == "none" else f"{100 * row['over']:+.0f}%",
                "lines to change": "" if name == "ours" else str(row["lines"]),
            }
            for framework, rows in results["frameworks"].items()
            for name, row in rows.items()
        ]
    )


if __name__ == "__main__":
    main()
