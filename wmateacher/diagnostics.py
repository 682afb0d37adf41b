"""How far teacher and student are apart: 0-d tensors, nothing that waits for the device.

The exceptions say so: `GapMonitor` reads old values now and then, the layer-wise functions run the models.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wmateacher import sharding
from wmateacher.teacher import WMATeacher

# --- weights --------------------------------------------------------------------------------------------


@torch.no_grad()
def parameter_gap(teacher: WMATeacher) -> Tensor:
    """The relative distance |W - M| / |W| of the teacher M from its student W, over averaged tensors.

    0 means that the teacher has collapsed onto the student.

    Example:
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
        ValueError: The teacher averages nothing.
    """
    return _relative(list(_gaps(teacher).values()))


@torch.no_grad()
def module_gaps(teacher: WMATeacher) -> dict[str, Tensor]:
    """The same for each module that has averaged tensors of its own, by the module's name.

    Returns:
        0-d float32 tensors on the student's device.
    """
    by_module: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for name, norms in _gaps(teacher).items():
        by_module.setdefault(name.rpartition(".")[0], []).append(norms)
    return {module: _relative(norms) for module, norms in by_module.items()}


def _gaps(teacher: WMATeacher) -> dict[str, tuple[Tensor, Tensor]]:
    """|W - M| and |W| of every averaged tensor."""
    whole = {n: w for n, w, _ in teacher.averaged_pairs()}
    if not whole:
        raise ValueError("the teacher averages no tensor: everything is frozen, excluded or a buffer")
    local = ((sharding.local(w), sharding.local(m)) for _, w, m in teacher.averaged_pairs())
    students, averages = zip(*((_real(w), _real(m.to(w.device))) for w, m in local), strict=True)
    norms = [torch._foreach_norm(torch._foreach_sub(students, averages)), torch._foreach_norm(students)]
    if any(map(sharding.is_sharded, whole.values())):
        norms = [sharding.norms(torch.stack(n), [*whole.values()]).unbind() for n in norms]
    return dict(zip(whole, zip(*norms, strict=True), strict=True))


def _relative(norms: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    apart, scale = (torch.stack(column) for column in zip(*norms, strict=True))
    return apart.norm() / scale.norm()


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor).float() if tensor.is_complex() else tensor.float()


class GapMonitor:
    """Records the gap |W - M| / |W| after every step, and warns once when the teacher has collapsed.

    A teacher on top of its student teaches nothing. At the start it is there by construction, so that
    nothing is judged before the gap has once been above the threshold or `patience` steps have passed.
    The recorded gaps are read in blocks of `read_every` steps, which is the only time that the host waits
    for the device, and for values that are long there.

    Example:
        >>> student = nn.Linear(4, 2)
        >>> monitor = GapMonitor(WMATeacher(student, "uniform"))
        >>> monitor.step()  # after each update
        >>> monitor.history()
        [0.0]

    Attributes:
        collapsed: The step at which the gap was found below the threshold; None: it was not.
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
            teacher: Whose gap.
            threshold: Of the relative gap. Default 1e-3, a small share of what even a fast EMA keeps while
                its student learns (5e-3 at its widest on the digits suite).
            patience: Steps without a gap above the threshold before that counts as a collapse.
            read_every: Steps between two readings.
            log: Called with step and gap of every recorded step, when it is read.

        Raises:
            ValueError: A number out of range.
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
        """Record the gap; call it after each `teacher.update()`."""
        self._steps.append(self.teacher.step)
        self._unread.append(parameter_gap(self.teacher))
        if len(self._unread) >= self.read_every:
            self._settle()

    def history(self) -> list[float]:
        """The gap after every recorded step; waits for the device."""
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
                    f"{gap:.1e}, below threshold={self.threshold}; distillation against it does next to "
                    f"nothing. A kernel that remembers longer than {self.teacher.kernel} keeps them apart",
                    stacklevel=3,
                )


# --- outputs --------------------------------------------------------------------------------------------


@torch.no_grad()
def output_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of the softmax of two batches of logits, the batch's mean, in nats.

    Args:
        student: Logits `[batch, classes]`.
        teacher: Logits of the same shape.

    Returns:
        0-d float32 tensor.
    """
    _require_same_shape(student, teacher, "logits")
    ours, theirs = F.log_softmax(student.float(), -1), F.log_softmax(teacher.float(), -1)
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True)


@torch.no_grad()
def agreement(student: Tensor, teacher: Tensor) -> Tensor:
    """The share of a batch on which two models choose the same class.

    Args:
        student: Logits `[batch, classes]`.
        teacher: Logits of the same shape.

    Returns:
        0-d float32 tensor in [0, 1].
    """
    _require_same_shape(student, teacher, "logits")
    return (student.argmax(-1) == teacher.argmax(-1)).float().mean()


# --- layers ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """A change of a layer's weights, inside the task subspace and outside of it.

    Attributes:
        inside: |D P|, the Frobenius norm of the part that the batch's activations see.
        outside: |D (I - P)|, of the part that no activation of the batch sees.
    """

    inside: Tensor
    outside: Tensor

    @property
    def share(self) -> Tensor:
        """The squared norm's share inside, in [0, 1]."""
        total = self.inside.square() + self.outside.square()
        return self.inside.square() / total.clamp_min(torch.finfo(total.dtype).tiny)


@torch.no_grad()
def task_subspace(activations: Tensor, tolerance: float = 1e-6) -> Tensor:
    """An orthonormal basis of the directions in which a batch's activations lie.

    With it `P = Q Q^t` is the projector of the paper's linear world, X (X^t X)^+ X^t.

    Args:
        activations: A layer's inputs `[n, d]`.
        tolerance: Directions whose singular value is below this share of the largest are left out;
            larger values keep only the main ones.

    Returns:
        `[d, r]` float32 with orthonormal columns.
    """
    if activations.dim() != 2:
        raise ValueError(f"activations must be [n, d], got shape {tuple(activations.shape)}: flatten them")
    _, values, directions = torch.linalg.svd(activations.float(), full_matrices=False)
    return directions[values > tolerance * values[:1]].T


@torch.no_grad()
def split_by_subspace(difference: Tensor, basis: Tensor) -> Split:
    """Split a change of weights by whether the task's activations see it.

    The gradient of a linear layer's weights lies in the span of its inputs, so that fine-tuning by plain
    gradient descent changes nothing outside; weight decay and other layers' drift do.

    Args:
        difference: W - W^0 or W - M of a layer, `[out, in]` or a convolution's `[out, in, k, k]`.
        basis: From `task_subspace` of that layer's inputs, `[in, r]` or `[in k k, r]`.
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
    """What a Linear or Conv2d layer is given when the model runs.

    Args:
        model: Run once, in its present mode.
        layer: The layer's name in it.
        *args: What the model is given.
        **kwargs: What the model is given.

    Returns:
        `[n, d]`: one row a position; of a convolution one row a patch, as its weights are laid out.

    Raises:
        ValueError: There is no such layer, it is of another kind, or it did not run.
    """
    module = dict(model.named_modules()).get(layer)
    if not isinstance(module, nn.Linear | nn.Conv2d):
        kind = "missing" if module is None else type(module).__name__
        raise ValueError(f"layer {layer!r} must be a Linear or Conv2d of the model, it is {kind}")
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        model(*args, **kwargs)
    finally:
        handle.remove()
    if not seen:
        raise ValueError(f"layer {layer!r} did not run: give the model an input that reaches it")
    if isinstance(module, nn.Linear):
        return torch.cat([x.flatten(0, -2) for x in seen])
    if module.groups != 1 or module.padding_mode != "zeros" or isinstance(module.padding, str):
        raise ValueError(f"layer {layer!r} must be a plain convolution (no groups, zero padding in numbers)")
    patches = [F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride) for x in seen]
    return torch.cat([p.transpose(1, 2).flatten(0, 1) for p in patches])


@torch.no_grad()
def linear_cka(x: Tensor, y: Tensor) -> Tensor:
    """Linear centred kernel alignment of two representations of the same examples.

    |Y^t X|_F^2 / (|X^t X|_F |Y^t Y|_F) of centred columns (Kornblith et al. 2019); 1 for representations
    that are equal up to rotation and scale.

    Example:
        >>> x = torch.randn(64, 8)
        >>> round(linear_cka(x, 3 * x.flip(1)).item(), 4)
        1.0

    Args:
        x: `[n, ...]`, one row an example.
        y: `[n, ...]`, of any width.

    Returns:
        0-d float32 tensor in [0, 1].
    """
    if len(x) != len(y):
        raise ValueError(f"both representations must be of the same examples, got {len(x)} and {len(y)} rows")
    x, y = (t.flatten(1).float() for t in (x, y))
    x, y = x - x.mean(0), y - y.mean(0)
    if max(x.shape[1], y.shape[1]) <= len(x):
        cross, ours, theirs = (y.T @ x).norm() ** 2, (x.T @ x).norm(), (y.T @ y).norm()
    else:  # the same through the Gram matrices of the examples, which are smaller here
        gram_x, gram_y = x @ x.T, y @ y.T
        cross, ours, theirs = (gram_x * gram_y).sum(), gram_x.norm(), gram_y.norm()
    return cross / (ours * theirs).clamp_min(torch.finfo(cross.dtype).tiny)


@torch.no_grad()
def layer_cka(
    first: nn.Module, second: nn.Module, *args: Any, layers: Sequence[str] | None = None, **kwargs: Any
) -> dict[str, Tensor]:
    """Linear CKA of each layer's output between two models on one batch.

    Args:
        first: Run once, in its present mode; a student, say.
        second: The same; its teacher's `module`, say.
        *args: What both are given.
        **kwargs: What both are given.
        layers: Names of modules; None: all that have no children and give a tensor.

    Raises:
        ValueError: A name that a model does not have, or layers none of which ran.
    """
    with _outputs(first, layers) as ours, _outputs(second, layers) as theirs:
        first(*args, **kwargs)
        second(*args, **kwargs)
    found = {name: linear_cka(ours[name], theirs[name]) for name in ours if name in theirs}
    if not found:
        raise ValueError("no layer ran in both models: give them an input that reaches the layers")
    return found


@contextmanager
def _outputs(model: nn.Module, layers: Sequence[str] | None) -> Iterator[dict[str, Tensor]]:
    """The last output of each layer that runs inside."""
    modules = dict(model.named_modules())
    for name in layers or ():
        if name not in modules:
            raise ValueError(f"the model has no layer {name!r}; it has {', '.join(list(modules)[1:9])}, ...")
    chosen = layers or [n for n, m in modules.items() if n and not any(m.children())]
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.dim() > 1 and output.is_floating_point():
                seen[name] = output

        return hook

    handles = [modules[name].register_forward_hook(keep(name)) for name in chosen]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _require_same_shape(student: Tensor, teacher: Tensor, what: str) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"{what} of student and teacher must have one shape, got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}"
        )
