"""Models with LoRA, and what they answer."""

from __future__ import annotations

import pytest
import torch
from modes import LOGITS, greedy

import vtoken

peft = pytest.importorskip("peft")


def lora(model):
    """Random LoRA matrices on all projections of tower and decoder, large enough to change scores."""
    names = "q_proj|k_proj|v_proj|qkv|fc1|linear_fc1"
    settings = peft.LoraConfig(r=4, target_modules=rf".*\.({names})", init_lora_weights=False)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, settings)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.mul_(8)
    return adapted.train(False)


def outcome(model, batch):
    out = greedy(model, batch, 3, **LOGITS)
    return torch.stack(out.logits), [k.tolist() for k in vtoken.trace(model).kept]


def same(a, b):
    torch.testing.assert_close(a[0], b[0], atol=1e-5, rtol=1e-5)
    assert a[1] == b[1]
