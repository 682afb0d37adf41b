"""Questions of a small world: facts to remember, skills to apply, and answers shown in the prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from wmateacher.integrations.engine.sampling import mix

__all__ = [
    "DEMONSTRATION",
    "END",
    "FACTS",
    "PAD",
    "SKILLS",
    "Question",
    "World",
    "demonstrate",
    "vocabulary",
    "words",
]

PAD, END, ASK, THEN = range(4)
"""Tokens: padding, the end of an answer, the end of a prompt, the end of a demonstration."""
FACTS, DEMONSTRATION = "facts", "demonstration"
SKILLS: Mapping[str, Callable[[Sequence[int], int], list[int]]] = {
    "reverse": lambda x, count: list(reversed(x)),
    "successor": lambda x, count: [(s + 1) % count for s in x],
    "rotate": lambda x, count: [*x[1:], x[0]],
}
"""From a prompt's symbols, and the number of symbols there are, to the answer."""
_TASKS = (FACTS, *SKILLS)
_FIRST_SYMBOL = THEN + 1 + len(_TASKS)
_SPAN = 3  # symbols of a skill's prompt
_LONGEST = 3  # symbols of a fact's answer


class Question(NamedTuple):
    """A prompt and its answer, in tokens.

    Attributes:
        prompt: The tokens of the prompt.
        answer: The tokens of the answer; the last one is `END`.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


def vocabulary(symbols: int) -> int:
    """Return the number of tokens of a world with that many symbols."""
    return _FIRST_SYMBOL + symbols


def words(symbols: int) -> tuple[str, ...]:
    """Return the word of each token, for tokenizers."""
    return ("<pad>", "<end>", "<ask>", "<then>", *_TASKS, *(f"s{i}" for i in range(symbols)))


def demonstrate(question: Question) -> Question:
    """Return the question with its own answer demonstrated in the prompt."""
    return Question((*question.prompt, *question.answer[:-1], THEN, *question.prompt), question.answer)


class World:
    """The facts and skills of one seed.

    A fact maps two symbols to one, two or three, at random, so it must be remembered. A skill maps any three
    symbols to three. A demonstration shows a question and an arbitrary answer, which is to be repeated.

    Args:
        symbols: The number of symbols.
        old_facts: The number of facts that pre-training teaches.
        new_facts: The number of further facts.
        skills: The names of the skills that pre-training teaches.
        new: The knowledge that is learned later, `"facts"` or the name of a skill.
        seed: The seed of everything that is drawn.

    Raises:
        ValueError: If there are more facts than pairs of symbols.
    """

    def __init__(
        self, symbols: int, old_facts: int, new_facts: int, skills: Sequence[str], new: str, seed: int
    ):
        if old_facts + new_facts > symbols**2:
            raise ValueError(
                f"old_facts={old_facts} and new_facts={new_facts} need as many pairs of symbols, but "
                f"symbols={symbols} makes {symbols**2}: raise symbols"
            )
        self.symbols, self.skills, self.new, self.seed = symbols, tuple(skills), new, seed
        random = self._random(0, 0)
        keys = random.permutation(symbols**2)[: old_facts + new_facts]
        facts = [self._question(FACTS, divmod(int(key), symbols), self._value(random)) for key in keys]
        self.old_facts, self.new_facts = facts[:old_facts], facts[old_facts:]

    def earlier(self, batch_size: int) -> Callable[[int], Iterator[list[Question]]]:
        """Return the stream of pre-training: a third each of facts, skills and demonstrations."""
        return self._stream(1, batch_size, self._earlier)

    def later(self, batch_size: int) -> Callable[[int], Iterator[list[Question]]]:
        """Return the stream of what is new."""
        return self._stream(2, batch_size, self._later)

    def examination(self, part: str, count: int) -> dict[str, list[Question]]:
        """Return questions on what is new (`"new"`), and on everything that pre-training taught, by its name.

        Facts are split in halves, one for each part; the prompts of skills and demonstrations are drawn anew.

        Args:
            part: `"validation"` or `"test"`.
            count: The number of questions of each kind, or all facts if there are fewer.
        """
        which = ("validation", "test").index(part)
        random = self._random(3, which)
        exam = {"new": self._some(self.new, self.new_facts[which::2], count, random)}
        exam[FACTS] = self.old_facts[which::2][:count]
        for name in (*self.skills, DEMONSTRATION):
            exam[name] = self._some(name, [], count, random)
        return exam

    def _some(
        self, name: str, facts: list[Question], count: int, random: np.random.Generator
    ) -> list[Question]:
        return facts[:count] if name == FACTS else [self._draw(name, random) for _ in range(count)]

    def _earlier(self, count: int, random: np.random.Generator) -> list[Question]:
        names = [(FACTS, DEMONSTRATION, *self.skills)[min(i % 3, 2)] for i in range(count)]
        names = [self.skills[(i // 3) % len(self.skills)] if i % 3 == 2 else n for i, n in enumerate(names)]
        return [self._draw(name, random) for name in names]

    def _later(self, count: int, random: np.random.Generator) -> list[Question]:
        if self.new != FACTS:
            return [self._draw(self.new, random) for _ in range(count)]
        return [self.new_facts[i] for i in random.permutation(len(self.new_facts))[:count]]

    def _draw(self, name: str, random: np.random.Generator) -> Question:
        if name == FACTS:
            return self.old_facts[random.integers(len(self.old_facts))]
        if name == DEMONSTRATION:
            task = _TASKS[random.integers(len(_TASKS))]
            length = 2 if task == FACTS else _SPAN
            answer = (
                self._value(random) if task == FACTS else random.integers(self.symbols, size=_SPAN).tolist()
            )
            return demonstrate(
                self._question(task, random.integers(self.symbols, size=length).tolist(), answer)
            )
        prompt = random.integers(self.symbols, size=_SPAN).tolist()
        return self._question(name, prompt, SKILLS[name](prompt, self.symbols))

    def _value(self, random: np.random.Generator) -> list[int]:
        return random.integers(self.symbols, size=random.integers(1, _LONGEST + 1)).tolist()

    def _question(self, task: str, prompt: Sequence[int], answer: Sequence[int]) -> Question:
        shown = (_FIRST_SYMBOL + s for s in prompt)
        return Question(
            (THEN + 1 + _TASKS.index(task), *shown, ASK), (*(_FIRST_SYMBOL + s for s in answer), END)
        )

    def _stream(
        self, kind: int, batch_size: int, draw: Callable[[int, np.random.Generator], list[Question]]
    ) -> Callable[[int], Iterator[list[Question]]]:
        def batches(step: int) -> Iterator[list[Question]]:
            while True:
                yield draw(batch_size, self._random(kind, step))
                step += 1

        return batches

    def _random(self, kind: int, step: int) -> np.random.Generator:
        return np.random.default_rng(mix(self.seed, kind, step))
