"""Record snapshots of power-function averages during training."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from wmateacher import kernels, pairing
from wmateacher.checks import increasing, one_of, positive_int
from wmateacher.files import File, require_safetensors
from wmateacher.posthoc.snapshots import snapshot_file, snapshot_files, step_of, write_snapshot
from wmateacher.teacher import WMATeacher

__all__ = ["Recorder"]


def __dir__() -> list[str]:
    return __all__


_FORMAT = 1


class Recorder:
    r"""Keeps power-function averages during training and writes snapshots of them for `synthesise`.

    There is one `WMATeacher` with kernel `power(sigma_rel=...)` for each `sigma_rel`. A snapshot is one
    average at full precision in one file, together with its clock, from which its float64 weights follow
    exactly. A snapshot is never half written.

    Each snapshot takes 4 bytes of disk space per parameter for float32 and bfloat16 models. There are
    `total_steps / every + 1` snapshots for each kernel, or at most `keep`. Parameters that the average shares
    with the student (the frozen ones) are not in the snapshots: load the synthesised state with
    `strict=False`.

    Examples:
        >>> import tempfile, torch
        >>> from wmateacher.posthoc import Recorder, synthesise
        >>> model, folder = nn.Linear(2, 2), tempfile.mkdtemp()
        >>> recorder = Recorder(model, total_steps=100, folder=folder, every=10)
        >>> for _ in range(100):
        ...     recorder.update()  # after each optimizer.step(), on every rank
        >>> state, report = synthesise(folder, "uniform")
        >>> torch.allclose(state["weight"], model.weight)
        True

    Attributes:
        teachers: The averages, which can be used as teachers during training.
        folder: The folder for the snapshots, which rank 0 writes.
        keep: The largest number of snapshots of each average, or None.
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
        """Start the averages at the model's current weights. Nothing is written before the first `update`.

        Args:
            model: The student.
            total_steps: The number of optimizer steps in the whole run, or None if it is open. It decides
                when the last snapshot is written. It changes no weight, because power functions have no
                horizon.
            folder: The folder for the snapshots.
            sigma_rels: The widths of the averages. The defaults are 0.05, the narrow one of EDM2, and 0.28,
                which is nearly the running mean. Without the wide one, kernels that weigh the start of the
                run are synthesised poorly.
            every: The interval n between snapshots, which are written at steps 0, n, 2n, ... and
                `total_steps`. Fifty snapshots or more are a good number.
            steps: The steps at which to write, instead of `every`. Step 0 is the model's present state.
            keep: The largest number of snapshots of each average, at least 2. When there are more, every
                second one is deleted: those at multiples of n, 2n, 4n, ... steps stay, and so does the
                latest.
            format: The format of the files, `"pt"` or `"safetensors"`.
            **options: Options for each `WMATeacher`: `update_every`, `device`, `buffers`, ...

        Raises:
            ValueError: If an argument is out of range, or not exactly one of `every` and `steps` is given.
            ImportError: If `format="safetensors"` and that package is not installed.
        """
        if (every is None) == (steps is None):
            raise ValueError(
                f"pass either every or steps, got every={every!r} and steps={steps!r}: every=200 writes "
                "at steps 0, 200, 400, ... and at the end, steps=[0, 100, 1000] at these steps"
            )
        if one_of("format", format, ("pt", "safetensors")) == "safetensors":
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
        self._dtype = options.get("dtype", "auto")
        self.teachers = tuple(
            WMATeacher(model, kernels.Power(sigma_rel=s), total_steps, **options) for s in sigma_rels
        )
        self._shared = self.teachers[0].roles.shared
        self._begun = self._resumed = False

    @property
    def step(self) -> int:
        """The number of optimizer steps counted so far."""
        return self.teachers[0].step

    @property
    def total_steps(self) -> int | None:
        """The number of optimizer steps in the whole run, or None."""
        return self.teachers[0].total_steps

    def set_total_steps(self, total_steps: int) -> None:
        """Change the length of the run. Snapshots that are already written stay as they are.

        Raises:
            ValueError: If `total_steps` is not a positive integer, is less than the number of steps already
                taken, or is less than the last of `steps`.
        """
        self._check_plan(total_steps)
        for teacher in self.teachers:
            teacher.set_total_steps(total_steps)

    def update(self, model: nn.Module | None = None) -> None:
        """Count one optimizer step, and write the snapshots if they are due.

        Call it after each `optimizer.step()`, on every rank.

        Args:
            model: The student, or None for the model that the recorder was built from.

        Raises:
            ValueError: If this is the first call of a new run and the folder already holds snapshots.
        """
        if torch.compiler.is_dynamo_compiling():
            _update_uncompiled(self, model)
            return
        if not self._begun:
            self._begin()
        before = self.step
        for teacher in self.teachers:
            teacher.update(model)
        self._warn_unfrozen()
        if self.step > before and self._position(self.step) is not None:
            self.save()

    def save(self) -> list[Path]:
        """Write a snapshot of each average now, for example at the end of a run without `total_steps`.

        `update` does this at the planned steps. Snapshots at other steps are never thinned out.

        Returns:
            The files.
        """
        # At the start of the run all averages are the same.
        teachers = self.teachers if self.step else self.teachers[:1]
        files = [self._write(teacher) for teacher in teachers]
        if self.keep is not None and _is_writer():
            self._thin(self.keep)
        return files

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to resume exactly: the state of each average, including its clock."""
        return {"format": _FORMAT, "teachers": {str(t.kernel): t.state_dict() for t in self.teachers}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a state that `state_dict` returned.

        The next `update` deletes the snapshots of later steps. The interrupted run wrote them after this
        state was saved, and the resumed run will write its own.

        Raises:
            ValueError: If the state has other kernels, another horizon or another model. The recorder then
                does not change.
        """
        averages = state.get("teachers") if isinstance(state, Mapping) else None
        theirs, ours = list(averages or {}), [str(t.kernel) for t in self.teachers]
        if theirs != ours:
            raise ValueError(
                f"the state was recorded with kernels {', '.join(theirs) or 'none'}, this recorder has "
                f"{', '.join(ours)}: build it with the same sigma_rels to resume that run"
            )
        before = [copy.deepcopy(teacher.state_dict()) for teacher in self.teachers[:-1]]
        try:
            for teacher in self.teachers:
                teacher.load_state_dict(state["teachers"][str(teacher.kernel)])
        except Exception:  # a load that fails changes nothing, so the first averages go back
            for teacher, own in zip(self.teachers, before, strict=False):
                teacher.load_state_dict(own)
            raise
        self._shared = self.teachers[0].roles.shared
        self._begun, self._resumed = False, True

    def _warn_unfrozen(self) -> None:
        """Warn if parameters that earlier snapshots do not have are averaged now."""
        now = self.teachers[0].roles.shared
        new, self._shared = [name for name in self._shared if name not in now], now
        if new:
            warnings.warn(
                f"{pairing.few(new)} had been frozen until step {self.step - 1}, so that earlier snapshots "
                "do not have it, and cannot be synthesised together with later ones: build the recorder "
                "with frozen='copy'",
                stacklevel=3,
            )

    def _check_plan(self, total_steps: int | None) -> None:
        if self._steps is not None and total_steps is not None and self._steps[-1] > total_steps:
            raise ValueError(
                f"steps must be within the run, got {self._steps[-1]} with total_steps={total_steps}"
            )

    def _position(self, step: int) -> int | None:
        """Return the index of a step among the planned ones, or None if no snapshot is planned for it."""
        if self._steps is not None:
            return self._steps.index(step) if step in self._steps else None
        assert self._every is not None
        if step % self._every == 0 or step == self.total_steps:
            return -(-step // self._every)
        return None

    def _begin(self) -> None:
        """Make sure that the folder holds snapshots of this run only, and write those of step 0."""
        if _is_writer():
            present = snapshot_files(self.folder) if self.folder.is_dir() else []
            if present and not self._resumed:
                raise ValueError(
                    f"{self.folder} already holds {len(present)} snapshots: record into an empty folder, "
                    "or resume the run that wrote them with load_state_dict"
                )
            for file in present:
                if step_of(file) > self.step:
                    file.unlink()
        if self.step == 0 and self._position(0) is not None:
            self.save()
        self._begun = True

    def _write(self, teacher: WMATeacher) -> Path:
        # Every rank takes part in gathering a sharded average, also those that do not write.
        state = {
            name.removeprefix("module."): _gathered(value)
            for name, value in teacher.state_dict().items()
            if isinstance(value, Tensor)
        }
        names = pairing.state_names(teacher.module)
        averaged = [n for n in state if names.get(n) in teacher.roles.averaged]
        if not isinstance(self._dtype, torch.dtype):
            # Vectors are averaged in float64, so that no small update is lost. Rounding once loses nothing.
            own = pairing.tensors(teacher.module)
            for name in averaged:
                tensor = own[names[name]]
                dtype = pairing.at_least_float32(tensor.dtype.to_real())
                state[name] = state[name].to(dtype.to_complex() if tensor.is_complex() else dtype)
        clock = {
            k: v
            for k, v in teacher.get_extra_state().items()
            if k not in ("format", "omega", "shared", "unfrozen", "changed_buffers")
        }
        kernel = teacher.kernel
        assert isinstance(kernel, kernels.Power)
        file = snapshot_file(self.folder, kernel, teacher.step, self._suffix)
        if _is_writer():
            write_snapshot(file, state, clock, averaged)
        return file

    def _thin(self, keep: int) -> None:
        """Delete the planned snapshots except those at multiples of a stride, and the latest."""
        latest = self._position(self.step)
        if latest is None:
            return
        stride = 1
        while -(-latest // stride) + 1 > keep:
            stride *= 2
        for file in snapshot_files(self.folder):
            position = self._position(step_of(file))
            if position is not None and position != latest and position % stride:
                file.unlink()


def _gathered(tensor: Tensor) -> Tensor:
    """Return a tensor on the CPU, gathered from all ranks if it is sharded."""
    gather = getattr(tensor, "full_tensor", None)
    return (tensor if gather is None else gather()).detach().cpu()


def _is_writer() -> bool:
    return not (distributed.is_available() and distributed.is_initialized() and distributed.get_rank())


# For compiled training steps, for the reasons given in `wmateacher.teacher`.
_update_uncompiled = torch._disable_dynamo(Recorder.update)
