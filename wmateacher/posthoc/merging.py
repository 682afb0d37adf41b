"""Merge saved checkpoints: averages over a run, interpolation (WiSE-FT) and Model Stock."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wmateacher import kernels
from wmateacher.checks import increasing, positive_int
from wmateacher.files import Checkpoint, File
from wmateacher.folders import SHARD_BYTES, check_target, write
from wmateacher.kernels import Array, KernelLike
from wmateacher.posthoc.combining import combine, matched, parts, pieces, refuse_nonfinite, wide
from wmateacher.posthoc.sources import Source, align

__all__ = [
    "average_checkpoints",
    "checkpoint_weights",
    "interpolate",
    "model_stock",
    "model_stock_ratios",
]


def __dir__() -> list[str]:
    return __all__


def average_checkpoints(
    checkpoints: Sequence[Checkpoint],
    kernel: KernelLike = "uniform",
    steps: Sequence[int] | None = None,
    total_steps: int | None = None,
    output: File | None = None,
    *,
    key: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """Average saved checkpoints with any kernel.

    Each checkpoint represents the optimizer steps nearest to it (ties go to the later one), and its weight is
    the kernel's mass of these steps. Checkpoints at steps 0, n, 2n, ..., T therefore give the average of a
    teacher with `update_every=n`. Floating-point buffers are averaged like parameters. It is better to
    recompute batch-norm statistics afterwards (`torch.optim.swa_utils.update_bn`).

    Examples:
        >>> average_checkpoints([{"w": torch.tensor([float(i)])} for i in range(4)], "uniform")
        {'w': tensor([1.5000])}

    Args:
        checkpoints: The state dicts, files or model folders, in the order of training.
        kernel: The kernel, in any form that `WMATeacher` accepts. Default: the plain mean.
        steps: The optimizer step of each checkpoint, in increasing order. Default: steps 0, 1, 2, ..., for
            equally spaced checkpoints.
        total_steps: The kernel's horizon. Default: the last of `steps`.
        output: The file to write the average to; if the last checkpoint is a model folder, also a folder.
            Default: none.
        key: The entry of each checkpoint that is the state dict, with dots between the keys of nested ones,
            as in `"model.student"`. Default: the student of a run's checkpoint, or the only state dict.
        shard_bytes: The largest size of a shard in an output folder.

    Raises:
        ValueError: If there are no checkpoints, their tensors differ or are not finite, or the steps do not
            fit.
    """
    _check_several("checkpoints", checkpoints, 1)
    check_target(output, checkpoints)
    counts = checkpoint_weights(kernel, len(checkpoints), steps, total_steps)
    state = combine(align(checkpoints, key), lambda name: counts)
    if output is not None:
        write(state, output, checkpoints[-1], shard_bytes)
    return state


def checkpoint_weights(
    kernel: KernelLike, count: int, steps: Sequence[int] | None = None, total_steps: int | None = None
) -> Array:
    """Return the weight of each checkpoint in `average_checkpoints`.

    Args:
        kernel: The kernel, in any form that `WMATeacher` accepts.
        count: The number of checkpoints.
        steps: The optimizer step of each checkpoint, as for `average_checkpoints`.
        total_steps: The horizon in optimizer steps, as for `average_checkpoints`.

    Returns:
        float64 `[count]`, summing to 1.

    Raises:
        ValueError: If the steps do not fit.
    """
    built = kernels.build(kernel)
    if steps is None:
        if total_steps is not None:
            raise ValueError(
                f"total_steps={total_steps} needs the step of each checkpoint: pass steps=[...] too"
            )
        steps = range(count)
    at = np.array(increasing("steps", steps))
    if len(at) != count:
        raise ValueError(f"steps must be one for each of the {count} checkpoints, got {len(at)}")
    total_steps = int(at[-1]) if total_steps is None else positive_int("total_steps", total_steps)
    if total_steps < at[-1]:
        raise ValueError(f"total_steps must be at least the last of steps, {at[-1]}, got {total_steps}")
    if total_steps == 0:
        return np.ones(1)
    first = np.append(0, (at[:-1] + at[1:] - 1) // 2 + 1)
    return np.add.reduceat(built.profile(total_steps), first)


def interpolate(
    start: Checkpoint,
    end: Checkpoint,
    alpha: float,
    *,
    output: File | None = None,
    key: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """Return `(1 - alpha) * start + alpha * end`: WiSE-FT (Wortsman et al. 2022), eq. 1.

    Examples:
        >>> interpolate({"w": torch.zeros(2)}, {"w": torch.ones(2)}, alpha=0.25)
        {'w': tensor([0.2500, 0.2500])}

    Args:
        start: The pretrained weights, a state dict, a file or a model folder.
        end: The fine-tuned weights, a state dict, a file or a model folder.
        alpha: The share of the fine-tuned weights, in [0, 1].
        output: The file to write the result to; if the last checkpoint is a model folder, also a folder.
            Default: none.
        key: The entry of each checkpoint that is the state dict, with dots between the keys of nested ones,
            as in `"model.student"`. Default: the student of a run's checkpoint, or the only state dict.
        shard_bytes: The largest size of a shard in an output folder.

    Raises:
        ValueError: If `alpha` is out of range, or the tensors differ or are not finite.
    """
    check_target(output, [start, end])
    if not 0 <= alpha <= 1:
        raise ValueError(
            f"alpha must be in [0, 1], got {alpha!r}: 0 is the start (pretrained), 1 the end (fine-tuned)"
        )
    state = combine(align([start, end], key), lambda name: (1.0 - alpha, alpha))
    if output is not None:
        write(state, output, end, shard_bytes)
    return state


def model_stock(
    pretrained: Checkpoint,
    finetuned: Sequence[Checkpoint],
    *,
    output: File | None = None,
    key: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    r"""Merge fine-tuned models by Model Stock (Jang et al. 2024).

    Each layer is moved from the pretrained weights towards the mean of the fine-tuned ones,

    $$w = t\, \bar w + (1 - t)\, w_0, \qquad t = \frac{N \cos\theta}{1 + (N - 1) \cos\theta}$$

    for N fine-tuned models, with `theta` the angle between the fine-tuned models seen from `w_0`. For N = 2
    it is the paper's `2 cos / (1 + cos)`. See `model_stock_ratios` for the cases that the paper leaves open.

    Examples:
        >>> start, one, two = torch.zeros(2), torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])
        >>> model_stock({"w": start}, [{"w": one}, {"w": two}])["w"]  # t = 2 cos 45 / (1 + cos 45) = 0.828...
        tensor([0.8284, 0.4142])

    Args:
        pretrained: The pretrained weights `w_0`, a state dict, a file or a model folder.
        finetuned: Two or more models that were fine-tuned from it, state dicts, files or model folders.
        output: The file to write the result to; if the last checkpoint is a model folder, also a folder.
            Default: none.
        key: The entry of each checkpoint that is the state dict, with dots between the keys of nested ones,
            as in `"model.student"`. Default: the student of a run's checkpoint, or the only state dict.
        shard_bytes: The largest size of a shard in an output folder.

    Raises:
        ValueError: If there are fewer than two fine-tuned models, or the tensors differ or are not finite.
    """
    _check_several("finetuned", finetuned, 2)
    check_target(output, [pretrained, *finetuned])
    sources, count = align([pretrained, *finetuned], key), len(finetuned)
    ratios = _stock_ratios(sources)
    state = combine(sources, lambda name: (1.0 - ratios[name], *[ratios[name] / count] * count))
    if output is not None:
        write(state, output, finetuned[-1], shard_bytes)
    return state


def model_stock_ratios(
    pretrained: Checkpoint, finetuned: Sequence[Checkpoint], *, key: str | None = None
) -> dict[str, float]:
    """Return the ratio `t` in [0, 1] of Model Stock for every floating-point tensor.

    The formula assumes that the fine-tuned weights are equally far from `w_0` and from their centre, with the
    same angle between any two of them. Real weights are treated as follows:

    - A layer is one tensor of the state dict, of any shape, including biases, norms and scalars.
    - `cos` is the mean over all pairs of fine-tuned models. A model that did not move a tensor has cosine 0
      with the others.
    - A negative mean, which no such centre explains, counts as 0: the tensor stays at `w_0`.

    Args:
        pretrained: The pretrained weights `w_0`, as for `model_stock`.
        finetuned: Two or more models that were fine-tuned from it.
        key: The entry of each checkpoint that is the state dict, as for `model_stock`.

    Raises:
        ValueError: If there are fewer than two fine-tuned models, or the tensors differ or are not finite.
    """
    _check_several("finetuned", finetuned, 2)
    return _stock_ratios(align([pretrained, *finetuned], key))


def _stock_ratios(sources: Sequence[Source]) -> dict[str, float]:
    specs, count = matched(sources, -1), len(sources) - 1
    names = [n for n, spec in specs.items() if spec.is_floating]
    grams = {name: np.zeros((count, count)) for name in names}
    for part in parts(specs, names, 1 / (4 * len(sources))):
        with ExitStack() as stack:
            opened = [stack.enter_context(source.open()) for source in sources]
            for name, first, end in part:
                values = [o.read(name, first, end) for o in opened]
                grams[name] += _gram(values)
                if not np.isfinite(grams[name]).all():
                    for source, value in zip(sources, values, strict=True):
                        refuse_nonfinite(value, name, source.label)
    return {name: _stock_ratio(gram) for name, gram in grams.items()}


def _gram(values: Sequence[Tensor]) -> Array:
    """Return the inner products of `values[i] - values[0]`, i = 1..N, as float64 `[N, N]`."""
    gram = np.zeros((len(values) - 1,) * 2)
    for aligned in zip(*(pieces(v) for v in values), strict=True):
        origin, *moved = (wide(p) for p in aligned)
        deltas = torch.stack([m - origin for m in moved])
        if deltas.is_complex():
            deltas = torch.view_as_real(deltas).flatten(1)
        gram += (deltas @ deltas.T).numpy()
    return gram


def _stock_ratio(gram: Array) -> float:
    count = len(gram)
    lengths = np.sqrt(np.diag(gram))
    products = np.outer(lengths, lengths)
    cosines = np.divide(gram, products, out=np.zeros_like(gram), where=products > 0)
    cosine = float(np.clip(cosines[np.triu_indices(count, 1)].mean(), 0.0, 1.0))
    return count * cosine / (1 + (count - 1) * cosine)


def _check_several(argument: str, values: Any, least: int) -> None:
    if isinstance(values, str | os.PathLike | Mapping) or not isinstance(values, Sequence):
        raise TypeError(f"{argument} must be a list of state dicts or files, got {type(values).__name__}")
    if len(values) < least:
        models = "model" if least == 1 else "models"
        raise ValueError(f"{argument} must be at least {least} {models}, got {len(values)}")
