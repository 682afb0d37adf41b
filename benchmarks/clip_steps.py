"""Training steps of CLIP by several methods, with the time of each part."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wmateacher import WMATeacher, losses
from wmateacher.integrations.clip.methods import METHODS
from wmateacher.losses import PairedEmbeddings

STEPS = 25_030
CLASSES = 1000


class Stopwatch:
    """Times the parts of a step: by events in the stream on a GPU, which the host does not wait for.

    Args:
        device: The device that works.
        clock: The clock that is read on a CPU.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter):
        self._cuda, self._clock = device.type == "cuda", clock
        self._marks: list[tuple[str, Any]] = []

    def start(self) -> None:
        """Forget all parts and start the first."""
        if self._cuda:
            torch.cuda.synchronize()
        self._marks = [("", self._now())]

    def lap(self, part: str) -> None:
        """End a part; the next one starts."""
        self._marks.append((part, self._now()))

    def seconds(self) -> dict[str, float]:
        """Return the seconds of every part, and those of all under `step`. On a GPU, wait for their end."""
        times = [mark for _, mark in self._marks]
        if self._cuda:
            times[-1].synchronize()
            apart = [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(times)]
        else:
            apart = [b - a for a, b in itertools.pairwise(times)]
        parts = {"step": sum(apart)}
        for (part, _), seconds in zip(self._marks[1:], apart, strict=True):
            parts[part] = parts.get(part, 0.0) + seconds
        return parts

    def _now(self) -> Any:
        if not self._cuda:
            return self._clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Steps:
    """A student with a teacher for each method, and synthetic images with captions.

    The losses are the published ones, with AdamW. FT classifies by a linear head, all other methods are
    contrastive.

    Args:
        student: Towers with `encode_image`, `image_projection`, `text_projection` and `image_size`, on the
            device, whose forward maps images, tokens and caption indices to `PairedEmbeddings`.
        texts: The tokens of a caption for each image, `[batch, L]`.
        precision: `fp32`, or `bf16` for autocast.
        methods: The names of the methods to take steps by.
        backend: The backend of `torch.compile` for student and teachers; None does not compile.
        compiled_teachers: Whether to compile the teachers alone, by the default backend.
        clock: The clock of the stopwatch on a CPU.
    """

    def __init__(
        self,
        student: nn.Module,
        texts: Tensor,
        precision: str,
        methods: Sequence[str],
        backend: str | None = None,
        *,
        compiled_teachers: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ):
        torch.manual_seed(0)
        parameters = list(student.parameters())
        self.device, self.bf16 = parameters[0].device, precision == "bf16"
        self.student: Any = student.train()
        self.teachers = {
            name: WMATeacher(student, METHODS[name].kernel, STEPS)
            for name in methods
            if METHODS[name].kernel is not None
        }
        self.criteria = {name: losses.build(METHODS[name].distillation) for name in self.teachers}
        width, size, batch = self.student.image_projection.shape[1], self.student.image_size, len(texts)
        self.head = nn.Parameter(torch.randn(width, CLASSES, device=self.device))
        self.optimizer = torch.optim.AdamW([*parameters, self.head], lr=1e-5, fused=True)
        self.images = torch.randn(batch, 3, size, size, device=self.device)
        self.texts = texts.to(self.device)
        self.caption = torch.arange(batch, device=self.device)
        self.labels = self.caption % CLASSES
        self.stopwatch = Stopwatch(self.device, clock)
        if backend is not None:
            student.compile(backend=backend)
            for teacher in self.teachers.values():
                teacher.module.compile(backend=backend)
        for teacher in self.teachers.values() if compiled_teachers else ():
            teacher.module.compile()
        # Compiling the forward alone leaves `encode_image` as it is, so FT's pass is compiled by itself.
        encode = self.student.encode_image
        self._encode = encode if backend is None else torch.compile(encode, backend=backend)

    def run(self, name: str) -> dict[str, float]:
        """Take one step by a method, and return its seconds and those of its parts."""
        method, watch = METHODS[name], self.stopwatch
        batch = (self.images, self.texts, self.caption)
        watch.start()
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            targets = None
            if name in self.teachers:
                targets = self.teachers[name](*batch)
                watch.lap("teacher")
            if method.head == "linear":
                features = self._encode(self.images, normalize=True)
                loss = F.cross_entropy(features.float() @ self.head, self.labels)
            else:
                answers = self.student(*batch)
                loss = losses.info_nce(*answers)
            if method.cross_frobenius:
                loss = loss + method.cross_frobenius * cross_frobenius(self.student)
            watch.lap("forward+backward")
            if targets is not None:
                loss = loss + method.distill_weight * self.criteria[name](answers, targets)
                watch.lap("losses, forward")
        loss.backward()
        watch.lap("forward+backward")
        self.optimizer.step()
        self.optimizer.zero_grad()
        watch.lap("optimizer")
        if targets is not None:
            self.teachers[name].update()
            watch.lap("update")
        return watch.seconds()

    def losses(self, name: str, rounds: int = 3) -> float:
        """Return the seconds of a distillation's value and gradient with respect to the embeddings."""
        count, width = len(self.texts), self.head.shape[0]

        def embeddings() -> PairedEmbeddings:
            image, text = (F.normalize(torch.randn(count, width, device=self.device), dim=-1) for _ in "ab")
            return PairedEmbeddings(image, text, torch.tensor(50.0, device=self.device))

        student, teacher = embeddings(), embeddings()
        taken = []
        for _ in range(rounds + 1):
            image, text = (t.detach().requires_grad_() for t in student[:2])
            self.stopwatch.start()
            self.criteria[name](PairedEmbeddings(image, text, student.logit_scale), teacher).backward()
            self.stopwatch.lap("losses")
            taken.append(self.stopwatch.seconds()["losses"])
        return statistics.median(taken[1:])


def cross_frobenius(towers: Any) -> Tensor:
    """Return |V U^t|_F of the image and text projections, in float32."""
    with torch.autocast(towers.image_projection.device.type, enabled=False):
        return torch.linalg.matrix_norm(towers.image_projection @ towers.text_projection.mT)


def medians(steps: Callable[[], dict[str, float]], rounds: int, warmup: int = 2) -> dict[str, float]:
    """Return the median of every part over the rounds, after a warm-up."""
    taken = [steps() for _ in range(rounds + warmup)][warmup:]
    return {part: statistics.median(t[part] for t in taken) for part in taken[0]}
