"""State dicts in memory and in files: read in parts, summed a piece at a time, written whole or not at all.

Sums are float64. Beside the result, which is in the CPU's memory, stands about a third of it.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from wmateacher import pairing
from wmateacher.kernels import Array

File = str | os.PathLike[str]
Checkpoint = Mapping[str, Any] | File

METADATA = "wmateacher"
"""Under which a file says what it is."""

_TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
_SUFFIXES = (".safetensors", *_TORCH_SUFFIXES)
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

# Files are reopened for each part of the checkpoint: pages of a mapped file count as memory of this
# process until it is closed.
_SHARE = 1 / 16
_LEAST_BYTES = 2**20
_PIECE = 2**16


# --- files --------------------------------------------------------------------------------------------


def load(file: File, key: str | None = None) -> dict[str, Any]:
    """Read a state dict; no code in the file is run.

    Args:
        file: `.safetensors`, or `.pt`, `.pth`, `.bin`, `.ckpt` as `torch.save` writes them; these are
            mapped, not read, until their tensors are used.
        key: Where in the file the state dict is; None: where it is obvious (the file itself, or its
            only entry that holds tensors, such as `"state_dict"`).

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, needs code to be read, or holds no or several state dicts.
        ImportError: A `.safetensors` file without that package.
    """
    path = existing(file)
    if path.suffix == ".safetensors":
        with open_checkpoint(path) as opened:
            return {name: opened.read(name) for name in opened.specs}
    return dict(_state_in(read_file(path), path, key))


def save(state: Mapping[str, Any], file: File) -> None:
    """Write a state dict so that the file is at any time the old one, or the new one and whole.

    Args:
        state: Tensors by name.
        file: Its suffix says how: `.safetensors`, or as `torch.save` does (`.pt`, `.pth`, `.bin`, `.ckpt`).

    Raises:
        ValueError: The suffix is none of these, or `.safetensors` is to hold what is no tensor.
        ImportError: A `.safetensors` file without that package.
    """
    check_output(file)
    write(state, Path(file))


@dataclass(frozen=True)
class _Spec:
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def averages(self) -> bool:
        return self.dtype.is_floating_point or self.dtype.is_complex

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class _Opened:
    """A checkpoint that can be read in parts.

    Attributes:
        specs: Its tensors.
        rest: What is no tensor.
        slices: Reads rows `[first, end)` of a tensor, or all of a scalar.
    """

    specs: dict[str, _Spec]
    rest: dict[str, Any]
    slices: Callable[[str, int | None, int | None], Tensor]

    def read(self, name: str, first: int | None = None, end: int | None = None) -> Tensor:
        return self.slices(name, first, end)


@contextmanager
def open_checkpoint(source: Checkpoint) -> Iterator[_Opened]:
    """Open a state dict or a file, to be read in parts."""
    if isinstance(source, Mapping):
        yield _in_memory(source)
        return
    path = existing(source)
    if path.suffix != ".safetensors":
        yield _in_memory(_state_in(read_file(path), path))
        return
    with open_safetensors(path) as file:

        def read(name: str, first: int | None, end: int | None) -> Tensor:
            if specs[name].shape and first is not None:
                return file.get_slice(name)[first:end]
            return file.get_tensor(name)

        specs = {}
        for name in file.keys():  # noqa: SIM118 (no mapping)
            part = file.get_slice(name)
            dtype = _SAFETENSORS_DTYPES.get(str(part.get_dtype()))
            specs[name] = _Spec(tuple(part.get_shape()), dtype or file.get_tensor(name).dtype)
        yield _Opened(specs, {}, read)


def _in_memory(state: Mapping[str, Any]) -> _Opened:
    tensors = {n: v.detach() for n, v in state.items() if isinstance(v, Tensor)}
    return _Opened(
        {n: _Spec(tuple(t.shape), t.dtype) for n, t in tensors.items()},
        {n: v for n, v in state.items() if n not in tensors},
        lambda name, first, end: tensors[name][first:end] if tensors[name].ndim else tensors[name],
    )


def open_safetensors(path: Path) -> Any:
    """What `safetensors.safe_open` gives, or a ValueError that says what is wrong with the file."""
    library = require_safetensors(f"{path.name!r}")
    try:
        return library.safe_open(str(path), framework="pt")
    except library.SafetensorError as error:
        raise _unreadable(path, error) from None


def require_safetensors(what: str) -> Any:
    """The package, or an ImportError that says what needs it."""
    try:
        importlib.import_module("safetensors.torch")
        return importlib.import_module("safetensors")
    except ImportError:
        raise ImportError(f"{what} needs the package safetensors: pip install safetensors") from None


def existing(file: Any) -> Path:
    """The path of a checkpoint that is there, or an error."""
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


def check_output(output: File | None) -> None:
    """Raise a ValueError, before any work, if `save` could not write there."""
    if output is not None and Path(output).suffix not in _SUFFIXES:
        raise ValueError(f"the output must be a file {_endings()}, got {str(output)!r}")


def _endings() -> str:
    return f"that ends in {', '.join(_SUFFIXES)}"


def read_file(path: Path) -> Any:
    """What `torch.save` wrote, mapped; no code in it is run."""
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> ValueError:
    why = (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0]
    return ValueError(
        f"cannot read {str(path)!r} ({why}): it must be .safetensors, or tensors saved by torch.save in its "
        "zip format; a file that holds other objects, load and save again with only its state dict"
    )


def _state_in(content: Any, path: Path, key: str | None = None) -> Mapping[str, Any]:
    """The state dict in what a file holds."""
    inner = [k for k, v in content.items() if _holds_tensors(v)] if isinstance(content, Mapping) else []
    if key is not None:
        if key not in inner:
            raise ValueError(
                f"{str(path)!r} has no state dict under {key!r}: there is one under "
                f"{', '.join(map(repr, inner)) or 'no key'}"
            )
        return content[key]
    if len(inner) > 1:
        raise ValueError(
            f"{str(path)!r} holds several state dicts, {', '.join(map(repr, inner))}: pass one of them, as "
            f"load(file, key={inner[0]!r})"
        )
    if inner:
        return content[inner[0]]
    if not _holds_tensors(content):
        raise ValueError(f"{str(path)!r} holds no state dict: no tensors by name")
    return content


def _holds_tensors(content: Any) -> bool:
    return isinstance(content, Mapping) and any(isinstance(v, Tensor) for v in content.values())


@contextmanager
def write_atomically(file: File) -> Iterator[BinaryIO]:
    """Write a file so that it is complete or not there: an old file stays as it was until the new one is.

    The context manager yields the open binary stream of `FILE.partial` beside the file. On leaving the
    block, that file is flushed to the disk and renamed. If the block raises, it is deleted.

    Example:
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
    partial = file.with_name(f"{file.name}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as stream:
            yield stream
        # Opened again, because safetensors replaces the file that it is told to write.
        with partial.open("rb+") as written:
            os.fsync(written.fileno())
        os.replace(partial, file)
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


def write(state: Mapping[str, Any], path: Path, about: Mapping[str, Any] | None = None) -> None:
    """Write a state dict; with `about`, a recorder's snapshot."""
    with write_atomically(path) as stream:
        if path.suffix == ".safetensors":
            library = require_safetensors(f"{path.name!r}")
            metadata = {"format": "pt"} | ({} if about is None else {METADATA: json.dumps(about)})
            try:
                library.torch.save_file(_separate(state), stream.name, metadata=metadata)
            except library.SafetensorError as error:
                raise OSError(str(error)) from error
        else:
            torch.save(dict(state) if about is None else {METADATA: dict(about), "state": state}, stream)


def _separate(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Contiguous tensors that share no memory."""
    others = [n for n, v in state.items() if not isinstance(v, Tensor)]
    if others:
        raise ValueError(
            f".safetensors holds tensors only, and {', '.join(map(repr, others))} is none: leave it out, or "
            "write .pt"
        )
    seen: set[int] = set()
    separate = {}
    for name, tensor in state.items():
        tensor = tensor.detach().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return separate


# --- sums ---------------------------------------------------------------------------------------------


@torch.no_grad()
def combine(
    sources: Sequence[Checkpoint],
    coefficients: Callable[[str], Sequence[float] | Array],
    *,
    last: int = -1,
    only: frozenset[str] | None = None,
) -> dict[str, Any]:
    """`sum_i coefficients(name)[i] * source_i[name]` for every floating-point tensor.

    Args:
        sources: State dicts or files.
        coefficients: What each counts, by tensor. A source that counts 0 is not read.
        last: Whose dtypes the result has, and whose tensors it takes where nothing is averaged.
        only: The tensors to average; None: all floating-point ones.
    """
    specs = matched(sources, last)
    names = [n for n, s in specs.items() if s.averages and (only is None or n in only)]
    averaged = set(names)
    with open_checkpoint(sources[last]) as opened:
        result: dict[str, Any] = {
            name: torch.empty(spec.shape, dtype=spec.dtype)
            if name in averaged
            else opened.read(name).to("cpu", copy=True)
            for name, spec in specs.items()
        }
        result.update(opened.rest)
    counts = {name: [float(c) for c in coefficients(name)] for name in names}
    for part in parts(specs, names, _SHARE):
        sums = {row: torch.zeros_like(_rows(result, row), dtype=_wider(specs[row[0]])) for row in part}
        for i, source in enumerate(sources):
            rows = [row for row in part if counts[row[0]][i]]
            if rows:
                with open_checkpoint(source) as opened:
                    for row in rows:
                        aligned = zip(pieces(sums[row]), pieces(opened.read(*row)), strict=True)
                        for total, piece in aligned:
                            total.add_(wide(piece), alpha=counts[row[0]][i])
        for row in part:
            _rows(result, row).copy_(sums[row])
    return result


_Row = tuple[str, int, int]


def _rows(state: Mapping[str, Tensor], row: _Row) -> Tensor:
    name, first, end = row
    return state[name][first:end] if state[name].ndim else state[name]


def parts(specs: Mapping[str, _Spec], names: Sequence[str], share: float) -> Iterator[list[_Row]]:
    """Rows of the named tensors in parts that, as float64, are about that share of all their memory."""
    budget = max(sum(specs[n].bytes for n in names) * share, _LEAST_BYTES)
    part: list[_Row] = []
    room = budget
    for name in names:
        shape = specs[name].shape or (1,)
        each = _wider(specs[name]).itemsize * math.prod(shape[1:])
        first = 0
        while first < shape[0]:
            fitting = max(int(room // each), 0 if part else 1) if each else shape[0]
            end = min(shape[0], first + fitting)
            if end > first:
                part.append((name, first, end))
                room -= (end - first) * each
                first = end
            if first < shape[0]:
                yield part
                part, room = [], budget
    if part:
        yield part


def pieces(tensor: Tensor) -> Sequence[Tensor]:
    """A tensor in flat pieces that fit the cache."""
    return tensor.reshape(-1).split(_PIECE)


def wide(tensor: Tensor) -> Tensor:
    """In float64 or complex128, on the CPU."""
    return tensor.to("cpu", torch.complex128 if tensor.is_complex() else torch.float64)


def _wider(spec: _Spec) -> torch.dtype:
    return torch.complex128 if spec.dtype.is_complex else torch.float64


def matched(sources: Sequence[Checkpoint], last: int) -> dict[str, _Spec]:
    """The tensors of the source `last`, which all others have too."""
    found = []
    for source in sources:
        with open_checkpoint(source) as opened:
            found.append(opened.specs)
    labels = [
        f"state dict {i}" if isinstance(s, Mapping) else repr(os.fspath(s)) for i, s in enumerate(sources)
    ]
    reference = found[last]
    for label, specs in zip(labels, found, strict=True):
        missing = [n for n in reference if n not in specs]
        extra = [n for n in specs if n not in reference]
        if missing or extra:
            raise ValueError(
                f"{label} has not the tensors of {labels[last]}: "
                f"{pairing.describe_difference(missing, extra)}; only checkpoints of one architecture can be "
                "averaged"
            )
        for name, spec in reference.items():
            if specs[name].shape != spec.shape or specs[name].averages != spec.averages:
                raise ValueError(
                    f"{name!r} is {specs[name].dtype} of shape {specs[name].shape} in {label}, and "
                    f"{spec.dtype} of shape {spec.shape} in {labels[last]}; only checkpoints of one "
                    "architecture can be averaged"
                )
    return reference
