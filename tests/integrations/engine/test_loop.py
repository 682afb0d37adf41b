import os
import resource
import signal
import struct
import time
from pathlib import Path

import programs
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from wmateacher.integrations.engine import loop, processes, signals, tracking
from wmateacher.posthoc import average_checkpoints

EXAMPLE = Path(__file__).parents[3] / "examples" / "clip_tracer.py"


class Line:
    """Fits a line; its batch at step `broken` is not a number."""

    name, device = "line", torch.device("cpu")

    def __init__(self, steps=60, broken=None):
        torch.manual_seed(0)
        self.steps, self.broken = steps, broken
        self.model = nn.Linear(3, 1)
        self.optimizer = torch.optim.Adam(self.model.parameters(), 1e-2)

    def batch(self, step):
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        return {"x": x * float("nan") if step == self.broken else x, "y": x.sum(1, keepdim=True)}

    def train_step(self, step):
        batch = self.batch(step)
        loss = (self.model(batch["x"]) - batch["y"]).square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {"loss": loss.detach(), "rate": 1e-2}

    def stateful(self):
        return {"model": self.model, "optimizer": self.optimizer}

    def run_config(self):
        return {"steps": self.steps}

    def nan_hint(self):
        return "lower the rate"


def test_sigterm_saves_and_the_run_goes_on_to_the_same_end(tmp_path):
    whole = Line()
    loop.train(whole)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(
        signals.Terminated, match="line: terminated after step 33 of 60, saved in .*run.pt"
    ) as end:
        loop.train(
            Line(), checkpoint=tmp_path / "run.pt",
            after_step=lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 32 else None,
        )  # fmt: skip
    assert end.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    resumed = Line()
    record = loop.train(resumed, checkpoint=tmp_path / "run.pt")
    assert torch.equal(resumed.model.weight, whole.model.weight)
    assert [step for step, _ in record.series["loss"]] == list(range(1, 61))


def test_averages_of_a_runs_checkpoints_are_of_its_model_and_not_of_its_loss(tmp_path):
    task = Line(steps=3)
    loop.train(task, checkpoint=tmp_path / "run.pt")
    loop.train(Line(steps=4), checkpoint=tmp_path / "longer.pt")
    found = average_checkpoints([tmp_path / "longer.pt", tmp_path / "run.pt"], "static")
    assert found.keys() == {"weight", "bias"}
    found = average_checkpoints([tmp_path / "run.pt", tmp_path / "longer.pt"], "static")
    assert torch.equal(found["weight"], task.model.weight)


def test_a_second_sigterm_kills_at_once(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import os, signal\n"
        "from wmateacher.integrations.engine import signals\n"
        "with signals.on_sigterm() as request:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    assert request.made\n"
        "    print('still here', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('never here')"
    )
    done = programs.run(program)
    assert done.stdout == "still here\n"
    assert done.returncode == -signal.SIGTERM


def test_a_loss_that_is_not_finite_leaves_its_batch(tmp_path):
    message = (
        r"line: the loss is nan at step 25 of 60: lower the rate; the batch .* are in .*run-not-finite.pt"
    )
    with pytest.raises(FloatingPointError, match=message):
        loop.train(Line(broken=24), checkpoint=tmp_path / "run.pt", checkpoint_every=10)
    kept = torch.load(tmp_path / "run-not-finite.pt", weights_only=True)
    assert kept["step"] == 25
    assert kept["batch"]["x"].isnan().all()
    torch.testing.assert_close(kept["batch"]["y"], Line().batch(24)["y"])
    assert torch.load(tmp_path / "run.pt", weights_only=True)["step"] == 20


def test_a_full_disk_is_an_error_that_leaves_the_checkpoint_before(tmp_path):
    file = tmp_path / "run.pt"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def fill_the_disk(step):
        if step == 35:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))

    try:
        with pytest.raises(OSError, match=r"cannot write .*run.pt \(.*\); the old file is unchanged"):
            loop.train(Line(), checkpoint=file, checkpoint_every=20, after_step=fill_the_disk)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert torch.load(file, weights_only=True)["step"] == 20
    assert list(tmp_path.iterdir()) == [file]


def scalars(folder, name="loss"):
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return {event.step: event.value for event in accumulator.Scalars(name)}


def test_tensorboard_has_every_step_once_also_of_a_resumed_run(tmp_path):
    with tracking.to(["tensorboard"], tmp_path):
        record = loop.train(Line(), label="whole")
    assert scalars(tmp_path / "tensorboard/whole") == pytest.approx(dict(record.series["loss"]))
    assert list(scalars(tmp_path / "tensorboard/whole", "rate").values()) == pytest.approx([1e-2] * 60)

    def stop(step):
        if step == 47:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), tracking.to(["tensorboard"], tmp_path):
        loop.train(Line(), label="run", checkpoint=tmp_path / "run.pt", checkpoint_every=30, after_step=stop)
    with tracking.to(["tensorboard"], tmp_path):
        loop.train(Line(), label="run", checkpoint=tmp_path / "run.pt", checkpoint_every=30)
    assert scalars(tmp_path / "tensorboard/run") == scalars(tmp_path / "tensorboard/whole")
    loop.train(Line(5), label="outside")
    assert not (tmp_path / "tensorboard/outside").exists()


def wandb_records(file):
    """What Weights & Biases wrote: a log in LevelDB's format, after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, joined = file.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if 32_768 - at % 32_768 < 7:  # the rest of a block
            at += 32_768 - at % 32_768
            continue
        length, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        if at + 7 + length > len(content):  # still being written
            return
        joined += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(joined)
            yield record
            joined = b""


def test_wandb_has_every_step_of_a_resumed_run(tmp_path, monkeypatch):
    """Offline, in its own process; read back from what it keeps."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")

    def stop(step):
        if step == 47:
            raise KeyboardInterrupt

    options = {"label": "run", "checkpoint": tmp_path / "run.pt", "checkpoint_every": 30}
    with pytest.raises(KeyboardInterrupt), tracking.to(["wandb"], tmp_path):
        loop.train(Line(), after_step=stop, **options)
    with tracking.to(["wandb", "tensorboard"], tmp_path):
        record = loop.train(Line(), **options)
    expected, found, names = dict(record.series["loss"]), {}, set()
    deadline = time.monotonic() + 60
    while found.keys() != expected.keys() and time.monotonic() < deadline:  # its process writes when it can
        time.sleep(0.1)
        for file in sorted(tmp_path.glob("wandb/offline*/*.wandb"), key=lambda f: f.stat().st_mtime):
            names.add(file.name)
            for entry in wandb_records(file):
                values = {i.key or i.nested_key[0]: float(i.value_json) for i in entry.history.item}
                if "loss" in values:
                    found[int(values["_step"])] = values["loss"]
    assert len(names) == 1  # one run there, which was gone on with
    assert found == pytest.approx(expected)
    assert scalars(tmp_path / "tensorboard/run") == pytest.approx({k: v for k, v in found.items() if k > 30})


def test_unknown_logs_list_what_there_is(tmp_path):
    with pytest.raises(ValueError, match="unknown log 'tensorbord'; did you mean 'tensorboard'"):
        tracking.to(["tensorbord"], tmp_path).__enter__()


def test_figures_are_logged_at_their_steps_survive_a_resume_and_are_not_training(tmp_path):
    def evaluate(pause=0.0):
        def figures():
            time.sleep(pause)
            return {"accuracy": 1.0 + len(seen)}

        return figures

    seen = []
    started = time.perf_counter()
    whole = loop.train(Line(), evaluate=evaluate(0.2), evaluate_every=25, after_step=seen.append)
    elapsed = time.perf_counter() - started
    assert [step for step, _ in whole.series["accuracy"]] == [25, 50]  # of 60
    assert whole.values("accuracy") == [26.0, 51.0]
    assert whole.seconds < elapsed - 2 * 0.2
    exact = loop.train(Line(50), evaluate=evaluate(), evaluate_every=25)
    assert [step for step, _ in exact.series["accuracy"]] == [25]  # the end has its own

    def stop(step):
        seen.append(step)
        if step == 47:
            raise KeyboardInterrupt

    seen.clear()
    options = {"checkpoint": tmp_path / "run.pt", "checkpoint_every": 30, "evaluate_every": 25}
    with pytest.raises(KeyboardInterrupt):
        loop.train(Line(), evaluate=evaluate(), after_step=stop, **options)
    del seen[30:]
    resumed = loop.train(Line(), evaluate=evaluate(), after_step=seen.append, **options)
    assert resumed.series["accuracy"] == whole.series["accuracy"]


def test_the_last_evaluation_is_made_once_and_outlives_an_interruption(tmp_path):
    def interrupted_at_the_end():
        if len(seen) == 60:
            raise KeyboardInterrupt
        return {"accuracy": float(len(seen))}

    seen = []
    options = {"checkpoint": tmp_path / "run.pt", "evaluate_every": 25, "evaluate_last": True}
    with pytest.raises(KeyboardInterrupt):
        loop.train(Line(), evaluate=interrupted_at_the_end, after_step=seen.append, **options)
    resumed = loop.train(Line(), evaluate=lambda: {"accuracy": 60.0}, **options)
    assert resumed.series["accuracy"] == [(25, 25.0), (50, 50.0), (60, 60.0)]
    again = loop.train(Line(), evaluate=lambda: 1 / 0, **options)
    assert again.series == resumed.series


def test_what_ends_a_run_while_it_evaluates_costs_the_evaluation_alone(tmp_path):
    def interrupted():
        raise KeyboardInterrupt

    options = {"checkpoint": tmp_path / "run.pt", "checkpoint_every": 1000, "evaluate_every": 25}
    with pytest.raises(KeyboardInterrupt):
        loop.train(Line(), evaluate=interrupted, **options)
    assert torch.load(tmp_path / "run.pt", weights_only=True)["step"] == 25
    resumed = loop.train(Line(), evaluate=lambda: {"accuracy": 1.0}, **options)
    assert resumed.series["accuracy"] == [(25, 1.0), (50, 1.0)]


def test_a_run_resumed_at_an_evaluation_loses_nothing_of_its_board(tmp_path):
    def interrupted():
        raise KeyboardInterrupt

    options = {"label": "run", "checkpoint": tmp_path / "run.pt", "evaluate_every": 25}
    with pytest.raises(KeyboardInterrupt), tracking.to(["tensorboard"], tmp_path):
        loop.train(Line(), evaluate=interrupted, **options)
    with tracking.to(["tensorboard"], tmp_path):
        loop.train(Line(), evaluate=lambda: {"accuracy": 1.0}, **options)
    assert list(scalars(tmp_path / "tensorboard/run")) == list(range(1, 61))
    assert scalars(tmp_path / "tensorboard/run", "accuracy") == {25: 1.0, 50: 1.0}


def test_a_loss_that_is_not_finite_is_found_before_an_evaluation(tmp_path):
    with pytest.raises(FloatingPointError, match="the loss is nan at step 23"):
        loop.train(Line(broken=22), evaluate=lambda: 1 / 0, evaluate_every=25)


@pytest.mark.slow
def test_the_example_ends_cleanly_when_it_is_terminated_and_goes_on(tmp_path):
    arguments = [
        "--model", "tiny-vit-16", "--pretrain-steps", "5", "--pretrain.batch-size", "32", "--steps", "80",
        "--finetune.batch-size", "16", "--finetune.checkpoint-every", "10", "--methods", "tracer",
        "--log-to", "tensorboard", "--cache", tmp_path / "cache", "--output", tmp_path / "out",
    ]  # fmt: skip
    run = programs.Program(EXAMPLE, *arguments, cwd=tmp_path)
    run.until((tmp_path / "out/checkpoints/tracer-0.pt").exists)
    error = run.kill(signal.SIGTERM).stderr
    assert run.returncode == signals.EXIT_CODE
    assert "terminated after step" in error
    assert f"--output {tmp_path / 'out'} continues this run" in error
    done = programs.run(EXAMPLE, *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (board,) = (tmp_path / "out/tensorboard").glob("tracer*")
    for name in ("loss", "gap", "fd", "info_nce", "logit_scale", "learning_rate"):
        assert list(scalars(board, name)) == list(range(1, 81)), name


def test_without_a_terminal_a_line_says_now_and_then_how_far_a_run_is(monkeypatch, capsys):
    monkeypatch.setattr(loop, "SAY_EVERY", 0.0)
    loop.train(Line(), label="a line")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(", loss")[0] for line in lines] == [f"a line: step {n} of 60" for n in (20, 40, 60)]
    loop.train(Line(), progress=False)
    monkeypatch.setattr(loop, "SAY_EVERY", 60.0)
    loop.train(Line())
    assert not capsys.readouterr().out


@pytest.mark.parametrize(("most", "inside"), [(None, 3), (2, 2), (8, 3)])
def test_threads_are_limited_inside_the_block_alone(most, inside):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with processes.at_most_threads(most):
            assert torch.get_num_threads() == inside
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
