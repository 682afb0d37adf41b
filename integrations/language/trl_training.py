"""Learning something new by a method, with the trainers of TRL in place of the training loop."""

from __future__ import annotations

import itertools
import math
import tempfile
import time
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from wmateacher import WMATeacher
from wmateacher.diagnostics import parameter_gap
from wmateacher.integrations.engine import tracking, training
from wmateacher.integrations.language.data import END, PAD, Question, demonstrate, vocabulary, words
from wmateacher.integrations.language.recipes import Method, Recipe, Settings
from wmateacher.integrations.language.training import Questions, adamw

with warnings.catch_warnings():
    # TRL warns on import that SDFT is experimental; the adapter accepts only tested versions.
    warnings.filterwarnings("ignore", message="You are importing from 'trl.experimental'")
    from wmateacher.integrations.trl import SDFTTrainer, SFTTrainer, TeacherCallback

import datasets
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainingArguments,
)
from trl import SFTConfig
from trl import SFTTrainer as PlainSFTTrainer
from trl.experimental.sdft import SDFTConfig

__all__ = ["check", "fit", "rows", "tokenizer"]

_ALPHAS: Mapping[str, float] = {"kl": 0.0, "reverse_kl": 1.0}
"""TRL's `distillation_alpha` of each distillation that its SDFT has, too."""


def check(recipe: Recipe) -> None:
    """Check that TRL's trainers can run every method of the recipe.

    Raises:
        ValueError: If a setting has no counterpart there.
    """
    if recipe.settings.precision != "fp32":
        raise ValueError(
            f"trainer='trl' trains in fp32, got precision={recipe.settings.precision!r}: its trainers would "
            "keep autocast in evaluations; use precision='fp32' or trainer='loop'"
        )
    for method in recipe.methods.values():
        if method.kind == "sdft" and method.distillation not in _ALPHAS:
            raise ValueError(
                f"TRL's SDFT has no distillation={method.distillation!r} ({method.name}): choose one of "
                f"{', '.join(_ALPHAS)}, or trainer='loop'"
            )


def tokenizer(symbols: int) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a world with that many symbols, one token for each word."""
    every = words(symbols)
    made = Tokenizer(models.WordLevel({word: token for token, word in enumerate(every)}))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token=every[PAD], eos_token=every[END])


def rows(questions: Iterable[Question], kind: str, symbols: int) -> list[dict[str, str]]:
    """Return a data set for TRL's trainers.

    Args:
        questions: The questions.
        kind: `sft` for columns `prompt` and `completion`, or `sdft` for `prompt` and `privileged_context`,
            which is the demonstration.
        symbols: The number of symbols of the world.
    """
    every = words(symbols)

    def text(tokens: Sequence[int]) -> str:
        return " ".join(every[token] for token in tokens)

    if kind == "sft":
        return [{"prompt": text(q.prompt), "completion": " " + text(q.answer)} for q in questions]
    return [
        {
            "prompt": text(q.prompt),
            "privileged_context": text(demonstrate(q).prompt[: -len(q.prompt)]),
        }
        for q in questions
    ]


def fit(
    student: nn.Module,
    method: Method,
    questions: Questions,
    settings: Settings,
    *,
    evaluate: training.Evaluate | None = None,
    evaluate_every: int = 0,
    evaluate_last: bool = False,
    label: str | None = None,
    progress: bool = True,
) -> training.Fit:
    """Train `student` in place by `method` with TRL's `SFTTrainer` or `SDFTTrainer`.

    Batches and their order, optimizer, learning rates and clipping are those of `language.training.fit`. The
    history has `loss` of every step, and with a teacher `gap`.

    Args:
        student: A causal language model, on the device to train on.
        method: The loss and the teacher.
        questions: Gives questions from a step on.
        settings: The optimisation.
        evaluate: Called at every evaluation with the networks; returns the values to log.
        evaluate_every: The number of steps between evaluations; 0 for none.
        evaluate_last: Whether to evaluate after the last step too.
        label: The name in the progress bar and in the logs. Default: the method's name.
        progress: Whether to show a progress bar on a terminal.

    Raises:
        ValueError: If TRL would train on another device than the student's, or on several.
        FloatingPointError: If the loss is not finite.
    """
    name = label or method.name
    fitted = training.Fit(student)
    # TRL's trainers ask for a folder, to which nothing is written here.
    with tempfile.TemporaryDirectory() as folder, _without_preparation_bars(), warnings.catch_warnings():
        # TRL and PEFT use names that transformers has replaced.
        warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)
        trainer = _trainer(student, method, questions, settings, folder)
        for printing in (PrinterCallback, ProgressCallback):  # every logged value
            trainer.remove_callback(printing)
        bar = tqdm(
            total=settings.steps, desc=name, unit="step", disable=None if progress else True, leave=False,
            dynamic_ncols=True,
        )  # fmt: skip
        evaluate_at = set(range(evaluate_every, settings.steps, evaluate_every) if evaluate_every else ())
        if evaluate_last:
            evaluate_at.add(settings.steps)
        following = _Following(trainer, fitted, name, settings, bar, evaluate, evaluate_at)
        trainer.add_callback(following)
        with bar:
            started = time.perf_counter()
            trainer.train()
            fitted.history.seconds = time.perf_counter() - started - following.evaluating
    return fitted


def _trainer(
    student: nn.Module, method: Method, questions: Questions, settings: Settings, folder: str
) -> Any:
    batches = list(itertools.islice(questions(0), settings.steps))
    data = [question for batch in batches for question in batch]
    config: Any = student.config
    symbols = config.vocab_size - vocabulary(0)
    optimizer = adamw(student, settings)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: settings.learning_rate_at(step) / settings.learning_rate
    )
    options: dict[str, Any] = {
        "output_dir": folder, "max_steps": settings.steps, "per_device_train_batch_size": len(batches[0]),
        "max_grad_norm": settings.clip_norm or 0.0, "seed": settings.seed, "bf16": False,
        "use_cpu": next(student.parameters()).device.type == "cpu", "dataloader_pin_memory": False,
        "activation_checkpointing": False, "save_strategy": "no", "report_to": [], "disable_tqdm": True,
        "logging_steps": 1, "logging_nan_inf_filter": False,
    }  # fmt: skip
    given: dict[str, Any] = {
        "train_dataset": datasets.Dataset.from_list(rows(data, method.kind, symbols)),
        "processing_class": tokenizer(symbols), "optimizers": (optimizer, schedule),
    }  # fmt: skip
    if method.kernel is not None:
        given["teacher_callback"] = TeacherCallback(method.kernel)
    if method.kind == "sdft":
        args: Any = SDFTConfig(
            num_generations=1, max_completion_length=max(len(q.answer) for q in data), shuffle_dataset=False,
            distillation_mode="full_logits", distillation_topk=None, distillation_is_clip=None,
            distillation_alpha=_ALPHAS[method.distillation],
            teacher_prompt_template="{privileged_context} {prompt}", **options,
        )  # fmt: skip
        kind: Any = SDFTTrainer
    else:
        args = SFTConfig(train_sampling_strategy="sequential", **options)
        kind = PlainSFTTrainer if method.kernel is None else SFTTrainer
        if method.kernel is not None:
            given |= {"distillation": method.distillation, "distill_weight": method.distill_weight}
    _check_device(args, next(student.parameters()).device)
    return kind(student, args=args, **given)


@contextmanager
def _without_preparation_bars() -> Iterator[None]:
    """Hide the bars of the preparation of a data set, which takes a moment."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _check_device(args: TrainingArguments, device: torch.device) -> None:
    """Check that the Trainer, which chooses its devices itself, trains on that of the student alone."""
    used = args.device
    if args.n_gpu > 1 or (used.type, used.index or 0) != (device.type, device.index or 0):
        raise ValueError(
            f"TRL's trainers take every GPU that they see, here {args.n_gpu}, starting with {used}, but the "
            f"student is on {device}: set CUDA_VISIBLE_DEVICES to one GPU, or use --device cpu"
        )


class _Following(TrainerCallback):
    """Write the history of a run, evaluate it, and stop it if its loss is not finite."""

    def __init__(
        self,
        trainer: Any,
        fitted: training.Fit,
        name: str,
        settings: Settings,
        bar: Any,
        evaluate: training.Evaluate | None,
        evaluate_at: Collection[int],
    ):
        self.trainer, self.fitted, self.name, self.settings, self.bar = trainer, fitted, name, settings, bar
        self.evaluate, self.evaluate_at, self.evaluating = evaluate, evaluate_at, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the teacher, which the callback before this one has built."""
        self.fitted.teacher = getattr(self.trainer, "teacher", None)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log the gap, and evaluate if it is time."""
        self.bar.update()
        teacher = self.fitted.teacher
        if isinstance(teacher, WMATeacher):
            self._log(state.global_step, {"gap": float(parameter_gap(teacher))})
        if self.evaluate is not None and state.global_step in self.evaluate_at:
            started = time.perf_counter()
            self._log(state.global_step, self.evaluate(self.fitted.networks))
            self.evaluating += time.perf_counter() - started

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log the loss of a step."""
        loss = kwargs["logs"].get("loss")
        if loss is None:  # the summary after the last step
            return
        self._log(state.global_step, {"loss": loss})
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"{self.name}: the loss is {loss} at step {state.global_step} of {state.max_steps}: "
                f"lower learning_rate ({self.settings.learning_rate}) or clip_norm "
                f"({self.settings.clip_norm})"
            )

    def _log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.fitted.history.series.setdefault(name, []).append((step, value))
        tracking.write(self.name, step, values)
