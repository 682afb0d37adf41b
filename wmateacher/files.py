"""State dicts on disk: read without running code, and written whole or not at all."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from wmateacher import contents

__all__ = [
    "Checkpoint",
    "File",
    "OpenCheckpoint",
    "TensorSpec",
    "check_output",
    "load",
    "open_checkpoint",
    "partial_name",
    "read_metadata",
    "read_texts",
    "require_safetensors",
    "save",
    "write_atomically",
]


def __dir__() -> list[str]:
    return __all__


File = str | os.PathLike[str]
Checkpoint = Mapping[str, Any] | File

_METADATA = "wmateacher"
"""The key of the metadata in a file."""

_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


# --- reading ------------------------------------------------------------------------------------------


def load(file: File, key: str | None = None) -> dict[str, Any]:
    """Read a state dict without running any code that the file may contain.

    Args:
        file: A `.safetensors` file, or a `.pt`, `.pth`, `.bin` or `.ckpt` file written by `torch.save`. The
            latter is memory-mapped, and its tensors are read when they are used.
        key: The entry of the file that is the state dict, with dots between the keys of nested ones. Default:
            a teacher's state if the file is one, the student of a run's checkpoint, or the only state dict.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, needs code to be read, or holds no or several state dicts.
        ImportError: If it is a `.safetensors` file and that package is not installed.
    """
    path = _existing(file)
    if path.suffix == ".safetensors":
        with open_checkpoint(path, key) as opened:
            return {name: opened.read(name) for name in opened.specs}
    content = _read(path)
    if key is None and contents.is_teacher(content):
        return dict(content)
    own = isinstance(content, Mapping) and "_extra_state" in content
    return dict(contents.find(content, repr(str(path)), "." if key is None and own else key))


def read_metadata(file: File) -> Any:
    """Return the metadata that `save` wrote into a file, or None.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged or needs code to be read, or its metadata is not `save`'s.
    """
    path = _existing(file)
    if path.suffix == ".safetensors":
        with _open_safetensors(path) as opened:
            text = (opened.metadata() or {}).get(_METADATA, "null")
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            raise ValueError(
                f"the metadata {_METADATA!r} of {str(path)!r} is not JSON, got {text[:50]!r}: another "
                "program wrote it, or the file is damaged; write the file again"
            ) from None
    content = _read(path)
    return content.get(_METADATA) if isinstance(content, Mapping) else None


def read_texts(file: File) -> dict[str, str]:
    """Return the metadata that other programs wrote into a `.safetensors` file; of another file, none.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged.
    """
    path = _existing(file)
    if path.suffix != ".safetensors":
        return {}
    with _open_safetensors(path) as opened:
        return {name: text for name, text in (opened.metadata() or {}).items() if name != _METADATA}


@dataclass(frozen=True)
class TensorSpec:
    """The shape and dtype of a tensor in a checkpoint."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def is_floating(self) -> bool:
        """Whether the tensor is real or complex floating point, and can be averaged."""
        return self.dtype.is_floating_point or self.dtype.is_complex

    @property
    def bytes(self) -> int:
        """The size of the tensor in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class OpenCheckpoint:
    """A checkpoint that can be read in parts.

    Attributes:
        specs: The shapes and dtypes of its tensors, by name.
        rest: Its entries that are not tensors.
        slices: The function behind `read`.
    """

    specs: dict[str, TensorSpec]
    rest: dict[str, Any]
    slices: Callable[[str, int | None, int | None], Tensor]

    def read(self, name: str, first: int | None = None, end: int | None = None) -> Tensor:
        """Read rows `first` to `end - 1` of a tensor, or all of a scalar."""
        return self.slices(name, first, end)


@contextmanager
def open_checkpoint(source: Checkpoint, key: str | None = None) -> Iterator[OpenCheckpoint]:
    """Open a state dict or a file to read it in parts.

    Args:
        source: The state dict or file.
        key: The entry that is the state dict, as for `contents.find`.
    """
    if isinstance(source, Mapping):
        yield _in_memory(contents.find(source, "the state dict", key), "the state dict")
        return
    path = _existing(source)
    if path.suffix != ".safetensors":
        yield _in_memory(contents.find(_read(path), repr(str(path)), key), repr(str(path)))
        return
    with _open_safetensors(path) as file:
        prefix = "" if key in (None, ".") else f"{key}."

        def read(name: str, first: int | None, end: int | None) -> Tensor:
            if specs[name].shape and first is not None:
                return file.get_slice(prefix + name)[first:end]
            return file.get_tensor(prefix + name)

        specs = {}
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            if name.startswith(prefix):
                part = file.get_slice(name)
                dtype = _SAFETENSORS_DTYPES.get(str(part.get_dtype()))
                spec = TensorSpec(tuple(part.get_shape()), dtype or file.get_tensor(name).dtype)
                specs[name.removeprefix(prefix)] = spec
        if not specs:
            raise ValueError(f"{str(path)!r} holds no tensors" + (f" under {key!r}" if prefix else ""))
        yield OpenCheckpoint(specs, {}, read)


def _in_memory(state: Mapping[str, Any], label: str) -> OpenCheckpoint:
    tensors = {n: v.detach() for n, v in state.items() if isinstance(v, Tensor)}
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            raise ValueError(
                f"{label} has a tensor under the key {name!r}, a {type(name).__name__}: tensors are "
                "paired by name, so rename it to a string or leave it out"
            )
        if tensor.layout != torch.strided:
            raise ValueError(
                f"{name!r} is a sparse tensor ({tensor.layout}) in {label}: replace it by its to_dense()"
            )
    return OpenCheckpoint(
        {n: TensorSpec(tuple(t.shape), t.dtype) for n, t in tensors.items()},
        {n: v for n, v in state.items() if n not in tensors},
        lambda name, first, end: tensors[name][first:end] if tensors[name].ndim else tensors[name],
    )


def _open_safetensors(path: Path) -> Any:
    library = require_safetensors(f"{path.name!r}")
    _refuse_stand_in(path)
    try:
        return library.safe_open(str(path), framework="pt")
    except library.SafetensorError as error:
        raise _unreadable(path, error) from None


def require_safetensors(what: str) -> Any:
    """Import safetensors.

    Args:
        what: The argument or file that needs the package, for the error message.

    Raises:
        ImportError: If the package is not installed.
    """
    try:
        importlib.import_module("safetensors.torch")
        return importlib.import_module("safetensors")
    except ImportError:
        raise ImportError(f"{what} needs the package safetensors: pip install safetensors") from None


def _existing(file: Any) -> Path:
    if not isinstance(file, str | os.PathLike):
        raise TypeError(
            f"a checkpoint must be a state dict or a file, got {type(file).__name__}; of a module, pass "
            "its state_dict()"
        )
    path = Path(file)
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"a checkpoint must be a file {_endings()}, got {str(file)!r}")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(file)!r}")
    return path


def _endings() -> str:
    return f"that ends in {', '.join(_SUFFIXES)}"


def _read(path: Path) -> Any:
    """Map a file that `torch.save` wrote, without running code in it."""
    # Only the zip format can be mapped; before torch 1.6 there was another one.
    mapped = _refuse_stand_in(path).startswith(b"PK")
    try:
        return torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # torch raises many kinds, depending on which byte is wrong
        raise _unreadable(path, error) from None


def _refuse_stand_in(path: Path) -> bytes:
    """Return the first bytes of a file, after checking that it is not one that stands for another."""
    with path.open("rb") as stream:
        head = stream.read(256)
    for condition, what in (
        (not head, "it is empty: write or download it again"),
        (
            head.startswith(b"version https://git-lfs"),
            "it is a Git LFS pointer: fetch the file with `git lfs pull`",
        ),
        (
            head.lstrip().lower().startswith((b"<!doctype", b"<html")),
            "it is a web page: download the file itself",
        ),
    ):
        if condition:
            raise ValueError(f"cannot read {str(path)!r}: {what}")
    return head


def _unreadable(path: Path, error: Exception) -> ValueError:
    needed = re.search(r"GLOBAL (\S+)", str(error))
    if needed:
        return ValueError(
            f"cannot read {str(path)!r}: it holds objects of {needed[1]}, and reading them would run code; "
            "load it where it comes from, and save only the model's state_dict()"
        )
    why = (str(error).splitlines() or [""])[0].split(". ")[0] or type(error).__name__
    return ValueError(
        f"cannot read {str(path)!r} ({why}): it is damaged, or neither .safetensors nor tensors saved by "
        "torch.save; if it holds other objects, load it and save only its state dict"
    )


# --- writing ------------------------------------------------------------------------------------------


@contextmanager
def write_atomically(file: File) -> Iterator[BinaryIO]:
    """Open a file for writing so that it appears complete or not at all.

    The context manager yields the binary stream of a new file in the same folder, `FILE.*.partial`. At the
    end of the block, that file is flushed to disk and takes the place of `FILE`. If the block raises, it is
    deleted, and `FILE` stays as it was.

    Examples:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "new folder" / "state.pt"
        >>> with write_atomically(file) as stream:
        ...     torch.save({"step": 3}, stream)
        >>> torch.load(file)
        {'step': 3}

    Args:
        file: The file to write. Missing parent folders are created.

    Raises:
        OSError: If the file cannot be written, for example because the disk is full. The message names the
            file and the reason, and says whether there is an old file, which is unchanged. `torch.save`
            raises a RuntimeError for the same reasons, which becomes this error too.
    """
    file = Path(file)
    partial = partial_name(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("xb") as stream:
            yield stream
        # The file is opened again because safetensors does not write into it but replaces it.
        with partial.open("rb+") as written:
            os.fsync(written.fileno())
        os.replace(partial, file)
        _remove_stale(file)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        old = "the old file is unchanged" if file.exists() else "there was no old file"
        raise OSError(
            f"cannot write {file} ({cause.strerror or cause}); {old}. Check that {file.parent} is a folder "
            "with free space that you may write to, and run the same command again"
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink()


def _remove_stale(file: Path) -> None:
    """Remove what runs that were killed more than an hour ago had written of a file."""
    pattern = re.compile(re.escape(file.name) + r"\.[0-9a-f]{8}\.partial")
    with suppress(OSError):
        for other in file.parent.iterdir():
            if pattern.fullmatch(other.name) and time.time() - other.stat().st_mtime > 3600:
                other.unlink()


def partial_name(path: Path) -> Path:
    """Return a new name beside a path, for what takes its place once it is complete."""
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")


def save(
    state: Mapping[str, Any],
    file: File,
    metadata: Mapping[str, Any] | None = None,
    *,
    texts: Mapping[str, str] | None = None,
) -> None:
    """Write a state dict with `write_atomically`.

    Args:
        state: The tensors by name.
        file: The file to write. Its suffix determines the format: `.safetensors`, or that of `torch.save`
            (`.pt`, `.pth`, `.bin`, `.ckpt`).
        metadata: Values that JSON can hold, to be stored with the state dict for `read_metadata`.
        texts: Further metadata for a `.safetensors` file, by name. Other formats have none.

    Raises:
        ValueError: If the file has another suffix, or an entry for `.safetensors` is not a tensor.
        ImportError: If it is a `.safetensors` file and that package is not installed.
        OSError: If the file cannot be written.
    """
    check_output(file)
    path = Path(file)
    with write_atomically(path) as stream:
        if path.suffix == ".safetensors":
            library = require_safetensors(f"{path.name!r}")
            stored = dict(texts or {}) | {"format": "pt"}
            if metadata is not None:
                stored[_METADATA] = json.dumps(metadata)
            try:
                library.torch.save_file(_separate(state), stream.name, metadata=stored)
            except library.SafetensorError as error:
                raise OSError(str(error)) from error
        else:
            content = state if metadata is None else {_METADATA: dict(metadata), "state": state}
            torch.save(dict(content), stream)


def check_output(output: File | None) -> None:
    """Check, before any work is done, that `save` knows the suffix of an output file.

    Raises:
        ValueError: If it does not.
    """
    if output is not None and Path(output).suffix not in _SUFFIXES:
        raise ValueError(f"the output must be a file {_endings()}, got {str(output)!r}")


def _separate(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return contiguous tensors that share no memory, as safetensors requires."""
    others = [n for n, v in state.items() if not isinstance(v, Tensor)]
    if others:
        raise ValueError(
            f".safetensors holds tensors only, and {', '.join(map(repr, others))} is not a tensor: leave it "
            "out, or write .pt"
        )
    seen: set[int] = set()
    separate = {}
    for name, tensor in state.items():
        tensor = tensor.detach().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return separate
