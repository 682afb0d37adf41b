"""A drop-in replacement for timm's `ModelEmaV3` that averages with any kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from wmateacher import WMATeacher, checks, pairing
from wmateacher.kernels import Array, Kernel, KernelLike, build

__all__ = ["ModelWma"]


class ModelWma(WMATeacher):
    """A teacher with the methods and the checkpoint keys of `timm.utils.ModelEmaV3`.

    In `train.py` of timm 1.0, it takes the place of `task.setup_ema(...)`, where the length of the run is not
    known yet:

        task.trainable_module_ema = ModelWma(
            task.get_trainable_module(), "beta(0.5,0.5)", device="cpu" if args.model_ema_force_cpu else None
        )

    After the line that creates the scheduler, tell it the length, which kernels without a horizon such as
    `ema(0.9998)` do not need:

        task.trainable_module_ema.set_total_steps(num_epochs * updates_per_epoch)

    In `legacy_train.py`, and `train.py` before tasks, write `model_ema = ModelWma(model, ...)` instead of
    `utils.ModelEmaV3(...)`, and `model_ema.set_total_steps(...)`.

    `CheckpointSaver` writes its weights as `state_dict_ema`, which timm's loaders read, as they read those of
    `ModelEmaV3`. The step count is timm's, the number in `update(model, step=num_updates)`, so a resumed run
    continues the average where it was.

    timm's checkpoints hold the average in the model's dtype, so that vectors, which are averaged in float64,
    are rounded once when a run is resumed. `dtype=torch.float32` makes resuming float32 runs bit-exact.

    Unlike `WMATeacher`, it averages floating-point buffers by default, as `ModelEmaV3` does.
    """

    def __init__(
        self,
        model: nn.Module,
        kernel: KernelLike = "beta(0.5,0.5)",
        total_steps: int | None = None,
        *,
        device: torch.device | str | None = None,
        **options: Any,
    ):
        """Start the average at the model as it is now.

        Args:
            model: The student, before or after DDP and torch.compile.
            kernel: The kernel, as for `WMATeacher`. `"ema(0.9998)"` keeps the start in the average.
                `ModelEmaV3(model, decay=0.9998)`, whose first update copies the model, is
                `migration.PeerEMA(0.9998)`, which has its warm-up too.
            total_steps: The optimizer steps of the whole run, epochs times updates per epoch. If the kernel
                needs it and this is None, call `set_total_steps` before the first update.
            device: The device of the average, as for `WMATeacher`; `"cpu"` for timm's
                `--model-ema-force-cpu`.
            **options: Further options of `WMATeacher`.
        """
        kernel = build(kernel)
        if kernel.needs_horizon and total_steps is None:
            kernel = _WithoutHorizon(kernel)
        super().__init__(model, kernel, total_steps, device=device, **{"buffers": "average", **options})

    @property
    def kernel(self) -> Kernel:
        """The kernel, which determines how much each step of the student counts."""
        kernel = super().kernel
        return kernel.kernel if isinstance(kernel, _WithoutHorizon) else kernel

    def update(self, model: nn.Module | None = None, step: int | None = None) -> None:
        """Count one optimizer step and average the model in.

        Args:
            model: The student; None for the model that this was built from.
            step: The number of this update, counted from 1; None for the next one. After a gap, as in a
                resumed run, the average in `module` continues from there.

        Raises:
            ValueError: If `step` was counted already.
            RuntimeError: If the kernel needs a horizon, and there was none at construction or since.
        """
        if step is not None and step != self.step + 1:
            if step <= self.step:
                raise ValueError(
                    f"step={step} was counted already, the last was {self.step}: step is the number of "
                    "optimizer steps so far, as timm's num_updates; build a new average for a new run"
                )
            resumed = self.step == 0
            # timm loads the average of a checkpoint into `module`, past the teacher's own state.
            self.load_average(self.module.state_dict() if resumed else None, step - 1)
            if resumed:
                # The average has this teacher's snapshots, of which the last may stand for steps to come.
                clock = self.get_extra_state()
                snapshot = step - 1 - (step - 1) % clock["update_every"]
                self.set_extra_state({**clock, "joined": 0, "snapshot": snapshot})
        super().update(model)

    def set(self, model: nn.Module) -> None:
        """Set the average to the model's weights."""
        self.load_average(pairing.unwrap(model).state_dict(), self.step)

    def get_decay(self, step: int | None = None) -> float:
        """Return the kernel's retention, timm's decay, at a step; None for the last one.

        Raises:
            ValueError: If `step` is not a whole number within the run.
            RuntimeError: If the kernel needs a horizon that is not set yet.
        """
        total, step = self.total_steps, self.step if step is None else checks.whole("step", step, 0)
        if total is not None and step > total:
            raise ValueError(f"step must be at most total_steps={total}, got {step}")
        return float(super().kernel.retention(np.array([step]), total)[0])


@dataclass(frozen=True)
class _WithoutHorizon(Kernel):
    """A kernel whose horizon is not known yet: it gives no weights until it is set."""

    kernel: Kernel

    def __post_init__(self) -> None:
        object.__setattr__(self, "stepwise", self.kernel.stepwise)
        object.__setattr__(self, "start_step", getattr(self.kernel, "start_step", 0))

    @property
    def needs_horizon(self) -> bool:
        return False

    def retention(self, steps: NDArray[np.int64], total_steps: int | None) -> Array:
        if total_steps is not None:
            return self.kernel.retention(steps, total_steps)
        if steps.any():
            raise RuntimeError(
                f"kernel {str(self.kernel)!r} needs total_steps, and ModelWma was built without it: first "
                "call its set_total_steps(num_epochs * updates_per_epoch)"
            )
        return np.zeros(len(steps))

    def __str__(self) -> str:
        return str(self.kernel)
