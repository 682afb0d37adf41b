"""Measure the time and the memory of the losses between logits at the vocabularies of language models.

    python benchmarks/token_losses.py

Each cell runs in a separate process: the loss and its gradient for 256 tokens, by wmateacher and as torch's
functions write it. *Peak* is how far the memory in use rises above the two tensors of logits, the gradient
included. *Seconds* is the best of three, on a CPU of one thread, in processor time, which other processes
hardly change. If liger_kernel is installed and the device is a GPU, its Jensen-Shannon divergence is
measured, too: it takes log-probabilities, so the log-softmax of both sides is included.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import memory
import torch
from torch import Tensor
from torch.nn import functional as F

from wmateacher import losses
from wmateacher.integrations.engine.results import environment, write_json

TOKENS = 256
LOSSES = ("kl", "reverse_kl", "jsd", "ce", "mse", "mse(logits)", "kl(top_k=100)")


def main() -> None:
    """Measure, print, and write results.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocabularies", nargs="+", type=int, default=[32_000, 128_000])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--losses", nargs="+", default=list(LOSSES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("runs/token-losses"))
    arguments = parser.parse_args()
    if arguments.device == "cpu" and not Path("/proc/self/clear_refs").exists():
        parser.error("measuring a CPU's memory needs Linux (/proc/self/clear_refs)")
    results: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "environment": environment(arguments.device, ("liger-kernel",)),
        "models": {},
    }
    # A process for each cell, with its own memory; forks of a server on a CPU, which import nothing again.
    on_host = arguments.device == "cpu"
    context = multiprocessing.get_context("forkserver" if on_host else "spawn")
    context.set_forkserver_preload(["memory", "wmateacher.losses"])
    with context.Pool(1, maxtasksperchild=1) as pool:
        for vocabulary in arguments.vocabularies:
            for dtype in arguments.dtypes:
                name = f"{TOKENS} x {vocabulary:,}, {dtype}"
                cells = [
                    (loss, how, vocabulary, dtype, arguments.device)
                    for loss in arguments.losses
                    for how in ways(loss, arguments.device)
                ]
                rows = pool.map(measure, cells, chunksize=1)
                results["models"][name] = {
                    f"{loss}, {how}": row for (loss, how, *_), row in zip(cells, rows, strict=True)
                }
                write_json(results, arguments.output / "results.json")
                print(f"{table(name, results['models'][name])}\n", flush=True)
    print(f"wrote {arguments.output}/results.json")


def ways(loss: str, device: str) -> list[str]:
    """Return who computes a loss: this library, torch where it is written below, Liger where it runs."""
    found = ["wmateacher"] + (["torch"] if loss in PLAIN else [])
    liger = device != "cpu" and importlib.util.find_spec("liger_kernel") is not None
    return found + (["liger"] if liger and loss == "jsd" else [])


def measure(cell: tuple[str, str, int, str, str]) -> dict[str, float]:
    """Return the seconds and the peak memory of one loss with its gradient."""
    loss, how, vocabulary, dtype, device = cell
    torch.set_num_threads(1)
    compute: Callable[[Tensor, Tensor], Tensor] = (
        liger() if how == "liger" else PLAIN[loss] if how == "torch" else losses.build(loss)
    )

    def job(student: Tensor, teacher: Tensor) -> None:
        torch.autograd.grad(compute(student, teacher), student)

    torch.manual_seed(0)
    student, teacher = (
        torch.randn(TOKENS, vocabulary, device=device).mul_(3).to(getattr(torch, dtype)) for _ in "ab"
    )
    student.requires_grad_()
    job(student[:4], teacher[:4])  # a first use loads libraries that stay in memory
    before = memory.in_use(device)
    memory.reset_peak(device)
    job(student, teacher)
    peak = memory.peak(device)
    seconds = []
    for _ in range(3):
        start = now(device)
        job(student, teacher)
        seconds.append(now(device) - start)
    return {
        "seconds": min(seconds),
        "peak_mib": (peak - before) / memory.MIB,
        "gradient_mib": student.nbytes / memory.MIB,
    }


def now(device: str) -> float:
    """Return the processor's time on a CPU, otherwise the wall clock's after the device is done."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def _log_softmax(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    return student.float().log_softmax(-1), teacher.float().log_softmax(-1)


def _kl(student: Tensor, teacher: Tensor) -> Tensor:
    ours, theirs = _log_softmax(student, teacher)
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True)


def _reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    return _kl(teacher, student)


def _jsd(student: Tensor, teacher: Tensor) -> Tensor:
    ours, theirs = _log_softmax(student, teacher)
    half = torch.tensor(0.5, device=student.device).log()
    mixture = torch.logsumexp(torch.stack([ours + half, theirs + half]), dim=0)
    sides = (F.kl_div(mixture, side, reduction="batchmean", log_target=True) for side in (ours, theirs))
    return sum(sides) / 2  # type: ignore[return-value]


def _ce(student: Tensor, teacher: Tensor) -> Tensor:
    return F.cross_entropy(student.float(), teacher.float().softmax(-1))


def _mse(student: Tensor, teacher: Tensor) -> Tensor:
    return F.mse_loss(student.float().softmax(-1), teacher.float().softmax(-1))


def _logit_mse(student: Tensor, teacher: Tensor) -> Tensor:
    return F.mse_loss(student.float(), teacher.float())


PLAIN = {
    "kl": _kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
    "ce": _ce,
    "mse": _mse,
    "mse(logits)": _logit_mse,
}


def liger() -> Callable[[Tensor, Tensor], Tensor]:
    """Return Liger's Jensen-Shannon divergence of logits."""
    from liger_kernel.transformers import LigerJSD

    divergence = LigerJSD(beta=0.5)
    return lambda student, teacher: divergence(*_log_softmax(student, teacher))


def table(name: str, rows: dict[str, Any]) -> str:
    """Return one size's table, as printed and as shown in benchmarks/results."""
    gradient = max(row["gradient_mib"] for row in rows.values())
    lines = [f"{name}: the gradient has {gradient:,.0f} MiB", f"{'':28} {'seconds':>8} {'peak MiB':>9}"]
    lines += [f"{key:28} {row['seconds']:8.3f} {row['peak_mib']:9.1f}" for key, row in rows.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
