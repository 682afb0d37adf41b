"""A polite end: SIGTERM, as schedulers send it, lets the step end and the state be saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_CODE = 128 + signal.SIGTERM
"""Of a program that was terminated, as shells report it: 143."""


class Terminated(SystemExit):
    """The run was asked to end by SIGTERM, and its state is saved."""

    def __init__(self, message: str):
        super().__init__(EXIT_CODE)
        self.message = message

    def __str__(self) -> str:
        return self.message


class Request:
    """Whether the process has been asked to end.

    Attributes:
        made: It has.
    """

    def __init__(self) -> None:
        self.made = False


def leave_to_main(worker: int) -> None:
    """Of a data loader's worker (its `worker_init_fn`): signals to the whole group are the main process's."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def on_sigterm() -> Iterator[Request]:
    """Note SIGTERM inside, instead of dying of it; a second one kills at once.

    Outside of the main thread, where Python takes no signals, nothing is noted. The handlers that were there
    are there again after.
    """
    request = Request()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = signal.getsignal(signal.SIGTERM)

    def note(number: int, frame: FrameType | None) -> None:
        request.made = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, note)
    try:
        yield request
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
