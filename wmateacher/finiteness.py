"""Find NaN and infinite values in many tensors at once, without waiting for the device that holds them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor, distributed
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from wmateacher.transfers import Transfer, moved

__all__ = ["NONFINITE", "Detector", "Nonfinite", "Verdict"]

Nonfinite = Literal["warn", "raise", "skip"]
NONFINITE: tuple[Nonfinite, ...] = ("warn", "raise", "skip")


class Detector:
    """Looks for NaN and infinite values in a fixed set of tensors.

    Attributes:
        names: The names of the tensors that can have such values, in the order of the results.
    """

    def __init__(self, tensors: Mapping[str, Tensor], *, everywhere: bool = False):
        """Group the tensors.

        Args:
            tensors: The tensors by name. Tensors of whole numbers are left out.
            everywhere: Whether they are shards, so that a value on one rank counts on all. Each call is then
                a collective.
        """
        groups: dict[tuple[torch.device, torch.dtype], list[tuple[str, Tensor]]] = {}
        for name, tensor in tensors.items():
            for part in _parts(tensor.detach()):
                if part.is_floating_point() or part.is_complex():
                    groups.setdefault((part.device, part.dtype), []).append((name, part))
        self._everywhere = everywhere
        self._groups = [[part for _, part in group] for group in groups.values()]
        self.names = [name for group in groups.values() for name, _ in group]

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """Return which tensors are finite, as bool `[len(names)]` on the device of the first."""
        if not self.names:
            return torch.ones(0, dtype=torch.bool)
        home = self._groups[0][0].device
        flags = [moved(_finite(group), home) for group in self._groups]
        finite = torch.cat(flags)
        if self._everywhere and distributed.is_initialized():
            counts = finite.to(torch.int32)
            distributed.all_reduce(counts, distributed.ReduceOp.MIN)
            finite = counts.bool()
        return finite


class Verdict:
    """What a `Detector` has found, on its way from the device to the host."""

    def __init__(self, names: list[str], finite: Tensor):
        """Start the transfer of the result of a detector with these names."""
        self._names, self._finite = names, Transfer(finite)

    def has_arrived(self) -> bool:
        """Return whether `nonfinite` would not wait."""
        return self._finite.has_arrived()

    def nonfinite(self) -> list[str]:
        """Return the names of the tensors that are not finite, once the result has arrived."""
        finite = self._finite.read()
        if bool(finite.all()):
            return []
        flags = zip(self._names, finite.tolist(), strict=True)
        return list(dict.fromkeys(name for name, is_finite in flags if not is_finite))


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the tensors with memory of their own: what is inside a wrapper, such as a quantised weight."""
    if is_traceable_wrapper_subclass(tensor):
        for attribute in tensor.__tensor_flatten__()[0]:
            yield from _parts(getattr(tensor, attribute))
    else:
        yield tensor


def _finite(tensors: list[Tensor]) -> Tensor:
    """Return which tensors of one dtype and device are finite, as bool `[n]` on their device."""
    on_cpu = tensors[0].device.type == "cpu"
    values = [_readable(tensor) for tensor in tensors]
    # A norm is NaN or infinite if a value is. On a CPU the Euclidean norm is many times as fast as the
    # largest value, but it may overflow. What it suspects is looked at again.
    half = on_cpu and values[0].dtype == torch.float16  # of which the sum of squares is soon infinite
    norms = torch._foreach_norm(values, 2 if on_cpu else float("inf"), dtype=torch.float32 if half else None)
    finite = torch.stack(list(norms)).isfinite()
    if on_cpu:
        for i in (~finite).nonzero().flatten().tolist():
            finite[i] = values[i].isfinite().all()
    return finite


def _readable(tensor: Tensor) -> Tensor:
    """Return the values of a tensor in a form of which there are norms."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    if tensor.dtype.itemsize == 1:
        tensor = tensor.float()
    return tensor if tensor.numel() else tensor.new_zeros(1)  # an empty tensor has no largest value


def __dir__() -> list[str]:
    return __all__
