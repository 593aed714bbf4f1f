"""Built-in configs: the models they describe build, have the right size and cost what the account claims."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flop_counts import CLOSE, counted
from transformers import AutoModelForImageTextToText, DynamicCache

from vtoken.evals.cost.flops import account
from vtoken.evals.shared.configs import builtin, resolve_config

# Parameters in millions: what a typing error in a config would change.
PARAMETERS = {
    "llava-hf/llava-1.5-7b-hf": 7063,
    "llava-hf/llava-1.5-13b-hf": 13351,
    "llava-hf/bakLlava-v1-hf": 7567,
    "xtuner/llava-llama-3-8b-v1_1-transformers": 8355,
    "llava-hf/llava-v1.6-vicuna-7b-hf": 7063,
    "llava-hf/llava-v1.6-mistral-7b-hf": 7567,
    "llava-hf/llava-onevision-qwen2-0.5b-ov-hf": 894,
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": 8031,
    "Qwen/Qwen2-VL-2B-Instruct": 2209,
    "Qwen/Qwen2-VL-7B-Instruct": 8291,
    "Qwen/Qwen2.5-VL-3B-Instruct": 3755,
    "Qwen/Qwen2.5-VL-7B-Instruct": 8292,
    "Qwen/Qwen2.5-VL-32B-Instruct": 33453,
    "Qwen/Qwen3-VL-2B-Instruct": 2128,
    "Qwen/Qwen3-VL-4B-Instruct": 4438,
    "Qwen/Qwen3-VL-8B-Instruct": 8767,
}


def test_every_config_is_here() -> None:
    assert set(builtin()) == set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_builtin_config(name: str) -> None:
    config: Any = resolve_config(name)
    dense = account(config)
    assert dense.dtype_bytes == 2
    with torch.device("meta"):
        model: Any = AutoModelForImageTextToText.from_config(config)
    assert round(sum(p.numel() for p in set(model.parameters())) / 1e6) == PARAMETERS[name]
    ids = torch.full((1, 64 + dense.visual_entry + dense.newline_entry), 5, device="meta")
    layers = counted(lambda: model.model.language_model(input_ids=ids, past_key_values=DynamicCache()))
    head = 2 * model.lm_head.weight.numel()
    assert dense.prefill_linear + dense.prefill_attention == pytest.approx(layers + head, rel=CLOSE)
    if config.model_type == "llava":
        assert dense.visual_entry == 576
        tower = counted(lambda: model.get_image_features(torch.empty(1, 3, 336, 336, device="meta")))
        assert dense.tower + dense.projector == pytest.approx(tower, rel=CLOSE)
