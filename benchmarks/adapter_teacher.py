"""Measure what a teacher costs beside a LoRA student of some 110M parameters.

    python benchmarks/adapter_teacher.py

The student is a randomly initialised Llama with LoRA on all linear layers. Each teacher is measured in a
separate process: what it adds to the resident memory (*held*), how far the memory rises in the first two
updates (*peak*), and the CPU time, on one thread, of an update and of a forward pass of the teacher. A second
table computes the memory of teachers of published Llama configurations from their tensors' shapes. Runs on
Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wmateacher import WMATeacher
from wmateacher.integrations.engine.results import environment, write_json

PACKAGES = ("transformers", "peft", "trl")
MIB, GIB = 2**20, 2**30
SMALL = {
    "vocab_size": 32_000, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 2048, "tie_word_embeddings": True,
}  # fmt: skip
# The `config.json` files of meta-llama/Llama-3.2-1B, Llama-3.1-8B and Llama-3.1-70B.
PUBLISHED = {
    "1B": {
        "vocab_size": 128_256, "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 8192, "tie_word_embeddings": True,
    },
    "8B": {
        "vocab_size": 128_256, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 14_336,
    },
    "70B": {
        "vocab_size": 128_256, "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "intermediate_size": 28_672,
    },
}  # fmt: skip
# An update, and a forward pass of the teacher.
Helper = tuple[Callable[[], object], Callable[[torch.Tensor], object]]


def main() -> None:
    """Measure, print, and write results.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--helpers", nargs="+", choices=HELPERS, default=list(HELPERS))
    parser.add_argument("--rank", type=int, default=16, help="rank of the adapter (default: 16)")
    parser.add_argument(
        "--layers", type=int, default=SMALL["num_hidden_layers"], help="layers of the student"
    )
    parser.add_argument("--updates", type=int, default=30, help="timed updates (default: 30)")
    parser.add_argument("--output", type=Path, default=Path("runs/adapter-teacher"))
    arguments = parser.parse_args()
    if not Path("/proc/self/clear_refs").exists():
        parser.error("measuring memory needs Linux (/proc/self/clear_refs)")
    cells = [(name, arguments.rank, arguments.layers, arguments.updates) for name in arguments.helpers]
    # A fresh process for each cell: what another has freed would be used again unseen.
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        rows = dict(zip(arguments.helpers, pool.map(measure, cells, chunksize=1), strict=True))
    results: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "environment": environment("cpu", PACKAGES),
        "rank": arguments.rank,
        "helpers": rows,
        "published": {name: computed(config, arguments.rank) for name, config in PUBLISHED.items()},
    }
    write_json(results, arguments.output / "results.json")
    print(table(results))


def student(config: dict[str, Any], rank: int) -> Any:
    """Return a Llama of a configuration, with LoRA on all linear layers of its blocks."""
    import peft
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**config))
    return peft.get_peft_model(base, peft.LoraConfig(r=rank, target_modules="all-linear"))


def _teacher(model: nn.Module, **options: Any) -> Helper:
    teacher = WMATeacher(model, "ema(0.95)", **options)
    return teacher.update, lambda tokens: teacher(input_ids=tokens)


def _trl(model: Any) -> Helper:
    from transformers import TrainerControl, TrainerState, TrainingArguments
    from trl.experimental.sdft.teacher_sync import PEFTAdapterEMACallback
    from trl.trainer.utils import use_adapter

    callback = PEFTAdapterEMACallback(model, update_rate=0.05)
    run = TrainingArguments(use_cpu=True), TrainerState(), TrainerControl()
    callback.on_train_begin(*run)

    @torch.no_grad()
    def forward(tokens: torch.Tensor) -> None:
        with use_adapter(model, adapter_name="teacher"):
            model(input_ids=tokens)

    return lambda: callback.on_step_end(*run), forward


HELPERS: dict[str, Callable[[Any], Helper]] = {
    "WMATeacher": _teacher,
    "TRL's adapter EMA": _trl,
    "WMATeacher(frozen='copy')": lambda model: _teacher(model, frozen="copy"),
}


def measure(cell: tuple[str, int, int, int]) -> dict[str, float]:
    """Return the memory of one teacher in MiB and its times in ms."""
    name, rank, layers, updates = cell
    torch.set_num_threads(1)
    make, tokens = HELPERS[name], torch.arange(128)[None]
    tiny = make(student({**SMALL, "hidden_size": 48, "num_hidden_layers": 1, "intermediate_size": 32}, 2))
    tiny[0]()  # a first use loads libraries that stay in memory
    model = student({**SMALL, "num_hidden_layers": layers}, rank)
    model(input_ids=tokens).logits.mean().backward()  # what the student's own passes need is not counted
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad) / MIB
    total = sum(p.numel() for p in model.parameters())
    before = _in_use()
    update, forward = make(model)
    held = _in_use()
    Path("/proc/self/clear_refs").write_text("5")
    update()
    update()
    peak = _status("VmHWM")
    return {
        "parameters": total,
        "trained_mib": trained,
        "held_mib": (held - before) / MIB,
        "peak_mib": (peak - held) / MIB,
        "update_ms": _milliseconds(update, updates),
        "forward_ms": _milliseconds(lambda: forward(tokens), max(3, updates // 4)),
    }


def computed(config: dict[str, Any], rank: int) -> dict[str, float]:
    """Return the GiB of a bf16 model, and of its teachers with and without LoRA."""
    with torch.device("meta"):
        model = student(config, rank)
    adapter = sum(p.numel() for p in model.parameters() if p.requires_grad)
    base = sum(p.numel() for p in model.parameters()) - adapter
    # peft keeps adapters in float32, in which they are averaged. A bf16 student's teacher has bf16 weights
    # for its forward pass, and the float32 average beside them in 4 bytes, or 2 with dtype="split".
    return {
        "parameters": base,
        "adapter": adapter,
        "model_gib": 2 * base / GIB,
        "lora_gib": 4 * adapter / GIB,
        "full_gib": 6 * base / GIB,
        "split_gib": 4 * base / GIB,
    }


def _milliseconds(call: Callable[[], object], times: int) -> float:
    taken = []
    for _ in range(times):
        started = time.process_time()
        call()
        taken.append(1000 * (time.process_time() - started))
    return statistics.median(taken)


def _in_use() -> int:
    """Return the resident bytes, after returning freed memory to the system."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return _status("VmRSS")


def _status(field: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return 1024 * int(line.split()[1])


def table(results: dict[str, Any]) -> str:
    """Return both tables, as printed and as shown in benchmarks/results."""
    rows = results["helpers"]
    first = next(iter(rows.values()))
    lines = [
        f"{first['parameters'] / 1e6:.0f}M parameters, LoRA of rank {results['rank']}: "
        f"{first['trained_mib']:.1f} MiB trained",
        f"{'':26} {'held MiB':>9} {'peak MiB':>9} {'update ms':>10} {'forward ms':>11}",
    ]
    lines += [
        f"{name:26} {r['held_mib']:9.1f} {r['peak_mib']:9.1f} {r['update_ms']:10.2f} {r['forward_ms']:11.0f}"
        for name, r in rows.items()
    ]
    lines += [
        "",
        f"{'computed, GiB':13} {'model, bf16':>12} {'LoRA teacher':>13} {'full teacher':>13} {'split':>8}",
    ]
    lines += [
        f"{name:13} {r['model_gib']:12.1f} {r['lora_gib']:13.2f} {r['full_gib']:13.1f} {r['split_gib']:8.1f}"
        for name, r in results["published"].items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    main()
