"""Processes that run test functions together, started once for all tests of a world size."""

import contextlib
import importlib
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
import warnings
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path

import torch

TIMEOUT = 60.0
"""Seconds after which ranks that have not answered count as hanging."""


class RankError(AssertionError):
    """What a rank raised, with its traceback."""


class Pool:
    """Ranks 0 to `size - 1` of one process group."""

    def __init__(self, backend, size, name=""):
        self.backend, self.size = backend, size
        self.ranks = []

    def run(self, function, *arguments, timeout=TIMEOUT):
        """Call `function(*arguments)`, found by its name, on every rank at once; their results."""
        __tracebackhide__ = True
        if not self.ranks:
            self._start()
        for _, pipe in self.ranks:
            pipe.send((function.__module__, function.__qualname__, arguments))
        results, deadline = {}, time.monotonic() + timeout
        pipes = {pipe: rank for rank, (_, pipe) in enumerate(self.ranks)}
        while len(results) < self.size:
            waiting = [pipe for pipe, rank in pipes.items() if rank not in results]
            ready = connection.wait(waiting, max(0.0, deadline - time.monotonic()))
            if not ready:
                silent = [rank for rank in range(self.size) if rank not in results]
                self.stop()
                raise RankError(f"ranks {silent} of {self.size} hang after {timeout} s")
            for pipe in ready:
                try:
                    results[pipes[pipe]] = pipe.recv()
                except EOFError:
                    self.stop()  # the others may wait for it in a collective
                    raise RankError(f"rank {pipes[pipe]} of {self.size} died") from None
        results = [results[rank] for rank in range(self.size)]
        failed = [f"--- rank {r} of {self.size}\n{text}" for r, (ok, text) in enumerate(results) if not ok]
        if failed:
            self.stop()  # what they were in the middle of would meet the next test's collectives
            raise RankError("\n".join(failed))
        return [value for _, value in results]

    def stop(self):
        """End the processes; the next `run` starts others."""
        for process, pipe in self.ranks:
            with contextlib.suppress(OSError):  # it has died
                pipe.send(None)
            process.join(0.5)
            pipe.close()
            process.kill()
            process.join()
        self.ranks = []

    def _start(self):
        # A fork has all imports already, but cannot use the GPU if this process has.
        context = multiprocessing.get_context("spawn" if self.backend == "nccl" else "fork")
        folder = tempfile.mkdtemp()
        for rank in range(self.size):
            here, there = context.Pipe()
            process = context.Process(
                target=_work, args=(self.backend, rank, self.size, folder, there), daemon=True
            )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Python 3.12 warns of forks beside any thread
                process.start()
            there.close()
            self.ranks.append((process, here))
        for _, pipe in self.ranks:
            assert pipe.poll(120), "a rank did not start"
            assert pipe.recv() == "ready"


def device():
    """Where this rank's tensors live."""
    return torch.device("cuda" if torch.distributed.get_backend() == "nccl" else "cpu")


def _work(backend, rank, size, folder, pipe):
    if backend != "nccl":
        warnings.resetwarnings()  # a fork begins inside a test, in which warnings are errors
    sys.path.insert(0, str(Path(__file__).parent))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if backend == "nccl" else backend,
        init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=timedelta(seconds=TIMEOUT / 2),
    )  # fmt: skip
    pipe.send("ready")
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while (task := pipe.recv()) is not None:
            module, name, arguments = task
            torch.manual_seed(0)
            try:
                function = importlib.import_module(module)
                for part in name.split("."):
                    function = getattr(function, part)
                pipe.send((True, function.__wrapped__(*arguments)))
            except BaseException:  # DCP's own derive from it
                pipe.send((False, traceback.format_exc()))
    torch.distributed.destroy_process_group()
