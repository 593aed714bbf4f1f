"""Built-in configs: the models they describe build, have the right size and cost what the account claims."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from flop_counts import CLOSE, counted
from transformers import AutoModelForImageTextToText, DynamicCache

from vtoken.evals.cost.flops import account
from vtoken.evals.shared.configs import builtin, resolve_config

# In millions: what a typing error in a config would change.
PARAMETERS = {name: n for family in tiny.FAMILIES for name, n in tiny.family(family).checkpoints.items()}


def test_every_config_is_here() -> None:
    assert set(builtin()) == set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_builtin_config(name: str) -> None:
    config: Any = resolve_config(name)
    dense = account(config)
    assert dense.dtype_bytes == config.dtype.itemsize
    with torch.device("meta"):
        model: Any = AutoModelForImageTextToText.from_config(config)
    assert round(sum(p.numel() for p in set(model.parameters())) / 1e6) == PARAMETERS[name]
    ids = torch.full((1, 64 + dense.visual_entry + dense.newline_entry), 5, device="meta")
    layers = counted(lambda: model.get_decoder()(input_ids=ids, past_key_values=DynamicCache(config=config)))
    head = 2 * model.lm_head.weight.numel()
    assert dense.prefill_linear + dense.prefill_attention == pytest.approx(layers + head, rel=CLOSE)
    if name in tiny.family("llava").checkpoints and config.vision_config.model_type == "clip_vision_model":
        assert dense.visual_entry == 576
        tower = counted(lambda: model.model.get_image_features(torch.empty(1, 3, 336, 336, device="meta")))
        assert dense.tower + dense.projector == pytest.approx(tower, rel=CLOSE)
