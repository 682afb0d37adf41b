"""SIGTERM, which schedulers send, ends a run after its current step, with the state saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["EXIT_CODE", "Request", "Terminated", "leave_to_main", "on_sigterm"]

EXIT_CODE = 128 + signal.SIGTERM
"""The exit code of a terminated program, 143, as shells report it."""


class Terminated(SystemExit):
    """SIGTERM asked the run to end, and its state is saved."""

    def __init__(self, message: str):
        super().__init__(EXIT_CODE)
        self.message = message

    def __str__(self) -> str:
        return self.message


class Request:
    """A request to end the process.

    Attributes:
        made: Whether the request has been made.
    """

    def __init__(self) -> None:
        self.made = False


def leave_to_main(worker: int) -> None:
    """Ignore SIGTERM and SIGINT in a data loader's worker, as its `worker_init_fn`.

    A signal to the whole process group must let the main process finish its step, which needs the workers.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def on_sigterm() -> Iterator[Request]:
    """Record SIGTERM inside the block instead of ending the process; a second SIGTERM ends it at once.

    In a thread other than the main one, where Python receives no signals, nothing is recorded. The previous
    handler is restored at the end.
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
