"""wmateacher: a teacher that is a weighted average of the student's whole trajectory."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from wmateacher import kernels, losses
from wmateacher.recalibration import recalibrate
from wmateacher.teacher import WMATeacher

if TYPE_CHECKING:
    from wmateacher import diagnostics, migration, posthoc, theory

    __version__: str

__all__ = [
    "WMATeacher",
    "__version__",
    "diagnostics",
    "kernels",
    "losses",
    "migration",
    "posthoc",
    "recalibrate",
    "theory",
]


def __getattr__(name: str) -> Any:
    """Load the modules that a training run may not need, and the version, on first use (PEP 562)."""
    if name == "__version__":
        return _version()
    if name in __all__:
        return import_module(f"wmateacher.{name}")
    raise AttributeError(f"module 'wmateacher' has no attribute {name!r}")


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("wmateacher")
    except PackageNotFoundError:  # imported from a source tree that is not installed
        return "0+unknown"


def __dir__() -> list[str]:
    return __all__
