"""Fine-tuned models as folders that open_clip, transformers and this package load, with their classes."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
from PIL import Image
from torch import Tensor

from wmateacher import files
from wmateacher.checks import one_of
from wmateacher.integrations.clip import conversion
from wmateacher.integrations.clip.data import imagenet
from wmateacher.integrations.clip.data.images import read_image
from wmateacher.integrations.clip.model import (
    Classifier,
    Prompts,
    Student,
    Towers,
    build,
    evaluation_view,
    head_of,
    towers_of,
    zero_shot_head,
)
from wmateacher.integrations.engine.results import write_json

__all__ = [
    "CLASSES",
    "CONFIG",
    "HEAD",
    "TRANSFORMERS",
    "WEIGHTS",
    "ZERO_SHOT_HEAD",
    "Answer",
    "SavedModel",
    "how_to_use",
    "load",
    "save",
    "save_all",
]

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
"""The files of a model folder that open_clip reads."""
CLASSES = "classes.json"
"""The kind of the head, the class names and the templates."""
HEAD = "head.safetensors"
"""A trained linear head, `head` `[d, classes]`. `wmateacher average` and the like average it too."""
ZERO_SHOT_HEAD = "zero_shot_head.safetensors"
"""The zero-shot head of the classes, which saves computing it again."""
TRANSFORMERS = "transformers"
"""The folder inside a model folder that transformers reads."""

_DIGEST = "weights_sha256"


# --- writing ----------------------------------------------------------------------------------------


def save(
    student: Student, folder: files.File, prompts: Prompts, preprocessing: Mapping[str, Any] | None = None
) -> None:
    """Write a model folder, which appears complete or not at all.

    It holds `open_clip_config.json` and `open_clip_model.safetensors`, which open_clip loads as
    `local-dir:FOLDER`; `classes.json` with the class names and templates; the head that classifies; and, if
    transformers' `CLIPModel` has the architecture, the folder `transformers` for its `from_pretrained`.

    Args:
        student: The model, or its teacher's module: towers from `model.build`, or a `Classifier` of them.
        folder: The folder to write, which must not exist or be empty.
        prompts: The texts of the classification task.
        preprocessing: The entries of `open_clip.get_model_preprocess_cfg`, such as `mean` and `std`, in which
            the preprocessing of its images differs from that of the towers.

    Raises:
        ValueError: If the folder is not empty, or the towers do not know their configuration.
        OSError: If it cannot be written.
    """
    with _whole(Path(folder)) as partial:
        _write(student, partial, prompts, preprocessing or {})


def save_all(
    networks: Mapping[str, Student],
    folder: files.File,
    prompts: Prompts,
    preprocessing: Mapping[str, Any] | None = None,
) -> None:
    """Write several models as folders in one, which appears complete or not at all.

    Args:
        networks: The models by the names of their folders, such as `student` and `teacher`.
        folder: The folder that holds theirs, which must not exist or be empty.
        prompts: The texts of the classification task.
        preprocessing: The preprocessing of the images, as for `save`.

    Raises:
        ValueError: If the folder is not empty, or the towers do not know their configuration.
        OSError: If it cannot be written.
    """
    with _whole(Path(folder)) as partial:
        for name, network in networks.items():
            (partial / name).mkdir()
            _write(network, partial / name, prompts, preprocessing or {})


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """Yield a new folder that takes the place of another one at the end of the block."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{str(folder)!r} exists and is not an empty folder: choose another, or delete it")
    partial = files.partial_name(folder)
    # What a run that was killed had written.
    for stale in folder.parent.glob(f"{folder.name}.????????.partial"):
        shutil.rmtree(stale, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        os.replace(partial, folder)
    finally:
        with suppress(OSError):
            shutil.rmtree(partial)


def _write(student: Student, folder: Path, prompts: Prompts, preprocessing: Mapping[str, Any]) -> None:
    towers = towers_of(student)
    if towers.config is None:
        raise ValueError(
            "these towers do not know the configuration that open_clip built them from: build them with "
            "model.build(name), or as Towers(clip, open_clip.get_model_config(name))"
        )
    config = dict(towers.config)
    preprocessing = {**open_clip.get_model_preprocess_cfg(towers.clip), **preprocessing}
    state = {name: tensor.detach().cpu() for name, tensor in towers.clip.state_dict().items()}
    write_json({"model_cfg": config, "preprocess_cfg": preprocessing}, folder / CONFIG)
    files.save(state, folder / WEIGHTS)
    if hasattr(prompts.tokenizer, "save_pretrained"):  # one of transformers; open_clip has its own vocabulary
        prompts.tokenizer.save_pretrained(str(folder))
    linear = isinstance(student, Classifier)
    texts = {"classes": list(prompts.classes), "templates": list(prompts.templates)}
    write_json({"head": "linear" if linear else "text", **texts}, folder / CLASSES)
    head = {"head": head_of(student, prompts).detach().cpu()}
    if linear:
        files.save(head, folder / HEAD)
    else:
        files.save(head, folder / ZERO_SHOT_HEAD, texts={_DIGEST: _digest(folder / WEIGHTS)})
    if conversion.why_not(config, preprocessing) is None:
        (folder / TRANSFORMERS).mkdir()
        conversion.write_transformers(state, config, preprocessing, folder / TRANSFORMERS)


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def how_to_use(run: Path) -> str:
    """Return lines that say where the models of a run are and how to use one.

    Args:
        run: The folder that `save_all` wrote, `models/METHOD-SEED`.
    """
    sides = sorted(path for path in run.iterdir() if path.is_dir())
    size = sum(file.stat().st_size for file in run.rglob("*") if file.is_file())
    either = " or ".join(str(side) for side in sides)
    converted = sides[0] / TRANSFORMERS
    for_transformers = [f"with transformers:\n  CLIPModel.from_pretrained({str(converted)!r})"]
    return "\n".join(
        [
            f"models in {run.parent}; {run.name} takes {size / 1e6:,.0f} MB. In Python, with {either}:",
            "  from wmateacher.integrations.clip import export",
            f"  model = export.load({str(sides[0])!r})",
            '  print(model.classify(["image.png"]))',
            "with open_clip alone:",
            f"  open_clip.create_model_and_transforms({'local-dir:' + str(sides[0])!r})",
            *(for_transformers if converted.exists() else []),
            "a folder of images to CSV:",
            f"  python -m wmateacher.integrations.clip.predict {shlex.quote(str(sides[0]))} IMAGES",
        ]
    )


# --- reading ----------------------------------------------------------------------------------------


class Answer(NamedTuple):
    """The answer of a `SavedModel` for an image.

    Attributes:
        label: The name of the class.
        confidence: Its probability.
    """

    label: str
    confidence: float


@dataclass(frozen=True)
class SavedModel:
    """A model from a folder, with its classes, ready to classify.

    Attributes:
        towers: The towers, in eval mode.
        prompts: The class names, the templates and the tokenizer.
        head: The head, `[d, classes]`; the logit scale is part of it.
        linear: Whether the head was trained. Otherwise it is the zero-shot head of the prompts.
        transform: From a PIL image to the towers' input, `[3, H, W]`.
    """

    towers: Towers
    prompts: Prompts
    head: Tensor
    linear: bool
    transform: Any

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Return the logits `[B, classes]` of normalised images `[B, 3, H, W]`, the same as in evaluation."""
        return self.towers.encode_image(images.to(self.head.device), normalize=True) @ self.head

    def answers(self, images: Tensor) -> list[Answer]:
        """Return the most probable class of each of some normalised images, `[B, 3, H, W]`."""
        confidence, best = self.logits(images).float().softmax(-1).max(-1)
        labels = [self.prompts.classes[i] for i in best.tolist()]
        return [Answer(*pair) for pair in zip(labels, confidence.tolist(), strict=True)]

    def classify(self, images: Sequence[Image.Image | str | Path]) -> list[Answer]:
        """Return the most probable class of each of some images or image files.

        Files are read as those of the recipe `folders`: turned as their EXIF data says, on white.

        Raises:
            OSError: If a file cannot be read as an image.
        """
        if isinstance(images, str | Path | Image.Image):
            raise TypeError(f"images must be a list of images or files, got {images!r}: pass [image]")
        opened = [i.convert("RGB") if isinstance(i, Image.Image) else read_image(str(i)) for i in images]
        return self.answers(torch.stack([self.transform(image) for image in opened])) if opened else []


def load(
    folder: files.File,
    device: torch.device | str = "cpu",
    *,
    classes: Sequence[str] | None = None,
    templates: Sequence[str] | None = None,
) -> SavedModel:
    """Load a model folder that `save` or `wmateacher average` wrote, or another one of open_clip.

    Args:
        folder: The folder.
        device: The device of the model.
        classes: Class names to use instead of the folder's.
        templates: Templates to use instead of the folder's. If there are none, OpenAI's 80 are used.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it is not a model folder or is damaged, it names no classes and none are given, or its
            head was trained for its own classes and others are given.
    """
    folder = Path(folder)
    _check(folder)
    towers, tokenizer = build(f"local-dir:{folder}", device=device)
    towers.eval()
    known = _read_classes(folder)
    linear = known["head"] == "linear"
    changed = classes is not None or templates is not None
    if linear and changed:
        raise ValueError(
            f"the linear head of {str(folder)!r} was trained for its own {len(known['classes'])} classes: "
            "leave out other classes and templates, or choose a model with a text head"
        )
    classes = known["classes"] if classes is None else classes
    if not classes:
        raise ValueError(
            f"{str(folder)!r} has no {CLASSES}, so its classes are not known: name them (classes=[...], "
            "--classes FILE)"
        )
    prompts = Prompts(classes, templates or known["templates"] or imagenet.openai_templates(), tokenizer)
    head = _linear_head(folder, len(classes)) if linear else None if changed else _kept_head(folder)
    if head is None:
        head = zero_shot_head(towers, prompts)
    return SavedModel(towers, prompts, head.to(device), linear, evaluation_view(towers))


def _check(folder: Path) -> None:
    """Check that a folder is a model folder."""
    if not folder.is_dir():
        raise FileNotFoundError(
            f"there is no folder {str(folder)!r}: give a model folder, such as RUN/models/tracer-0/student"
        )
    if (folder / CONFIG).is_file():
        with suppress(ValueError):
            if "model_cfg" in json.loads((folder / CONFIG).read_text(encoding="utf-8")):
                return
        raise ValueError(f"{str(folder / CONFIG)!r} is damaged: save or download the model again")
    inside = sorted(str(f.parent.relative_to(folder)) for f in folder.glob(f"**/{CONFIG}"))
    hint = (
        f"it holds {', '.join(inside[:6])}: give one of them"
        if inside
        else ("give one that a run wrote, such as RUN/models/tracer-0/student")
    )
    raise ValueError(f"{str(folder)!r} is not a model folder, because it has no {CONFIG}; {hint}")


def _read_classes(folder: Path) -> dict[str, Any]:
    """Return the kind of the head, the classes and the templates; no classes if the folder names none."""
    file = folder / CLASSES
    if not file.is_file():
        return {"head": "text", "classes": [], "templates": []}
    try:
        known: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        one_of("head", known["head"], ("text", "linear"))
        for name in ("classes", "templates"):
            if not known[name] or not all(isinstance(text, str) for text in known[name]):
                raise ValueError(f"{name} must be a list of texts")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(file)!r} is damaged ({error}): save the model again") from error
    return known


def _linear_head(folder: Path, classes: int) -> Tensor:
    if not (folder / HEAD).is_file():
        raise ValueError(
            f"{str(folder)!r} classifies by a linear head, and its {HEAD} is missing: copy it there"
        )
    head: Tensor = files.load(folder / HEAD)["head"]
    if head.shape[1] != classes:
        raise ValueError(
            f"in {str(folder)!r}, {HEAD} has {head.shape[1]} classes and {CLASSES} has {classes}: copy both "
            "from the same model"
        )
    return head


def _kept_head(folder: Path) -> Tensor | None:
    """Return the zero-shot head in a folder if it is that of the folder's weights."""
    file = folder / ZERO_SHOT_HEAD
    if not file.is_file() or not (folder / WEIGHTS).is_file():
        return None
    if files.read_texts(file).get(_DIGEST) != _digest(folder / WEIGHTS):
        return None
    head: Tensor = files.load(file)["head"]
    return head
