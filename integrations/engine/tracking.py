"""What a training loop logs, where people look at it: TensorBoard, Weights & Biases.

with logs.to(("tensorboard",), folder):
    ...  # every run inside writes its loss, its terms, its gap under its name
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal, Protocol

from wmateacher.checks import nearest
from wmateacher.integrations.engine import processes

Tool = Literal["tensorboard", "wandb"]


class _Board(Protocol):
    def write(self, run: str, step: int, values: Mapping[str, float], kept: int) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    """One folder of event files a run."""

    def __init__(self, folder: Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError("logging needs TensorBoard: pip install 'wmateacher[logging]'") from error
        self._make, self._folder = SummaryWriter, folder / "tensorboard"
        self._writers: dict[str, Any] = {}

    def write(self, run: str, step: int, values: Mapping[str, float], kept: int) -> None:
        if run not in self._writers:
            # What an interrupted run wrote after its last checkpoint is written again.
            self._writers[run] = self._make(str(self._folder / run), purge_step=kept + 1)
        for name, value in values.items():
            self._writers[run].add_scalar(name, value, step)

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()


class _Wandb:
    """One run there for each here, in a group for the folder; a resumed one goes on in its own."""

    def __init__(self, folder: Path):
        try:
            import wandb
        except ImportError as error:
            raise ImportError("logging to Weights & Biases needs it: pip install wandb") from error
        self._wandb, self._folder = wandb, folder
        self._runs: dict[str, Any] = {}

    def write(self, run: str, step: int, values: Mapping[str, float], kept: int) -> None:
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
    """Inside, `write` goes to these tools. Rank 0 writes.

    Args:
        tools: Of `"tensorboard"` and `"wandb"`; none: nothing is written.
        folder: Of the experiment; `tensorboard/` in it has a folder of event files for each run, `wandb/`
            what Weights & Biases keeps, which takes `WANDB_MODE` and the like from the environment.

    Raises:
        ValueError: Another name.
        ImportError: A tool is not installed.
    """
    for tool in tools:
        if tool not in _BOARDS:
            raise ValueError(f"unknown log {tool!r}; {nearest(tool, _BOARDS)}")
    if not processes.is_main():
        yield
        return
    boards = tuple(_BOARDS[tool](folder) for tool in dict.fromkeys(tools))
    token = _active.set(boards)
    try:
        yield
    finally:
        _active.reset(token)
        for board in boards:
            board.close()


def write(run: str, step: int, values: Mapping[str, float], kept: int = 0) -> None:
    """Log the values of a run after `step` steps, where something is to be written to.

    Args:
        run: Its name.
        step: Number of steps done.
        values: By name.
        kept: Up to which step an interrupted run's values stand; what it wrote later is dropped.
    """
    for board in _active.get():
        board.write(run, step, values, kept)
