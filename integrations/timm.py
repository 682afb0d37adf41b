"""What stands where timm's `ModelEmaV3` stands, its average any kernel's."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from wmateacher import WMATeacher, pairing
from wmateacher.kernels import KernelLike


class ModelWma(WMATeacher):
    """A teacher with the methods and the checkpoint keys of `timm.utils.ModelEmaV3`.

    In a script such as timm's `train.py` it takes one line:

        model_ema = ModelWma(model, "beta(0.5,0.5)", total_steps=num_epochs * updates_per_epoch)

    `CheckpointSaver` writes its weights as `state_dict_ema`, and `load_checkpoint(model_ema.module, file,
    use_ema=True)` reads them; a `state_dict_ema` of timm's own does as well. The clock is timm's: the number
    in `update(model, step=num_updates)`, so that a run that is resumed goes on where the average was.

    Unlike `WMATeacher` it averages floating-point buffers by default, as `ModelEmaV3` does.
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
            kernel: As `WMATeacher`'s. `"ema(0.9998)"` is `ModelEmaV3(model, decay=0.9998)`;
                `migration.PeerEMA` has its warm-up.
            total_steps: Optimizer steps of the whole run: epochs times updates per epoch.
            device: As `WMATeacher`'s; `"cpu"` for timm's `--model-ema-force-cpu`.
            **options: More of `WMATeacher`'s.
        """
        super().__init__(model, kernel, total_steps, device=device, **{"buffers": "average", **options})

    def update(self, model: nn.Module | None = None, step: int | None = None) -> None:
        """Count one optimizer step and average the model in.

        Args:
            model: The student; None: the one that this was built from.
            step: The number of this update, from 1; None: the next. After a gap, as when a run is resumed,
                the average as it is in `module` goes on from there.

        Raises:
            ValueError: `step` was counted already.
        """
        if step is not None and step != self.step + 1:
            if step <= self.step:
                raise ValueError(
                    f"step={step} was counted already, the last was {self.step}: step is the number of "
                    "optimizer steps so far, as timm's num_updates; build a new average for a new run"
                )
            # What timm loads from a checkpoint is in `module`.
            self.load_average(None if self.step else self.module.state_dict(), step - 1)
        super().update(model)

    def set(self, model: nn.Module) -> None:
        """Let the average be the model as it is."""
        self.load_average(pairing.unwrap(model).state_dict(), self.step)

    def get_decay(self, step: int | None = None) -> float:
        """The retention of a step; None: of the last one."""
        at = np.array([self.step if step is None else step])
        return float(self.kernel.retention(at, self.total_steps)[0])
