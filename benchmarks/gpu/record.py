"""The results of one section, in a JSON file that is whole at every moment."""

from __future__ import annotations

import faulthandler
import gc
import importlib
import os
import subprocess
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wmateacher.integrations.engine.results import environment, read_json, write_json

ROOT = Path(__file__).parents[2]
PACKAGES = (
    "triton", "timm", "torchvision", "open_clip_torch", "torchmetrics", "scikit-learn", "ema-pytorch",
    "torch-ema",
)  # fmt: skip


@dataclass(frozen=True)
class Options:
    """What every section is told.

    Attributes:
        device: The device to measure.
        quick: Whether to measure tiny sizes, to see that everything runs.
        output: The folder of the results.
        scratch: The folder of everything else that runs leave, such as checkpoints.
        command: The command line.
        commit: The commit that is measured.
        date: The time of the measurement, in UTC.
        data_root: The folder that holds MNIST; None for the bundled digits alone.
        jobs: The number of training runs at a time.
        deadline: The time, by `time.monotonic`, by which a section should have ended.
    """

    device: str
    quick: bool
    output: Path
    scratch: Path
    command: str
    commit: str
    date: str
    data_root: Path | None = None
    jobs: int = 1
    deadline: float = float("inf")


class UnsupportedError(Exception):
    """What is measured cannot do this; a gap in a table, and not a failure."""


class Record:
    """The results of one section.

    Attributes:
        content: The content of the file: `results` by name, and what was `skipped` and the `errors` with
            their reasons.
        before: The results that the file held before.
    """

    def __init__(self, section: str, options: Options):
        self.section, self.options = section, options
        self.file = options.output / f"{section}.json"
        self.before = _results(self.file)
        self.content = {
            **header(section, options),
            "environment": {**environment(options.device, PACKAGES), **_gpu(options.device)},
        }
        self.write()

    def remaining(self) -> float:
        """Return the seconds that are left."""
        return self.options.deadline - time.monotonic()

    def say(self, text: str) -> None:
        """Print a line of progress."""
        print(f"[{self.section}] {text}", flush=True)

    def write(self) -> None:
        """Write the file."""
        write_json(self.content, self.file)

    def add(self, name: str, result: Any) -> None:
        """Keep a result."""
        self.content["results"][name] = result
        self.write()

    def skip(self, name: str, reason: str) -> None:
        """Keep the reason why something was not measured."""
        self.content["skipped"][name] = reason
        self.say(f"{name}: skipped, {reason}")
        self.write()

    def fail(self, name: str, error: str) -> None:
        """Keep an error."""
        self.content["errors"][name] = error
        self.say(f"{name}: failed, {error}")
        self.write()

    def attempt(self, name: str, measure: Callable[[], Any], *, needs: float = 0.0) -> Any:
        """Measure and keep the result, so that an error or a missing package costs this measurement alone.

        Args:
            name: The name of the result.
            measure: The measurement.
            needs: The seconds that it takes; with fewer left it is skipped.

        Returns:
            The result, or None if there is none.
        """
        if self.remaining() < needs:
            self.skip(name, "no time left")
            return None
        began = time.perf_counter()
        try:
            result = measure()
        except (ImportError, UnsupportedError) as error:
            self.skip(name, described(error))
            return None
        except Exception as error:
            traceback.print_exc()
            self.fail(name, described(error))
            return None
        finally:
            if torch.device(self.options.device).type == "cuda":
                gc.collect()
                torch.cuda.empty_cache()
        self.add(name, result)
        self.say(f"{name}: measured in {time.perf_counter() - began:.1f} s")
        return result


def header(section: str, options: Options) -> dict[str, Any]:
    """Return the content of a section's file before anything is measured."""
    return {
        "section": section, "state": "running", "command": options.command, "commit": options.commit,
        "date": options.date, "quick": options.quick, "environment": {}, "results": {}, "skipped": {},
        "errors": {},
    }  # fmt: skip


def work(section: str, options: Options) -> None:
    """Measure a section; the body of its process."""
    os.setpgrp()  # so that the section can be stopped with everything that it started
    faulthandler.enable()
    if (device := torch.device(options.device)).index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # on which events, `synchronize` and memory statistics work by default
    record, began = Record(section, options), time.monotonic()
    try:
        importlib.import_module(f"gpu.{section}").measure(record, options)
        state = "finished"
    except ImportError as error:
        record.content["skipped"][section], state = described(error), "skipped"
    except Exception as error:
        traceback.print_exc()
        record.content["errors"][section], state = described(error), "failed"
    record.content |= {"state": state, "seconds": time.monotonic() - began}
    record.write()


def described(error: BaseException) -> str:
    """Return an error as one line."""
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:300]


def commit() -> str:
    """Return the commit that is checked out, with a `+` if files differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _results(file: Path) -> dict[str, Any]:
    """Return the results that the file of an earlier run holds."""
    try:
        return read_json(file)["results"] if file.exists() else {}
    except (ValueError, KeyError, TypeError):
        return {}


def _gpu(device: str) -> dict[str, Any]:
    if torch.device(device).type != "cuda":
        return {}
    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu_memory_gib": properties.total_memory / 2**30,
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "driver": _driver(),
    }


def _driver() -> str:
    try:
        return subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True, text=True, check=True, timeout=20,
        ).stdout.split("\n")[0]  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return "unknown"
