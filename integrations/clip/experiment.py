"""Run methods over a recipe: shared data and pretrained towers, one record a method and seed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from wmateacher.integrations import digits, loop, processes, runs
from wmateacher.integrations.clip.evaluation import Labelled, Scores, score, summarise
from wmateacher.integrations.clip.heads import Prompts, Student, head_of, towers_of
from wmateacher.integrations.clip.methods import METHODS, Merge, Method
from wmateacher.integrations.clip.pairs import DrawnPairs, normalise
from wmateacher.integrations.clip.recipes import Recipe
from wmateacher.integrations.clip.towers import Towers, build
from wmateacher.integrations.clip.training import Settings, fit, started
from wmateacher.integrations.digits import Domain, Split
from wmateacher.posthoc import interpolate, model_stock

_EVALUATION_BATCH = 500


def default_cache() -> Path:
    """Where pretrained towers are kept: `$XDG_CACHE_HOME/wmateacher`, by default in `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "wmateacher"


class Experiment:
    """A recipe with its data loaded, and a folder that its results go to.

    The folder holds `results.json`, `gaps/METHOD-SEED.csv` and `checkpoints/`. A folder with results of
    the same configuration is continued: finished methods are not run again, an interrupted one goes on
    from its checkpoint.

    Args:
        recipe: What to run.
        output: The folder.
        root: Where the recipe's data lies.
        download: Let torchvision download it.
        cache: Where pretrained towers are kept between runs.
        device: To train on.
        progress: Show progress bars.

    Raises:
        ValueError: The folder holds results of another configuration.
        FileNotFoundError: The data is not there.
    """

    def __init__(
        self,
        recipe: Recipe,
        output: Path,
        *,
        root: Path | None = None,
        download: bool = False,
        cache: Path | None = None,
        device: torch.device | str = "cpu",
        progress: bool = True,
    ):
        self.recipe, self.output, self.progress = recipe, output, progress
        self.device = torch.device(device)
        self.cache = cache or default_cache()
        with processes.in_turn():
            self.source = digits.load(recipe.data, root, download=download)
        self.train = self.source.train.subset(recipe.train_images)
        self.towers, self.tokenizer = self._fresh_towers()
        self.prompts = Prompts(self.source.classes, self.source.templates, self.tokenizer)
        packages = ("open_clip_torch", "timm", "torchvision", "torchmetrics", "scikit-learn")
        self._results = runs.Results(output, asdict(recipe), runs.environment(self.device, packages))

    # --- one method ---------------------------------------------------------------------------------

    def pretrain(self) -> float:
        """Pre-train the towers, or load them from the cache; seconds that the training took."""
        key = hashlib.sha256(json.dumps(self._pretraining(), sort_keys=True).encode()).hexdigest()[:16]
        stream = self._pairs(self.recipe.wide, self.recipe.pretrain)
        file = self.cache / f"{self.recipe.model}-{self.recipe.data}-{key}.pt"
        pretrained = fit(
            self.towers, METHODS["flyp"], stream, self.recipe.pretrain,
            checkpoint=file, label="pre-training", progress=self.progress,
        )  # fmt: skip
        return pretrained.seconds

    def run(
        self, name: str, seed: int = 0, after_step: Callable[[int], None] | None = None
    ) -> dict[str, Any]:
        """Fine-tune by one method from the pretrained towers, evaluate, and record it.

        Args:
            name: Of the method, in the recipe.
            seed: Of data order, drawing and initialisation; the pretrained towers are the same.
            after_step: As in `fit`.

        Returns:
            This seed's record; `results["methods"]` has the means over all seeds so far.
        """
        recorded = self._results.recorded(name, seed)
        if recorded is not None:
            return recorded
        student, seconds, gaps = self._student(self.recipe.method(name), seed, after_step)
        if gaps and processes.is_first():
            runs.write_csv(("step", "gap"), enumerate(gaps, 1), self.gap_file(name, seed))
        scores = self.evaluate(student, self.source.test, {"id": self.recipe.narrow, **self.recipe.shifts})
        validation = self.evaluate(
            student, self.source.val, {"id": self.recipe.narrow, "wide": self.recipe.wide}
        )
        record = {
            "seed": seed,
            **summarise(scores),
            "seconds": seconds,
            "final_gap": gaps[-1] if gaps else None,
            "validation": {k: s.accuracy for k, s in validation.items()},
        }
        self._results.record(name, record)
        return record

    def evaluate(self, student: Student, split: Split, domains: Mapping[str, Domain]) -> dict[str, Scores]:
        """Score the student's head on a split drawn in each domain, always the same way."""
        towers, head = towers_of(student), head_of(student, self.prompts)
        return {name: score(towers, head, self._drawn(split, domain)) for name, domain in domains.items()}

    @property
    def results(self) -> dict[str, Any]:
        """What stands in `results.json`."""
        return self._results.content

    def gap_file(self, method: str, seed: int) -> Path:
        """Where the teacher-student gap after every step is written."""
        return self.output / "gaps" / f"{method}-{seed}.csv"

    # --- pieces -------------------------------------------------------------------------------------

    def _student(
        self, method: Method, seed: int, after_step: Callable[[int], None] | None = None
    ) -> tuple[Student, float, list[float]]:
        """A method's finished model, the seconds of training and the teacher's gaps."""
        if method.merge is not None:
            return *self._merged(method.merge, seed), []
        student = started(method, deepcopy(self.towers), self.prompts)
        if not method.trains:
            return student, 0.0, []
        settings = replace(self.recipe.finetune, seed=self.recipe.finetune.seed + 1 + seed)
        fitted = fit(
            student, method, self._pairs(self.recipe.narrow, settings), settings,
            prompts=self.prompts, anchors=self._pairs(self.recipe.wide, settings),
            checkpoint=self.output / "checkpoints" / f"{method.name}-{seed}.pt",
            label=f"{method.name} (seed {seed})", progress=self.progress, after_step=after_step,
        )  # fmt: skip
        return student, fitted.seconds, fitted.gaps

    def _merged(self, merge: Merge, seed: int) -> tuple[Student, float]:
        """Weights between the pretrained and fine-tuned ones, and the seconds of all fine-tuning."""
        method = self.recipe.method(merge.of)
        if not method.trains:
            raise ValueError(f"merge of {merge.of!r}, which is not trained: choose a method that is")
        student = started(method, deepcopy(self.towers), self.prompts)
        ends = [self._student(method, merge.models * seed + i) for i in range(merge.models)]
        states = [end.state_dict() for end, *_ in ends]
        start = student.state_dict()
        alpha = merge.alpha
        merged = model_stock(start, states) if alpha is None else interpolate(start, states[0], alpha)
        student.load_state_dict(merged)
        return student, sum(seconds for _, seconds, _ in ends)

    def _fresh_towers(self) -> tuple[Towers, Any]:
        torch.manual_seed(self.recipe.pretrain.seed)
        towers, tokenizer = build(self.recipe.model)
        return towers.to(self.device), tokenizer

    def _pairs(self, domain: Domain, settings: Settings) -> DrawnPairs:
        return DrawnPairs(
            self.train, domain, self.source.classes, self.source.templates, self.tokenizer,
            size=self.towers.image_size, batch_size=settings.batch_size, seed=settings.seed,
        )  # fmt: skip

    def _drawn(self, split: Split, domain: Domain) -> Labelled:
        def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            generator = torch.Generator().manual_seed(0)
            for first in range(0, len(split), _EVALUATION_BATCH):
                chosen = slice(first, first + _EVALUATION_BATCH)
                part = Split(split.images[chosen], split.labels[chosen])
                yield normalise(domain.draw(part, self.towers.image_size, generator)), part.labels

        return batches()

    def _pretraining(self) -> dict[str, Any]:
        """What the pretrained towers depend on."""
        recipe = self.recipe
        return {
            "model": recipe.model,
            "data": recipe.data,
            "images": len(self.train),
            "domain": asdict(recipe.wide),
            "pretrain": asdict(recipe.pretrain),
            "method": METHODS["flyp"].settings(),
            "checkpoint": loop.FORMAT,
        }
