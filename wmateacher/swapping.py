"""Lend a model other weights for a while. Its own are always restored, and the lent ones are never saved."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import chain
from types import TracebackType
from typing import NoReturn

import torch
from torch import Tensor, nn

from wmateacher import adapters, averaging, caches, sharding, walking, watching

__all__ = ["Lending", "refuse"]

# The address of every tensor that holds lent values now. Different models may share tensors or their memory.
_lent: dict[int, Lending] = {}
_lock = threading.Lock()


class Lending(AbstractContextManager[None]):
    """Other values in a model's tensors from the first entry to the last exit, in whatever order blocks end.

    Attributes:
        model: The unwrapped model.
        depth: The number of blocks that are open.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Sequence[Tensor],
        sources: Sequence[Tensor],
        replaced: AbstractContextManager[None],
    ):
        """Prepare to give an unwrapped model other values.

        Args:
            model: The model.
            targets: The model's tensors to write.
            sources: Their values inside the block; shards for sharded targets.
            replaced: The context in which the model has the buffers that cannot be written in place.
        """
        self.model = model
        self.depth = 0
        self._thread = threading.get_ident()
        self._block = self._lend(targets, sources, replaced)

    def __enter__(self) -> None:
        """Write the values, unless they are there already.

        Raises:
            RuntimeError: If some of the tensors hold lent values already.
        """
        if self.depth == 0:
            self._block.__enter__()
        self.depth += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        """Restore the model's own values, bit for bit, if this is the last exit.

        Raises:
            RuntimeError: If a parameter was written inside.
        """
        self.depth -= 1
        return None if self.depth else self._block.__exit__(kind, error, trace)

    def covers(self, model: nn.Module) -> bool:
        """Return whether a further block for `model` may be opened by this thread."""
        return self.model is model and self._thread == threading.get_ident()

    def refuse(self, action: str) -> NoReturn:
        """Raise a RuntimeError that says why `action` must wait."""
        mine = self._thread == threading.get_ident()
        raise RuntimeError(
            f"{action} {'inside swap()' if mine else 'while another thread is inside swap()'}: the student "
            "holds a teacher's averaged weights there, not its own. Do it after the with block; "
            "teacher.averaged_state_dict() returns the averaged weights"
        )

    @contextmanager
    def _lend(
        self, targets: Sequence[Tensor], sources: Sequence[Tensor], replaced: AbstractContextManager[None]
    ) -> Iterator[None]:
        memory = [sharding.local(target) for target in targets]
        own = [tensor.detach().clone() for tensor in memory]
        fully_sharded, forget = sharding.fully_sharded(self.model), caches.Forget(self.model)
        problem = None
        with self._registered(targets), _guarded(self.model, self.refuse), replaced:
            try:
                averaging.copy_(memory, sources)
                forget()
                watch = watching.Watch(self.model, targets)
                try:
                    yield
                    # A forward pass may have left the lent weights gathered.
                    sharding.reshard(fully_sharded)
                    problem = watch.problem()
                finally:
                    sharding.reshard(fully_sharded)
                    watch.put_back()
            finally:
                averaging.copy_(memory, own)
                forget()
        if problem is not None:
            raise RuntimeError(problem)

    @contextmanager
    def _registered(self, targets: Sequence[Tensor]) -> Iterator[None]:
        addresses = _addresses(targets)
        with _lock:
            for address in addresses & _lent.keys():
                _lent[address].refuse("swap()")
            _lent.update(dict.fromkeys(addresses, self))
        try:
            yield
        finally:
            for address in addresses:
                del _lent[address]


def refuse(model: nn.Module, action: str) -> None:
    """Raise a RuntimeError that names `action` if any tensor of an unwrapped model holds lent values."""
    if torch.compiler.is_compiling() or not _lent:
        return
    for address in _addresses(chain(model.parameters(), model.buffers())):
        lending = _lent.get(address)
        if lending is not None:
            lending.refuse(action)


def _addresses(tensors: Iterable[Tensor]) -> set[int]:
    """Return where the tensors hold their values."""
    return {part.data_ptr() for tensor in tensors for part in watching.memory(tensor) if part.numel()}


@contextmanager
def _guarded(model: nn.Module, refuse: Callable[[str], NoReturn]) -> Iterator[None]:
    """Refuse to save, pickle or copy any part of a model inside a `with` block, and to merge its adapters."""

    def guard(action: str) -> Callable[..., NoReturn]:
        return lambda *args, **kwargs: refuse(action)

    state, copy = guard("state_dict() of the student"), guard("pickling or copying the student")
    modules, layers = walking.modules(model), adapters.layers(model).values()
    # Both pickle and copy look these methods up on the object before its class, like any other caller.
    guards = [(m, name, copy) for m in modules for name in ("__reduce_ex__", "__deepcopy__")]
    guards += [(m, name, guard(f"{name}() of an adapter")) for m in layers for name in ("merge", "unmerge")]
    before = [(vars(module), name, vars(module).get(name)) for module, name, _ in guards]
    hooks = [module.register_state_dict_pre_hook(state) for module in modules]
    for module, name, function in guards:
        vars(module)[name] = function
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for attributes, name, value in before:
            del attributes[name]
            if value is not None:
                attributes[name] = value


def __dir__() -> list[str]:
    return __all__
