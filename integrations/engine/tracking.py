"""Logging of training to TensorBoard and Weights & Biases.

with tracking.to(("tensorboard",), folder):
    ...  # every run inside the block logs its loss, terms and gap under its name
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal, Protocol

from wmateacher.checks import lookup
from wmateacher.integrations.engine import processes

__all__ = ["Tool", "to", "write"]

Tool = Literal["tensorboard", "wandb"]


class _Board(Protocol):
    def write(self, run: str, step: int, values: Mapping[str, float], resumed_at: int) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    """One folder of event files for each run."""

    def __init__(self, folder: Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError("logging needs TensorBoard: pip install 'wmateacher[logging]'") from error
        self._make, self._folder = SummaryWriter, folder / "tensorboard"
        self._writers: dict[str, Any] = {}

    def write(self, run: str, step: int, values: Mapping[str, float], resumed_at: int) -> None:
        if run not in self._writers:
            # An interrupted run writes the steps after its last checkpoint again.
            self._writers[run] = self._make(str(self._folder / run), purge_step=resumed_at + 1)
        for name, value in values.items():
            self._writers[run].add_scalar(name, value, step)

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()


class _Wandb:
    """One run of Weights & Biases for each run, grouped by folder; a resumed run continues its own."""

    def __init__(self, folder: Path):
        try:
            import wandb
        except ImportError as error:
            raise ImportError("logging to Weights & Biases needs it: pip install wandb") from error
        self._wandb, self._folder = wandb, folder
        self._runs: dict[str, Any] = {}

    def write(self, run: str, step: int, values: Mapping[str, float], resumed_at: int) -> None:
        if run not in self._runs:
            self._folder.mkdir(parents=True, exist_ok=True)
            identity = hashlib.sha256(f"{self._folder.resolve()} {run}".encode()).hexdigest()[:16]
            self._runs[run] = self._wandb.init(
                project="wmateacher", group=self._folder.name, name=run, id=identity, resume="allow",
                dir=self._folder, reinit="create_new",
            )  # fmt: skip
        self._runs[run].log(dict(values), step=step)

    def close(self) -> None:
        for run in self._runs.values():
            run.finish()


_BOARDS: dict[str, type[_TensorBoard] | type[_Wandb]] = {"tensorboard": _TensorBoard, "wandb": _Wandb}
_active: ContextVar[tuple[_Board, ...]] = ContextVar("boards", default=())


@contextmanager
def to(tools: Sequence[str], folder: Path) -> Iterator[None]:
    """Send what `write` logs inside the block to these tools. Only the main process logs.

    Args:
        tools: Any of `"tensorboard"` and `"wandb"`; without any, nothing is logged.
        folder: The folder of the experiment. Event files go to `tensorboard/RUN` in it, and the files of
            Weights & Biases to `wandb`. `WANDB_MODE` and the like are read from the environment.

    Raises:
        ValueError: If a tool is unknown.
        ImportError: If a tool is not installed.
    """
    kinds = [lookup("log", tool, _BOARDS) for tool in dict.fromkeys(tools)]
    if not processes.is_main():
        yield
        return
    boards = tuple(kind(folder) for kind in kinds)
    token = _active.set(boards)
    try:
        yield
    finally:
        _active.reset(token)
        for board in boards:
            board.close()


def write(run: str, step: int, values: Mapping[str, float], resumed_at: int = 0) -> None:
    """Log the values of a run after `step` steps to every active tool.

    Args:
        run: The name of the run.
        step: The number of steps done.
        values: The values by name.
        resumed_at: The step that the run was resumed at; values of later steps that it logged before are
            dropped.
    """
    for board in _active.get():
        board.write(run, step, values, resumed_at)
