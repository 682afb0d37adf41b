"""The settings that all training runs share, checked once; autocast and gradient scaling follow from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar, get_type_hints

import torch

from wmateacher.integrations.engine import schedules

__all__ = ["Hidden", "Settings", "check_at_least", "visible"]

ValueT = TypeVar("ValueT")
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}

if TYPE_CHECKING:
    Hidden = Annotated[ValueT, None]
else:

    class Hidden:
        """Annotate a field, as in `name: Hidden[str]`, that the command line neither shows nor changes."""

        def __class_getitem__(cls, kind):
            # Only reading a command line needs tyro, and only that evaluates annotations.
            from tyro.conf import Suppress

            return Annotated[kind, Suppress, cls]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The optimisation of a run: a linear warm-up, then a cosine decay to 0.

    Attributes:
        steps: Number of optimizer steps T.
        learning_rate: Learning rate at the end of the warm-up.
        weight_decay: Weight decay of every parameter.
        warmup: Steps of linear warm-up.
        clip_norm: Largest gradient norm; None for no clipping.
        precision: `fp32`, or autocast to `bf16` or `fp16` with float32 weights. fp16 uses a gradient scaler.
        seed: Seed of the initialisation, the data order and everything else that is random.
        checkpoint_every: Steps between checkpoints.

    Raises:
        ValueError: If a value is out of range.
    """

    steps: int
    learning_rate: float
    weight_decay: float = 0.0
    warmup: int = 0
    clip_norm: float | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    seed: int = 0
    checkpoint_every: int = 100

    precisions: ClassVar[tuple[str, ...]] = ("fp32", "bf16")
    least: ClassVar[Mapping[str, int]] = {"steps": 1, "warmup": 0, "checkpoint_every": 1}

    def __post_init__(self) -> None:
        check_at_least(self, **self.least)
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"clip_norm must be above 0, or None for no clipping, got {self.clip_norm}")
        if self.precision not in self.precisions:
            *others, last = map(repr, self.precisions)
            raise ValueError(f"precision must be {', '.join(others)} or {last}, got {self.precision!r}")

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of the optimizer step with index `step`, from 0."""
        return schedules.warmup_cosine(step, self.steps, self.warmup, self.learning_rate)

    def autocast(self, device: torch.device) -> torch.autocast:
        """Return the context for the forward pass; it does nothing in fp32."""
        dtype = _AUTOCAST.get(self.precision)
        return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)

    def grad_scaler(self, device: torch.device) -> torch.amp.GradScaler:
        """Return the gradient scaler, which scales in fp16 only."""
        return torch.amp.GradScaler(device.type, enabled=self.precision == "fp16")

    def run_config(self) -> dict[str, Any]:
        """Return the settings that must match for a checkpoint to be resumed: all that change a result."""
        config = asdict(self)
        del config["checkpoint_every"]
        return config


def check_at_least(config: Any, **bounds: float) -> None:
    """Check lower bounds of attributes.

    Args:
        config: The object with the attributes.
        **bounds: For each name, the smallest value that it may have.

    Raises:
        ValueError: If a value is below its bound.
    """
    for name, low in bounds.items():
        if getattr(config, name) < low:
            raise ValueError(f"{name} must be at least {low}, got {getattr(config, name)}")


def visible(config: Any) -> dict[str, Any]:
    """Return the fields of a dataclass that the command line shows: all that are not `Hidden`."""
    hints = get_type_hints(type(config), include_extras=True)
    return {
        n: value for n, value in vars(config).items() if Hidden not in getattr(hints[n], "__metadata__", ())
    }
