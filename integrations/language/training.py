"""Learning something new by a method: one step of the training loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wmateacher import WMATeacher, losses
from wmateacher.diagnostics import parameter_gap
from wmateacher.integrations.engine import loop, training
from wmateacher.integrations.language.data import Question, demonstrate
from wmateacher.integrations.language.model import answer_logits, answer_tokens, sample
from wmateacher.integrations.language.recipes import Method, Settings

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Learning", "Questions", "adamw", "fit"]

Questions = loop.Stream[list[Question]]
"""Questions with their right answers."""


def fit(
    student: nn.Module,
    method: Method,
    questions: Questions,
    settings: Settings,
    *,
    evaluate: training.Evaluate | None = None,
    **options: Unpack[loop.Options],
) -> training.Fit:
    """Train `student` in place by `method`.

    The history has `loss` of every step; with a teacher `distillation` and `gap`.

    Args:
        student: A causal language model, on the device to train on.
        method: The loss and the teacher.
        questions: Gives questions from a step on.
        settings: The optimisation.
        evaluate: Called at every evaluation with the networks; returns the values to log.
        **options: Options of `loop.train`, such as `checkpoint`.

    Raises:
        ValueError: If the checkpoint cannot be read or belongs to another run.
        FloatingPointError: If the loss is not finite.
    """
    return training.fit(Learning(student, method, questions, settings), evaluate, **options)


def adamw(student: nn.Module, settings: Settings) -> torch.optim.AdamW:
    """Return the optimizer of the weights that are trained."""
    return torch.optim.AdamW(
        [p for p in student.parameters() if p.requires_grad],
        lr=settings.learning_rate, weight_decay=settings.weight_decay, betas=(0.9, 0.99),
    )  # fmt: skip


class Learning(training.Training):
    """Train a causal language model on questions.

    Args:
        student: The model.
        method: The loss and the teacher.
        questions: Gives questions from a step on.
        settings: The optimisation.
    """

    settings: Settings
    teacher: WMATeacher | None

    def __init__(self, student: nn.Module, method: Method, questions: Questions, settings: Settings):
        torch.manual_seed(settings.seed)
        student.train()
        self.method = method
        teacher = None if method.kernel is None else WMATeacher(student, method.kernel, settings.steps)
        super().__init__(method.name, settings, student, teacher)
        self.criterion = losses.build(method.distillation)
        self.optimizer = adamw(student, settings)
        self.questions = loop.BatchStream(questions)

    def batch(self, step: int) -> dict[str, Any]:
        """Return the questions of a step."""
        return {"questions": [tuple(question) for question in self.questions(step)]}

    def train_step(self, step: int) -> dict[str, Tensor | float]:
        """Take one optimizer step."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate_at(step)
        with self.settings.autocast(self.device):
            loss, logged = self._loss(self.questions(step))
        loss.backward()
        if self.settings.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.student.parameters(), self.settings.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.teacher is not None:
            self.teacher.update()
            logged["gap"] = parameter_gap(self.teacher)
        return {"loss": loss.detach(), **logged}

    def _loss(self, questions: list[Question]) -> tuple[Tensor, dict[str, Tensor | float]]:
        if self.method.kind == "sft":
            logits = answer_logits(self.student, questions)
            loss = F.cross_entropy(logits.float(), answer_tokens(questions, self.device))
            if self.teacher is None:
                return loss, {}
            term = self.criterion(logits, answer_logits(self.teacher, questions))
            weight = 1.0 if self.method.distill_weight is None else self.method.distill_weight
            return loss + weight * term, {"distillation": term.detach()}
        assert self.teacher is not None
        shown = [demonstrate(q).prompt for q in questions]
        drawn = sample(self.student, [q.prompt for q in questions], max(len(q.answer) for q in questions))
        wise = [Question(prompt, q.answer) for prompt, q in zip(shown, drawn, strict=True)]
        term = self.criterion(answer_logits(self.student, drawn), answer_logits(self.teacher, wise))
        return term, {"distillation": term.detach()}

    def stateful(self) -> dict[str, loop.Part]:
        """Return every object whose state changes during training."""
        parts: dict[str, loop.Part] = {"student": self.student, "optimizer": self.optimizer}
        return parts if self.teacher is None else {**parts, "teacher": self.teacher}

    def run_config(self) -> Mapping[str, Any]:
        """Return the method and the settings."""
        return {**asdict(self.method), **self.settings.run_config()}
