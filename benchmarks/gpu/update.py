"""One update of the average, beside other libraries and the bandwidth of the memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import averagers
import torch
import update_overhead
from torch import nn

from gpu import shapes
from gpu.record import Options, Record, UnsupportedError
from wmateacher.integrations.engine import tables

MODELS: dict[str, Callable[[], nn.Module]] = {
    "ViT-B/16": lambda: shapes.Parameters(shapes.clip(16, 768, 12, 512, 512)),
    "3,000 tensors": lambda: shapes.Parameters(shapes.many(3000)),
    "1B language model": lambda: shapes.Parameters(shapes.language_model()),
    "LoRA of ViT-B/16": lambda: shapes.lora(768, 12, 8),
    "ViT-L/14": lambda: shapes.Parameters(shapes.clip(14, 1024, 24, 768, 768)),
}
QUICK: dict[str, Callable[[], nn.Module]] = {
    "small": lambda: shapes.Parameters(shapes.transformer(64, 2, 128)),
    "LoRA": lambda: shapes.lora(64, 2, 4),
}
TARGETS = {"share_of_copy_bandwidth": 0.9, "host_milliseconds": 0.3}
"""The least share of the copy bandwidth, for models of over 10^7 parameters, and the most CPU time."""


def measure(record: Record, options: Options) -> None:
    """Time an update of every model by every helper."""
    device = options.device
    rounds = 2 if options.quick else 20
    size = 2**20 if options.quick else 2**30
    bandwidth = record.attempt("copy bandwidth, GB/s", lambda: update_overhead.copy_bandwidth(device, size))
    for name, make in (QUICK if options.quick else MODELS).items():
        for precision, dtype in averagers.PRECISIONS.items():
            torch.manual_seed(0)
            try:
                with torch.device(device):
                    student = make().to(dtype)
                for parameter in student.parameters():
                    nn.init.normal_(parameter)
            except torch.OutOfMemoryError as error:
                record.fail(f"{name}, {precision}", str(error).splitlines()[0])
                continue
            for helper in averagers.on(device):
                if precision == "fp32" and helper in ("wmateacher, split", "wmateacher, fp32 forward"):
                    continue  # they are for bfloat16
                record.attempt(
                    f"{name}, {precision}: {helper}",
                    lambda student=student, helper=helper: one(student, helper, rounds, device, bandwidth),
                    needs=3,
                )
            del student


def one(student: nn.Module, helper: str, rounds: int, device: str, bandwidth: float | None) -> dict[str, Any]:
    """Return the times and the memory of one helper's update.

    Raises:
        UnsupportedError: If another library's helper cannot average this student.
        RuntimeError: If this library cannot.
    """
    before, cuda = _allocated(device), torch.device(device).type == "cuda"
    measured = update_overhead.measure(student, [helper], rounds, device)
    if helper in measured["errors"]:
        ours = helper.startswith("wmateacher")
        raise (RuntimeError if ours else UnsupportedError)(measured["errors"][helper])
    row = measured["helpers"][helper]
    row |= {"parameters": measured["averaged_parameters"], "tensors": measured["tensors"]}
    if bandwidth:
        row["share_of_copy_bandwidth"] = row["bytes"] / row["milliseconds"] / 1e6 / bandwidth
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        made = averagers.start(helper, student)
        held = _allocated(device)
        torch.cuda.reset_peak_memory_stats()
        if not isinstance(made, str):
            made.update()
            row["held_mib"] = (held - before) / 2**20
            row["peak_mib"] = (torch.cuda.max_memory_allocated() - held) / 2**20
    return row


def _allocated(device: str) -> int:
    return torch.cuda.memory_allocated() if torch.device(device).type == "cuda" else 0


def table(results: dict[str, Any]) -> str:
    """Return a table with a row for each model, precision and helper."""
    rows = []
    for name, row in results.items():
        if not isinstance(row, dict):
            continue
        model, _, helper = name.partition(": ")
        rows.append(
            {
                "student -> fp32": f"{model}: {helper}",
                "tensors": f"{row['tensors']:,}",
                "ms": f"{row['milliseconds']:.3f}",
                "flat lerp ms": f"{row['floor_milliseconds']:.3f}",
                "ratio": f"{row['ratio_to_floor']:.2f}",
                "of copy": f"{row['share_of_copy_bandwidth']:.0%}"
                if "share_of_copy_bandwidth" in row
                else "",
                "CPU ms": f"{row['host_milliseconds']:.3f}",
                "held MiB": f"{row['held_mib']:,.0f}" if "held_mib" in row else "",
                "peak MiB": f"{row['peak_mib']:,.1f}" if "peak_mib" in row else "",
            }
        )
    copied = results.get("copy bandwidth, GB/s")
    lines = [] if copied is None else [f"copy bandwidth {copied:,.0f} GB/s, reads and writes together"]
    lines.append(
        f"targets: at least {TARGETS['share_of_copy_bandwidth']:.0%} of the copy bandwidth for the large "
        f"models, CPU time below {TARGETS['host_milliseconds']} ms"
    )
    return "\n".join([*([tables.aligned(rows)] if rows else []), *lines])
