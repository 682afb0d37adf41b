"""A callback that averages the model while a transformers Trainer trains it, and a Trainer that distils."""

try:
    import accelerate  # noqa: F401
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError(
        "wmateacher.integrations.huggingface needs transformers and accelerate: "
        "pip install 'wmateacher[huggingface]'"
    ) from error

from wmateacher.integrations.huggingface.callback import AVERAGE, FILE, TeacherCallback
from wmateacher.integrations.huggingface.comparison import Comparison
from wmateacher.integrations.huggingface.trainer import TeacherMixin, TeacherTrainer

__all__ = ["AVERAGE", "FILE", "Comparison", "TeacherCallback", "TeacherMixin", "TeacherTrainer"]


def __dir__() -> list[str]:
    return __all__
