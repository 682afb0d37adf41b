r"""Averages that are made after training, from recorded snapshots or from saved checkpoints.

- `Recorder` keeps a few power-function averages during training and writes snapshots of them.
  `synthesise` combines the snapshots into the average of *any* kernel (post-hoc EMA of Karras et al. 2024,
  "Analyzing and Improving the Training Dynamics of Diffusion Models", section 3).
- `average_checkpoints`, `interpolate` and `model_stock` merge checkpoints that already exist.

Every result is $\sum_i c_i X_i$ with $\sum_i c_i = 1$. Inputs are state dicts, files, or model folders as
`save_pretrained` writes them, whose weights may be in shards with an index. What DDP, torch.compile and other
wrappers add to names does not matter. Inputs are read a part at a time: besides the result in CPU memory,
this takes about a third of the result's size. Sums are computed in float64, and results have the dtypes of
the last input. Entries that cannot be averaged (integer and boolean tensors, and anything that is not a
tensor) are taken from the last input.
"""

from wmateacher.posthoc.merging import (
    average_checkpoints,
    checkpoint_weights,
    interpolate,
    model_stock,
    model_stock_ratios,
)
from wmateacher.posthoc.recorder import Recorder
from wmateacher.posthoc.synthesis import Synthesis, synthesise

__all__ = [
    "Recorder",
    "Synthesis",
    "average_checkpoints",
    "checkpoint_weights",
    "interpolate",
    "model_stock",
    "model_stock_ratios",
    "synthesise",
]


def __dir__() -> list[str]:
    return __all__
