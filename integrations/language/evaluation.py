"""The share of questions that a model answers right."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from wmateacher.integrations.language.data import Question
from wmateacher.integrations.language.model import answer_logits, answer_tokens

__all__ = ["accuracy", "scores"]


@torch.no_grad()
def accuracy(model: nn.Module, questions: Sequence[Question]) -> float:
    """Return the percentage of questions whose whole answer is right, decoded greedily."""
    was_training = model.training
    model.eval()
    logits = answer_logits(model, questions)
    model.train(was_training)
    # Greedy decoding gives the answer if every token of it is the likeliest after those before it.
    right = logits.argmax(-1) == answer_tokens(questions, logits.device)
    answers = right.split([len(q.answer) for q in questions])
    return 100 * statistics.fmean(float(answer.all()) for answer in answers)


def scores(model: nn.Module, exam: Mapping[str, Sequence[Question]]) -> dict[str, float]:
    """Return the accuracy on every kind of question, and the mean over all but `new` as `kept`."""
    each = {name: accuracy(model, questions) for name, questions in exam.items()}
    return {**each, "kept": statistics.fmean(value for name, value in each.items() if name != "new")}
