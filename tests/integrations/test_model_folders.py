"""Averages of the folders that transformers and peft write are read by their `from_pretrained`."""

import os

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from wmateacher.posthoc import average_checkpoints, interpolate

TOKENS = torch.arange(6)[None]


def language_model(seed=0):
    """A model whose head is tied to its embedding."""
    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=20, n_positions=8, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
        )
    ).eval()


def midpoint(one, other):
    with torch.no_grad():
        for a, b in zip(one.parameters(), other.parameters(), strict=True):
            a.copy_((a.double() + b.double()) / 2)
    return one


@pytest.mark.parametrize("size", ["6KB", "1GB"])
def test_from_pretrained_reads_an_average_of_model_folders(tmp_path, size):
    models = [language_model(seed) for seed in range(2)]
    folders = [tmp_path / str(i) for i in range(2)]
    for model, folder in zip(models, folders, strict=True):
        model.save_pretrained(folder, max_shard_size=size)
    sharded = len(list(folders[0].glob("model-*.safetensors"))) > 2
    assert sharded == (size == "6KB")
    average_checkpoints(folders, output=tmp_path / "out", shard_bytes=6000 if sharded else 10**9)
    assert (len(list((tmp_path / "out").glob("model-*"))) > 2) == sharded
    assert os.path.exists(tmp_path / "out" / "generation_config.json")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(merged(TOKENS).logits, midpoint(*models)(TOKENS).logits)
    assert merged.lm_head.weight is merged.transformer.wte.weight


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft's call
def test_peft_reads_an_average_of_adapters(tmp_path):
    adapters = []
    for seed in range(2):
        torch.manual_seed(seed)
        config = LoraConfig(target_modules=["c_attn"], r=2, fan_in_fan_out=True, init_lora_weights=False)
        adapters.append(get_peft_model(language_model(), config).eval())
        adapters[-1].save_pretrained(tmp_path / str(seed))
    interpolate(tmp_path / "0", tmp_path / "1", 0.5, output=tmp_path / "out", shard_bytes=100)
    merged = PeftModel.from_pretrained(language_model(), tmp_path / "out").eval()
    assert torch.equal(merged(TOKENS).logits, midpoint(*adapters)(TOKENS).logits)
