"""A drop-in replacement for timm's `ModelEmaV3` that averages with any kernel."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from wmateacher import WMATeacher, pairing
from wmateacher.kernels import KernelLike

__all__ = ["ModelWma"]


class ModelWma(WMATeacher):
    """A teacher with the methods and the checkpoint keys of `timm.utils.ModelEmaV3`.

    In a script such as timm's `train.py`, replace one line:

        model_ema = ModelWma(model, "beta(0.5,0.5)", total_steps=num_epochs * updates_per_epoch)

    `CheckpointSaver` writes its weights as `state_dict_ema`, and `load_checkpoint(model_ema.module, file,
    use_ema=True)` reads them, as it reads those of `ModelEmaV3`. The step count is timm's, the number in
    `update(model, step=num_updates)`, so a resumed run continues the average where it was. timm's file has
    the model's dtypes, to which averages in higher precision are rounded once; `dtype=torch.float32` resumes
    a float32 model to the last bit.

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
            total_steps: The optimizer steps of the whole run, epochs times updates per epoch.
            device: The device of the average, as for `WMATeacher`; `"cpu"` for timm's
                `--model-ema-force-cpu`.
            **options: Further options of `WMATeacher`.
        """
        super().__init__(model, kernel, total_steps, device=device, **{"buffers": "average", **options})

    def update(self, model: nn.Module | None = None, step: int | None = None) -> None:
        """Count one optimizer step and average the model in.

        Args:
            model: The student; None for the model that this was built from.
            step: The number of this update, counted from 1; None for the next one. After a gap, as in a
                resumed run, the average in `module` continues from there.

        Raises:
            ValueError: If `step` was counted already.
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
        """Return the kernel's retention, timm's decay, at a step; None for the last one."""
        at = np.array([self.step if step is None else step])
        return float(self.kernel.retention(at, self.total_steps)[0])
