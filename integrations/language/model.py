"""A small causal transformer, its logits at the tokens of answers, and answers that it gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from wmateacher.integrations.language.data import END, PAD, Question, vocabulary
from wmateacher.losses import token_mask

__all__ = [
    "answer_logits",
    "answer_tokens",
    "build",
    "import_peft",
    "import_transformers",
    "sample",
    "with_lora",
]

_IGNORED = -100


def build(symbols: int, width: int, depth: int) -> nn.Module:
    """Return a Llama with random weights.

    Args:
        symbols: The number of symbols of the world.
        width: The width, a multiple of 16.
        depth: The number of blocks.

    Raises:
        ImportError: If Transformers is not installed.
    """
    transformers = import_transformers()
    heads = width // 16
    config = transformers.LlamaConfig(
        vocab_size=vocabulary(symbols), hidden_size=width, intermediate_size=2 * width,
        num_hidden_layers=depth, num_attention_heads=heads, num_key_value_heads=heads,
        max_position_embeddings=64, tie_word_embeddings=True, use_cache=False,
        pad_token_id=PAD, eos_token_id=END, bos_token_id=None,
    )  # fmt: skip
    network: nn.Module = transformers.LlamaForCausalLM(config)
    return network


def with_lora(model: nn.Module, rank: int) -> nn.Module:
    """Return the model with LoRA adapters of that rank on every projection, the only weights that train.

    Raises:
        ImportError: If PEFT is not installed.
    """
    peft = import_peft()
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)


def import_transformers() -> Any:
    """Return the module `transformers`.

    Raises:
        ImportError: If it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "the language model needs Transformers: pip install 'wmateacher[examples,huggingface]'"
        ) from error
    return transformers


def import_peft() -> Any:
    """Return the module `peft`.

    Raises:
        ImportError: If it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError("lora_rank needs PEFT: pip install 'wmateacher[huggingface]'") from error
    return peft


def answer_tokens(questions: Sequence[Question], device: torch.device) -> Tensor:
    """Return the tokens of all answers one after the other, `[N]`."""
    return torch.tensor([token for q in questions for token in q.answer], device=device)


def answer_logits(model: nn.Module, questions: Sequence[Question]) -> Tensor:
    """Return the logits that predict the tokens of `answer_tokens`, `[N, V]`.

    Prompts may differ in length: rows are padded on the right, which a causal model does not see.
    """
    device = next(model.parameters()).device
    tokens = _padded([q.prompt + q.answer for q in questions], PAD).to(device)
    labels = _padded([(_IGNORED,) * len(q.prompt) + q.answer for q in questions], _IGNORED).to(device)
    return _logits(model, tokens)[token_mask(labels)]


@torch.no_grad()
def sample(model: nn.Module, prompts: Sequence[tuple[int, ...]], longest: int) -> list[Question]:
    """Return answers drawn from the model, up to `END` or the length `longest`."""
    device = next(model.parameters()).device
    rows, ends = torch.arange(len(prompts)), torch.tensor([len(p) for p in prompts])
    tokens = _padded([p + (PAD,) * longest for p in prompts], PAD).to(device)
    rows, ends = rows.to(device), ends.to(device)
    for i in range(longest):
        logits = _logits(model, tokens[:, : int(ends.max()) + i])[rows, ends + i - 1]
        tokens[rows, ends + i] = logits.float().softmax(-1).multinomial(1)[:, 0]
    answers = [row[len(p) : len(p) + longest] for row, p in zip(tokens.tolist(), prompts, strict=True)]
    cut = [a[: a.index(END) + 1] if END in a else a for a in answers]
    return [Question(prompt, tuple(answer)) for prompt, answer in zip(prompts, cut, strict=True)]


def _padded(rows: Sequence[Sequence[int]], filler: int) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[filler] * (longest - len(row))] for row in rows])


def _logits(model: nn.Module, tokens: Tensor) -> Tensor:
    output: Any = model(input_ids=tokens)
    return output.logits
