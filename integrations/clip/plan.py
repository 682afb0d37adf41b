"""Plan a run without running it: its configuration, length, memory, and missing data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from wmateacher.integrations.clip.data import check, imagenet
from wmateacher.integrations.clip.data.task import Task
from wmateacher.integrations.clip.data.templates import read_templates
from wmateacher.integrations.clip.datamodules import FolderData
from wmateacher.integrations.clip.methods import Method
from wmateacher.integrations.clip.model import Towers, build
from wmateacher.integrations.clip.recipes import (
    EmojiRecipe,
    FileRecipe,
    FolderRecipe,
    PhotoRecipe,
    Recipe,
    Settings,
)
from wmateacher.integrations.engine import tables
from wmateacher.integrations.engine.sampling import steps_per_epoch
from wmateacher.integrations.engine.settings import visible

__all__ = ["GIB", "Memory", "describe", "memory", "outline"]

GIB = 2**30
_MOST_CLASSES = 20


@dataclass(frozen=True)
class Memory:
    """The memory of one process in bytes.

    Attributes:
        student: The student's weights.
        gradients: The gradients of the trained weights.
        optimizer: AdamW's two moments.
        teacher: The averaged weights, or 0 without a teacher.
        start: The pretrained weights that an L2 pull needs, or 0 without one.
        activations: The tensors that the student's forward pass keeps for the backward pass.
    """

    student: int
    gradients: int
    optimizer: int
    teacher: int
    start: int
    activations: int

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(vars(self).values())


def memory(
    model: str,
    settings: Settings,
    teacher: bool = False,
    *,
    head: str = "text",
    pull: bool = False,
    processes: int = 1,
) -> Memory:
    """Estimate the least memory that training needs; the framework's buffers and fragmentation add to it.

    Activations are counted by running the forward pass of a CPU on tensors without content.

    Args:
        model: The name of the towers, as in a recipe.
        settings: The settings, for batch size, precision and micro batches.
        teacher: Whether there is a teacher.
        head: The method's head. With `"linear"` the text tower is neither trained nor run.
        pull: Whether there is an L2 pull to the pretrained weights.
        processes: The number of processes that share each batch.
    """
    towers, _ = build(model, device="meta")
    if settings.freeze_text or head == "linear":
        towers.freeze_text()
    every = 4 * sum(p.numel() for p in towers.parameters())
    trained = 4 * sum(p.numel() for p in towers.parameters() if p.requires_grad)
    batch = -(-settings.batch_size // processes)
    pairs = min(batch, settings.micro_batch or batch)
    activations = _kept(towers, pairs, settings, texts=head == "text")
    return Memory(
        student=every, gradients=trained, optimizer=2 * trained, teacher=trained if teacher else 0,
        start=trained if pull else 0, activations=activations,
    )  # fmt: skip


class _Embeds(nn.Module):
    def __init__(self, towers: Towers, texts: bool):
        super().__init__()
        self.towers, self.texts = towers, texts

    def forward(self, images: Tensor, tokens: Tensor) -> list[Tensor]:
        given = [self.towers.encode_image(images)]
        return [*given, self.towers.encode_text(tokens)] if self.texts else given


def _kept(towers: Towers, pairs: int, settings: Settings, texts: bool) -> int:
    """Return the bytes that autograd keeps of a forward pass."""
    if settings.grad_checkpointing:
        towers.clip.set_grad_checkpointing()
    module = _Embeds(towers.train(), texts)
    kept: dict[int, tuple[Tensor, int]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # Keeping the tensor alive keeps its address from being used again.
        kept[storage._cdata] = (tensor, storage.nbytes())
        return tensor

    with FakeTensorMode():
        tensors: dict[str, Tensor] = {}
        for name, parameter in module.named_parameters():
            tensors[name] = torch.empty(parameter.shape).requires_grad_(parameter.requires_grad)
        for name, buffer in module.named_buffers():
            tensors[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
        own = {t.untyped_storage()._cdata for t in tensors.values()}
        images = torch.empty(pairs, 3, towers.image_size, towers.image_size)
        tokens = torch.zeros(pairs, towers.clip.context_length, dtype=torch.int64)
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=settings.precision != "fp32"),
        ):
            torch.func.functional_call(module, tensors, (images, tokens))
    return sum(size for storage, (_, size) in kept.items() if storage not in own)


def describe(
    recipe: Recipe,
    select: Callable[[Recipe], tuple[Recipe, Sequence[str]]],
    root: Path | None,
    processes: int = 1,
) -> str:
    """Describe a run in lines of text.

    Args:
        recipe: The recipe from the command line.
        select: A function from the recipe, once its steps are known, to the recipe that runs and the names
            of its methods.
        root: The folder that holds the data sets.
        processes: The number of processes that would share each batch.

    Raises:
        ValueError: If there is no such folder, or the warm-up is not shorter than the run.
    """
    if root is not None and not root.is_dir():
        raise ValueError(f"no folder {root}: give the one that holds the data sets (--data-root)")
    found = _data(recipe, root)
    if isinstance(recipe, FolderRecipe):
        width = build(recipe.model, device="meta")[0].width
        recipe = recipe.resolve(found.pairs, width, "", processes)
    elif isinstance(recipe, PhotoRecipe) and found.pairs:
        recipe = recipe.resolve(found.pairs)
    recipe, names = select(recipe)
    methods = [recipe.method(name) for name in names]
    lines = [f"{recipe.name}: {recipe.summary}", "", "configuration (--NAME VALUE changes a value):"]
    lines += [f"  {line}" for line in _settings(recipe)]
    lines += ["", "methods, as differences from FLYP (--methods.NAME.SETTING VALUE changes a value):"]
    for m in methods:
        own = ", ".join(f"{k}={v}" for k, v in m.settings().items() if k != "name")
        lines.append(f"  {m.name}: {own or 'nothing'}")
    lines.append(f"  settings of a method: {', '.join(visible(methods[0]))}")
    lines += ["", *_length(recipe, found), "", *_memory(recipe, methods, processes), "", *found.lines]
    anchored = not isinstance(recipe, FileRecipe) or recipe.anchors is not None
    reasons = [recipe.why_not(name, labelled=found.labelled, anchored=anchored) for name in names]
    lines += [f"cannot run: {reason}" for reason in reasons if reason is not None]
    return "\n".join(lines)


def outline(recipe: FolderRecipe, task: Task, names: Sequence[str], processes: int = 1) -> str:
    """Describe a run on your own images in a few lines: its data, length and memory.

    Args:
        recipe: The recipe, with the number of steps that its images make.
        task: The images.
        names: The names of the methods.
        processes: The number of processes that share each batch.
    """
    found = _own(task)
    methods = [recipe.method(name) for name in names]
    weights = f"weights: {recipe.pretrained or (recipe.model if ':' in recipe.model else 'random')}"
    return "\n".join([weights, *found.lines, *_length(recipe, found), *_memory(recipe, methods, processes)])


def _own(task: Task) -> _Found:
    """Return the images of a task."""
    shown = ", ".join(task.classes[:_MOST_CLASSES])
    more = f" and {len(task.classes) - _MOST_CLASSES:,} more" if len(task.classes) > _MOST_CLASSES else ""
    lines = [f"{len(task.classes):,} classes: {shown}{more}", "images:"]
    lines += [f"  {line}" for line in task.table().splitlines()]
    return _Found(len(task.train), task.train.labels is not None, lines)


def _settings(config: Any, prefix: str = "") -> Iterator[str]:
    """Yield every value of a recipe except its methods', under its name on the command line."""
    for key, value in visible(config).items():
        name = prefix + key.replace("_", "-")
        if name == "methods":
            continue
        if is_dataclass(value):
            yield from _settings(value, f"{name}.")
        elif isinstance(value, tuple):
            cells = [cell for item in value for cell in (item if isinstance(item, tuple) else (item,))]
            yield f"{name} {' '.join(map(repr, cells)) or '()'}"
        else:
            yield f"{name} {value}"


@dataclass(frozen=True)
class _Found:
    pairs: int
    labelled: bool
    lines: list[str]


def _data(recipe: Recipe, root: Path | None) -> _Found:
    """Count the training pairs, as found or else as published, and list what is missing."""
    if isinstance(recipe, FolderRecipe):
        found = _own(FolderData.load(recipe, root))
        templates = read_templates(recipe.templates, root)
        lines = [f"{len(templates)} templates, such as {templates[0]!r}"]
        return _Found(found.pairs, found.labelled, [*found.lines, *lines])
    if isinstance(recipe, EmojiRecipe):
        where = "--data-root is missing" if root is None else f"in {root}"
        return _Found(0, True, [f"data: pictograms in {', '.join((recipe.style, *recipe.shifts))}, {where}"])
    if not isinstance(recipe, PhotoRecipe):
        return _Found(0, True, [f"data: {getattr(recipe, 'data', '')}" + (f" in {root}" if root else "")])
    if root is None:
        wanted = dict.fromkeys((*_sets(recipe.train), *recipe.tests))
        lines = [f"  {name}: {imagenet.SETS[name].source}" for name in wanted]
        labelled = recipe.train in imagenet.SETS
        return _Found(
            _published(recipe.train), labelled, ["data: --data-root is missing; it should hold", *lines]
        )
    lines = [f"data in {root}:"]
    findings = [check.check(name, root) for name in dict.fromkeys((*_sets(recipe.train), *recipe.tests))]
    others = [w for w in (recipe.train, recipe.anchors) if w is not None and w not in imagenet.SETS]
    findings += [check.check_pairs(where, root) for where in others]
    lines += [f"  {line}" for line in check.table(findings).splitlines()]
    train = next(f for f in findings if f.name == recipe.train)
    labelled = train.classes > 0 or recipe.train in imagenet.SETS
    return _Found(train.images or _published(recipe.train), labelled, lines)


def _published(where: str) -> int:
    """Return the published number of pairs of a set, or 0 for a file."""
    return imagenet.SETS[where].images if where in imagenet.SETS else 0


def _sets(where: str) -> tuple[str, ...]:
    return (where,) if where in imagenet.SETS else ()


def _length(recipe: Recipe, found: _Found) -> list[str]:
    s = recipe.finetune
    of = ""
    if isinstance(recipe, PhotoRecipe) and not found.pairs:
        of = f", but the number of pairs decides: those of {recipe.train} are missing"
    elif isinstance(recipe, PhotoRecipe):
        each = steps_per_epoch(found.pairs, s.batch_size)
        of = f": {found.pairs:,} pairs, {each:,} steps per epoch"
        if found.pairs < s.batch_size:
            of += f"; batch_size {s.batch_size} is larger than the data, so training would fail"
    elif isinstance(recipe, FolderRecipe):
        each = steps_per_epoch(found.pairs, s.batch_size)
        of = f": {found.pairs:,} images, {each:,} steps per epoch, {s.steps / each:.3g} epochs"
        if s.steps == recipe.min_steps > recipe.epochs * each:
            of += f" instead of {recipe.epochs}, to make min_steps={recipe.min_steps}"
    at = dict.fromkeys(step for step in (0, s.warmup - 1, s.warmup, s.steps - 1) if 0 <= step < s.steps)
    rates = ", ".join(f"{s.learning_rate_at(step):.4g} at step {step}" for step in at)
    return [f"length: {s.steps:,} optimizer steps of {s.batch_size}{of}", f"learning rate: {rates}"]


def _memory(recipe: Recipe, methods: Sequence[Method], processes: int) -> list[str]:
    """Estimate the memory of each kind of method."""
    kinds: dict[tuple[bool, str, bool], list[str]] = {}
    for m in methods:
        if m.trains:
            kinds.setdefault((m.kernel is not None, m.head, m.l2_sp > 0), []).append(m.name)
    if not kinds:
        return ["memory: nothing is trained"]
    rows = []
    for (teacher, head, pull), names in kinds.items():
        needed = memory(recipe.model, recipe.finetune, teacher, head=head, pull=pull, processes=processes)
        row = {"GiB of": ", ".join(names)}
        row |= {part: f"{size / GIB:.2f}" for part, size in (*vars(needed).items(), ("total", needed.total))}
        rows.append(row)
    own = f", each of {processes} processes" if processes > 1 else ""
    return [f"memory, at least{own}:", *(f"  {line}" for line in tables.aligned(rows).splitlines())]
