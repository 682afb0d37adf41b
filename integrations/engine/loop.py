"""The one training loop that every task runs through: progress, checkpoints, exact resume."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from wmateacher.integrations.engine import processes, signals, tracking

Batch = TypeVar("Batch")
Stream = Callable[[int], Iterator[Batch]]
"""Batches from a given optimizer step on; the same step always gives the same batch."""

FORMAT = 3
"""Of checkpoints."""
_READ_EVERY = 20


class Part(Protocol):
    """Something with a state: a module, an optimizer, a teacher."""

    def state_dict(self) -> Any:
        """What to save."""
        ...

    def load_state_dict(self, state: Any, /) -> Any:
        """Take over what was saved."""
        ...


class Task(Protocol):
    """What a loop trains.

    Attributes:
        name: In messages and the progress bar.
        steps: Optimizer steps T of the whole run.
        device: Where it trains.
    """

    name: str
    steps: int
    device: torch.device

    def train_step(self, step: int) -> Mapping[str, Tensor | float]:
        """Take the optimizer step with index `step`, from 0; what to log of it, a `"loss"` among it.

        0-d tensors stay on their device until the loop reads them.
        """
        ...

    def stateful(self) -> Mapping[str, Part]:
        """All that changes while it trains."""
        ...

    def run_config(self) -> Mapping[str, Any]:
        """What two runs must share for one to continue the other."""
        ...

    def nan_hint(self) -> str:
        """What to change where the loss is not finite."""
        ...


class BatchStream(Generic[Batch]):
    """Gives a stream's batch of any step; consecutive steps go on in one iterator."""

    def __init__(self, stream: Stream[Batch]):
        self._stream, self._next = stream, -1
        self._batches: Iterator[Batch] = iter(())

    def __call__(self, step: int) -> Batch:
        """The batch of the step with this index."""
        if step != self._next:
            self._batches = self._stream(step)
        self._next = step + 1
        return next(self._batches)


@dataclass
class History:
    """What a run logged.

    Attributes:
        series: Name -> (number of steps done, value) of everything logged under it, in order.
        seconds: Spent training, over all resumes.
    """

    series: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    seconds: float = 0.0

    def values(self, name: str) -> list[float]:
        """The values of one series; empty where nothing was logged under that name."""
        return [value for _, value in self.series.get(name, [])]


def train(
    task: Task,
    *,
    checkpoint: Path | None = None,
    checkpoint_every: int = 100,
    label: str | None = None,
    progress: bool = True,
    after_step: Callable[[int], None] | None = None,
    after_read: Callable[[int, Mapping[str, float]], None] | None = None,
    evaluate: Callable[[], Mapping[str, float]] | None = None,
    evaluate_every: int = 0,
) -> History:
    """Run a task from where its checkpoint stands to its end.

    An interrupted run that is started again with the same arguments goes on from its last checkpoint
    and ends, on one device and one version of torch, with the same bits as an uninterrupted one.

    Args:
        task: What to train, at its start.
        checkpoint: File to write checkpoints to, and to go on from where it exists.
        checkpoint_every: Steps between checkpoints.
        label: Name in the progress bar; the task's by default.
        progress: Show a bar, where there is a terminal.
        after_step: Called with the number of steps done after each one.
        after_read: Called with the number of steps done and what was logged of the last, each once, some
            steps later, when it has been read off the device.
        evaluate: Figures to log after every `evaluate_every`th step but the last, once its checkpoint is
            written. Their time is not training.
        evaluate_every: 0: never.

    Raises:
        ValueError: The checkpoint cannot be read, or belongs to another run.
        FloatingPointError: The loss is not finite. The last checkpoint stays, and the batch of that step is
            beside it, where the task has a `batch`.
        OSError: A checkpoint cannot be written; the one before it stays whole.
        Terminated: SIGTERM came (a `SystemExit`, code 143); the state is saved.
    """
    run = _Run(task, label or task.name, after_read)
    evaluate_at = (
        range(evaluate_every, task.steps, evaluate_every) if evaluate is not None and evaluate_every else ()
    )
    if checkpoint is not None and processes.broadcast_from_main(checkpoint.exists()):
        run.load(checkpoint)
    bar = tqdm(
        total=task.steps, initial=run.step, desc=label or task.name, unit="step",
        disable=None if progress and processes.is_main() else True, leave=False, dynamic_ncols=True,
    )  # fmt: skip
    with bar, signals.on_sigterm() as ending:
        while run.step < task.steps:
            if evaluate is not None and run.step in evaluate_at and run.evaluated < run.step:
                run.settle(checkpoint)
                run.evaluate(evaluate)
            run.advance()
            bar.update()
            last = run.step == task.steps
            if last or run.step % _READ_EVERY == 0:
                run.settle(checkpoint)
                bar.set_postfix(loss=f"{run.record.values('loss')[-1]:.3f}", refresh=False)
            ended = not last and _agreed(ending, run.step)
            due = last or ended or run.step % checkpoint_every == 0 or run.step in evaluate_at
            if checkpoint is not None and due:
                run.save(checkpoint)
            if ended:
                raise signals.Terminated(
                    f"{task.name}: terminated after step {run.step} of {task.steps}"
                    + (f", which {checkpoint} has" if checkpoint is not None else "; nothing was to be saved")
                )
            if after_step is not None:
                after_step(run.step)
    return run.record


def _agreed(ending: signals.Request, step: int) -> bool:
    """Whether to end here; of several processes all do, at a step at which all ask."""
    if processes.is_single():
        return ending.made
    return step % _READ_EVERY == 0 and processes.any_of(ending.made)


class _Run:
    """A task and how far it has come."""

    def __init__(self, task: Task, name: str, after_read: Callable[[int, Mapping[str, float]], None] | None):
        self.task, self.name, self.step, self.record = task, name, 0, History()
        self._after_read = after_read
        self.evaluated = self._kept = 0
        self._unread: list[tuple[int, Mapping[str, Tensor | float]]] = []

    def advance(self) -> None:
        """One optimizer step."""
        started = time.perf_counter()
        logged = self.task.train_step(self.step)
        self.step += 1
        self._unread.append((self.step, logged))
        self.record.seconds += time.perf_counter() - started

    def evaluate(self, figures: Callable[[], Mapping[str, float]]) -> None:
        """Log figures of where it stands."""
        self._log(self.step, figures())
        self.evaluated = self.step

    def _log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.record.series.setdefault(name, []).append((step, value))
        tracking.write(self.name, step, values, self._kept)
        if self._after_read is not None:
            self._after_read(step, values)

    def settle(self, checkpoint: Path | None = None) -> None:
        """Read what the last steps logged off the device.

        Raises:
            FloatingPointError: A loss is not finite; what it came of is written beside `checkpoint`.
        """
        for step, logged in self._unread:
            values = {name: float(value) for name, value in logged.items()}
            self._log(step, values)
            if not math.isfinite(values["loss"]):
                kept = self._keep(step, values, checkpoint)
                raise FloatingPointError(
                    f"{self.task.name}: the loss is {values['loss']} at step {step} of {self.task.steps}: "
                    f"{self.task.nan_hint()}{kept}"
                )
        self._unread.clear()

    def _keep(self, step: int, values: Mapping[str, float], checkpoint: Path | None) -> str:
        """Write the batch of a step for inspection, where there is one to be had; a word of where."""
        batch = getattr(self.task, "batch", None)
        if batch is None or checkpoint is None or not processes.is_main():
            return ""
        file = checkpoint.with_name(f"{checkpoint.stem}-not-finite.pt")
        content = batch(step - 1)
        write_atomically({"step": step, "logged": dict(values), "batch": _plain(content)}, file)
        return f"; the batch and what was logged of it are in {file}, for torch.load"

    def save(self, file: Path) -> None:
        """Write a checkpoint; the one before it stays whole until this one is."""
        self.settle(file)
        if not processes.is_main():
            return
        state = {
            "format": FORMAT,
            "identity": dict(self.task.run_config()),
            "step": self.step,
            "evaluated": self.evaluated,
            "parts": {name: part.state_dict() for name, part in self.task.stateful().items()},
            "random": torch.get_rng_state(),
            "cuda_random": torch.cuda.get_rng_state() if self.task.device.type == "cuda" else None,
            "series": {
                name: torch.tensor(values, dtype=torch.float64) for name, values in self.record.series.items()
            },
            "seconds": self.record.seconds,
        }
        write_atomically(state, file)

    def load(self, file: Path) -> None:
        """Go on from a checkpoint, all of it or nothing.

        Raises:
            ValueError: It cannot be read, or belongs to another run.
        """
        state = read(file, {"format", "identity", "step", "evaluated", "parts", "series"})
        ours, theirs = dict(self.task.run_config()), state["identity"]
        differing = [k for k in {**ours, **theirs} if ours.get(k) != theirs.get(k)]
        if differing:
            raise ValueError(
                f"checkpoint {file} belongs to another run: "
                + ", ".join(f"{k}={theirs.get(k)!r} there, {ours.get(k)!r} here" for k in differing)
                + "; choose another folder, or delete it to start again"
            )
        try:
            for name, part in self.task.stateful().items():
                part.load_state_dict(state["parts"][name])
        except (RuntimeError, ValueError, KeyError) as error:
            raise ValueError(
                f"checkpoint {file} does not fit this model ({error}); choose another folder, or "
                "delete it to start again"
            ) from error
        torch.set_rng_state(state["random"])
        if state["cuda_random"] is not None and self.task.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_random"])
        self.step, self.record.seconds = state["step"], state["seconds"]
        self.evaluated, self._kept = state["evaluated"], state["step"]
        self.record.series = {
            name: [(int(step), value) for step, value in values.tolist()]
            for name, values in state["series"].items()
        }


def _plain(batch: Any) -> Any:
    """A batch in types that are read without running code."""
    return dict(batch._asdict()) if hasattr(batch, "_asdict") else batch


def write_atomically(state: dict[str, Any], file: Path) -> None:
    """Save with `torch.save` so that `file` is either the old content or the new, never a part.

    Raises:
        OSError: It cannot be written, as on a full disk.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.partial")
    try:
        with partial.open("wb") as stream:
            torch.save(state, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, file)
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, RuntimeError) and not isinstance(error.__context__, OSError):
            raise  # torch's writer raises one for the other
        before = "the one before it is whole" if file.exists() else "there was none before it"
        reason = str(error.__context__ or error).splitlines()[0]
        raise OSError(
            f"cannot write {file} ({reason}); {before}. Make room, and run the same command again"
        ) from error


def read(file: Path, keys: set[str]) -> dict[str, Any]:
    """Load what `write_atomically` wrote, without running code from it.

    Raises:
        ValueError: The file is damaged, or something else.
    """
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds, depending on which byte is wrong
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(
            f"cannot read checkpoint {file} ({reason}): it is damaged or something else; delete it to "
            "start again"
        ) from error
    if not isinstance(state, dict) or not keys <= state.keys() or state["format"] != FORMAT:
        raise ValueError(
            f"{file} is not a checkpoint of this version's training loop; delete it to start again"
        )
    return state
