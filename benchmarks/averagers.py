"""The models and averaging helpers that the benchmarks compare."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wmateacher import WMATeacher

RETENTION = 0.999


class Small(nn.Module):
    """A network of 1,500 small linear layers: 3,000 tensors of 32 elements on average."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(63, 1) for _ in range(1500))


def _clip() -> nn.Module:
    import open_clip

    logging.getLogger().setLevel(logging.ERROR)  # it warns that there are no pretrained weights
    return open_clip.create_model("ViT-B-16")


def _resnet() -> nn.Module:
    import timm

    return timm.create_model("resnet50")


def _lora() -> nn.Module:
    import peft
    import timm

    base = timm.create_model("vit_base_patch16_224")
    return peft.get_peft_model(base, peft.LoraConfig(r=8, target_modules=["qkv"]))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "CLIP ViT-B/16": _clip,
    "ResNet-50": _resnet,
    "3,000 tensors": Small,
    "LoRA ViT-B/16": _lora,
}
# The student's dtype; the average is float32.
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Averager:
    """An averaging helper with its student.

    Attributes:
        update: Adds the student's current weights to the average.
        keep: The object that holds the average, referenced here so that it stays alive.
        forward: Whether the helper also keeps the average in the student's dtype, for the forward.
    """

    update: Callable[[], object]
    keep: object
    forward: bool = False


def _wmateacher(model: nn.Module, **options: object) -> Averager:
    teacher = WMATeacher(model, f"ema({RETENTION})", **options)  # type: ignore[arg-type]
    return Averager(teacher.update, teacher, forward=_dtype(model) != torch.float32)


def _float32_forward(model: nn.Module) -> Averager:
    if _dtype(model) == torch.float32:
        raise ValueError("the forward of a float32 student's teacher is in float32 already")
    averager = _wmateacher(model, module_factory=lambda: copy.deepcopy(model).float())
    averager.forward = False
    return averager


def _split(model: nn.Module) -> Averager:
    return _wmateacher(model, dtype="split")


def _averaged_model(model: nn.Module) -> Averager:
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(RETENTION)).float()
    average.n_averaged += 1  # the first update only copies
    return Averager(lambda: average.update_parameters(model), average)


def _averaged_model_promoting(model: nn.Module) -> Averager:
    from torch.optim.swa_utils import AveragedModel

    average = AveragedModel(model, avg_fn=lambda a, p, _: RETENTION * a + (1 - RETENTION) * p).float()
    average.n_averaged += 1
    return Averager(lambda: average.update_parameters(model), average)


def _timm(model: nn.Module) -> Averager:
    from timm.utils import ModelEmaV3

    options = {} if _dtype(model) == torch.float32 else {"dtype": torch.float32}
    average = ModelEmaV3(model, decay=RETENTION, **options)
    return Averager(lambda: average.update(model), average)


def _ema_pytorch(model: nn.Module) -> Averager:
    from ema_pytorch import EMA

    average = EMA(
        model, ema_model=copy.deepcopy(model).float(), beta=RETENTION, update_after_step=-1, update_every=1,
        min_value=RETENTION, include_online_model=False, use_foreach=_dtype(model) == torch.float32,
        coerce_dtype=True,
    )  # fmt: skip
    for _ in range(2):  # the first ones only copy
        average.update()
    return Averager(average.update, average)


def _torch_ema(model: nn.Module) -> Averager:
    from torch_ema import ExponentialMovingAverage

    average = ExponentialMovingAverage(list(model.parameters()), RETENTION, use_num_updates=False)
    average.shadow_params = [p.float() for p in average.shadow_params]
    return Averager(average.update, average)


def _by_hand(model: nn.Module) -> Averager:
    average = [p.detach().float().clone() for p in model.parameters()]

    @torch.no_grad()
    def update() -> None:
        for a, p in zip(average, model.parameters(), strict=True):
            a.lerp_(p.float(), 1 - RETENTION)

    return Averager(update, average)


AVERAGERS: dict[str, Callable[[nn.Module], Averager]] = {
    "wmateacher": _wmateacher,
    "wmateacher, fused=False": lambda model: _wmateacher(model, fused=False),
    "wmateacher, split": _split,
    "wmateacher, fp32 forward": _float32_forward,
    "torch AveragedModel, multi_avg_fn": _averaged_model,
    "torch AveragedModel, avg_fn": _averaged_model_promoting,
    "timm ModelEmaV3": _timm,
    "ema-pytorch": _ema_pytorch,
    "torch-ema": _torch_ema,
    "loop: cast, lerp": _by_hand,
}


def _dtype(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def build(model: str, precision: str, device: str) -> nn.Module:
    """Return a model of `MODELS` as a student in train mode."""
    torch.manual_seed(0)
    return MODELS[model]().to(device, PRECISIONS[precision])


def on(device: str) -> list[str]:
    """Return the helpers that differ on a device: on a CPU no update is fused."""
    return [name for name in AVERAGERS if "fused" not in name or torch.device(device).type != "cpu"]


def start(averager: str, student: nn.Module) -> Averager | str:
    """Return the averager after one update, or the text of the error that it raises."""
    try:
        made = AVERAGERS[averager](student)
        made.update()
    except (RuntimeError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return made


def averaged(student: nn.Module) -> list[Tensor]:
    """Return the tensors that a teacher averages: the trained parameters, tied ones once."""
    return [p.detach() for p in student.parameters() if p.requires_grad]


def colours(helpers: list[str]) -> list[str]:
    """Return a bar colour for each helper: blue for this library."""
    return ["tab:blue" if h.startswith("wmateacher") else "tab:gray" for h in helpers]


def panels(models: dict[str, Any], draw: Callable[[Any, Any], None], label: str, file: Path) -> None:
    """Draw one panel per model with `draw(axis, rows)`, and label the shared horizontal axis."""
    from matplotlib.figure import Figure

    columns = min(2, len(models)) or 1
    lines = -(-len(models) // columns) or 1
    figure = Figure(figsize=(7 * columns, 2.6 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flat
    for axis, (name, rows) in zip(axes, models.items(), strict=False):
        draw(axis, rows)
        axis.set_title(name, fontsize=10)
        axis.tick_params(labelsize=8)
    for axis in list(axes):
        axis.axis("off")
    figure.supxlabel(label, fontsize=10)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
