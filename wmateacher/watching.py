"""Notice what is written to a model's parameters inside a block, and put back tensors that are replaced.

Writing to a tensor raises its version counter, but writing through `.data` does not. Where nothing would undo
such a write, a checksum of the values shows it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from wmateacher import adapters, walking

__all__ = ["Watch", "memory"]


class Watch:
    """A model's tensors as they are at the start of a block."""

    def __init__(self, model: nn.Module, restored: Iterable[Tensor]):
        """Look at an unwrapped model.

        Args:
            model: The model.
            restored: Those of its tensors whose values the caller restores. A checksum is taken of all other
                parameters, which reads them once.
        """
        tables: list[dict[str, Any]] = [
            t for m in walking.modules(model) for t in (m._parameters, m._buffers)
        ]
        self._slots = [(table, key, table[key]) for table in tables for key in table]
        tensors = {id(tensor): tensor for *_, tensor in self._slots if tensor is not None}
        self._places = [(t, t.detach()) for t in tensors.values() if _is_plain(t) and not t.is_meta]
        rewritten = {id(m.weight) for m in walking.modules(model) if _rewrites_its_weight(m)}
        self._parameters = {n: p for n, p in walking.named_parameters(model) if id(p) not in rewritten}
        # Writing to a DTensor raises its version counter, writing to its shard raises the shard's.
        self._counted = {n: [p, *memory(p)] for n, p in self._parameters.items()}
        self._versions = {n: _versions(tensors) for n, tensors in self._counted.items()}
        # The address also recognises a tensor that is restored through a view, as expanded ones are.
        addresses = {part.data_ptr() for tensor in restored for part in memory(tensor) if part.numel()}
        self._checksums = {
            n: _checksum(p)
            for n, p in self._parameters.items()
            if not any(part.data_ptr() in addresses for part in memory(p))
        }
        self._merged = [(n, layer, layer.merged) for n, layer in adapters.layers(model).items()]

    def problem(self) -> str | None:
        """Return a description of what has been written since, or None."""
        moved = {id(t) for table, key, t in self._slots if table.get(key) is not t}
        moved |= {id(t) for t, place in self._places if not _is_at(t, place)}
        lost, kept = [], []
        for name, parameter in self._parameters.items():
            written = id(parameter) in moved or _versions(self._counted[name]) != self._versions[name]
            if name not in self._checksums:
                lost += [name] * written
            elif written or bool(_checksum(parameter) != self._checksums[name]):
                kept.append(name)
        switched = [name for name, layer, merged in self._merged if layer.merged != merged]
        if kept:
            return (
                f"the student's {_few(kept)} changed inside swap(). The teacher shares these frozen "
                "parameters, so that swap() has no copy of their values to restore: load them again, and "
                "write to them after the with block or build the teacher with frozen='copy'"
            )
        if switched:
            return (
                f"the student's adapters in {_few(switched)} were merged or unmerged inside swap(), but its "
                "weights are those from before the block again: undo it before the block ends"
            )
        if lost:
            return (
                f"the student's parameters {_few(lost)} were written inside swap(), by an optimizer step, by "
                "loading weights, or by moving or casting the model. The student has its own weights again "
                "and what was written is lost: train, load weights and move the model after the with block"
            )
        return None

    def put_back(self) -> None:
        """Put the tensors, and the memory of each, back where others have taken their place."""
        for table, key, tensor in self._slots:
            table[key] = tensor
        for tensor, place in self._places:
            if not _is_at(tensor, place):
                tensor.data = place


def memory(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the strided tensors that hold a tensor's values: the tensor, or those that it wraps."""
    if is_traceable_wrapper_subclass(tensor):
        for value in map(tensor.__getattribute__, tensor.__tensor_flatten__()[0]):
            if isinstance(value, Tensor):  # a DTensor also lists its device mesh
                yield from memory(value)
    elif _is_plain(tensor):
        yield tensor


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not is_traceable_wrapper_subclass(tensor)


def _is_at(tensor: Tensor, place: Tensor) -> bool:
    same_kind = tensor.dtype == place.dtype and tensor.device == place.device
    return same_kind and tensor.is_set_to(place)


def _rewrites_its_weight(module: nn.Module) -> bool:
    """Return whether each forward pass may write to the module's weight."""
    return isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    return [t._version for t in tensors if not t.is_inference()]


@torch.no_grad()
def _checksum(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor's bits, in words of 64, as a 0-d tensor on its device."""
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for part in memory(tensor):
        data = part.detach().contiguous().view(-1).view(torch.uint8)
        words = data.numel() // 8 * 8
        # A view as words must start at a whole word of its storage.
        whole = data[:words] if data.storage_offset() % 8 == 0 else data[:words].clone()
        total = total + whole.view(torch.int64).sum() + data[words:].sum()
    return total


def _few(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def __dir__() -> list[str]:
    return __all__
