"""Folders for transformers' `CLIPModel` from open_clip's models; transformers itself is not needed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path
from typing import Any

import open_clip
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

from wmateacher.files import save
from wmateacher.integrations.engine.results import write_json

__all__ = ["why_not", "write_transformers"]

_WEIGHTS = "model.safetensors"

# Settings of a tower that transformers has too, or that change nothing at evaluation.
_TOWER = ("layers", "width", "mlp_ratio", "output_tokens")
_IMAGE = (*_TOWER, "head_width", "patch_size", "image_size", "patch_dropout")
_TEXT = (*_TOWER, "heads", "context_length", "vocab_size")
_MODEL = ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text", "init_logit_scale")
_PILLOW = {"bilinear": 2, "bicubic": 3}
_SPECIAL = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}

_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_IMAGE_NAMES = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "ln_pre.weight": "pre_layrnorm.weight",
    "ln_pre.bias": "pre_layrnorm.bias",
    "ln_post.weight": "post_layernorm.weight",
    "ln_post.bias": "post_layernorm.bias",
}
_TEXT_NAMES = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}


def why_not(config: Mapping[str, Any], preprocessing: Mapping[str, Any]) -> str | None:
    """Return the reason why transformers' `CLIPModel` cannot compute what a model does, or None if it can.

    Args:
        config: The model's configuration, as `open_clip.get_model_config` returns it.
        preprocessing: The preprocessing of its images, as `open_clip.get_model_preprocess_cfg` returns it.
    """
    vision, text = config["vision_cfg"], config["text_cfg"]
    if vision.get("timm_model_name"):
        return f"its image tower {vision['timm_model_name']!r} is from timm"
    if not isinstance(vision.get("layers", 12), int):
        return "its image tower is a ResNet"
    if text.get("hf_model_name") or text.get("hf_tokenizer_name"):
        return "its text tower or tokenizer is another one of transformers"
    others = [
        *(name for name in config if name not in _MODEL),
        *_unusual(vision, open_clip.CLIPVisionCfg, _IMAGE),
        *_unusual(text, open_clip.CLIPTextCfg, _TEXT),
    ]
    if others:
        return f"CLIPModel has no {', '.join(others)}"
    if not all(isinstance(vision.get(name, 16), int) for name in ("image_size", "patch_size")):
        return "its images or patches are not square"
    if preprocessing.get("interpolation", "bicubic") not in _PILLOW or preprocessing.get(
        "resize_mode", "shortest"
    ) not in ("shortest", "squash"):
        return "its images are prepared in a way that CLIPImageProcessor does not have"
    return None


def _unusual(tower: Mapping[str, Any], kind: type[Any], known: tuple[str, ...]) -> list[str]:
    """Return the settings that differ from the defaults and are not known."""
    usual = {f.name: f.default for f in fields(kind)}
    # These only matter for towers of timm and transformers, which are refused before.
    ignored = ("timm_", "hf_model_", "pad_id", "eos_id")
    return [
        name
        for name, value in tower.items()
        if name not in known and not name.startswith(ignored) and (value or None) != (usual.get(name) or None)
    ]


def write_transformers(
    state: Mapping[str, Tensor], config: Mapping[str, Any], preprocessing: Mapping[str, Any], folder: Path
) -> None:
    """Write a folder that `from_pretrained` of transformers' `CLIPModel` and `CLIPProcessor` reads.

    Args:
        state: The state dict of open_clip's model.
        config: The model's configuration, as `open_clip.get_model_config` returns it.
        preprocessing: The preprocessing of its images, as `open_clip.get_model_preprocess_cfg` returns it.
        folder: The folder, which exists.

    Raises:
        ValueError: If `CLIPModel` cannot compute what the model does; `why_not` gives the reason.
    """
    reason = why_not(config, preprocessing)
    if reason is not None:
        raise ValueError(f"the model has no counterpart in transformers: {reason}; use it through open_clip")
    vision = asdict(open_clip.CLIPVisionCfg(**config["vision_cfg"]))
    text = asdict(open_clip.CLIPTextCfg(**config["text_cfg"]))
    save(_renamed(state), folder / _WEIGHTS)
    start, end = _tokenizer().all_special_ids
    common = {
        "hidden_act": "quick_gelu" if config.get("quick_gelu") else "gelu",
        "projection_dim": config["embed_dim"],
    }
    write_json(
        {
            "architectures": ["CLIPModel"],
            "model_type": "clip",
            "projection_dim": config["embed_dim"],
            "torch_dtype": str(state["logit_scale"].dtype).removeprefix("torch."),
            "vision_config": {
                "model_type": "clip_vision_model",
                **common,
                **_sizes(vision, vision["width"] // vision["head_width"]),
                "image_size": vision["image_size"],
                "patch_size": vision["patch_size"],
            },
            "text_config": {
                "model_type": "clip_text_model",
                **common,
                **_sizes(text, text["heads"]),
                "vocab_size": text["vocab_size"],
                "max_position_embeddings": text["context_length"],
                "bos_token_id": start,
                "eos_token_id": end,
                "pad_token_id": end,
            },
        },
        folder / "config.json",
    )
    _write_preprocessor(preprocessing, vision["image_size"], folder)
    _write_tokenizer(text["context_length"], folder)


def _sizes(tower: Mapping[str, Any], heads: int) -> dict[str, Any]:
    return {
        "hidden_size": tower["width"],
        "intermediate_size": int(tower["width"] * tower["mlp_ratio"]),
        "num_hidden_layers": tower["layers"],
        "num_attention_heads": heads,
    }


def _renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors under transformers' names."""
    renamed: dict[str, Tensor] = {"logit_scale": state["logit_scale"].reshape(())}
    for name, tensor in state.items():
        if name == "logit_scale":
            continue
        is_image = name.startswith("visual.")
        own = name.removeprefix("visual." if is_image else "text.")
        kind = "vision" if is_image else "text"
        if own in ("proj", "text_projection"):  # `[width, d]`; a linear layer has the transpose
            renamed[f"{'visual' if is_image else 'text'}_projection.weight"] = tensor.T.contiguous()
            continue
        for new, part in _layers(own, tensor, _IMAGE_NAMES if is_image else _TEXT_NAMES):
            renamed[f"{kind}_model.{new}"] = part
    return renamed


def _layers(name: str, tensor: Tensor, names: Mapping[str, str]) -> list[tuple[str, Tensor]]:
    """Return the new names and tensors of a tensor of a tower."""
    found = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)", name)
    if found is None:
        return [(names[name], tensor)]
    layer, part, kind = found.groups()
    prefix = f"encoder.layers.{layer}"
    if part == "attn.in_proj":
        parts = zip("qkv", tensor.chunk(3), strict=True)
        return [(f"{prefix}.self_attn.{which}_proj.{kind}", piece.contiguous()) for which, piece in parts]
    return [(f"{prefix}.{_LAYER[part]}.{kind}", tensor)]


def _write_preprocessor(preprocessing: Mapping[str, Any], size: int, folder: Path) -> None:
    square = {"height": size, "width": size}
    squash = preprocessing.get("resize_mode") == "squash"
    write_json(
        {
            "image_processor_type": "CLIPImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": square if squash else {"shortest_edge": size},
            "resample": _PILLOW[preprocessing.get("interpolation", "bicubic")],
            "do_center_crop": True,
            "crop_size": square,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(preprocessing["mean"]),
            "image_std": list(preprocessing["std"]),
        },
        folder / "preprocessor_config.json",
    )


@cache
def _tokenizer() -> SimpleTokenizer:
    return SimpleTokenizer()


@cache
def _vocabulary() -> tuple[str, str]:
    """Return `vocab.json` and `merges.txt`: open_clip's, under transformers' names of the special tokens."""
    tokenizer = _tokenizer()
    merges = ["#version: 0.2", *(" ".join(pair) for pair in tokenizer.bpe_ranks)]
    tokens = {_SPECIAL.get(token, token): i for token, i in tokenizer.encoder.items()}
    return json.dumps(tokens), "\n".join(merges) + "\n"


def _write_tokenizer(context_length: int, folder: Path) -> None:
    """Write open_clip's tokenizer as one of transformers."""
    for name, text in zip(("vocab.json", "merges.txt"), _vocabulary(), strict=True):
        (folder / name).write_text(text, encoding="utf-8")
    start, end = _SPECIAL.values()
    tokens = {
        "bos_token": start,
        **dict.fromkeys(("eos_token", "pad_token", "unk_token"), end),
    }
    write_json(
        {"tokenizer_class": "CLIPTokenizer", "model_max_length": context_length, **tokens},
        folder / "tokenizer_config.json",
    )
