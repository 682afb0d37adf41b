"""Measures of the distance between teacher and student, in weights, outputs and layers.

The functions return 0-d tensors, so that the host does not wait for the device. `GapMonitor` reads them in
blocks of steps.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wmateacher import checks, sharding, transfers
from wmateacher.losses.divergences import ForwardKL
from wmateacher.losses.tokens import token_mean
from wmateacher.teacher import WMATeacher

__all__ = [
    "GapMonitor",
    "Split",
    "agreement",
    "layer_cka",
    "layer_inputs",
    "linear_cka",
    "module_gaps",
    "output_kl",
    "parameter_gap",
    "split_by_subspace",
    "task_subspace",
]


def __dir__() -> list[str]:
    return __all__


# --- weights --------------------------------------------------------------------------------------------


# The name, the student's tensor and the average of `WMATeacher.averaged_pairs`.
_Pair = tuple[str, Tensor, Tensor]
# The number of elements that are compared at once, unless one tensor has more.
_AT_ONCE = 2**24


@torch.no_grad()
def parameter_gap(teacher: WMATeacher) -> Tensor:
    """Return the relative distance |W - M| / |W| between the student W and its teacher M.

    It is taken over all averaged tensors. 0 means that the teacher has collapsed onto the student.

    Examples:
        >>> student = nn.Linear(4, 4)
        >>> teacher = WMATeacher(student, "static", total_steps=10)
        >>> parameter_gap(teacher).item()
        0.0
        >>> _ = student.weight.data.add_(1)
        >>> bool(parameter_gap(teacher) > 0)
        True

    Returns:
        0-d float32 tensor on the student's device.

    Raises:
        ValueError: If the teacher averages no tensor.
    """
    return _relative(list(_gaps(teacher).values()))


@torch.no_grad()
def module_gaps(teacher: WMATeacher) -> dict[str, Tensor]:
    """Return the gap of `parameter_gap` for each module that has averaged tensors of its own.

    Returns:
        0-d float32 tensors on the student's device, by module name.
    """
    by_module: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for name, norms in _gaps(teacher).items():
        by_module.setdefault(name.rpartition(".")[0], []).append(norms)
    return {module: _relative(norms) for module, norms in by_module.items()}


def _gaps(teacher: WMATeacher) -> dict[str, tuple[Tensor, Tensor]]:
    """Return |W - M| and |W| of every averaged tensor."""
    students: dict[str, Tensor] = {}
    apart: list[Tensor] = []
    scale: list[Tensor] = []
    for batch in _batches(teacher.averaged_pairs()):
        students |= {name: student for name, student, _ in batch}
        norms = _norms(batch)
        apart += norms[0]
        scale += norms[1]
    if not students:
        raise ValueError("the teacher averages no tensor: everything is frozen, excluded or a buffer")
    if any(map(sharding.is_sharded, students.values())):
        whole = list(students.values())
        apart, scale = ([*sharding.norms(torch.stack(n), whole).unbind()] for n in (apart, scale))
    return dict(zip(students, zip(apart, scale, strict=True), strict=True))


def _batches(pairs: Iterable[_Pair]) -> Iterator[list[_Pair]]:
    """Yield batches of at most `_AT_ONCE` elements, or of one larger tensor, to limit what copies take."""
    batch: list[_Pair] = []
    free = _AT_ONCE
    for pair in pairs:
        free -= pair[1].numel()
        if batch and free < 0:
            yield batch
            batch, free = [], _AT_ONCE - pair[1].numel()
        batch.append(pair)
    if batch:
        yield batch


def _norms(batch: Sequence[_Pair]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Return |W - M| and |W| of the local part of every pair."""
    local = ((sharding.local(student), sharding.local(average)) for _, student, average in batch)
    ours, theirs = zip(*((_real(w), _real(m.to(w.device))) for w, m in local), strict=True)
    return torch._foreach_norm(torch._foreach_sub(ours, theirs)), torch._foreach_norm(ours)


def _relative(norms: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    home = norms[0][0].device  # a student may be on several
    apart, scale = (
        torch.stack([transfers.moved(n, home) for n in column]) for column in zip(*norms, strict=True)
    )
    return apart.norm() / scale.norm()


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor).float() if tensor.is_complex() else tensor.float()


class GapMonitor:
    """Records the gap |W - M| / |W| after every step, and warns once if the teacher has collapsed.

    A teacher that equals its student teaches nothing. The teacher starts as a copy of the student, so the
    monitor does not judge until the gap has been above the threshold once or `patience` steps have passed. It
    reads the recorded gaps in blocks of `read_every` steps. The host waits for the device only then, and most
    of the values were computed long before.

    Examples:
        >>> student = nn.Linear(4, 2)
        >>> monitor = GapMonitor(WMATeacher(student, "uniform"))
        >>> monitor.step()  # after each update
        >>> monitor.history()
        [0.0]

    Attributes:
        collapsed: The step at which the gap fell below the threshold, or None.
    """

    def __init__(
        self,
        teacher: WMATeacher,
        *,
        threshold: float = 1e-3,
        patience: int = 200,
        read_every: int = 50,
        log: Callable[[int, float], None] | None = None,
    ):
        """Watch a teacher.

        Args:
            teacher: The teacher to watch.
            threshold: The relative gap below which the teacher has collapsed. The default, 1e-3, is a small
                fraction of the gap that even a fast EMA has while its student learns (up to 5e-3 on the
                digits suite).
            patience: The number of first steps in which a small gap is not a collapse.
            read_every: The number of steps between two readings.
            log: A function that is called with the step and the gap of every recorded step, when it is read.

        Raises:
            ValueError: If a number is out of range.
        """
        for name, value, low in (("patience", patience, 0), ("read_every", read_every, 1)):
            if value < low:
                raise ValueError(f"{name} must be at least {low}, got {value}")
        if not 0 < threshold < 1:
            raise ValueError(f"threshold must lie between 0 and 1, got {threshold}")
        self.teacher, self.threshold, self.patience = teacher, threshold, patience
        self.read_every, self.log = read_every, log
        self.collapsed: int | None = None
        self._steps: list[int] = []
        self._read: list[float] = []
        self._unread: list[Tensor] = []
        self._armed = False

    def step(self) -> None:
        """Record the gap. Call this after each `teacher.update()`."""
        self._steps.append(self.teacher.step)
        self._unread.append(parameter_gap(self.teacher))
        if len(self._unread) >= self.read_every:
            self._settle()

    def history(self) -> list[float]:
        """Return the gap after every recorded step. The host waits for the device."""
        self._settle()
        return list(self._read)

    def _settle(self) -> None:
        if not self._unread:
            return
        first = len(self._read)
        self._read += torch.stack(self._unread).tolist()
        self._unread.clear()
        for step, gap in zip(self._steps[first:], self._read[first:], strict=True):
            if self.log is not None:
                self.log(step, gap)
            self._armed = self._armed or gap > self.threshold or step > self.patience
            if self._armed and gap < self.threshold and self.collapsed is None:
                self.collapsed = step
                warnings.warn(
                    f"the teacher has collapsed onto its student: at step {step} their relative distance is "
                    f"{gap:.1e}, below threshold={self.threshold}, and distillation has next to no effect. "
                    f"Use a kernel with a longer memory than {self.teacher.kernel}",
                    stacklevel=3,
                )


# --- outputs --------------------------------------------------------------------------------------------


@torch.no_grad()
def output_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Return KL(teacher || student) between the softmax outputs, in nats, averaged over the batch.

    For sequences `[B, S, V]` it is the mean over all `B * S` positions, padding included. To leave padding
    out, select the real tokens first: `output_kl(student[mask], teacher[mask])` with a boolean mask `[B, S]`.

    Args:
        student: The student's logits, shape `[B, C]` or `[..., C]`.
        teacher: The teacher's logits, same shape.

    Returns:
        0-d float32 tensor, the mean over all dimensions but the last. Entries whose logits are -inf on both
            sides contribute 0.
    """
    _require_same_shape(student, teacher)
    return token_mean(ForwardKL(), student, teacher)


@torch.no_grad()
def agreement(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the share of a batch on which two models predict the same class.

    Args:
        student: The student's logits, shape `[B, C]` or `[..., C]`.
        teacher: The teacher's logits, same shape.

    Returns:
        0-d float32 tensor in [0, 1].
    """
    _require_same_shape(student, teacher)
    return (student.argmax(-1) == teacher.argmax(-1)).float().mean()


# --- layers ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """The norm of a change D of a layer's weights, inside the task's subspace and outside it.

    Attributes:
        inside: |D P|, the Frobenius norm of the part that affects the batch's activations.
        outside: |D (I - P)|, the Frobenius norm of the part that affects no activation of the batch.
    """

    inside: Tensor
    outside: Tensor

    @property
    def share(self) -> Tensor:
        """The share of the squared norm that is inside, in [0, 1]."""
        total = self.inside.square() + self.outside.square()
        return self.inside.square() / total.clamp_min(torch.finfo(total.dtype).tiny)


@torch.no_grad()
def task_subspace(activations: Tensor, tolerance: float = 1e-6) -> Tensor:
    """Return an orthonormal basis Q of the span of a batch's activations.

    `P = Q Q^t` is then the projector X (X^t X)^+ X^t of the paper's linear world (see `theory`).

    Args:
        activations: A layer's inputs, shape `[n, d]`.
        tolerance: The smallest singular value to keep, as a share of the largest. Larger values keep only
            the main directions.

    Returns:
        float32 `[d, r]` with orthonormal columns.

    Raises:
        ValueError: If the activations are not a matrix.
    """
    if activations.dim() != 2:
        raise ValueError(f"activations must be [n, d], got shape {tuple(activations.shape)}: flatten them")
    _, values, directions = torch.linalg.svd(activations.float(), full_matrices=False)
    return directions[values > tolerance * values[:1]].T


@torch.no_grad()
def split_by_subspace(difference: Tensor, basis: Tensor) -> Split:
    """Split a change of a layer's weights into the parts inside and outside the task's subspace.

    The gradient of a linear layer's weights lies in the span of its inputs. Plain gradient descent therefore
    changes nothing outside the subspace, but weight decay and the drift of other layers do.

    Args:
        difference: The change W - W^0 or W - M of the layer's weights, shape `[out, in]`, or
            `[out, in, k, k]` for a convolution.
        basis: The result of `task_subspace` for that layer's inputs, shape `[in, r]` or `[in k k, r]`.

    Raises:
        ValueError: If the basis belongs to a layer with another number of inputs.
    """
    flat = difference.flatten(1).float()
    if flat.shape[1] != basis.shape[0]:
        raise ValueError(
            f"the weights have {flat.shape[1]} inputs, the basis {basis.shape[0]}: take the basis from the "
            "same layer's activations (layer_inputs)"
        )
    inside = flat @ basis
    return Split(inside.norm(), (flat - inside @ basis.T).norm())


@torch.no_grad()
def layer_inputs(model: nn.Module, layer: str, *args: Any, **kwargs: Any) -> Tensor:
    """Return the inputs of a Linear or Conv2d layer when the model runs.

    Args:
        model: The model, which runs once in its current mode.
        layer: The layer's name in the model.
        *args: The model's arguments.
        **kwargs: The model's keyword arguments.

    Returns:
        `[n, d]` with one row per position. For a convolution, there is one row per patch, flattened like its
        weights.

    Raises:
        ValueError: If there is no such layer, it is of another kind, or it did not run.
    """
    module = _layers(model, [layer])[layer]
    if not isinstance(module, nn.Linear | nn.Conv2d):
        raise ValueError(f"layer {layer!r} must be a Linear or Conv2d, got a {type(module).__name__}")
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        model(*args, **kwargs)
    finally:
        handle.remove()
    if not seen:
        raise ValueError(f"layer {layer!r} did not run: pass an input that reaches it")
    if isinstance(module, nn.Linear):
        return torch.cat([x.flatten(0, -2) for x in seen])
    if module.groups != 1 or module.padding_mode != "zeros" or isinstance(module.padding, str):
        raise ValueError(f"layer {layer!r} must be a plain convolution (no groups, zero padding in numbers)")
    patches = [F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride) for x in seen]
    return torch.cat([p.transpose(1, 2).flatten(0, 1) for p in patches])


@torch.no_grad()
def linear_cka(x: Tensor, y: Tensor) -> Tensor:
    """Return the linear centred kernel alignment (CKA) of two representations of the same examples.

    It is |Y^t X|_F^2 / (|X^t X|_F |Y^t Y|_F) with centred columns (Kornblith et al. 2019), and 1 for
    representations that are equal up to rotation and scale.

    Examples:
        >>> x = torch.randn(64, 8)
        >>> round(linear_cka(x, 3 * x.flip(1)).item(), 4)
        1.0

    Args:
        x: One representation, shape `[n, ...]` with one row per example.
        y: The other, shape `[n, ...]`, of any width.

    Returns:
        0-d float32 tensor in [0, 1].

    Raises:
        ValueError: If they have different numbers of rows.
    """
    if len(x) != len(y):
        raise ValueError(f"both representations must be of the same examples, got {len(x)} and {len(y)} rows")
    x, y = (t.flatten(1).float() for t in (x, y))
    x, y = x - x.mean(0), y - y.mean(0)
    if max(x.shape[1], y.shape[1]) <= len(x):
        cross, ours, theirs = (y.T @ x).norm() ** 2, (x.T @ x).norm(), (y.T @ y).norm()
    else:  # the same numbers from the Gram matrices of the examples, which are smaller here
        gram_x, gram_y = x @ x.T, y @ y.T
        cross, ours, theirs = (gram_x * gram_y).sum(), gram_x.norm(), gram_y.norm()
    return cross / (ours * theirs).clamp_min(torch.finfo(cross.dtype).tiny)


@torch.no_grad()
def layer_cka(
    first: nn.Module, second: nn.Module, *args: Any, layers: Sequence[str] | None = None, **kwargs: Any
) -> dict[str, Tensor]:
    """Return the linear CKA of each layer's output between two models on one batch.

    Args:
        first: One model, such as the student, which runs once in its current mode.
        second: The other, such as the teacher's `module`, which runs once in its current mode.
        *args: The arguments of both models.
        **kwargs: The keyword arguments of both models.
        layers: The names of the layers. Default: all modules without children whose output is a tensor.

    Raises:
        ValueError: If a model has no layer of a given name, or no layer ran in both models.
    """
    with _outputs(first, layers) as ours, _outputs(second, layers) as theirs:
        first(*args, **kwargs)
        second(*args, **kwargs)
    found = {name: linear_cka(ours[name], theirs[name]) for name in ours if name in theirs}
    if not found:
        raise ValueError("no layer ran in both models: pass an input that reaches the layers")
    return found


@contextmanager
def _outputs(model: nn.Module, layers: Sequence[str] | None) -> Iterator[dict[str, Tensor]]:
    """Collect the last output of each layer that runs inside a `with` block."""
    chosen = _layers(model, layers)
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.dim() > 1 and output.is_floating_point():
                seen[name] = output

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in chosen.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _layers(model: nn.Module, names: Sequence[str] | None) -> dict[str, nn.Module]:
    """Return layers by name; None stands for all modules without children."""
    known = {n: m for n, m in model.named_modules() if n}
    chosen = names or [n for n, m in known.items() if not any(m.children())]
    return {name: checks.lookup("layer", name, known) if name else model for name in chosen}


def _require_same_shape(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"the logits of student and teacher must have the same shape, got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}"
        )
