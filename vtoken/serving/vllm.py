"""vLLM's entry point (group `vllm.general_plugins`). Every process of vLLM calls it, for all users who have vtoken
installed, so it imports nothing heavy: models are named as text, and the engine imports the one it needs.

Internals of vLLM that this package uses: get_num_image_tokens, _process_image_input, _image_pixels_to_features,
_merge_image_patch_embeddings, _get_mm_hashes, _get_mm_fields_config, _call_hf_processor, _postprocess_hf_mm_data,
_cached_apply_hf_processor, qkv_proj, MMEncoderAttention. For OneVision also: _process_video_pixels, apply_pooling,
get_num_video_tokens, _get_max_video_frames, get_mm_max_tokens_per_item. For Qwen-VL: _get_prompt_updates,
get_video_repl, _process_video_input, visual.blocks[k].attn (qkv, split_qkv, apply_rotary_emb), visual.merger's norm,
get_rope_by_thw, input_norm, out_hidden_size, iter_mm_grid_thw, get_mrope_input_positions, recompute_mrope_positions,
video_pruning_rate.
"""

from __future__ import annotations

import logging

from vtoken.serving.family import families

SUPPORTED = ((0, 32), (0, 33))  # first supported version, and first untested one
LOGGER = logging.getLogger("vllm.plugins.vtoken")  # child of vLLM's own logger, which decides where it is written


def register() -> None:
    """Replaces vLLM's models by vtoken's, which behave like the stock ones if the config names no pipeline. Untested
    versions of vLLM keep their own models and get one line in the log."""
    import vllm

    low, high = SUPPORTED
    if not low <= _release(vllm.__version__) < high:
        LOGGER.warning(
            "vtoken serves vLLM %d.%d up to %d.%d, this is %s: its models stay as they are, and a pipeline in their "
            "config does nothing",
            *low,
            *high,
            vllm.__version__,
        )
        return
    for family in families().values():
        vllm.ModelRegistry.register_model(family.architecture, family.model)


def _release(version: str) -> tuple[int, ...]:
    """(0, 32) for 0.32.1+cpu; () for what is not a number, which is outside every range."""
    parts = version.split(".")[:2]
    return tuple(int(part) for part in parts) if all(part.isdigit() for part in parts) else ()
