"""Recompute the running statistics of a model, or of an average, from data."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.utils import _pytree

from wmateacher import averaging, caches, checks, collectives, normalisation, pairing, sharding, walking

__all__ = ["recalibrate"]

_Forward = Callable[[nn.Module, Any], Any]


def recalibrate(
    model: nn.Module, loader: Iterable[Any], steps: int | None = None, *, forward: _Forward | None = None
) -> int:
    """Recompute the running statistics of normalisation layers from data, for averaged weights above all.

    Running statistics belong to the weights that they were collected with. Averaged weights, from a teacher,
    from `copy_to`, or from `wmateacher.posthoc`, need their own, after the run or before an evaluation:

        >>> recalibrate(teacher, loader)  # doctest: +SKIP

    Every running mean and variance becomes the plain mean over all batches of the batch's mean and unbiased
    variance, as by `torch.optim.swa_utils.update_bn` (which leaves instance normalisation out), but summed in
    float64. With a process group, this is the mean over the batches of all processes, each of which must call
    it. Layers of batch and instance normalisation take part, except for those that the model, or the
    teacher's student, keeps in eval mode while it is in train mode itself. All other modules run in eval
    mode, without dropout. Modes and momenta are restored afterwards, and the old statistics, too, if an error
    interrupts the pass.

    In a teacher the statistics hold for its present average. With `buffers="copy"` the next snapshot replaces
    them by the student's; with `"average"` the running average goes on from them; with `"keep"` they stay; in
    `mode="train"` the teacher's forward passes move them on. `swap`, `copy_to`, and saved states include
    them. For a progress bar, wrap the loader: `recalibrate(teacher, tqdm(loader))`. Inside `torch.autocast`
    the passes run in its precision.

    Args:
        model: A teacher, whose averaged module is recalibrated, or any other module. Wrappers such as DDP's
            and torch.compile's are unwrapped.
        loader: The batches: tensors, lists or tuples whose first element is the model's input, or mappings of
            keyword arguments. Their tensors, and objects with a `to` method, are moved to the model's device.
            Training batches of the size and the augmentation used in training fit best.
        steps: The largest number of batches to use on each process; None stands for all.
        forward: A function that runs `forward(model, batch)`, for batches of another kind.

    Returns:
        The number of batches, of all processes together; 0 for a model without running statistics, for which
            the loader is not touched.

    Raises:
        ValueError: If the loader is empty, `forward` reaches none of the layers, a batch gives statistics
            that are not finite, or a layer is of a kind that is not derived from torch's.
        RuntimeError: If called for a teacher inside `swap`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module or a WMATeacher, got {type(model).__name__}")
    if steps is not None:
        checks.positive_int("steps", steps)
    teacher: Any = model if walking.is_teacher(model) else None
    # A teacher knows how to write its averages; of other modules the tensors themselves are written.
    if teacher is not None:
        target: AbstractContextManager[tuple[nn.Module, Any, Any]] = teacher._recalibrating()
    else:
        module = pairing.unwrap(model)
        target = nullcontext((module, normalisation.frozen(module), lambda values: _write(module, values)))
    with target as (module, frozen, write):
        layers = {n: m for n, m in normalisation.layers(module).items() if n not in frozen}
        foreign = [n for n, m in layers.items() if not isinstance(m, _NormBase)]
        if foreign:
            kind = type(layers[foreign[0]]).__name__
            raise ValueError(
                f"recalibrate() knows layers derived from torch's batch and instance normalisation, but "
                f"{pairing.few(foreign)} keeps running statistics as a {kind}: recompute them as its library "
                "says"
            )
        if not layers:
            return 0
        values, count = _measure(module, frozen, islice(loader, steps), forward or _call)
        write(values)
        return count


def _measure(
    module: nn.Module, frozen: Any, batches: Iterable[Any], forward: _Forward
) -> tuple[dict[str, Tensor], int]:
    """Return the statistics by canonical name, and the number of batches; leave the module as it was."""
    names = {id(tensor): name for name, tensor in pairing.tensors(module).items()}
    device = next((t.device for t in module.parameters()), torch.device("cpu"))
    with _collecting(module, frozen) as sums, torch.no_grad(), caches.apart(), _eagerly():
        count = 0
        for count, batch in enumerate(batches, 1):  # noqa: B007
            forward(module, _moved(batch, device))
    sharding.reshard(sharding.fully_sharded(module))
    rows = [torch.cat([*parts, parts[0].new_tensor([calls])]).to(device) for parts, calls in sums.values()]
    total = torch.cat([*rows, torch.tensor([count], dtype=torch.float64).to(rows[0])])
    if collectives.world_size() > 1:
        dist.all_reduce(total)
    *numbers, count = total.split([*map(len, rows), 1])
    if not count:
        raise ValueError(
            "loader gave no batch: pass one that gives at least one (an iterator may be used up)"
        )
    values: dict[str, Tensor] = {}
    for layer, row in zip(sums, numbers, strict=True):
        calls, size = row[-1], (len(row) - 1) // 2
        if not calls:
            continue  # the batches did not pass through it
        mean, variance = row[:size] / calls, row[size:-1] / calls
        name = names[id(layer.running_mean)]
        if not total.isfinite().all() and not (mean.isfinite().all() and variance.isfinite().all()):
            raise ValueError(
                f"the batches give {name!r} values that are not finite: leave out batches with NaN or "
                "infinite values"
            )
        values[name], values[names[id(layer.running_var)]] = mean, variance
        if isinstance(layer, _BatchNorm) and layer.num_batches_tracked is not None:
            values[names[id(layer.num_batches_tracked)]] = calls
    if not values:
        raise ValueError(
            "no batch passed through a layer with running statistics: pass forward=FUNCTION, which calls "
            "FUNCTION(model, batch), if the model is not used as model(batch)"
        )
    return values, int(count)


@contextmanager
def _collecting(module: nn.Module, frozen: Any) -> Iterator[dict[Any, Any]]:
    """Sum the statistics of the batches that pass through a module inside a `with` block.

    Yields:
        The sums of means and variances of each layer, and the number of its calls.
    """
    mode, flags = module.training, [(m, m.training) for m in module.modules()]
    live: list[Any] = normalisation.use_batches(module, frozen)
    own = [(layer, layer.momentum, [(b, b.clone()) for b in layer.buffers(recurse=False)]) for layer in live]
    sums: dict[Any, Any] = {}
    hooks = []

    def add(layer: Any, *unused: Any) -> None:
        parts, calls = sums[layer]
        parts[0] += sharding.local(layer.running_mean)
        parts[1] += sharding.local(layer.running_var)
        sums[layer] = parts, calls + 1

    try:
        for layer in live:
            mean = sharding.local(layer.running_mean)
            dtype = torch.float32 if mean.device.type == "mps" else torch.float64
            sums[layer] = [torch.zeros_like(mean, dtype=dtype) for _ in "mv"], 0
            # With momentum 1 the running statistics are those of the last batch. 0 times NaN would be NaN.
            layer.momentum = 1.0
            layer.reset_running_stats()
            hooks.append(layer.register_forward_hook(add))
        yield sums
    finally:
        for hook in hooks:
            hook.remove()
        for layer, momentum, buffers in own:
            layer.momentum = momentum
            for buffer, value in buffers:
                buffer.copy_(value)
        module.train(mode)  # adapters that merge themselves by mode are as they were
        for m, flag in flags:
            m.training = flag


@contextmanager
def _eagerly() -> Iterator[None]:
    """Run what torch.compile has compiled without it, which ignores hooks that are added later."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def _moved(batch: Any, device: torch.device) -> Any:
    """Return a batch on a device: its tensors, or itself if it moves itself, as transformers' batches do."""
    return _pytree.tree_map(lambda leaf: leaf.to(device) if hasattr(leaf, "to") else leaf, batch)


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, list | tuple) else batch)


def _write(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Write statistics into a module by canonical name."""
    tensors = pairing.tensors(module)
    averaging.copy_([sharding.local(tensors[n]) for n in values], list(values.values()))
    caches.Forget(module)()


def __dir__() -> list[str]:
    return __all__
