"""Refuse checkpoints whose average would mean nothing: quantised, or of different configurations."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from reprlib import repr as short
from typing import Any

import torch
from torch import Tensor

from wmateacher import contents
from wmateacher.files import Checkpoint, OpenCheckpoint
from wmateacher.folders import folder_of

__all__ = ["check_configurations", "check_tensors"]


def __dir__() -> list[str]:
    return __all__


# The names under which libraries for quantisation keep integers in place of weights.
_PACKED = ("weight", "qweight", "weight_packed")
# What a configuration says about training and about where and when it was written, not about the function.
_VOLATILE = {
    "_name_or_path", "_commit_hash", "_attn_implementation_autoset", "_diffusers_version", "torch_dtype",
    "dtype", "transformers_version", "revision", "use_cache", "gradient_checkpointing",
    "timm_model_pretrained", "hf_model_pretrained",
}  # fmt: skip
# Of an adapter's configuration, what scales or places its weights.
_ADAPTER = {
    "r", "lora_alpha", "use_rslora", "use_dora", "target_modules", "rank_pattern", "alpha_pattern",
    "fan_in_fan_out",
}  # fmt: skip


_CLASSES = "classes.json"
"""The classes of a CLIP classifier, as `wmateacher.integrations.clip.export` writes them."""


def check_tensors(opened: OpenCheckpoint, label: str) -> None:
    """Check that a checkpoint holds floating-point weights.

    Args:
        opened: The checkpoint.
        label: Its name for error messages.

    Raises:
        ValueError: If it has no floating-point tensor, if weights are quantised, or if it holds a teacher.
    """
    for name, spec in opened.specs.items():
        integers = not spec.is_floating and spec.dtype != torch.bool
        if str(spec.dtype).startswith(("torch.qint", "torch.quint")) or (
            integers and len(spec.shape) > 1 and name.rpartition(".")[2] in _PACKED
        ):
            raise ValueError(
                f"{name!r} is quantised ({spec.dtype}) in {label} and cannot be averaged: dequantise the "
                "model first"
            )
    for key, value in opened.rest.items():
        if contents.is_clock(value):
            raise ValueError(
                f"{label} holds the state of a teacher, whose clock is {key!r}: leave the teacher's entries "
                "out, because the result would not be the average that the clock says"
            )
        if isinstance(value, tuple | list) and any(isinstance(v, Tensor) for v in value):
            raise ValueError(
                f"{key!r} is a {type(value).__name__} of tensors in {label}, as quantised layers have it, "
                "and cannot be averaged: dequantise the model first, or leave the entry out"
            )
    if not any(spec.is_floating for spec in opened.specs.values()):
        raise ValueError(
            f"{label} has nothing to average: none of its {len(opened.specs)} tensors is floating point; "
            "pass the checkpoint with the weights"
        )


def check_configurations(checkpoints: Sequence[Checkpoint]) -> None:
    """Check that model folders describe one function, so that weights of the same name mean the same.

    Keys that do not decide the function, such as the transformers version, may differ.

    Args:
        checkpoints: The checkpoints. Those that are not folders have no configuration.

    Raises:
        ValueError: If a model is quantised, or if two configurations differ.
    """
    folders = [folder for folder in map(folder_of, checkpoints) if folder is not None]
    for name in ("config.json", "adapter_config.json", "open_clip_config.json", _CLASSES):
        files = [folder / name for folder in folders if (folder / name).is_file()]
        found = [_read(file) for file in files]
        for file, config in zip(files, found, strict=True):
            if config.get("quantization_config"):
                raise ValueError(
                    f"the model in {str(file.parent)!r} is quantised (quantization_config in {name}) and "
                    "cannot be averaged: dequantise it first, and save it again"
                )
        values = [_decisive(config, name) for config in found]
        for file, other in zip(files, values, strict=True):
            differing = sorted(
                key for key in values[-1].keys() | other if values[-1].get(key) != other.get(key)
            )
            if differing:
                shown = ", ".join(
                    f"{k} ({short(other.get(k))}, {short(values[-1].get(k))})" for k in differing[:5]
                )
                raise ValueError(
                    f"{str(file)!r} and {str(files[-1])!r} differ in {shown}: the same weights mean "
                    "something else there; average models of one configuration, or pass the files with the "
                    "weights instead of the folders if the difference does not matter"
                )


def _read(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise ValueError(f"{str(file)!r} is not a configuration in JSON: download or save it again")
    return config


def _decisive(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    if name == _CLASSES:
        # Only the rows of a trained head stand for classes.
        return {
            key: config.get(key)
            for key in ("head", "classes")
            if key == "head" or config.get("head") == "linear"
        }
    if name != "adapter_config.json":
        return dict(_flat(config))
    # The order of the modules is that of a set.
    return {
        key: sorted(value) if isinstance(value, list) else value
        for key, value in _flat({key: value for key, value in config.items() if key in _ADAPTER})
    }


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values that decide the function, with dots between the keys of nested ones."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        # An entry that is off or empty is the same as none, which other versions write.
        elif key not in _VOLATILE and "drop" not in key and (value or (value == 0 and value is not False)):
            yield f"{prefix}{key}", value
