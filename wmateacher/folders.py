"""Model folders as `save_pretrained` writes them: weights in one file or in shards with an index."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from wmateacher.checks import positive_int
from wmateacher.files import (
    Checkpoint,
    File,
    OpenCheckpoint,
    check_output,
    open_checkpoint,
    partial_name,
    read_texts,
    save,
)

__all__ = ["SHARD_BYTES", "check_target", "folder_of", "is_folder", "open_source", "write"]

SHARD_BYTES = 5 * 10**9
"""The largest size of a shard, which is the default of `save_pretrained` in many versions."""

_INDEX = ".index.json"
# The beginnings of the names of weights: of transformers (two kinds of files) or open_clip, of PEFT, and of
# diffusers. Of several files in one group the first is read, as `from_pretrained` does.
_STEMS = (
    ("model", "pytorch_model", "open_clip_model", "open_clip_pytorch_model"),
    ("adapter_model",),
    ("diffusion_pytorch_model",),
)
_SUFFIXES = (".safetensors", f".safetensors{_INDEX}", ".bin", f".bin{_INDEX}")
_WHOLE_MODELS = tuple(f"{stem}{suffix}" for stems in _STEMS for stem in stems for suffix in _SUFFIXES)
# Files that are not copied: weights in any format, and the state of the training that wrote them.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", _INDEX)
_HEAD = "head"
"""The tensor, and the file, of the linear head that `wmateacher.integrations.clip.export` saves."""
_TRAINING = ("trainer_state.json", "README.md")


# --- reading ------------------------------------------------------------------------------------------


def is_folder(source: Checkpoint) -> bool:
    """Return whether a checkpoint is a model folder or the index of one."""
    return isinstance(source, str | os.PathLike) and (
        os.path.isdir(source) or os.fspath(source).endswith(_INDEX)
    )


def folder_of(source: Checkpoint) -> Path | None:
    """Return the folder of a checkpoint that is a model folder or the index of one, or None."""
    if not is_folder(source):
        return None
    path = Path(source)  # type: ignore[arg-type]
    return path if path.is_dir() else path.parent


@contextmanager
def open_source(source: Checkpoint, key: str | None = None) -> Iterator[OpenCheckpoint]:
    """Open a state dict, a file or a model folder to read it in parts.

    Args:
        source: The state dict, file, folder, or the index of the shards in a folder.
        key: The entry that is the state dict, as for `contents.find`, in each file of a folder.

    Raises:
        FileNotFoundError: If there is no such file, or a shard is missing.
        ValueError: If a file is damaged, or an index names other tensors than there are in the shards.
    """
    if not is_folder(source):
        with open_checkpoint(source, key) as opened:
            yield opened
        return
    file = _weights_file(Path(source))  # type: ignore[arg-type]
    index = _read_index(file) if file.name.endswith(_INDEX) else {}
    names = list(dict.fromkeys(index.values())) or [file.name, *_heads(file)]
    with ExitStack() as stack:
        shards = {s: stack.enter_context(open_checkpoint(file.parent / s, key)) for s in names}
        if index and key is None:
            _compare(file, index, shards)
        home = {name: opened for opened in shards.values() for name in opened.specs}
        specs = {name: opened.specs[name] for name, opened in home.items()}
        rest = {name: value for opened in shards.values() for name, value in opened.rest.items()}
        yield OpenCheckpoint(specs, rest, lambda name, first, end: home[name].read(name, first, end))


def _weights_file(source: Path) -> Path:
    """Return the file with the weights, or their index."""
    if not source.is_dir():
        if not source.is_file():
            raise FileNotFoundError(f"there is no file {str(source)!r}")
        return source
    found = [
        next(
            (f for stem in stems for suffix in _SUFFIXES if (f := source / f"{stem}{suffix}").is_file()), None
        )
        for stems in _STEMS
    ]
    files = [file for file in found if file is not None]
    if len(files) > 1:
        raise ValueError(
            f"the folder {str(source)!r} holds several models, {', '.join(f.name for f in files)}: pass one "
            "of these files instead of the folder"
        )
    if not files:
        inside = sorted(
            str(f.relative_to(source))
            for pattern in ("*", "*/*", "*/*/*")
            for f in source.glob(pattern)
            if f.is_dir() and any((f / name).is_file() for name in _WHOLE_MODELS)
        )
        more = f" and {len(inside) - 6} more" if len(inside) > 6 else ""
        raise ValueError(
            f"the folder {str(source)!r} holds no model: none of model.safetensors, pytorch_model.bin, "
            f"adapter_model.safetensors, open_clip_model.safetensors and their {_INDEX}; pass "
            + (f"a folder inside, {', '.join(inside[:6])}{more}" if inside else "the checkpoint file itself")
        )
    return files[0]


def _heads(file: Path) -> list[str]:
    """Return the file of the linear head beside the weights of a CLIP classifier, if there is one."""
    head = f"{_HEAD}.safetensors"
    return [head] if file.name.startswith("open_clip") and (file.parent / head).is_file() else []


def _read_index(file: Path) -> dict[str, str]:
    """Return the shard of each tensor."""
    try:
        index = json.loads(file.read_text())["weight_map"]
        whole = index and all(isinstance(v, str) for v in index.values())
    except (ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise ValueError(f"{str(file)!r} is not an index of shards: it has no weight_map; download it again")
    for shard in dict.fromkeys(index.values()):
        if not (file.parent / shard).is_file():
            raise FileNotFoundError(
                f"the shard {shard!r} that {str(file)!r} names is missing: download or copy it again"
            )
    return dict(index)


def _compare(file: Path, index: Mapping[str, str], shards: Mapping[str, OpenCheckpoint]) -> None:
    for shard, opened in shards.items():
        named = {name for name, home in index.items() if home == shard}
        for name in sorted(named ^ opened.specs.keys()):
            where = "but the shard does not have it" if name in named else "where the index does not name it"
            raise ValueError(
                f"{str(file)!r} and its shards do not fit together: {name!r} is in {shard!r}, {where}; "
                "download or save the whole folder again"
            )


# --- writing ------------------------------------------------------------------------------------------


def check_target(output: File | None, inputs: Sequence[Checkpoint]) -> None:
    """Check, before any work is done, that `write` can write an output.

    Args:
        output: The file or folder to write.
        inputs: The checkpoints that are read. A folder gets the configuration of the last one.

    Raises:
        ValueError: If a file has an unknown suffix, an existing folder is not empty, or the output is inside
            of a model folder that is read.
        OSError: If there is no place for it.
    """
    if output is None:
        return
    path = Path(os.path.realpath(output))
    if not (is_folder(inputs[-1]) and not _is_file_name(path)):
        check_output(output)
        if path.is_dir():
            raise ValueError(f"the output must be a file, and {str(output)!r} is a folder: name a file in it")
    elif path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(
            f"the folder {str(output)!r} exists and is not empty: choose another name, or delete it"
        )
    for folder in map(folder_of, inputs):
        if folder is not None and Path(os.path.realpath(folder)) in path.parents:
            raise ValueError(
                f"the output {str(output)!r} is inside of the input {str(folder)!r}, whose files it could "
                "replace: name a place outside of it"
            )
    parent = next(p for p in path.parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OSError(f"cannot write {str(output)!r}: {str(parent)!r} is not a folder that you may write to")


def write(state: Mapping[str, Any], output: File, like: Checkpoint, shard_bytes: int = SHARD_BYTES) -> None:
    """Write a state dict as a file, or as a model folder, which appears complete or not at all.

    Args:
        state: The tensors by name.
        output: The file, or the folder if `like` is one.
        like: The checkpoint that the state stands for. Of a folder, all files but the weights are copied,
            such as the configuration and the tokenizer.
        shard_bytes: The largest size of a shard. A tensor is never split.
    """
    folder = Path(output)
    if not is_folder(like) or _is_file_name(folder):
        save(state, output, texts=_texts(like))
        return
    positive_int("shard_bytes", shard_bytes)
    source = _weights_file(Path(like))  # type: ignore[arg-type]
    stem = source.name.partition(".")[0].replace("pytorch_model", "model")
    stem = {"diffusion_model": "diffusion_pytorch_model"}.get(stem, stem)
    partial = partial_name(folder)
    texts = _texts(like)
    try:
        partial.mkdir(parents=True)
        for file in source.parent.iterdir():
            if file.is_file() and not file.name.endswith(_WEIGHTS) and file.name not in _TRAINING:
                shutil.copy2(file, partial)
        heads = _heads(source)
        if heads:
            save({n: v for n, v in state.items() if n == _HEAD}, partial / heads[0], texts=texts)
            state = {n: v for n, v in state.items() if n != _HEAD}
        # PEFT and open_clip read a model from one file.
        whole = stem in ("adapter_model", "open_clip_model")
        shards = [dict(state)] if whole else _split(state, shard_bytes)
        count, index = len(shards), {}
        for i, shard in enumerate(shards):
            name = f"{stem}.safetensors" if count == 1 else f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors"
            save(shard, partial / name, texts=texts)
            index.update(dict.fromkeys(shard, name))
        if count > 1:
            content = {"metadata": {"total_size": sum(map(_bytes, state.values()))}, "weight_map": index}
            (partial / f"{stem}.safetensors{_INDEX}").write_text(json.dumps(content, indent=2) + "\n")
        os.replace(partial, folder)
    finally:
        with suppress(OSError):
            shutil.rmtree(partial)


def _texts(like: Checkpoint) -> dict[str, str]:
    """Return the metadata in the first file of a checkpoint."""
    if isinstance(like, Mapping):
        return {}
    file = _weights_file(Path(like)) if is_folder(like) else Path(like)
    if file.name.endswith(_INDEX):
        file = file.parent / next(iter(_read_index(file).values()))
    return read_texts(file)


def _is_file_name(path: Path) -> bool:
    try:
        check_output(path)
    except ValueError:
        return False
    return True


def _split(state: Mapping[str, Any], shard_bytes: int) -> list[dict[str, Any]]:
    shards: list[dict[str, Any]] = [{}]
    room = shard_bytes
    for name, value in state.items():
        if _bytes(value) > room and shards[-1]:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = value
        room -= _bytes(value)
    return shards


def _bytes(value: Any) -> int:
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


def __dir__() -> list[str]:
    return __all__
