"""A Lightning callback that averages the module while a Trainer trains it."""

try:
    import lightning  # noqa: F401
except ImportError as error:
    raise ImportError(
        "wmateacher.integrations.lightning needs Lightning: pip install 'wmateacher[lightning]'"
    ) from error

from wmateacher.integrations.lightning.callback import TeacherCallback

__all__ = ["TeacherCallback"]


def __dir__() -> list[str]:
    return __all__
