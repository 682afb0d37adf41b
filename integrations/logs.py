"""TensorBoard's view of what a training loop logs.

with logs.to_tensorboard(folder):
    ...  # every run inside writes its loss, its terms, its gap under its name
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from wmateacher.integrations import processes


class _Board:
    def __init__(self, folder: Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError("logging needs TensorBoard: pip install 'wmateacher[logging]'") from error
        self._make, self._folder = SummaryWriter, folder
        self._writers: dict[str, Any] = {}

    def write(self, run: str, step: int, values: Mapping[str, float]) -> None:
        if run not in self._writers:
            # What an interrupted run wrote after its last checkpoint is written again.
            self._writers[run] = self._make(str(self._folder / run), purge_step=step)
        for name, value in values.items():
            self._writers[run].add_scalar(name, value, step)

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()


_active: ContextVar[_Board | None] = ContextVar("board", default=None)


@contextmanager
def to_tensorboard(folder: Path | None) -> Iterator[None]:
    """Inside, `write` goes to event files in `folder`, one folder a run; None: nowhere. Rank 0 writes.

    Raises:
        ImportError: TensorBoard is not installed.
    """
    if folder is None or not processes.is_first():
        yield
        return
    board = _Board(folder)
    token = _active.set(board)
    try:
        yield
    finally:
        _active.reset(token)
        board.close()


def write(run: str, step: int, values: Mapping[str, float]) -> None:
    """Log the values of a run after `step` steps, where something is to be written to."""
    board = _active.get()
    if board is not None:
        board.write(run, step, values)
