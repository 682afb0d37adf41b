"""An update of the average: what it reads and writes, prepared once and applied at every snapshot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from wmateacher import averaging, buffers, caches
from wmateacher.averaging import Average
from wmateacher.finiteness import Detector, Verdict
from wmateacher.pairing import Binding

__all__ = ["Plan", "prepare"]


def __dir__() -> list[str]:
    return __all__


@dataclass(frozen=True)
class Plan:
    """An update of the average, prepared for as long as both modules keep their tensors.

    Attributes:
        student: The student's tensors.
        own: The averaged module's tensors.
        update: The function that moves the averaged tensors.
        copied: The tensors that are copied at every snapshot: targets and sources.
        detector: The detector of NaN in a student before it is averaged, or None for no detection.
        copy: The function that copies `copied` where the device decides whether a snapshot counts; None if
            the host does.
        changed: The names of buffers that changed their structure in the student, which the averaged module
            takes over at a snapshot.
        forget: The function that drops what the averaged module has computed from its weights.
    """

    student: Binding
    own: Binding
    update: averaging.Update
    copied: tuple[Sequence[Tensor], Sequence[Tensor]]
    detector: Detector | None = None
    copy: averaging.Update | None = None
    changed: Sequence[str] = ()
    forget: Callable[[], None] = lambda: None

    def fits(self, student: nn.Module) -> bool:
        """Return whether the plan is for this student and both modules still have the same tensors."""
        return self.student.model is student and self.student.is_current() and self.own.is_current()

    @property
    def on_device(self) -> bool:
        """Whether the device decides if and how far the average moves, so that the host need not wait."""
        return self.copy is not None and not self.changed

    def apply(self, omega: float | Tensor) -> Verdict | None:
        """Move the average towards the student by the share `omega` in (0, 1].

        A 0-d tensor is allowed if the plan is `on_device`. It may be 0, which changes nothing.

        Returns:
            What the detector found, if there is one. A student that is not finite has changed nothing.
        """
        mask = omega != 0 if isinstance(omega, Tensor) else None
        verdict = None
        if self.detector is not None:
            finite = self.detector()
            verdict = Verdict(self.detector.names, finite)
            if self.on_device:
                # The host learns of the verdict later. Until then the device acts on it.
                mask = finite.all() if mask is None else finite.all() & mask.to(finite.device)
            elif verdict.nonfinite():
                return verdict
        if mask is not None:
            assert self.copy is not None
            if isinstance(omega, Tensor):
                omega = torch.where(mask.to(omega.device), omega, 0.0)
            self.update(omega, mask)
            self.copy(1.0, mask)
            self.forget()
            return verdict
        assert not isinstance(omega, Tensor)
        self.update(omega)
        averaging.copy_(*self.copied)
        if self.changed:
            buffers.follow(self.own.model, self.student.model, self.changed)
        self.forget()
        return verdict


def prepare(
    student: Binding,
    own: Binding,
    averages: Mapping[str, Average],
    copied: Sequence[str],
    changed: Sequence[str],
    detector: Detector | None,
    *,
    measured: bool,
    fuse: bool,
) -> Plan:
    """Return the plan of an update.

    Args:
        student: The student's tensors.
        own: The averaged module's tensors.
        averages: The averages by name.
        copied: The names of the tensors that are copied at every snapshot.
        changed: The names of the buffers that changed their structure in the student.
        detector: The detector of NaN in the student, or None.
        measured: Whether the device computes how far the update moves the average.
        fuse: Whether one kernel may move many averages where the device has one.
    """
    targets, sources = ([b.local[n] for n in copied] for b in (own, student))
    held = list(averages.values())
    masked = (detector is not None or measured) and _decides_on_device(held, targets)
    # Scratch tensors that were made in inference mode could not be written outside of it.
    with torch.inference_mode(False):
        update = averaging.Update(held, [student.local[n] for n in averages], masked=masked, fuse=fuse)
        pairs = (list(map(Average, targets)), sources)
        copy = averaging.Update(*pairs, masked=True, fuse=fuse) if masked else None
    return Plan(student, own, update, (targets, sources), detector, copy, changed, caches.Forget(own.model))


def _decides_on_device(averages: Sequence[Average], copied: Sequence[Tensor]) -> bool:
    """Return whether the device rather than the host decides if a snapshot counts, so that nothing waits."""
    plain = all(t.layout == torch.strided and not is_traceable_wrapper_subclass(t) for t in copied)
    return plain and any(average.held.device.type != "cpu" for average in averages)
