"""A training step of CLIP by several methods: images a second, memory, and the time of each part."""

from __future__ import annotations

import gc
from typing import Any

import clip_steps
import torch
from torch import Tensor, nn

from gpu.record import Options, Record
from gpu.report import shown
from wmateacher.integrations.engine import tables

METHODS = ("flyp", "tracer", "ft", "static-sd")
TARGET = 1.30
"""The largest time of a step by TRACER, in steps by FLYP."""
PARTS = ("step", "forward+backward", "teacher", "losses", "optimizer", "update")


def measure(record: Record, options: Options) -> None:
    """Time steps of every method as they are, and then compiled."""
    batch = 4 if options.quick else 512
    record.content["towers"] = "of the quick form" if options.quick else towers_name()
    for compiled in (False, True):
        for method in METHODS[:2] if options.quick else METHODS:
            name = f"{method}, compiled" if compiled else method
            # Compiling takes its time, most of it for the first method.
            made = record.attempt(
                name,
                lambda method=method, batch=batch, compiled=compiled: one(method, batch, options, compiled),
                needs=25 if compiled and not options.quick else 5,
            )
            if made is not None:
                batch = made["batch"]  # the first method may have found that it must be smaller


def one(method: str, batch: int, options: Options, compiled: bool) -> dict[str, Any]:
    """Return the times and the memory of steps by one method, with the largest batch that has room."""
    cuda = torch.device(options.device).type == "cuda"
    while True:
        torch.manual_seed(0)
        if cuda:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            return timed(method, batch, options, compiled)
        except torch.OutOfMemoryError:
            if batch < 64:
                raise
        batch //= 2


def timed(method: str, batch: int, options: Options, compiled: bool) -> dict[str, Any]:
    """Return the times and the memory of steps by one method.

    Raises:
        OutOfMemoryError: If there is no room for them.
    """
    with torch.device(options.device):
        student, texts = build(batch, options)
    backend = ("eager" if options.quick else "inductor") if compiled else None
    precision = "fp32" if torch.device(options.device).type == "cpu" else "bf16"
    steps = clip_steps.Steps(student, texts, precision, (method,), backend)
    rounds, warmup = (1, 1) if options.quick else (10, 3)
    found: dict[str, Any] = {"batch": batch, "seconds": {}}
    found["seconds"] = clip_steps.medians(lambda: steps.run(method), rounds, warmup)
    if options.device != "cpu":
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    if method in steps.criteria:
        found["seconds"]["losses"] = steps.losses(method)
    return found


def build(batch: int, options: Options) -> tuple[nn.Module, Tensor]:
    """Return towers and a text for each image."""
    from gpu.towers import Towers

    if options.quick:
        towers = Towers(
            "vit_tiny_patch16_224", embedding=16, width=16, layers=1, context=4, vocabulary=32,
            img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=1,
        )  # fmt: skip
        return towers, towers.captions(batch)
    try:
        from wmateacher.integrations.clip.model import build as build_clip
    except ImportError:
        towers = Towers()
        return towers, towers.captions(batch)
    student, tokenizer = build_clip("ViT-B-16", device=options.device)
    return student, tokenizer([f"a photo of number {i}" for i in range(batch)])


def towers_name() -> str:
    """Return the library that the towers are from."""
    try:
        import open_clip
    except ImportError:
        return "ViT-B/16 of timm, text tower of torch: open_clip is not installed"
    return f"ViT-B-16 of open_clip {open_clip.__version__}"


def table(results: dict[str, Any]) -> str:
    """Return a table with a row for each method, and the ratios to FLYP."""
    rows = []
    for name, found in results.items():
        milliseconds = {part: 1e3 * seconds for part, seconds in found["seconds"].items()}
        row = {
            "method": name,
            "batch": str(found["batch"]),
            "images/s": f"{found['batch'] / found['seconds']['step']:,.0f}",
        }
        row |= {f"{part} ms": shown(milliseconds, part, ".1f") for part in PARTS}
        rows.append({**row, "peak GiB": shown(found, "peak_gib", ".1f")})
    lines = [tables.aligned(rows)]
    for form in ("", ", compiled"):
        ours, theirs = results.get(f"tracer{form}"), results.get(f"flyp{form}")
        if ours and theirs:
            ratio = ours["seconds"]["step"] / ours["batch"] / (theirs["seconds"]["step"] / theirs["batch"])
            lines.append(f"TRACER / FLYP{form}: {ratio:.3f} (target: at most {TARGET:.2f})")
    return "\n".join(lines)
