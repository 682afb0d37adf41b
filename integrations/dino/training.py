"""Training a backbone by DINO or one of its relatives: one step of the training loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from wmateacher import WMATeacher, losses
from wmateacher.diagnostics import parameter_gap
from wmateacher.integrations.dino.masks import Masks, draw_blocks
from wmateacher.integrations.dino.model import (
    MLP,
    Head,
    MultiCrop,
    MultiCropLoss,
    Output,
    PairLoss,
    koleo,
    masked_loss,
)  # fmt: skip
from wmateacher.integrations.dino.recipes import OBJECTIVES, PAPER_KERNEL, Crops, Settings
from wmateacher.integrations.engine import collapse, loop, processes, training
from wmateacher.integrations.engine.sampling import generator
from wmateacher.losses.logits import DINO

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Pretraining", "fit", "try_network"]


def fit(
    backbone: nn.Module,
    stream: loop.Stream[list[Tensor]],
    settings: Settings,
    kernel: str = PAPER_KERNEL,
    evaluate: training.Evaluate | None = None,
    **options: Unpack[loop.Options],
) -> training.Fit:
    """Train `backbone` in place by DINO, under a teacher with the given kernel.

    The history has `loss` and `gap` (|W - M| / |W|) of every step, and from time to time `information` and
    `used` of the teacher's outputs. Under torchrun each process sees its part of every batch, and the history
    has the losses of the first process's part.

    Args:
        backbone: Maps images to features, on the device to train on.
        stream: Gives lists of crops from a step on, the two global crops first.
        settings: The optimisation.
        kernel: The teacher's kernel.
        evaluate: Called at every evaluation with the networks, each a `MultiCrop`; returns the values to log.
        **options: Options of `loop.train`, such as `checkpoint`.

    Raises:
        ValueError: If the checkpoint cannot be read or belongs to another run, or a batch cannot be split
            into equal parts for all processes.
        FloatingPointError: If the loss is not finite.

    Warns:
        CollapseWarning: If the teacher's outputs are constant, or most of them are not used.
    """
    processes.check_batch(settings.batch_size, equal=True)
    return training.fit(Pretraining(backbone, stream, settings, kernel), evaluate, **options)


class Pretraining(training.Training):
    """Train a backbone and a head on crops of unlabelled images.

    Args:
        backbone: Maps images to features.
        stream: Gives lists of crops from a step on, the two global crops first.
        settings: The optimisation.
        kernel: The teacher's kernel.
    """

    settings: Settings
    student: MultiCrop
    teacher: WMATeacher

    def __init__(
        self, backbone: nn.Module, stream: loop.Stream[list[Tensor]], settings: Settings, kernel: str
    ):
        torch.manual_seed(settings.seed)
        device = next(backbone.parameters()).device
        student = _network(backbone, settings).to(device).train()
        self.model = processes.parallel(student)
        # As published, the teacher's batch norms, if it has any, use its own batches; nothing is dropped.
        teacher = WMATeacher(student, kernel, settings.steps, mode="train")
        super().__init__(kernel, settings, student, teacher)
        spec = OBJECTIVES[settings.objective]
        criterion, patches = _criterion(settings), _criterion(settings)
        self.loss = MultiCropLoss(criterion) if spec is None else PairLoss(losses.build(spec, gather="rows"))
        self.loss.to(self.device)
        self.patch_criterion = patches.to(self.device) if settings.ibot else None
        outputs = settings.outputs if spec is None else settings.bottleneck
        self.monitor = collapse.OutputMonitor(outputs).to(self.device)
        lower = f"teacher_temperature ({settings.teacher_temperature}) or " if spec is None else ""
        self.watch = collapse.CollapseWatch(
            kernel, settings.steps, outputs, min(5.0, 0.05 * outputs) if spec is None else 0.0,
            f"lower {lower}learning_rate ({settings.learning_rate}), or use another kernel",
        )  # fmt: skip
        self.optimizer = torch.optim.AdamW(_groups(student), lr=0.0, fused=True)
        self.batch = loop.BatchStream(stream)

    def train_step(self, step: int) -> dict[str, Tensor | float]:
        """Take one optimizer step."""
        settings = self.settings
        crops = [crop.to(self.device, non_blocking=True) for crop in self.batch(step)]
        masks = self._masks(step, crops[0]) if settings.ibot else None
        decayed, plain = self.optimizer.param_groups
        decayed["lr"] = plain["lr"] = settings.learning_rate_at(step)
        decayed["weight_decay"] = settings.weight_decay_at(step)
        with settings.autocast(self.device):
            target = self.teacher(crops[:2], masks, hide=False)
            output = self.model(crops, masks)
        losses, probabilities = self._losses(step, output, target, masks)
        total = sum(losses.values(), torch.zeros((), device=self.device))
        if settings.koleo:
            total = total + settings.koleo * koleo(output.features[0])
        total.backward()
        if settings.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.student.parameters(), settings.clip_norm)
        if step < settings.hold_last and settings.objective == "dino":
            for head in (self.student.head, self.student.patch_head):
                if head is not None:
                    head.hold_last_layer()  # type: ignore[operator]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.teacher.update()
        logged = {name: loss.detach() for name, loss in losses.items()}
        return {**logged, "gap": parameter_gap(self.teacher), **self.monitor.update(step, probabilities)}

    def _losses(
        self, step: int, output: Output, target: Output, masks: Masks | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return the losses by name, `loss` first, and what tells whether the teacher's outputs collapse."""
        settings = self.settings
        if settings.objective != "dino":
            found = {"loss": self.loss(output.predictions, target.logits)}
            # Embeddings have no classes. Their softmax is the same for all inputs if and only if they are.
            return found, (nn.functional.normalize(target.logits.float(), dim=-1) / 0.1).softmax(-1)
        temperature = settings.teacher_temperature_at(step)
        criterion: Any = self.loss.criterion
        criterion.teacher_temperature = temperature
        loss, probabilities = self.loss(output.logits, target.logits)
        found = {"loss": loss}
        if masks is not None:
            assert self.patch_criterion is not None
            self.patch_criterion.teacher_temperature = temperature
            found["ibot"] = settings.ibot * masked_loss(
                self.patch_criterion, output.patches, target.patches, masks.weights  # type: ignore[arg-type]
            )  # fmt: skip
        return found, probabilities

    def _masks(self, step: int, crop: Tensor) -> Masks:
        """Return the masks of this process's global crops."""
        backbone: Any = self.student.backbone
        rows, columns = backbone.patch_embed.patch_size
        grid = (crop.shape[-2] // rows, crop.shape[-1] // columns)
        settings = self.settings
        hidden = draw_blocks(
            2 * settings.batch_size, grid, settings.mask_ratio, settings.mask_probability,
            generator(settings.seed, 2, step),
        )  # fmt: skip
        own = processes.shard_rows(hidden.unflatten(0, (2, -1)).transpose(0, 1)).transpose(0, 1)
        return Masks.of(own.flatten(0, 1)).to(self.device)

    def stateful(self) -> dict[str, loop.Part]:
        """Return every object whose state changes during training."""
        return {
            "student": self.student, "teacher": self.teacher, "loss": self.loss,
            "monitor": self.monitor, "optimizer": self.optimizer,
            **({} if self.patch_criterion is None else {"patch_criterion": self.patch_criterion}),
        }  # fmt: skip

    def run_config(self) -> dict[str, Any]:
        """Return the kernel and the settings."""
        return {"kernel": self.name, **self.settings.run_config()}


def _network(backbone: nn.Module, settings: Settings) -> MultiCrop:
    """Return the backbone with the heads of the objective."""
    width: int = backbone.num_features  # type: ignore[assignment]

    def head() -> Head:
        return Head(
            width, settings.outputs, settings.hidden, settings.bottleneck, unit_norm=settings.unit_norm,
            batch_norm=settings.head_batch_norm,
        )  # fmt: skip

    if settings.objective != "dino":
        inner, outer = settings.hidden, settings.bottleneck
        projector = MLP([width, inner, outer], batch_norm=True, activation=nn.ReLU)
        return MultiCrop(backbone, projector, MLP([outer, inner, outer], batch_norm=True, activation=nn.ReLU))
    images = head()
    separate = settings.ibot > 0 and settings.patch_head == "separate"
    patches = head() if separate else images if settings.ibot else None
    return MultiCrop(backbone, images, patch_head=patches)


@torch.no_grad()
def try_network(backbone: nn.Module, settings: Settings, crops: Crops) -> None:
    """Try a backbone and its heads on a few blank crops.

    Raises:
        ValueError: If the crops, the backbone and the settings do not fit together.
    """
    network = _network(backbone, settings)
    device = next(backbone.parameters()).device
    for size in sorted({crops.global_size, crops.local_size if crops.local_count else crops.global_size}):
        try:
            network([torch.zeros(2, 3, size, size, device=device)])
        except (AssertionError, RuntimeError) as error:
            raise ValueError(
                f"crops of {size} pixels do not go through the backbone {type(backbone).__name__} and its "
                f"head ({error}): choose a size that its patches divide, or another backbone"
            ) from error


def _criterion(settings: Settings) -> DINO:
    """Return DINO's loss."""
    return DINO(
        settings.outputs, settings.student_temperature, settings.first_teacher_temperature,
        settings.center_momentum, settings.centering,
    )  # fmt: skip


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    """Return the parameter groups: matrices, which are decayed, and all others, which are not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.0},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
