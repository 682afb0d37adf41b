"""The checkpoints of a merge: opened in parts, under names that they have in common."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from wmateacher import naming
from wmateacher.files import Checkpoint, OpenCheckpoint
from wmateacher.folders import open_source
from wmateacher.posthoc import suitability

__all__ = ["Source", "align"]


def __dir__() -> list[str]:
    return __all__


@dataclass(frozen=True)
class Source:
    """A checkpoint and the names that its tensors have here.

    Attributes:
        checkpoint: The state dict, file or model folder.
        key: The entry of it that is the state dict, or None.
        label: The name for error messages.
        names: The name of each tensor, by its key in the checkpoint.
    """

    checkpoint: Checkpoint
    key: str | None
    label: str
    names: Mapping[str, str]

    @contextmanager
    def open(self) -> Iterator[OpenCheckpoint]:
        """Open the checkpoint under the names of `names`."""
        with open_source(self.checkpoint, self.key) as opened:
            keys = {self.names[key]: key for key in opened.specs}
            yield OpenCheckpoint(
                {name: opened.specs[key] for name, key in keys.items()},
                {naming.plain(key) if isinstance(key, str) else key: v for key, v in opened.rest.items()},
                lambda name, first, end: opened.read(keys[name], first, end),
            )


def align(checkpoints: Sequence[Checkpoint], key: str | None = None, *, check: bool = True) -> list[Source]:
    """Return the checkpoints with names that do not depend on the wrappers of the models that wrote them.

    Args:
        checkpoints: The state dicts, files or model folders.
        key: The entry of each that is the state dict, as for `contents.find`.
        check: Whether to refuse what cannot be averaged. Snapshots say themselves what is averaged in them.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a checkpoint cannot be read, holds no state dict or several, or cannot be averaged.
    """
    if check:
        suitability.check_configurations(checkpoints)
    labels = [
        repr(os.fspath(c)) if isinstance(c, str | os.PathLike) else f"state dict {i}"
        for i, c in enumerate(checkpoints)
    ]
    keys = []
    for checkpoint, label in zip(checkpoints, labels, strict=True):
        with open_source(checkpoint, key) as opened:
            if check:
                suitability.check_tensors(opened, label)
            keys.append(list(opened.specs))
    names = naming.align(keys)
    return [Source(c, key, label, n) for c, label, n in zip(checkpoints, labels, names, strict=True)]
