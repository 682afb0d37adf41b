"""Run programs in forks of the test process: real processes to signal and examine, without their imports' cost.

A program's own start, in an interpreter of its own, is left to one test for each program.
"""

import contextlib
import importlib
import json
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

# What every program imports (torch._dynamo: in an optimizer's first step), once for all forks.
import torch._dynamo  # noqa: F401

import wmateacher  # noqa: F401

# What examples and benchmarks import when they need it.
OPTIONAL = (
    "matplotlib.pyplot", "open_clip", "scipy.optimize", "sklearn.datasets", "sklearn.linear_model", "timm",
    "torch.utils.tensorboard", "torchvision.transforms.v2",
)  # fmt: skip

TIMEOUT = 300.0
"""Seconds after which a program counts as hanging."""


class Program:
    """`python script arguments...`, started at once; use `wait` or the signals to end it."""

    def __init__(self, script, *arguments, cwd=".", env=None):
        self._files = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115 - closed by wait
        argv = [str(a) for a in (script, *arguments)]
        # Not a daemon: the program may start loaders of its own.
        self._process = multiprocessing.get_context("fork").Process(
            target=_execute, args=(argv, cwd, env or {}, *(f.fileno() for f in self._files))
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python 3.12 warns of forks beside any thread, idle ones too
            if Path(script).parent.name in {"benchmarks", "examples"}:
                for module in OPTIONAL:
                    with contextlib.suppress(ImportError):
                        importlib.import_module(module)
            self._process.start()

    @property
    def returncode(self):
        """The exit code, minus the signal's number for a program that one ended; None while it runs."""
        return self._process.exitcode

    def until(self, condition):
        """Wait until `condition()` is true while the program runs."""
        deadline = time.monotonic() + TIMEOUT
        while not condition():
            assert self.returncode is None, self.wait().stderr[-3000:]
            assert time.monotonic() < deadline, "the program hangs"
            time.sleep(0.01)

    def wait(self):
        """Wait for the end; from then on there are `stdout` and `stderr`."""
        self._process.join(TIMEOUT)
        if self.returncode is None:
            self.kill()
            raise AssertionError(f"the program hangs\n{self.stderr[-3000:]}")
        for file, name in zip(self._files, ("stdout", "stderr"), strict=True):
            if not file.closed:
                file.seek(0)
                setattr(self, name, file.read().decode())
                file.close()
        return self

    def kill(self, number=signal.SIGKILL, *, group=False):
        """Send a signal to the program, or also to the processes that it started, and wait for its end."""
        (os.killpg if group else os.kill)(self._process.pid, number)
        return self.wait()


def run(script, *arguments, **options):
    """Run a program to its end."""
    return Program(script, *arguments, **options).wait()


def launch(size, script, *arguments, cwd=".", wait=True):
    """Run a program on `size` ranks, each with the environment that torchrun gives it; one `Program` a rank."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {
        "MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size,
        "GROUP_RANK": 0, "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": 0,
        "TORCHELASTIC_MAX_RESTARTS": 0, "ROLE_RANK": 0,
    }  # fmt: skip
    ranks = [
        Program(script, *arguments, cwd=cwd, env={**shared, "RANK": rank, "LOCAL_RANK": rank})
        for rank in range(size)
    ]
    return [rank.wait() for rank in ranks] if wait else ranks


def measured(file):
    """Return what a `results.json` holds, without what differs between equal runs: times and the environment."""

    def strip(value):
        if isinstance(value, dict):
            return {k: strip(v) for k, v in value.items() if k not in ("seconds", "environment")}
        return [strip(v) for v in value] if isinstance(value, list) else value

    return strip(json.loads(Path(file).read_text()))


def _execute(argv, cwd, env, stdout, stderr):
    os.setsid()
    os.chdir(cwd)
    os.environ.update({key: str(value) for key, value in env.items()})
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    sys.stdout, sys.stderr = map(os.fdopen, (1, 2), "ww")
    warnings.resetwarnings()
    warnings.simplefilter("ignore", DeprecationWarning)
    sys.argv, sys.path[:0] = argv, [str(Path(argv[0]).parent)]
    code = 0
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)
