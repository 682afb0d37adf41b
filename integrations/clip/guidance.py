"""Texts on which image features are compared: prompts without a class, or random tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from wmateacher.checks import nearest
from wmateacher.integrations.clip.heads import Prompts
from wmateacher.integrations.clip.model import Towers
from wmateacher.integrations.engine.sampling import generator
from wmateacher.spec import parse_call

Guide = Callable[[int], Tensor]
"""The step with this index -> the features of its texts, `[M, d]`, of length 1."""
_RANDOM = 2
"""Of the random streams of a seed; 0 and 1 are the order and the drawing of images."""


class Contexts:
    """One text for each template: the mean over the classes, normalised (CAR-FT, Mao et al. 2022).

    Softmax of the similarities to them is what the paper calls the context distribution of an image.

    Args:
        towers: As pretrained.
        prompts: Whose templates and classes.
    """

    def __init__(self, towers: Towers, prompts: Prompts, seed: int):
        del seed
        self._texts = prompts.embedded(towers).mean(0)
        self._texts = F.normalize(self._texts, dim=-1)

    def __call__(self, step: int) -> Tensor:
        """The features `[templates, d]`, the same at every step."""
        return self._texts


class RandomTexts:
    """Texts of random tokens, drawn anew at each step (Lipsum-FT, Nam et al. 2024, section 5.1).

    Args:
        towers: Their text tower embeds them; it must stay as it is.
        prompts: Whose tokenizer has the vocabulary.
        seed: Of the draws.
        count: M texts; 80 in the paper.
        length: Tokens in each, between those of start and end; 8 in the paper.

    Raises:
        ValueError: The tokenizer does not tell its start and end, or has not the room.
    """

    def __init__(self, towers: Towers, prompts: Prompts, seed: int, count: int = 80, length: int = 8):
        _check_random(count, length)
        tokenizer = prompts.tokenizer
        try:
            self._start, self._end = tokenizer.sot_token_id, tokenizer.eot_token_id  # type: ignore[attr-defined]
            room = tokenizer.context_length - 2  # type: ignore[attr-defined]
        except AttributeError:
            raise ValueError(
                f"random_texts needs a tokenizer with sot_token_id, eot_token_id and context_length, got "
                f"{type(tokenizer).__name__}: take a model with CLIP's own"
            ) from None
        if length > room:
            raise ValueError(f"random_texts: length must be at most {room} for this model, got {length}")
        self._towers, self._seed, self._shape = towers, seed, (count, length)
        self._context = room + 2

    def tokens(self, step: int) -> Tensor:
        """int64 `[count, context length]`: start, random ids below it, end, zeros."""
        count, length = self._shape
        tokens = torch.zeros(count, self._context, dtype=torch.int64)
        tokens[:, 0], tokens[:, length + 1] = self._start, self._end
        random = generator(self._seed, _RANDOM, step)
        tokens[:, 1 : length + 1] = torch.randint(self._start, (count, length), generator=random)
        return tokens

    @torch.no_grad()
    def __call__(self, step: int) -> Tensor:
        """The features `[count, d]` of the step's texts."""
        device = self._towers.logit_scale.device
        return self._towers.encode_text(self.tokens(step).to(device), normalize=True)


def _check_random(count: int = 80, length: int = 8) -> None:
    for name, value in (("count", count), ("length", length)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"random_texts: {name} must be a whole number of at least 1, got {value!r}")


_CHECKS: dict[str, Callable[..., None]] = {"contexts": lambda: None, "random_texts": _check_random}


def check(guidance: str) -> None:
    """See that `build` will know it.

    Raises:
        ValueError: The text does not parse, or names no guidance.
    """
    call = parse_call(guidance)
    if call.name not in _CHECKS:
        raise ValueError(f"unknown guidance {call.name!r}; {nearest(call.name, _CHECKS)}")
    call.build(_CHECKS[call.name])


def build(guidance: str, towers: Towers, prompts: Prompts, seed: int) -> Guide:
    """The texts that a method is guided by.

    Args:
        guidance: `"contexts"`, or `"random_texts(80,8)"`: how many, and tokens in each.
        towers: As pretrained; the text tower must stay so.
        prompts: Of the task.
        seed: Of what is random.

    Raises:
        ValueError: As `check`; or the tokenizer does not do.
    """
    check(guidance)
    call = parse_call(guidance)
    kind = Contexts if call.name == "contexts" else RandomTexts
    return kind(towers, prompts, seed, *call.args, **call.kwargs)  # type: ignore[arg-type]
