"""The main job under torchrun: one table, from any number of processes."""

import csv
import json
import subprocess
import sys
import time
from pathlib import Path

import programs
import pytest
import torch
from pool import device
from ranks import on_ranks

from wmateacher.integrations.clip.evaluation import score
from wmateacher.integrations.engine import processes

EXAMPLE = Path(__file__).parents[2] / "examples" / "clip_tracer.py"
OPTIONS = (
    "--methods", "zero-shot", "tracer", "--model", "tiny-vit-16", "--pretrain-steps", "30",
    "--pretrain.batch-size", "32", "--finetune.batch-size", "32", "--steps", "30",
    "--finetune.checkpoint-every", "10", "--device", "cpu", "--cache", "cache", "--output",
)  # fmt: skip


def results(folder):
    return json.loads((folder / "results.json").read_text())["methods"]


def gaps(folder):
    return [
        float(row["gap"]) for row in csv.DictReader((folder / "gaps/tracer-0.csv").read_text().splitlines())
    ]


@pytest.mark.slow
def test_the_table_is_that_of_one_process_also_resumed_on_another_number(tmp_path):
    one = programs.run(EXAMPLE, *OPTIONS, "one", cwd=tmp_path)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    two = subprocess.run(
        [*torchrun, EXAMPLE, *OPTIONS, "two"], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    ranks = programs.launch(2, EXAMPLE, *OPTIONS, "three", cwd=tmp_path, wait=False)
    ranks[0].until((tmp_path / "three/checkpoints/tracer-0.pt").exists)
    for rank in ranks:
        rank.kill()
    assert "tracer" not in results(tmp_path / "three")
    resumed = programs.run(EXAMPLE, *OPTIONS, "three", cwd=tmp_path)  # what two processes began
    for done in (one, two, resumed):
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("method ") == 1
        assert done.stdout.count("wrote ") == 1
        assert done.stdout.count("zero-shot (seed 0): ID") == 1
        assert done.stdout.count("models in ") == 1
    expected = results(tmp_path / "one")
    for folder in ("one", "two", "three"):
        saved = sorted(str(f.relative_to(tmp_path / folder)) for f in (tmp_path / folder).glob("models/*/*"))
        assert saved == ["models/tracer-0/student", "models/tracer-0/teacher", "models/zero-shot-0/student"]
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
