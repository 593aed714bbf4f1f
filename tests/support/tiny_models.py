"""Tiny random-weight VLMs of every family, without downloads: under a second each on one core.

Towers and decoders have 4 layers of width 32 and 14 px patches. The LLaVA family cuts 56 px crops (16 visual tokens each, a
4 x 4 raster); Qwen merges 2 x 2 patches into a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import transformers
from transformers import LlavaConfig, LlavaForConditionalGeneration, PreTrainedModel

FAMILIES = (
    "llava",
    "llava_next",
    "llava_onevision",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
)  # names as config.model_type
VIDEO = ("llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")

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
}
PINPOINTS = [[56, 112], [112, 56], [112, 112]]
QWEN_VISION = {
    "depth": 4,
    "num_heads": 4,
    "hidden_size": 32,
    "patch_size": PATCH,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
QWEN2_5_VISION = {
    "out_hidden_size": 32,
    "intermediate_size": 64,
    "window_size": 56,  # 2 x 2 tokens
    "fullatt_block_indexes": [1, 3],
    "tokens_per_second": 2,
}
QWEN3_VISION = {
    "out_hidden_size": 32,
    "intermediate_size": 64,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0, 1],
}
QWEN_IDS = {
    "image_token_id": IMG,
    "video_token_id": VID,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}


def make(family: str, attn: str = "sdpa", seed: int = 0, **text_overrides: Any) -> PreTrainedModel:
    """A model of a family, in evaluation mode, float32 on the CPU: the same weights for the same arguments, whatever ran before.

    Args:
        family: one of `FAMILIES`.
        attn: attention implementation of tower and decoder.
        seed: of the weights; torch's global generator is left as it was.
        text_overrides: fields of the decoder's config, over `TEXT`; for "llava" also `tower` and `text`, see `llava`.
    """
    if family == "llava":
        return llava(attn, seed, **text_overrides)
    text: dict[str, Any] = {**TEXT, **text_overrides}
    qwen = {**QWEN_IDS, "text_config": {"rope_parameters": MROPE, **text}}
    anyres = {"image_grid_pinpoints": PINPOINTS, "image_token_index": IMG}
    if family == "llava_next":
        name = "LlavaNext"
        fields = {"text_config": {"model_type": "llama", **text}, **TOWERS["clip"], **anyres}
    elif family == "llava_onevision":
        name = "LlavaOnevision"
        fields = {
            "text_config": {"model_type": "qwen2", **text},
            **TOWERS["siglip"],
            **anyres,
            "video_token_index": VID,
        }
        fields["vision_aspect_ratio"] = "anyres_max_2"  # pictures of more than two crops' worth of tokens are resized
    elif family == "qwen2_vl":
        name, fields = "Qwen2VL", {**qwen, "vision_config": {**QWEN_VISION, "embed_dim": 32, "mlp_ratio": 2}}
    elif family == "qwen2_5_vl":
        name, fields = "Qwen2_5_VL", {**qwen, "vision_config": {**QWEN_VISION, **QWEN2_5_VISION}}
    elif family == "qwen3_vl":
        rope = {**MROPE, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
        name, fields = "Qwen3VL", {**qwen, "vision_config": {**QWEN_VISION, **QWEN3_VISION}}
        fields["text_config"] = {"head_dim": 8, "rope_parameters": rope, **text}
    else:
        raise ValueError(f"no tiny model of family {family!r}; there are {', '.join(FAMILIES)}")
    config = getattr(transformers, f"{name}Config")(**fields, tie_word_embeddings=False, dtype="float32")
    return _finish(
        getattr(transformers, f"{name}ForConditionalGeneration"), config, attn, seed, range(IMG, VISION_END + 1)
    )


def llava(
    attn: str = "sdpa",
    seed: int = 0,
    tower: Literal["clip", "siglip"] = "clip",
    text: str = "llama",
    **text_overrides: Any,
) -> LlavaForConditionalGeneration:
    """A LLaVA, as `make` does.

    Args:
        attn: attention implementation of tower and decoder.
        seed: of the weights; torch's global generator is left as it was.
        tower: vision tower, see `TOWERS`.
        text: model_type of the decoder (llama, qwen2, mistral, ...).
        text_overrides: fields of the decoder's config, over `TEXT`.
    """
    config = LlavaConfig(
        text_config={"model_type": text, **TEXT, **text_overrides},
        image_token_index=IMG,
        image_seq_length=TOKENS,
        dtype="float32",
        **TOWERS[tower],
    )
    return _finish(LlavaForConditionalGeneration, config, attn, seed, [IMG])


def _finish(kind: Any, config: Any, attn: str, seed: int, never: Sequence[int]) -> Any:
    config._attn_implementation = attn
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
