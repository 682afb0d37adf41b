"""Averaged weights in the checkpoint files that a Lightning Trainer writes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.plugins import CheckpointIO
from torch import Tensor

__all__ = ["STUDENT", "AveragedIO"]

STUDENT = "student_state_dict"
"""The entry of a checkpoint with the student's weights, if its `state_dict` has averaged ones."""

_OF_TRAINING = ("callbacks", "loops", "lr_schedulers", "optimizer_states", STUDENT)


class AveragedIO(CheckpointIO):
    """Another `CheckpointIO` that gets checkpoints with averaged weights to write.

    Every file passes through here, also those that the Trainer's callbacks are not told of
    (`save_weights_only=True`).
    """

    def __init__(
        self,
        inner: CheckpointIO,
        owner: object,
        average: Callable[[], Mapping[str, Tensor] | None],
        *,
        replace: bool,
        beside: bool,
    ):
        """Wrap a `CheckpointIO`.

        Args:
            inner: The `CheckpointIO` that writes the files.
            owner: The callback whose average it is.
            average: A function that returns the averaged weights under the module's keys; None if there is
                no average yet.
            replace: Whether a checkpoint's `state_dict` gets the averaged weights. The student's are then
                saved as well, under `STUDENT`, unless the checkpoint has nothing but weights.
            beside: Whether a second file, `averaged/NAME` in the same folder, gets them.
        """
        self.inner, self.owner = inner, owner
        self._average, self._replace, self._beside = average, replace, beside

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint, averaged if it is asked for.

        Raises:
            ValueError: If another callback has replaced some of the same weights.
        """
        average = self._average()
        if average is not None and "state_dict" in checkpoint:
            averaged = {**checkpoint["state_dict"], **average}
            # The Trainer's tuners write hidden files, which they remove soon.
            if self._beside and not Path(path).name.startswith("."):
                export = {key: value for key, value in checkpoint.items() if key not in _OF_TRAINING}
                export["state_dict"] = averaged
                self.inner.save_checkpoint(export, _beside(path), storage_options)
            if self._replace:
                own = checkpoint.get(STUDENT, checkpoint["state_dict"])
                if any(checkpoint["state_dict"][key] is not own[key] for key in average):
                    raise ValueError(
                        "two callbacks with checkpoint='teacher' average the same weights, and a state_dict "
                        "has room for one average: leave checkpoint='teacher' to one of them"
                    )
                checkpoint = {**checkpoint, "state_dict": averaged}
                if "callbacks" in checkpoint:
                    checkpoint[STUDENT] = own
        self.inner.save_checkpoint(checkpoint, path, storage_options)

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a checkpoint."""
        return self.inner.load_checkpoint(path, *args, **kwargs)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint, and the averaged one beside it."""
        self.inner.remove_checkpoint(path)
        if self._beside:
            self.inner.remove_checkpoint(_beside(path))

    def teardown(self) -> None:
        """Wait for what is still being written."""
        self.inner.teardown()


def _beside(path: str | Path) -> str:
    folder, name = os.path.split(path)
    return os.path.join(folder, "averaged", name)
