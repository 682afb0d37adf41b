"""The one training loop that every method runs through."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from wmateacher import WMATeacher
from wmateacher.diagnostics import parameter_gap
from wmateacher.distributed import world_size
from wmateacher.integrations import processes
from wmateacher.integrations.clip.methods import Method
from wmateacher.integrations.clip.objective import Objective
from wmateacher.integrations.clip.pairs import Batch, Stream
from wmateacher.integrations.clip.towers import Towers

_FORMAT = 1


@dataclass(frozen=True)
class Settings:
    """How a run is optimised: AdamW, linear warm-up, cosine decay to 0.

    Attributes:
        steps: Optimizer steps T of the run.
        learning_rate: At the end of the warm-up.
        batch_size: Image-text pairs a step.
        weight_decay: On every parameter, in one group, as in the published code.
        warmup: Steps of linear warm-up; 500 in the published recipes.
        clip_norm: Largest gradient norm; None: unclipped.
        precision: `"fp32"`, or `"bf16"` autocast with float32 weights.
        seed: Of initialisation, dropout and data.
        checkpoint_every: Steps between checkpoints.
        freeze_text: Train the image tower and the logit scale only.
    """

    steps: int
    learning_rate: float
    batch_size: int
    weight_decay: float = 0.1
    warmup: int = 500
    clip_norm: float | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: int = 0
    checkpoint_every: int = 100
    freeze_text: bool = False

    def __post_init__(self) -> None:
        for name, low in (("steps", 1), ("batch_size", 1), ("warmup", 0), ("checkpoint_every", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}")
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision must be 'fp32' or 'bf16', got {self.precision!r}")

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of the optimizer step with index `step`, from 0."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass
class Fit:
    """A finished run.

    Attributes:
        student: The trained towers.
        teacher: None for methods without one.
        losses: The total loss of every step.
        gaps: `|W - M| / |W|` after every step; empty without a teacher.
        seconds: Spent training, over all resumes.
    """

    student: Towers
    teacher: WMATeacher | None
    losses: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    seconds: float = 0.0


def fit(
    student: Towers,
    method: Method,
    stream: Stream,
    settings: Settings,
    *,
    checkpoint: Path | None = None,
    label: str | None = None,
    progress: bool = True,
    after_step: Callable[[int], None] | None = None,
) -> Fit:
    """Fine-tune `student` in place by `method`.

    An interrupted run that is started again with the same arguments goes on from its last checkpoint
    and ends, on one device and one version of torch, with the same bits as an uninterrupted one.

    With an initialised process group every rank takes its part of each batch, and rank 0 writes the
    checkpoints. The loss is that of the whole batch, so that the number of processes changes no more than
    rounding does (and the statistics of batch norms), also between checkpoints.

    Args:
        student: The pretrained towers, on the device to train on.
        method: What to minimise, with which teacher.
        stream: Batches from a given step on.
        settings: How to optimise.
        checkpoint: File to write checkpoints to, and to go on from where it exists.
        label: Name in the progress bar; the method's by default.
        progress: Show a bar, where there is a terminal.
        after_step: Called with the number of steps done after each one.

    Raises:
        ValueError: The checkpoint cannot be read, or belongs to another run; a batch has fewer pairs
            than there are processes.
        FloatingPointError: The loss is not finite.
    """
    if settings.batch_size < world_size():
        raise ValueError(
            f"batch_size must be at least the number of processes, {world_size()}, got {settings.batch_size}"
        )
    run = _Run(student, method, settings)
    if checkpoint is not None and processes.of_first(checkpoint.exists()):
        run.load(checkpoint)
    bar = tqdm(
        total=settings.steps, initial=run.step, desc=label or method.name, unit="step",
        disable=None if progress and processes.is_first() else True, leave=False, dynamic_ncols=True,
    )  # fmt: skip
    with bar:
        batches = stream(run.step)
        while run.step < settings.steps:
            run.advance(next(batches))
            bar.update()
            last = run.step == settings.steps
            if last or run.step % 20 == 0:
                run.settle()
                bar.set_postfix(loss=f"{run.losses[-1]:.3f}", refresh=False)
            if checkpoint is not None and (last or run.step % settings.checkpoint_every == 0):
                run.save(checkpoint)
            if after_step is not None:
                after_step(run.step)
    processes.same_buffers(student)
    return Fit(student, run.teacher, run.losses, run.gaps, run.seconds)


class _Run:
    """Everything that changes while a run goes on, and can be saved."""

    def __init__(self, student: Towers, method: Method, settings: Settings):
        torch.manual_seed(settings.seed)
        self.student, self.method, self.settings = student, method, settings
        self.device = next(student.parameters()).device
        if settings.freeze_text:
            student.freeze_text()
        self.objective = Objective(method, student).to(self.device)
        self.model = processes.parallel(student)
        self.teacher = None
        if method.kernel is not None:
            self.teacher = WMATeacher(student, method.kernel, settings.steps)
        self.parameters = [
            p for p in (*student.parameters(), *self.objective.parameters()) if p.requires_grad
        ]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
        )
        self.step = 0
        self.losses: list[float] = []
        self.gaps: list[float] = []
        self.seconds = 0.0
        self._unread: list[tuple[Tensor, Tensor | None]] = []
        student.train()

    def advance(self, batch: Batch) -> None:
        """One optimizer step."""
        started = time.perf_counter()
        batch = Batch(processes.part(batch.images), batch.tokens, processes.part(batch.caption))
        batch = Batch(*(t.to(self.device, non_blocking=True) for t in batch))
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate_at(self.step)
        bf16 = self.settings.precision == "bf16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bf16):
            embeddings = self.model(*batch)
            targets = None if self.teacher is None else self.teacher(*batch)
            loss = self.objective(self.student, embeddings, targets).total
        loss.backward()
        if self.settings.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        gap = None
        if self.teacher is not None:
            self.teacher.update()
            gap = parameter_gap(self.teacher)
        self._unread.append((loss.detach(), gap))
        self.step += 1
        self.seconds += time.perf_counter() - started

    def settle(self) -> None:
        """Read the losses and gaps of the last steps off the device.

        Raises:
            FloatingPointError: A loss is not finite.
        """
        for loss, gap in self._unread:
            self.losses.append(loss.item())
            if gap is not None:
                self.gaps.append(gap.item())
            if not math.isfinite(self.losses[-1]):
                raise FloatingPointError(
                    f"{self.method.name}: the loss is {self.losses[-1]} at step {len(self.losses)} of "
                    f"{self.settings.steps}: lower learning_rate ({self.settings.learning_rate}) or "
                    f"clip_norm ({self.settings.clip_norm})"
                )
        self._unread.clear()

    def identity(self) -> dict[str, Any]:
        """What two runs must share for one to continue the other."""
        settings = asdict(self.settings)
        del settings["checkpoint_every"]
        method = asdict(self.method)
        del method["summary"]
        return {**method, **settings}

    def save(self, file: Path) -> None:
        """Write a checkpoint; the one before it stays whole until this one is."""
        self.settle()
        if not processes.is_first():
            return
        state = {
            "format": _FORMAT,
            "identity": self.identity(),
            "step": self.step,
            "student": self.student.state_dict(),
            "teacher": None if self.teacher is None else self.teacher.state_dict(),
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "cuda_random": torch.cuda.get_rng_state() if self.device.type == "cuda" else None,
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "gaps": torch.tensor(self.gaps, dtype=torch.float64),
            "seconds": self.seconds,
        }
        write_atomically(state, file)

    def load(self, file: Path) -> None:
        """Go on from a checkpoint, all of it or nothing.

        Raises:
            ValueError: It cannot be read, or belongs to another run.
        """
        state = read(file, {"format", "identity", "step", "student", "teacher", "optimizer"})
        ours, theirs = self.identity(), state["identity"]
        differing = [k for k in {**ours, **theirs} if ours.get(k) != theirs.get(k)]
        if differing:
            raise ValueError(
                f"checkpoint {file} belongs to another run: "
                + ", ".join(f"{k}={theirs.get(k)!r} there, {ours.get(k)!r} here" for k in differing)
                + "; choose another folder, or delete it to start again"
            )
        try:
            self.student.load_state_dict(state["student"])
            self.objective.load_state_dict(state["objective"])
            if self.teacher is not None:
                self.teacher.load_state_dict(state["teacher"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise ValueError(
                f"checkpoint {file} does not fit this model ({error}); choose another folder, or "
                "delete it to start again"
            ) from error
        torch.set_rng_state(state["random"])
        if state["cuda_random"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_random"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.losses, self.gaps = state["losses"].tolist(), state["gaps"].tolist()


def write_atomically(state: dict[str, Any], file: Path) -> None:
    """Save with `torch.save` so that `file` is either the old content or the new, never a part."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.partial")
    torch.save(state, partial)
    os.replace(partial, file)


def read(file: Path, keys: set[str]) -> dict[str, Any]:
    """Load what `write_atomically` wrote, without running code from it.

    Raises:
        ValueError: The file is damaged, or something else.
    """
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds, depending on which byte is wrong
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(
            f"cannot read checkpoint {file} ({reason}): it is damaged or something else; delete it to "
            "start again"
        ) from error
    if not isinstance(state, dict) or not keys <= state.keys() or state.get("format", _FORMAT) != _FORMAT:
        raise ValueError(
            f"{file} is not a checkpoint of this version's training loop; delete it to start again"
        )
    return state
