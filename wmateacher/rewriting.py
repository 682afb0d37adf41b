"""Notice when the teacher's forward pass writes to the averaged module's tensors."""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter

from torch import Tensor, nn

from wmateacher import naming

__all__ = ["Watch", "renormalised"]

_VERSION = attrgetter("_version")


class Watch:
    """Some tensors as their owner left them.

    Every write raises a tensor's version counter, except one through `.data`.
    """

    def __init__(self, tensors: Mapping[str, Tensor]):
        """Look at tensors by name, except for those made in inference mode, which count no versions."""
        counted = {name: tensor for name, tensor in tensors.items() if not tensor.is_inference()}
        self._names, self._tensors = list(counted), list(counted.values())
        self.settle()

    def settle(self) -> None:
        """Accept what has been written until now."""
        # This runs at every forward pass. `map` over a C function has no bytecode per tensor.
        self._versions = list(map(_VERSION, self._tensors))

    def written(self) -> list[str]:
        """Return the names of the tensors that have been written since."""
        versions = list(map(_VERSION, self._tensors))
        if versions == self._versions:
            return []
        changed = zip(self._names, versions, self._versions, strict=True)
        return [name for name, now, before in changed if now != before]


def renormalised(model: nn.Module) -> set[str]:
    """Return the canonical names of the embeddings whose rows each forward pass renormalises (`max_norm`)."""
    return {
        f"{name}.weight" if name else "weight"
        for name, module in naming.modules(model).items()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None
    }


def __dir__() -> list[str]:
    return __all__
