"""Run kernels over a recipe: shared data, one record a kernel and seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from wmateacher import kernels
from wmateacher.integrations import backbones, digits, images, probes, processes, runs
from wmateacher.integrations.digits import Split
from wmateacher.integrations.dino import crops
from wmateacher.integrations.dino.recipes import DRAWN, Recipe
from wmateacher.integrations.dino.training import Fit, fit
from wmateacher.integrations.sampling import generator

PIXELS, NORMALISED, UNTRAINED = "raw pixels", "normalised pixels", "untrained"
BASELINES = (PIXELS, NORMALISED, UNTRAINED)
"""What nothing is trained for: images as drawn or read, as the network gets them, and its first answers."""
COLUMNS = {
    "k-NN": ("teacher.knn", 1),
    "linear": ("teacher.linear", 1),
    "student k-NN": ("student.knn", 1),
    "student linear": ("student.linear", 1),
    "final gap": ("final_gap", 4),
    "seconds": ("seconds", 0),
}
"""Of a table of results."""
_BATCH = 500


class Experiment:
    """A recipe with its data loaded, and a folder that its results go to.

    The folder holds `results.json`, `gaps/KERNEL-SEED.csv`, `curves/KERNEL-SEED.csv` and `checkpoints/`. One
    with results of the same configuration is continued: finished runs are not run again, an interrupted
    one goes on from its checkpoint.

    Args:
        recipe: What to run.
        output: The folder.
        root: Where the recipe's data lies.
        download: Let torchvision download it.
        device: To train on.
        workers: Processes that prepare photographs.
        progress: Show progress bars.

    Raises:
        ValueError: The folder holds results of another configuration, or the crops do not fit.
        FileNotFoundError: The data is not there.
    """

    def __init__(
        self,
        recipe: Recipe,
        output: Path,
        *,
        root: Path | None = None,
        download: bool = False,
        device: torch.device | str = "cpu",
        workers: int = 0,
        progress: bool = True,
    ):
        self.recipe, self.output, self.progress = recipe, output, progress
        self.device, self.workers = torch.device(device), workers
        with processes.in_turn():
            if recipe.data in DRAWN:
                self.source = digits.load(recipe.data, root, download=download)
                self.train = self.source.train.subset(recipe.train_images)
            else:
                self.photos = images.load(recipe.data, root, download=download)
        packages = ("timm", "torchvision", "scikit-learn")
        self._results = runs.Results(output, asdict(recipe), runs.environment(self.device, packages))
        self._stream(0)  # crops that do not fit should not be found after other runs
        self._kept: dict[str, tuple[Tensor, Tensor]] = {}

    @property
    def results(self) -> dict[str, Any]:
        """What stands in `results.json`."""
        return self._results.content

    @property
    def drawn(self) -> bool:
        """Whether grey images are drawn, rather than photographs read."""
        return self.recipe.data in DRAWN

    @property
    def baselines(self) -> tuple[str, ...]:
        """Those that make sense for the data: photographs are not normalised one by one."""
        return BASELINES if self.drawn else (PIXELS, UNTRAINED)

    def run(
        self, name: str, seed: int = 0, after_step: Callable[[int], None] | None = None
    ) -> dict[str, Any]:
        """Pre-train under a teacher with one kernel, evaluate, and record it.

        Args:
            name: A kernel, or one of `BASELINES`.
            seed: Of initialisation, order and crops.
            after_step: As in `fit`.

        Returns:
            This seed's record; `results["methods"]` has the means over all seeds so far.
        """
        recorded = self._results.recorded(name, seed)
        if recorded is not None:
            return recorded
        if name in BASELINES:
            scores = self._scores(self._baseline(name, seed))
            record: dict[str, Any] = {"teacher": scores, "student": None}
        else:
            record = self._trained(name, seed, after_step)
        record = {"seed": seed, **record}
        self._results.record(name, record)
        return record

    def fit(self, kernel: str, seed: int = 0, after_step: Callable[[int], None] | None = None) -> Fit:
        """The run itself, from its checkpoint where there is one."""
        settings = replace(self.recipe.settings, seed=self.recipe.settings.seed + seed)
        return fit(
            self._backbone(seed), self._stream(seed), settings, kernel,
            checkpoint=self.output / "checkpoints" / f"{runs.file_name(kernel)}-{seed}.pt",
            label=f"{kernel} (seed {seed})", progress=self.progress, after_step=after_step,
            validate=self._validation,
            validate_every=max(1, settings.steps // 10),
        )  # fmt: skip

    def gap_file(self, kernel: str, seed: int) -> Path:
        """Where the teacher-student gap after every step is written."""
        return self.output / "gaps" / f"{runs.file_name(kernel)}-{seed}.csv"

    def curve_file(self, kernel: str, seed: int) -> Path:
        """Where the k-NN accuracy over training is written."""
        return self.output / "curves" / f"{runs.file_name(kernel)}-{seed}.csv"

    def pictured(self, count: int = 6) -> Tensor:
        """Test images as the network sees them, `[count, 3, S, S]`."""
        return self._images("test")[0][:count]

    # --- pieces -------------------------------------------------------------------------------------

    def _trained(self, kernel: str, seed: int, after_step: Callable[[int], None] | None) -> dict[str, Any]:
        kernels.build(kernel)
        fitted = self.fit(kernel, seed, after_step)
        if processes.is_first():
            file = self.curve_file(kernel, seed)
            runs.write_csv(("step", "knn"), fitted.record.series["validation"], file)
            runs.write_csv(("step", "gap"), fitted.record.series["gap"], self.gap_file(kernel, seed))
        return {
            "teacher": self._scores(partial(self._features, fitted.average.backbone)),
            "student": self._scores(partial(self._features, fitted.student.backbone)),
            "final_gap": fitted.record.values("gap")[-1],
            "validation": fitted.record.values("validation")[-1],
            "collapsed": fitted.collapsed,
            "seconds": fitted.record.seconds,
        }

    def _backbone(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return backbones.build(self.recipe.backbone, self.recipe.crops.global_size).to(self.device)

    def _stream(self, seed: int) -> Any:
        recipe = self.recipe
        seed += recipe.settings.seed
        if self.drawn:
            return crops.DrawnCrops(
                self.train, recipe.domain, recipe.image_size, recipe.crops, recipe.settings.batch_size,
                seed, redraw=recipe.redraw,
            )  # fmt: skip
        return crops.PhotoCrops(self.photos, recipe.crops, recipe.settings.batch_size, seed, self.workers)

    # --- evaluation ---------------------------------------------------------------------------------

    def _baseline(self, name: str, seed: int) -> Callable[[str], Tensor]:
        if name == PIXELS:
            return lambda part: self._images(part, raw=True)[0].flatten(1)
        if name == NORMALISED:
            return lambda part: self._images(part)[0].flatten(1)
        return partial(self._features, self._backbone(seed))

    def _scores(self, features: Callable[[str], Tensor]) -> dict[str, float]:
        train, test = features("train"), features("test")
        labels = [self._images(part)[1] for part in ("train", "test")]
        return {
            "knn": probes.knn_accuracy(train, labels[0], test, labels[1]),
            "linear": probes.linear_accuracy(train, labels[0], test, labels[1]),
        }

    def _validation(self, backbone: nn.Module) -> float:
        return probes.knn_accuracy(
            self._features(backbone, "train"), self._images("train")[1],
            self._features(backbone, "val"), self._images("val")[1],
        )  # fmt: skip

    @torch.no_grad()
    def _features(self, backbone: nn.Module, part: str) -> Tensor:
        training = backbone.training
        backbone.eval()
        found = [
            processes.whole(backbone(processes.part(batch).to(self.device))).cpu()
            for batch in self._images(part)[0].split(_BATCH)
        ]
        backbone.train(training)
        return torch.cat(found)

    def _images(self, part: str, raw: bool = False) -> tuple[Tensor, Tensor]:
        """Images as the network sees them, or as drawn or read; always the same; and their labels."""
        if part not in self._kept:
            self._kept[part] = self._drawn(part) if self.drawn else self._read(part)
        pixels, labels = self._kept[part]
        return (crops.normalise(pixels) if self.drawn and not raw else pixels), labels

    def _drawn(self, part: str) -> tuple[Tensor, Tensor]:
        split: Split = self.train if part == "train" else getattr(self.source, part)
        split = split.subset(self.recipe.bank_images)
        size = self.recipe.crops.global_size
        whole = self.recipe.domain.draw(split, self.recipe.image_size, generator(0, len(part)))
        return F.interpolate(whole, (size, size), mode="bilinear", antialias=True), split.labels

    def _read(self, part: str) -> tuple[Tensor, Tensor]:
        data = {"train": self.photos.train, "val": self.photos.val, "test": self.photos.test}[part]
        count = min(len(data), self.recipe.bank_images)  # type: ignore[arg-type]
        chosen = torch.randperm(len(data), generator=generator(0))[:count]  # type: ignore[arg-type]
        view = crops.photo_view(self.recipe.crops.global_size)
        loader: DataLoader[Any] = DataLoader(
            images.Viewed(data, view, chosen), batch_size=_BATCH, num_workers=self.workers,
            generator=torch.Generator(),
        )  # fmt: skip
        seen, labels = zip(*loader, strict=True)
        return torch.cat(seen), torch.cat(labels)
