"""What the tiny random-weight VLMs are made of (`families/` has them): under a second each on one core.

Towers and decoders have 4 layers of width 32 and 14 px patches. The LLaVA family cuts 56 px crops (16 visual tokens
each, a 4 x 4 raster); Qwen merges 2 x 2 patches into a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

IMG, VID, VISION_START, VISION_END = 190, 191, 192, 193  # ids of the placeholders; text is drawn from below them
VOCAB = 200
PAD = 0
TOKENS = 16  # visual tokens per image of LLaVA
GRID = (1, 4, 4)
SIZE, PATCH = 56, 14

TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": SIZE,
    "patch_size": PATCH,
}
# CLIP has a CLS token that LLaVA drops, SigLIP has none. Features come from the last layer but one, and from the last.
TOWERS: dict[str, dict[str, Any]] = {
    "clip": {
        "vision_config": {"model_type": "clip_vision_model", **VISION},
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    },
    "siglip": {
        "vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False, **VISION},
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    },
    "pixtral": {
        "vision_config": {"model_type": "pixtral", **VISION},
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    },
}
PINPOINTS = [[56, 112], [112, 56], [112, 112]]
# What a processor of a model with CLIP is told.
CLIP = {"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}


def finish(kind: Any, config: Any, attn: str, seed: int, never: Sequence[int]) -> Any:
    """The model of a config with random weights, whose answers never hold the ids `never`.

    Experts of a mixture multiply token by token: transformers' default multiplies all tokens of an expert at once, and
    some CPUs round by how many they are, so that what padding holds would change the last bits of other rows.
    """
    config._attn_implementation = attn
    config._experts_implementation = "batched_mm"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config)
        _boost(model)
    model.train(False)
    with torch.no_grad():
        model.lm_head.weight[list(never)] = 0  # never sample a placeholder
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model


def _boost(model: PreTrainedModel) -> None:
    """Stock initialisation gives about the same logits for every input: make matrices large enough to matter."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim >= 2:
                weight.normal_(0, 1.0 if "embed_tokens" in name else 0.3)
