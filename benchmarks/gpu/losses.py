"""The time and the memory of distillation losses at large vocabularies and large batches."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
import update_overhead
from torch import Tensor
from torch.nn import functional as F

from gpu.record import Options, Record
from gpu.report import shown
from wmateacher import losses
from wmateacher.integrations.engine import tables
from wmateacher.losses import PairedEmbeddings

TRACER = "3.90625*fd + crd + icl + cross_kd"


def measure(record: Record, options: Options) -> None:
    """Measure losses of tokens, then those of image-text pairs."""
    device, rounds = options.device, 2 if options.quick else 10
    bandwidth = update_overhead.copy_bandwidth(device, 2**20 if options.quick else 2**30)
    tokens, vocabulary = (8, 512) if options.quick else (4096, 128_000)
    pairs, width = (16, 8) if options.quick else (4096, 512)

    def logits(outputs: int) -> tuple[Tensor, Tensor]:
        return tuple(torch.randn(tokens, outputs, device=device, dtype=torch.bfloat16) for _ in range(2))  # type: ignore[return-value]

    def token_loss(criterion: Callable[[Tensor, Tensor], Tensor], outputs: int) -> dict[str, Any]:
        student, teacher = logits(outputs)
        student.requires_grad_()
        found = cost(lambda: criterion(student, teacher), [student], rounds, device)
        # Both logits are read and the gradient is written.
        return {**found, "floor_milliseconds": 3 * student.nbytes / bandwidth / 1e6}

    for spec in ("kl", "kl(2.0)", "kl(top_k=100)", "reverse_kl", "jsd", "ce", "mse", "mse(logits)"):
        criterion = losses.build(spec)
        record.attempt(
            f"{spec}, {tokens:,} tokens of {vocabulary:,}",
            lambda criterion=criterion: token_loss(criterion, vocabulary),
            needs=2,
        )
    record.attempt(
        f"torch kl_div in float32, {tokens:,} tokens of {vocabulary:,}",
        lambda: token_loss(torch_kl, vocabulary),
        needs=2,
    )
    outputs = 256 if options.quick else 65_536
    criterion = losses.build(f"dino({outputs})").to(device)
    record.attempt(f"dino, {tokens:,} rows of {outputs:,}", lambda: token_loss(criterion, outputs), needs=2)

    def paired_loss(criterion: Callable[..., Tensor]) -> dict[str, Any]:
        student, teacher = embeddings(pairs, width, device), embeddings(pairs, width, device)
        inputs = [t.requires_grad_() for t in student]
        found = cost(lambda: criterion(student, teacher), inputs, rounds, device)
        # One pass over a matrix of logits, read or written.
        return {**found, "passes": found["milliseconds"] * bandwidth * 1e6 / (4 * pairs**2)}

    specs = [TRACER, *losses.available("paired")]
    for spec in specs:
        criterion = losses.build(f"afd({width})" if spec == "afd" else spec).to(device)
        record.attempt(
            f"{spec}, {pairs:,} pairs", lambda criterion=criterion: paired_loss(criterion), needs=2
        )
    record.attempt(
        f"info_nce, {pairs:,} pairs", lambda: paired_loss(lambda s, t: losses.info_nce(*s)), needs=2
    )


def torch_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Return KL(teacher || student) as torch's own functions compute it in float32."""
    ours, theirs = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True)


def embeddings(pairs: int, width: int, device: str) -> PairedEmbeddings:
    """Return random embeddings at CLIP's final logit scale."""
    image, text = (F.normalize(torch.randn(pairs, width, device=device), dim=-1) for _ in range(2))
    return PairedEmbeddings(image, text, torch.tensor(100.0, device=device))


def cost(loss: Callable[[], Tensor], inputs: list[Tensor], rounds: int, device: str) -> dict[str, Any]:
    """Return the median time of a loss with its gradient, and on a GPU the memory above the inputs."""

    def job() -> None:
        torch.autograd.grad(loss(), inputs, allow_unused=True)

    job()
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    times = [update_overhead.timed(job, device) for _ in range(rounds)]
    found = {
        "milliseconds": 1e3 * statistics.median(seconds for seconds, _ in times),
        "host_milliseconds": 1e3 * statistics.median(host for _, host in times),
    }
    if cuda:
        found["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return found


def table(results: dict[str, Any]) -> str:
    """Return a table with a row for each loss."""
    rows = [
        {
            "value and gradient": name,
            "ms": f"{row['milliseconds']:.2f}",
            "floor ms": shown(row, "floor_milliseconds", ".2f"),
            "passes": shown(row, "passes", ".0f"),
            "CPU ms": f"{row['host_milliseconds']:.2f}",
            "peak MiB": shown(row, "peak_mib", ",.0f"),
        }
        for name, row in results.items()
    ]
    return (
        tables.aligned(rows)
        + "\nfloor: both logits read and the gradient written at the bandwidth of a copy"
        + "\npasses: the time, in reads or writes of one float32 matrix of logits of all pairs"
        + "\npeak: memory above that of the inputs"
    )
