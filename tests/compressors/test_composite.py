"""composite_attention in whole models, against stock models whose attention is given the mask."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from modes import greedy
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

import vtoken

NAME = "composite_stand_in"
SEEN: dict[str, Any] = {}


def attend(
    module: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout: float = 0.0,
    *,
    scaling: float,
    **kwargs: Any,
) -> Any:
    """Attention under the mask, and among the prompt's visual tokens only to oneself in the layers of SEEN."""
    n, m = q.shape[2], k.shape[2]
    seen = torch.ones(n, m, dtype=torch.bool).tril(m - n) if mask is None else mask[..., :m]
    if n > 1 and module.layer_idx in SEEN["layers"]:
        visual, text = SEEN["visual"], ~SEEN["visual"]
        other = visual if SEEN["prefix"] else visual | text
        lost = visual[:, None, :, None] & other[:, None, None, :] & ~torch.eye(n, dtype=torch.bool)
        seen = seen & ~lost
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scaling).transpose(1, 2), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("family", tiny.families(anyres=False, states=(), both_ways=False))
def test_equals_a_stock_model_under_the_mask(family, prefix):
    model = tiny.make(family)
    batch = tiny.build(model, [[5, "img", 4, "img", 3], [2, "img", 6], [4]], seed=3)
    options = {"return_dict_in_generate": True, "output_logits": True}
    with vtoken.wrapped(model, [{"composite_attention": {"first": 1, "dense_layers": [2], "prefix": prefix}}]):
        got = greedy(model, batch, n=3, **options)
        entries = [s for s in vtoken.trace(model).stages if s.stood_aside is None]
        assert [s.layer for s in entries] == [1, 3]
    SEEN.update(visual=batch["input_ids"] == model.config.image_token_id, layers=(1, 3), prefix=prefix)
    model.get_decoder().config._attn_implementation = NAME
    want = greedy(model, batch, n=3, **options)
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), atol=1e-4, rtol=1e-4)
    SEEN["layers"] = ()
    dense = greedy(model, batch, n=3, **options)
    assert not torch.allclose(dense.logits[0], want.logits[0], atol=1e-3)
