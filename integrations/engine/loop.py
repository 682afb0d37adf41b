"""The training loop of every task: progress, evaluations, checkpoints and exact resume."""

from __future__ import annotations

import math
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypedDict, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from wmateacher.files import write_atomically
from wmateacher.integrations.engine import processes, signals, tracking

__all__ = [
    "FORMAT",
    "SAY_EVERY",
    "AfterRead",
    "BatchStream",
    "History",
    "Options",
    "Part",
    "ResumeOptions",
    "Stream",
    "Task",
    "read",
    "train",
]

Batch = TypeVar("Batch")
AfterRead = Callable[[int, Mapping[str, float]], None]
"""Called with the number of steps done and the values logged there."""
Stream = Callable[[int], Iterator[Batch]]
"""Batches from a given optimizer step on; the same step always gives the same batch."""

FORMAT = 3
"""The version of the checkpoints."""
SAY_EVERY = 60.0
"""The seconds between lines on the progress of a run that has no terminal for its bar."""
_READ_EVERY = 20


class Part(Protocol):
    """An object with a state: a module, an optimizer, a teacher."""

    def state_dict(self) -> Any:
        """Return the state to save."""
        ...

    def load_state_dict(self, state: Any, /) -> Any:
        """Restore a saved state."""
        ...


class Task(Protocol):
    """A model in training, whose steps `train` takes.

    Attributes:
        name: The name in messages and in the progress bar.
        steps: The number of optimizer steps T of the whole run.
        device: The device that the task trains on.
    """

    name: str
    steps: int
    device: torch.device

    @abstractmethod
    def train_step(self, step: int) -> Mapping[str, Tensor | float]:
        """Take the optimizer step with index `step`, from 0, and return what to log, including `"loss"`.

        0-d tensors stay on their device until the loop reads them.
        """
        ...

    @abstractmethod
    def stateful(self) -> Mapping[str, Part]:
        """Return every object whose state changes during training, by name."""
        ...

    @abstractmethod
    def run_config(self) -> Mapping[str, Any]:
        """Return the settings that must match for a checkpoint to be resumed."""
        ...

    @abstractmethod
    def nan_hint(self) -> str:
        """Return the advice that ends the error about a loss that is not finite."""
        ...


class BatchStream(Generic[Batch]):
    """Return the batch of any step of a stream; consecutive steps share one iterator.

    Args:
        stream: Gives batches from a step on.
    """

    def __init__(self, stream: Stream[Batch]):
        self._stream, self._next = stream, -1
        self._batches: Iterator[Batch] = iter(())

    def __call__(self, step: int) -> Batch:
        """Return the batch of the step with this index."""
        if step != self._next:
            self._batches = self._stream(step)
        self._next = step + 1
        return next(self._batches)


@dataclass
class History:
    """The values that a run logged.

    Attributes:
        series: For every name, the pairs (number of steps done, value) in order.
        seconds: Time spent training, over all resumes; evaluations are not counted.
    """

    series: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    seconds: float = 0.0

    def values(self, name: str) -> list[float]:
        """Return the values of one series, an empty list if nothing was logged under that name."""
        return [value for _, value in self.series.get(name, [])]


class ResumeOptions(TypedDict, total=False):
    """The options of `train` that make a run resumable and name it."""

    checkpoint: Path | None
    label: str | None
    progress: bool


class Options(ResumeOptions, total=False):
    """The options of `train` that functions built on it pass through."""

    after_step: Callable[[int], None] | None
    evaluate_every: int
    evaluate_last: bool


def train(
    task: Task,
    *,
    checkpoint: Path | None = None,
    checkpoint_every: int = 100,
    label: str | None = None,
    progress: bool = True,
    after_step: Callable[[int], None] | None = None,
    after_read: AfterRead | None = None,
    evaluate: Callable[[], Mapping[str, float]] | None = None,
    evaluate_every: int = 0,
    evaluate_last: bool = False,
) -> History:
    """Train a task to its end, from its last checkpoint if there is one.

    An interrupted run that is started again with the same arguments resumes from its last checkpoint. On a
    CPU and one version of torch it ends with the same bits as an uninterrupted run. On a GPU it has the same
    state and batches, but some of torch's kernels sum in another order in each run.

    Args:
        task: The task to train, in its initial state.
        checkpoint: The file for checkpoints. If it exists, the run resumes from it.
        checkpoint_every: The number of steps between checkpoints.
        label: The name in the progress bar and in the logs. Default: the task's name.
        progress: Whether to show a progress bar on a terminal, or a line every minute elsewhere.
        after_step: Called after every step with the number of steps done.
        after_read: Called once for every step and every evaluation, with the number of steps done and the
            logged values. Values are read from the device every few steps.
        evaluate: Returns the values to log at an evaluation. Its time does not count as training.
        evaluate_every: The number of steps between evaluations; 0 for none.
        evaluate_last: Whether to evaluate after the last step too.

    Raises:
        ValueError: If the checkpoint cannot be read or belongs to another run.
        FloatingPointError: If the loss is not finite. The last checkpoint is kept. If the task has a `batch`,
            the batch of that step is written next to it.
        OSError: If a checkpoint cannot be written. The previous one is unchanged.
        Terminated: If SIGTERM was received (a `SystemExit` with code 143). The state is saved.
    """
    run = _Run(task, label or task.name, after_read)
    evaluate_at = set(range(evaluate_every, task.steps, evaluate_every) if evaluate_every else ())
    if evaluate_last:
        evaluate_at.add(task.steps)
    if checkpoint is not None and processes.broadcast_from_main(checkpoint.exists()):
        run.load(checkpoint)
    bar = tqdm(
        total=task.steps, initial=run.step, desc=label or task.name, unit="step",
        disable=None if progress and processes.is_main() else True, leave=False, dynamic_ncols=True,
    )  # fmt: skip
    said = time.monotonic()
    with bar, signals.on_sigterm() as request:
        while True:
            # An evaluation follows the checkpoint of its step, so an interruption costs the evaluation alone.
            if evaluate is not None and run.step in evaluate_at and run.evaluated < run.step:
                run.settle(checkpoint)
                run.evaluate(evaluate)
                if run.step == task.steps and checkpoint is not None:
                    run.save(checkpoint)
            if run.step >= task.steps:
                return run.history
            run.train_step()
            bar.update()
            last = run.step == task.steps
            if last or run.step % _READ_EVERY == 0:
                run.settle(checkpoint)
                loss = f"{run.history.values('loss')[-1]:.3f}"
                bar.set_postfix(loss=loss, refresh=False)
                # Without a terminal there is no bar, but a log should show that the run is alive.
                if progress and bar.disable and processes.is_main() and time.monotonic() - said >= SAY_EVERY:
                    said = time.monotonic()
                    print(f"{label or task.name}: step {run.step} of {task.steps}, loss {loss}", flush=True)
            terminated = not last and _terminated(request, run.step)
            evaluated_next = evaluate is not None and run.step in evaluate_at
            due = last or terminated or evaluated_next or run.step % checkpoint_every == 0
            if checkpoint is not None and due:
                run.save(checkpoint)
            if terminated:
                saved = "not saved (no checkpoint file)" if checkpoint is None else f"saved in {checkpoint}"
                raise signals.Terminated(
                    f"{task.name}: terminated after step {run.step} of {task.steps}, {saved}"
                )
            if after_step is not None:
                after_step(run.step)


def _terminated(request: signals.Request, step: int) -> bool:
    """Return whether to stop here; several processes agree, at steps at which all of them ask."""
    if processes.is_single():
        return request.made
    return step % _READ_EVERY == 0 and processes.any_of(request.made)


class _Run:
    """A task and its progress."""

    def __init__(self, task: Task, name: str, after_read: AfterRead | None):
        self.task, self.name, self.step, self.history = task, name, 0, History()
        self._after_read = after_read
        self.evaluated = self._resumed_at = 0
        self._unread: list[tuple[int, Mapping[str, Tensor | float]]] = []

    def train_step(self) -> None:
        """Take one optimizer step."""
        started = time.perf_counter()
        logged = self.task.train_step(self.step)
        self.step += 1
        self._unread.append((self.step, logged))
        self.history.seconds += time.perf_counter() - started

    def evaluate(self, figures: Callable[[], Mapping[str, float]]) -> None:
        """Log an evaluation of the current state."""
        self._log(self.step, figures())
        self.evaluated = self.step

    def _log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.history.series.setdefault(name, []).append((step, value))
        tracking.write(self.name, step, values, self._resumed_at)
        if self._after_read is not None:
            self._after_read(step, values)

    def settle(self, checkpoint: Path | None = None) -> None:
        """Read the logged values of the last steps from the device.

        Raises:
            FloatingPointError: If a loss is not finite; its batch is written next to `checkpoint`.
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
        """Write the batch of a step for inspection, if the task has it, and return where it is."""
        batch = getattr(self.task, "batch", None)
        if batch is None or checkpoint is None or not processes.is_main():
            return ""
        file = checkpoint.with_name(f"{checkpoint.stem}-not-finite.pt")
        content = batch(step - 1)
        # A dict instead of a named tuple, so that `torch.load` reads it without running code.
        content = content._asdict() if hasattr(content, "_asdict") else content
        with write_atomically(file) as stream:
            torch.save({"step": step, "logged": dict(values), "batch": content}, stream)
        return f"; the batch and its logged values are in {file}, for torch.load"

    def save(self, file: Path) -> None:
        """Write a checkpoint; the previous one stays intact until this one is complete."""
        self.settle(file)
        if not processes.is_main():
            return
        device = self.task.device
        state = {
            "format": FORMAT,
            "identity": dict(self.task.run_config()),
            "step": self.step,
            "evaluated": self.evaluated,
            "parts": {name: part.state_dict() for name, part in self.task.stateful().items()},
            "random": torch.get_rng_state(),
            "cuda_random": None if device.type != "cuda" else torch.cuda.get_rng_state(device),
            "series": {
                name: torch.tensor(values, dtype=torch.float64)
                for name, values in self.history.series.items()
            },
            "seconds": self.history.seconds,
        }
        with write_atomically(file) as stream:
            torch.save(state, stream)

    def load(self, file: Path) -> None:
        """Resume from a checkpoint.

        Raises:
            ValueError: If the checkpoint cannot be read or belongs to another run.
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
            torch.cuda.set_rng_state(state["cuda_random"], self.task.device)
        self.step, self.history.seconds = state["step"], state["seconds"]
        self.evaluated, self._resumed_at = state["evaluated"], state["step"]
        self.history.series = {
            name: [(int(step), value) for step, value in values.tolist()]
            for name, values in state["series"].items()
        }


def read(file: Path, keys: set[str]) -> dict[str, Any]:
    """Load a checkpoint without running code from it.

    Args:
        file: The checkpoint.
        keys: The keys that it must have.

    Raises:
        ValueError: If the file is damaged or not a checkpoint of this loop.
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
