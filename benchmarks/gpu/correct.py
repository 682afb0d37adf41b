"""The tests that are marked `gpu`, each with its outcome."""

from __future__ import annotations

import contextlib
import io
from typing import Any

from gpu.record import ROOT, Options, Record, described
from wmateacher.integrations.engine import tables

TESTS = "tests/test_gpu.py"
QUICK = "(beta and fp32 and 5) or grad_scaler or (never_waits and split) or noticed"


def measure(record: Record, options: Options) -> None:
    """Run the tests in this process, and keep each outcome at once."""
    import pytest

    arguments = [
        str(ROOT / TESTS), "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT),
        "-m", "gpu", "--device", options.device, "-q", "-p", "no:cacheprovider", "-p", "no:randomly",
        # Versions of packages that the tests were not written with may warn.
        "-W", "default",
    ]  # fmt: skip
    if options.quick:
        arguments += ["-k", QUICK]
    said = io.StringIO()  # pytest's own errors, such as a package that the tests lack
    with contextlib.redirect_stderr(said):
        code = int(pytest.main(arguments, plugins=[Outcomes(record)]))
    if code not in (0, 1) and not record.content["errors"]:
        record.fail("pytest", " ".join([f"ended with code {code}.", *said.getvalue().split()])[-500:])
    results = record.content["results"]
    failed = [name for name, result in results.items() if result["outcome"] == "failed"]
    record.say(f"{len(results)} tests, {len(failed)} failed")


class Outcomes:
    """A plugin of pytest that records outcomes.

    Args:
        record: The record to write to.
    """

    def __init__(self, record: Record):
        self.record = record

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Keep the outcome of a test's call, or of a set-up that failed or skipped it."""
        if report.when != "call" and report.outcome == "passed":
            return
        name = report.nodeid.partition("::")[2]
        self.record.add(name, {"outcome": report.outcome, "seconds": report.duration})
        if report.outcome == "failed":
            crash = getattr(report.longrepr, "reprcrash", None)
            self.record.fail(name, getattr(crash, "message", str(report.longrepr)).splitlines()[0][:300])

    def pytest_collectreport(self, report: Any) -> None:
        """Keep why tests could not even be read, such as a package that they lack."""
        if report.failed:
            self.record.fail(report.nodeid, str(report.longrepr).splitlines()[-1][:300])

    def pytest_internalerror(self, excinfo: Any) -> None:
        """Keep an error of pytest itself."""
        self.record.fail("pytest", described(excinfo.value))


def table(results: dict[str, Any]) -> str:
    """Return a line for each test function: how many of its cases passed."""
    functions: dict[str, list[str]] = {}
    for name, result in results.items():
        functions.setdefault(name.partition("[")[0], []).append(result["outcome"])
    return tables.aligned(
        [
            {
                "test": name.removeprefix("test_").replace("_", " "),
                "passed": f"{outcomes.count('passed')} of {len(outcomes)}",
            }
            for name, outcomes in functions.items()
        ]
    )
