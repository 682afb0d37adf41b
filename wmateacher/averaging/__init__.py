"""Averages of tensors and their update, `average <- average + omega (value - average)`.

No other package writes averaged tensors. An average is held in one of three ways:

- *direct*: in the averaged module's own tensor;
- *wide*: in a tensor of higher precision beside it, which is rounded into the module at each update;
- *split*: in float32, whose upper half is the module's own bfloat16 tensor (rounded to nearest) and whose
  lower half is a 16-bit tensor beside it. The values are exactly float32's, for half the extra memory of
  *wide*.

An `Update` is prepared once and applied at every snapshot, for as long as the tensors stay the same. It is
made of steps: a kernel that moves many tensors in one pass (`fused`, on a CUDA device), or torch's own
operations on batches that fit in the cache (`steps`, anywhere).
"""

from wmateacher.averaging.average import Average, is_vector, side_by_side
from wmateacher.averaging.steps import SCRATCH_BYTES, batched, views
from wmateacher.averaging.update import Update, copy_

__all__ = ["SCRATCH_BYTES", "Average", "Update", "batched", "copy_", "is_vector", "side_by_side", "views"]


def __dir__() -> list[str]:
    return __all__
