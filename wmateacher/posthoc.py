r"""Averages made after training: of recorded snapshots, and of saved checkpoints.

- `Recorder` keeps a few power-function averages while training and writes snapshots of them;
  `synthesise` combines these afterwards into the average of *any* kernel (post-hoc EMA of Karras et al.
  2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", section 3).
- `average_checkpoints`, `interpolate` and `model_stock` combine checkpoints that exist already.

Every result is $\sum_i c_i X_i$ with $\sum_i c_i = 1$. Inputs are state dicts or files and are read a
piece at a time: beside the result, which is in the CPU's memory, stands at most about a third of it. Sums are
float64, results have the dtype of the last input. What has no average (integer and boolean tensors, and
whatever else a state dict holds) is the last input's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import torch
from torch import Tensor, distributed, nn

from wmateacher import kernels, pairing
from wmateacher.checks import increasing, positive_int
from wmateacher.files import (
    METADATA,
    Checkpoint,
    File,
    check_output,
    combine,
    existing,
    matched,
    open_checkpoint,
    open_safetensors,
    parts,
    pieces,
    read_file,
    require_safetensors,
    save,
    wide,
    write,
)
from wmateacher.kernels import Array, KernelLike
from wmateacher.schedule import Clock
from wmateacher.teacher import WMATeacher

_FORMAT = 1


# --- recording ----------------------------------------------------------------------------------------


class Recorder:
    r"""Keeps power-function averages while training and writes snapshots of them for `synthesise`.

    There is one `WMATeacher` for each `sigma_rel`, with kernel `power(sigma_rel=...)`. A snapshot is one
    average at full precision in one file, beside its clock, from which its float64 weights follow
    exactly. Files appear whole or not at all.

    Disk: one average (4 bytes a parameter for float32 and bfloat16 models) for each kernel and
    snapshot, of which there are `total_steps / every + 1`, or at most `keep`. Parameters shared with
    the student (frozen ones) are in no snapshot: load the synthesised state with `strict=False`.

    Example:
        >>> import tempfile
        >>> model, folder = nn.Linear(2, 2), tempfile.mkdtemp()
        >>> recorder = Recorder(model, total_steps=100, folder=folder, every=10)
        >>> for _ in range(100):
        ...     recorder.update()  # after each optimizer.step(), on every rank
        >>> state, report = synthesise(folder, "uniform")
        >>> torch.allclose(state["weight"], model.weight)
        True

    Attributes:
        teachers: The averages, usable as teachers while training.
        folder: Where the snapshots go; rank 0 writes.
    """

    def __init__(
        self,
        model: nn.Module,
        total_steps: int | None = None,
        *,
        folder: File,
        sigma_rels: Sequence[float] = (0.05, 0.28),
        every: int | None = None,
        steps: Sequence[int] | None = None,
        keep: int | None = None,
        format: str = "pt",
        **options: Any,
    ):
        """Start the averages at the model as it is now; nothing is written before the first `update`.

        Args:
            model: The student.
            total_steps: Optimizer steps of the whole run; None where it is open. It sets the last
                snapshot and no weight: power functions have no horizon.
            folder: Where the snapshots go.
            sigma_rels: Widths of the averages. Default: 0.05, EDM2's narrow one, and 0.28, nearly the
                running mean, without which kernels that weigh the start of the run come out poorly.
            every: Write at steps 0, n, 2n, ... and `total_steps`. Fifty snapshots or more are good.
            steps: Write at these steps instead; 0 is the model as it is now.
            keep: At most this many snapshots of each average, at least 2. When there are more, every
                second one goes: those at multiples of n, 2n, 4n, ... steps stay, and the latest.
            format: Of the files, `"pt"` or `"safetensors"`.
            **options: Passed on to each `WMATeacher`: `update_every`, `device`, `buffers`, ...

        Raises:
            ValueError: A number out of range, or not one of `every` and `steps`.
            ImportError: `format="safetensors"` without that package.
        """
        if (every is None) == (steps is None):
            raise ValueError(
                f"pass either every or steps, got every={every!r} and steps={steps!r}: every=200 writes "
                "at steps 0, 200, 400, ... and at the end, steps=[0, 100, 1000] at these"
            )
        if format not in ("pt", "safetensors"):
            raise ValueError(f"format must be 'pt' or 'safetensors', got {format!r}")
        if format == "safetensors":
            require_safetensors(f"format={format!r}")
        if keep is not None and positive_int("keep", keep) < 2:
            raise ValueError(f"keep must be at least 2 (the first snapshot and the latest), got {keep}")
        if not sigma_rels or len(set(sigma_rels)) < len(sigma_rels):
            raise ValueError(f"sigma_rels must be one or more different widths, got {sigma_rels!r}")
        self._every = None if every is None else positive_int("every", every)
        self._steps = None if steps is None else increasing("steps", steps)
        self._check_plan(total_steps)
        self.folder = Path(folder)
        self.keep = keep
        self._suffix = f".{format}"
        self.teachers = tuple(
            WMATeacher(model, kernels.Power(sigma_rel=s), total_steps, **options) for s in sigma_rels
        )
        self._begun = self._resumed = False

    @property
    def step(self) -> int:
        """Optimizer steps counted so far."""
        return self.teachers[0].step

    @property
    def total_steps(self) -> int | None:
        """The horizon in optimizer steps."""
        return self.teachers[0].total_steps

    def set_total_steps(self, total_steps: int) -> None:
        """Change the horizon mid-run; what is recorded stays as it is.

        Raises:
            ValueError: Not a whole number, less than the steps already taken, or before one of `steps`.
        """
        self._check_plan(total_steps)
        for teacher in self.teachers:
            teacher.set_total_steps(total_steps)

    def update(self, model: nn.Module | None = None) -> None:
        """Count one optimizer step, and write where a snapshot is due.

        Call it after each `optimizer.step()`, on every rank.

        Raises:
            ValueError: At the first call of a run that is not resumed: the folder has snapshots.
        """
        if not self._begun:
            self._begin()
        before = self.step
        for teacher in self.teachers:
            teacher.update(model)
        if self.step > before and self._position(self.step) is not None:
            self.save()

    def save(self) -> list[Path]:
        """Write a snapshot of each average now, at the end of a run without a horizon for instance.

        `update` does it at the planned steps; what is written at another step is never thinned out.

        Returns:
            The files.
        """
        teachers = self.teachers if self.step else self.teachers[:1]  # at the start they are the same
        files = [self._write(teacher) for teacher in teachers]
        if self.keep is not None and _is_writer():
            self._thin(self.keep)
        return files

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on exactly: the state of each average, with its clock."""
        return {"format": _FORMAT, "teachers": {str(t.kernel): t.state_dict() for t in self.teachers}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state that `state_dict` returned.

        At the next `update`, snapshots of later steps are deleted: the interrupted run wrote them after
        this state was saved, and this one will write its own.

        Raises:
            ValueError: The state is of other kernels, another horizon or another model.
        """
        theirs, ours = list(state.get("teachers", {})), [str(t.kernel) for t in self.teachers]
        if theirs != ours:
            raise ValueError(
                f"the state was recorded with kernels {', '.join(theirs) or 'none'}, this recorder has "
                f"{', '.join(ours)}: build it with the same sigma_rels to resume that run"
            )
        for teacher in self.teachers:
            teacher.load_state_dict(state["teachers"][str(teacher.kernel)])
        self._begun, self._resumed = False, True

    def _check_plan(self, total_steps: int | None) -> None:
        if self._steps is not None and total_steps is not None and self._steps[-1] > total_steps:
            raise ValueError(
                f"steps must be within the run, got {self._steps[-1]} with total_steps={total_steps}"
            )

    def _position(self, step: int) -> int | None:
        """The number of a step among the planned ones."""
        if self._steps is not None:
            return self._steps.index(step) if step in self._steps else None
        assert self._every is not None
        if step % self._every == 0 or step == self.total_steps:
            return -(-step // self._every)
        return None

    def _begin(self) -> None:
        """Make sure that the folder holds this run and nothing else."""
        if _is_writer():
            present = _snapshot_files(self.folder) if self.folder.is_dir() else []
            if present and not self._resumed:
                raise ValueError(
                    f"{self.folder} already holds {len(present)} snapshots: record into an empty folder, "
                    "or resume the run that wrote them with load_state_dict"
                )
            for file in present:
                if _step_of(file) > self.step:
                    file.unlink()
        if self.step == 0 and self._position(0) is not None:
            self.save()
        self._begun = True

    def _write(self, teacher: WMATeacher) -> Path:
        state = {
            name.removeprefix("module."): _whole(value)
            for name, value in teacher.state_dict().items()
            if isinstance(value, Tensor)
        }
        named = {id(t): n for n, t in pairing.tensors(teacher.module).items()}
        kept = teacher.module.state_dict(keep_vars=True)
        averaged = [n for n in state if named.get(id(kept[n])) in teacher.roles.averaged]
        clock = {k: v for k, v in teacher.get_extra_state().items() if k not in ("format", "omega")}
        about = {"format": _FORMAT, "clock": clock, "averaged": averaged}
        kernel = teacher.kernel
        assert isinstance(kernel, kernels.Power)
        file = self.folder / f"step-{teacher.step:09d}-power-{kernel.sigma_rel}{self._suffix}"
        if _is_writer():
            write(state, file, about)
        return file

    def _thin(self, keep: int) -> None:
        """Delete all but the planned snapshots at multiples of a stride, and the latest."""
        latest = self._position(self.step)
        if latest is None:
            return
        stride = 1
        while -(-latest // stride) + 1 > keep:
            stride *= 2
        for file in _snapshot_files(self.folder):
            position = self._position(_step_of(file))
            if position is not None and position != latest and position % stride:
                file.unlink()


# --- synthesis ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Synthesis:
    """How well a synthesised average follows its kernel; `str` gives a small table.

    If no state of the run is further than `r` from some point, the synthesised weights are within
    `l1_error * r` of the average that a teacher would have kept, plus the rounding of the snapshots,
    which `amplification` multiplies.

    Attributes:
        kernel: The kernel's text.
        step: The step at which the average stands.
        total_steps: The kernel's horizon.
        files: The snapshots.
        coefficients: float64 `[len(files)]`, what each counts.
        weights: float64 `[states]`, the realised weight of every student state.
        target: float64 `[states]`, the kernel's.
        relative_error: `||weights - target|| / ||target||`, Euclidean.
        l1_error: `sum |weights - target|`: 0 is exact, 2 has nothing in common with the target.
        weight_sum: `sum(weights)`; 1 but for rounding.
        amplification: `sum |coefficients|`; 1 for a convex combination.
    """

    kernel: str
    step: int
    total_steps: int
    files: tuple[Path, ...]
    coefficients: Array
    weights: Array
    target: Array

    @property
    def relative_error(self) -> float:  # noqa: D102
        return float(np.linalg.norm(self.weights - self.target) / np.linalg.norm(self.target))

    @property
    def l1_error(self) -> float:  # noqa: D102
        return float(np.abs(self.weights - self.target).sum())

    @property
    def weight_sum(self) -> float:  # noqa: D102
        return float(self.weights.sum())

    @property
    def amplification(self) -> float:  # noqa: D102
        return float(np.abs(self.coefficients).sum())

    def __str__(self) -> str:
        return "\n".join(
            [
                f"{self.kernel} at step {self.step} of {self.total_steps}, from {len(self.files)} snapshots",
                f"  relative error         {self.relative_error:.2e}",
                f"  L1 error               {self.l1_error:.2e}",
                f"  sum of the weights     {self.weight_sum:.9f}",
                f"  amplification          {self.amplification:.1f}",
            ]
        )


def synthesise(
    snapshots: File | Sequence[File],
    kernel: KernelLike,
    total_steps: int | None = None,
    *,
    step: int | None = None,
    ridge: float = 1e-5,
    output: File | None = None,
) -> tuple[dict[str, Any], Synthesis]:
    r"""The average of any kernel, from snapshots that a `Recorder` wrote.

    With `p_i` the realised weights of snapshot i and `q` the kernel's (both exact, for every step), the
    coefficients minimise

    $$\| \textstyle\sum_i c_i p_i - q \|^2 + \mu^2 \| c - e \|^2, \qquad \textstyle\sum_i c_i = 1,$$

    where `e` picks the snapshot nearest to `q`. So a recorded average comes back exactly, and weights
    sum to 1 whatever the error. (Karras et al. 2024, Algorithm 3, use the inner products of continuous
    profiles, no `mu`, and scale to sum 1 at the end.)

    Tensors that the teacher copies instead of averaging (buffers by default) are the last snapshot's.

    Args:
        snapshots: The recorder's folder, or some of its files.
        kernel: What `WMATeacher` takes.
        total_steps: The kernel's horizon; None: the recorder's, or the last snapshot's step.
        step: Where the average stands; None: at `total_steps`.
        ridge: `mu`. Snapshots are rounded (float32: 6e-8 of a weight), and coefficients of 1e4 turn
            that into noise. The default suits float32 and a run that moves its weights by about 1%; take
            less (1e-12) for float64.
        output: Also write the state there, as `save` does.

    Returns:
        The averaged weights at the snapshots' precision, and how well they follow the kernel.

    Raises:
        ValueError: There are no snapshots, they are not of one run, or end before `step`.
    """
    check_output(output)
    if not np.isfinite(ridge) or ridge < 0:
        raise ValueError(f"ridge must be a finite number of at least 0, got {ridge!r}")
    files = _chosen_files(snapshots)
    abouts = [_about(file) for file in files]
    clocks = [_clock(about["clock"]) for about in abouts]
    last = max(range(len(files)), key=lambda i: clocks[i].step)
    intervals = {clock.update_every for clock in clocks}
    if len(intervals) > 1 or any(a["averaged"] != abouts[last]["averaged"] for a in abouts):
        raise ValueError(
            f"the {len(files)} snapshots are not of one run: their update_every or what they average "
            "differs; pass the snapshots of one recorder"
        )
    built = kernels.build(kernel)
    if total_steps is None:
        total_steps = clocks[last].total_steps or clocks[last].step
    target_clock = Clock(built, total_steps, intervals.pop())
    step = total_steps if step is None else step
    if not 0 <= step <= min(total_steps, clocks[last].step):
        raise ValueError(
            f"the average is wanted at step {step} of total_steps={total_steps}, and the last snapshot "
            f"is of step {clocks[last].step}: pass step={min(total_steps, clocks[last].step)}"
        )
    target_clock.restore({"step": step, "snapshot": 0, "horizons": [(0, total_steps)]})

    states = clocks[last].step + 1
    target = _padded(target_clock.trajectory_weights(), states)
    profiles = np.stack([_padded(clock.trajectory_weights(), states) for clock in clocks], axis=1)
    coefficients = solve(profiles, target, ridge)
    report = Synthesis(
        kernel=str(built),
        step=step,
        total_steps=total_steps,
        files=tuple(files),
        coefficients=coefficients,
        weights=profiles @ coefficients,
        target=target,
    )
    state = combine(files, lambda name: coefficients, last=last, only=frozenset(abouts[last]["averaged"]))
    if output is not None:
        save(state, output)
    return state, report


def solve(profiles: Array, target: Array, ridge: float = 0.0) -> Array:
    """The coefficients of `synthesise`: least squares on weight vectors, with sum 1.

    Args:
        profiles: float64 `[states, n]`, each column summing to 1.
        target: float64 `[states]`.
        ridge: What a coefficient's distance from "only the nearest profile" costs.

    Returns:
        float64 `[n]`, summing to 1.
    """
    used = profiles.any(axis=1) | (target != 0)
    profiles, target = profiles[used], target[used]
    nearest = int(np.argmin(np.linalg.norm(profiles - target[:, None], axis=0)))
    # Unknowns are the other coefficients; the nearest profile's is what they leave of 1.
    system = np.delete(profiles, nearest, axis=1) - profiles[:, [nearest]]
    others = system.shape[1]
    if others == 0:
        return np.ones(1)
    system = np.concatenate([system, ridge * np.eye(others)])
    residual = np.append(target - profiles[:, nearest], np.zeros(others))
    found = scipy.linalg.lstsq(system, residual, overwrite_a=True, overwrite_b=True)[0]
    return np.insert(found, nearest, 1.0 - found.sum())


# --- saved checkpoints --------------------------------------------------------------------------------


def average_checkpoints(
    checkpoints: Sequence[Checkpoint],
    kernel: KernelLike = "uniform",
    steps: Sequence[int] | None = None,
    total_steps: int | None = None,
    output: File | None = None,
) -> dict[str, Any]:
    """Average saved checkpoints with any kernel.

    Each checkpoint stands for the optimizer steps nearest to it (ties to the later one) and counts what
    the kernel gives to them, so that checkpoints at steps 0, n, 2n, ..., T give the average of a teacher
    with `update_every=n`. Floating-point buffers are averaged like parameters; batch-norm statistics
    are better measured again (`torch.optim.swa_utils.update_bn`).

    Example:
        >>> average_checkpoints([{"w": torch.tensor([float(i)])} for i in range(4)], "uniform")
        {'w': tensor([1.5000])}

    Args:
        checkpoints: State dicts or files, in the order of training.
        kernel: What `WMATeacher` takes. Default: the plain mean.
        steps: The optimizer step of each, rising; None: they are equally spaced, one state each.
        total_steps: The kernel's horizon; None: the last of `steps`.
        output: Also write the average there, as `save` does.

    Raises:
        ValueError: There are no checkpoints, their tensors differ, or the steps do not fit.
    """
    check_output(output)
    _check_several("checkpoints", checkpoints, 1)
    counts = checkpoint_weights(kernel, len(checkpoints), steps, total_steps)
    state = combine(checkpoints, lambda name: counts)
    if output is not None:
        save(state, output)
    return state


def checkpoint_weights(
    kernel: KernelLike, count: int, steps: Sequence[int] | None = None, total_steps: int | None = None
) -> Array:
    """What each of `count` checkpoints counts in `average_checkpoints`.

    Returns:
        float64 `[count]`, summing to 1.

    Raises:
        ValueError: The steps do not fit.
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
    start: Checkpoint, end: Checkpoint, alpha: float, *, output: File | None = None
) -> dict[str, Any]:
    """`(1 - alpha) * start + alpha * end`: WiSE-FT (Wortsman et al. 2022), eq. 1.

    Example:
        >>> interpolate({"w": torch.zeros(2)}, {"w": torch.ones(2)}, alpha=0.25)
        {'w': tensor([0.2500, 0.2500])}

    Args:
        start: The pretrained weights, a state dict or file.
        end: The fine-tuned weights.
        alpha: In [0, 1].
        output: Also write the result there, as `save` does.

    Raises:
        ValueError: `alpha` is out of range, or the tensors differ.
    """
    check_output(output)
    if not 0 <= alpha <= 1:
        raise ValueError(
            f"alpha must be in [0, 1], got {alpha!r}: 0 is the start (pretrained), 1 the end (fine-tuned)"
        )
    state = combine([start, end], lambda name: (1.0 - alpha, alpha))
    if output is not None:
        save(state, output)
    return state


def model_stock(
    pretrained: Checkpoint, finetuned: Sequence[Checkpoint], *, output: File | None = None
) -> dict[str, Any]:
    r"""Model Stock (Jang et al. 2024): each layer between the fine-tuned mean and the pretrained.

    $$w = t\, \bar w + (1 - t)\, w_0, \qquad t = \frac{N \cos\theta}{1 + (N - 1) \cos\theta}$$

    for N fine-tuned models (the paper's formula for N = 2, `2 cos / (1 + cos)`, is a case of it), with
    `theta` the angle between the fine-tuned models seen from `w_0`. See `model_stock_ratios` for what
    the paper leaves open.

    Example:
        >>> start, one, two = torch.zeros(2), torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])
        >>> model_stock({"w": start}, [{"w": one}, {"w": two}])["w"]  # t = 2 cos 45 / (1 + cos 45) = 0.828...
        tensor([0.8284, 0.4142])

    Args:
        pretrained: `w_0`, a state dict or file.
        finetuned: Two or more models fine-tuned from it.
        output: Also write the result there, as `save` does.

    Raises:
        ValueError: There are fewer than two fine-tuned models, or the tensors differ.
    """
    check_output(output)
    ratios = model_stock_ratios(pretrained, finetuned)
    count = len(finetuned)
    state = combine(
        [pretrained, *finetuned], lambda name: (1.0 - ratios[name], *[ratios[name] / count] * count)
    )
    if output is not None:
        save(state, output)
    return state


def model_stock_ratios(pretrained: Checkpoint, finetuned: Sequence[Checkpoint]) -> dict[str, float]:
    """The ratio `t` in [0, 1] of Model Stock, for every floating-point tensor.

    The formula follows if the fine-tuned weights lie equally far from `w_0` and from their centre,
    with one angle between any two. What that leaves open is decided here:

    - a layer is one tensor of the state dict, of any shape: biases, norms and scalars too;
    - `cos` is the mean over all pairs of fine-tuned models, and a model that did not move a tensor has
      cosine 0 with the others;
    - a mean below 0, which no such centre explains, counts as 0: the tensor stays at `w_0`.

    Raises:
        ValueError: There are fewer than two fine-tuned models, or the tensors differ.
    """
    _check_several("finetuned", finetuned, 2)
    sources, count = [pretrained, *finetuned], len(finetuned)
    specs = matched(sources, -1)
    names = [n for n, spec in specs.items() if spec.averages]
    grams = {name: np.zeros((count, count)) for name in names}
    for part in parts(specs, names, 1 / (4 * len(sources))):
        with ExitStack() as stack:
            opened = [stack.enter_context(open_checkpoint(source)) for source in sources]
            for name, first, end in part:
                grams[name] += _gram([o.read(name, first, end) for o in opened])
    return {name: _stock_ratio(gram) for name, gram in grams.items()}


def _gram(values: Sequence[Tensor]) -> Array:
    """float64 `[N, N]`: inner products of `values[1:]` seen from `values[0]`."""
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


# --- snapshots ----------------------------------------------------------------------------------------


def _snapshot_files(folder: Path) -> list[Path]:
    return sorted(f for f in folder.glob("step-*") if f.suffix in (".pt", ".safetensors"))


def _step_of(file: Path) -> int:
    return int(file.name.split("-")[1])


def _chosen_files(snapshots: File | Sequence[File]) -> list[Path]:
    if isinstance(snapshots, str | os.PathLike):
        folder = Path(snapshots)
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {str(folder)!r}")
        files = _snapshot_files(folder)
        where = f"{str(folder)!r} holds"
    else:
        files, where = [Path(s) for s in snapshots], "the list has"
    if not files:
        raise ValueError(f"{where} no snapshots: record some with Recorder(model, folder=..., every=...)")
    return files


def _about(file: Path) -> dict[str, Any]:
    """What a snapshot says of itself."""
    path = existing(file)
    if path.suffix == ".safetensors":
        with open_safetensors(path) as opened:
            about = json.loads((opened.metadata() or {}).get(METADATA, "null"))
    else:
        content = read_file(path)
        about = content.get(METADATA) if isinstance(content, Mapping) else None
    if not isinstance(about, dict):
        raise ValueError(
            f"{str(path)!r} is not a recorder's snapshot: it has no clock; average plain checkpoints with "
            "average_checkpoints"
        )
    if about.get("format") != _FORMAT:
        raise ValueError(
            f"{str(path)!r} has format {about.get('format')!r}, this version reads format {_FORMAT}: read it "
            "with the version of wmateacher that wrote it"
        )
    return about


def _clock(state: dict[str, Any]) -> Clock:
    clock = Clock(kernels.build(state["kernel"]), state["horizons"][-1][1], state["update_every"])
    clock.check(state)
    clock.restore(state)
    return clock


def _padded(weights: Array, states: int) -> Array:
    return np.append(weights, np.zeros(states - len(weights)))


def _whole(tensor: Tensor) -> Tensor:
    """A tensor on the CPU, gathered where ranks hold parts of it."""
    gather = getattr(tensor, "full_tensor", None)
    return (tensor if gather is None else gather()).detach().cpu()


def _is_writer() -> bool:
    return not (distributed.is_available() and distributed.is_initialized() and distributed.get_rank())


def _check_several(argument: str, values: Any, least: int) -> None:
    if isinstance(values, str | os.PathLike | Mapping) or not isinstance(values, Sequence):
        raise TypeError(f"{argument} must be a list of state dicts or files, got {type(values).__name__}")
    if len(values) < least:
        raise ValueError(f"{argument} must be at least {least}, got {len(values)}")
