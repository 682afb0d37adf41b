"""The main job under torchrun: one table, from any number of processes."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from pool import device
from ranks import on_ranks

from wmateacher.integrations.clip.evaluation import score
from wmateacher.integrations.engine import processes

EXAMPLE = Path(__file__).parents[2] / "examples" / "clip_tracer.py"
OPTIONS = (
    "--methods", "zero-shot", "tracer", "--model", "tiny-vit-16", "--pretrain-steps", "40",
    "--steps", "70", "--set", "finetune.checkpoint_every=30", "--device", "cpu",
)  # fmt: skip


def command(ranks, tmp_path, output):
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return [
        sys.executable,
        *launcher,
        str(EXAMPLE),
        *OPTIONS,
        "--cache",
        str(tmp_path / "cache"),
        "--output",
        output,
    ]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def run(ranks, tmp_path, output):
    done = subprocess.run(
        command(ranks, tmp_path, output),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment(),
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def results(folder):
    return json.loads((folder / "results.json").read_text())["methods"]


def gaps(folder):
    return [
        float(row["gap"]) for row in csv.DictReader((folder / "gaps/tracer-0.csv").read_text().splitlines())
    ]


@pytest.mark.slow
def test_the_table_is_that_of_one_process_also_resumed_on_another_number(tmp_path):
    printed = run(1, tmp_path, "one")
    two = run(2, tmp_path, "two")
    victim = subprocess.Popen(
        command(2, tmp_path, "three"), cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 200
    while not (tmp_path / "three/checkpoints/tracer-0.pt").exists():
        assert victim.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(victim.pid, signal.SIGKILL)
    victim.wait()
    assert "tracer" not in results(tmp_path / "three")
    resumed = run(1, tmp_path, "three")  # what two processes began
    for text in (printed, two, resumed):
        assert text.count("method ") == 1
        assert text.count("wrote ") == 1
        assert text.count("zero-shot (seed 0): ID") == 1
    expected = results(tmp_path / "one")
    for folder in ("two", "three"):
        found = results(tmp_path / folder)
        for name in expected:
            for key in ("id", "ood"):  # one image of the 400 is 0.25 points
                assert found[name][key] == pytest.approx(expected[name][key], abs=3.0), (folder, name, key)
        assert gaps(tmp_path / folder) == pytest.approx(gaps(tmp_path / "one"), rel=0.05)


class Embedding(torch.nn.Module):
    seen = 0

    def encode_image(self, images, normalize):
        self.seen += len(images)
        return images[:, 0, 0]


@on_ranks(1, 2, 4)
def test_evaluation_is_shared_and_exact(folder):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(103, 1, 1, 6, generator=generator)
    labels = torch.randint(0, 6, (103,), generator=generator)
    batches = list(zip(logits.split(50), labels.split(50), strict=True))  # the last has three
    towers = Embedding()
    found = score(towers, torch.eye(6, device=device()), batches)
    assert towers.seen <= sum(-(-len(part) // torch.distributed.get_world_size()) for part, _ in batches)
    probabilities = logits[:, 0, 0].softmax(-1)
    right = (probabilities.argmax(-1) == labels).double().mean().item()
    assert found.accuracy == pytest.approx(100 * right)
    everyone = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, tuple(found))
    assert len(set(everyone)) == 1


@on_ranks(1, 2, 4)
def test_parts_make_the_whole(folder):
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for rows in (8, 7, 3, 1):
        whole = torch.arange(2 * rows, device=device()).view(rows, 2)
        mine = processes.shard_rows(whole)
        assert torch.equal(processes.all_gather_rows(mine), whole)
    assert processes.broadcast_from_main(rank) == 0
    assert processes.is_main() == (rank == 0)
    model = torch.nn.BatchNorm1d(2).to(device())
    model.running_mean.fill_(rank)
    processes.same_buffers(model)
    assert model.running_mean.tolist() == [0, 0]
    order = []
    with processes.main_process_first():
        order.append(time.monotonic())
    moments = [None] * size
    torch.distributed.all_gather_object(moments, order[0])
    assert min(moments) == moments[0]
