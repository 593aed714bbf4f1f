"""A tap on the decoder's attention, layer by layer, that leaves the model's own backend in charge.

Each tapped module gets a shadow config that differs only in the name of its attention implementation. Masks are made from the real config,
so they keep the backend's format, and nothing global changes.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vtoken.hooks.flow import Prefill, eager
from vtoken.hooks.handle import Handle
from vtoken.kernels import query_attention
from vtoken.run import Run
from vtoken.stages import Fact, offsets_of

NAME = "vtoken"
# fn(module, q, k, v, mask, original, **kwargs) -> (output, weights); q and k carry RoPE, k and v include the cache.
Tap = Callable[..., tuple[Tensor, Tensor | None]]


def tap(handle: Handle, lm: Any, layers: Iterable[int], function: Tap) -> None:
    """Sends the attention of these decoder layers through `function`, which may call `original()`."""
    AttentionInterface.register(NAME, _dispatch)
    for layer in layers:
        module = lm.layers[layer].self_attn
        shadow = copy.copy(module.config)
        shadow._attn_implementation_internal = NAME
        handle.set(module, "vtoken_tap", (function, module.config))
        handle.set(module, "config", shadow)


def _dispatch(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
    function, config = module.vtoken_tap
    name = config._attn_implementation

    def original(q: Tensor = q, k: Tensor = k, v: Tensor = v, mask: Any = mask) -> Any:
        attend = ALL_ATTENTION_FUNCTIONS.get(name) or sys.modules[type(module).__module__].eager_attention_forward
        if "flash" not in name:
            return attend(module, q, k, v, mask, **kwargs)
        # The flash wrapper reads the implementation from module.config, so it sees a stand-in with the real one.
        return attend(_WithConfig(module, config), q, k, v, mask, **kwargs)

    return function(module, q, k, v, mask, original, **kwargs)


class _WithConfig:
    """A module as attention functions see it, with another config; the module itself is not written to (threads share it)."""

    def __init__(self, module: Any, config: Any) -> None:
        self._module, self.config = module, config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def last_query(run: Run) -> Tap:
    """Keeps the attention of the last prompt token over all slots, head mean, as the fact `last_query_attention` [B, slots].

    With `logits_to_keep` = n > 1 (drafts of assisted generation, an answer that is scored) the last prompt token is the first of
    those n positions, so the decision is the one that `generate` makes.
    """

    def function(
        module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, original: Callable[..., Any], **kwargs: Any
    ) -> Any:
        if q.shape[2] > 1:
            _keep_last(run, module.layer_idx, q, k, kwargs.get("scaling") or k.shape[-1] ** -0.5)
        return original()

    return function


@eager
@torch.no_grad()
def _keep_last(run: Run, layer: int, q: Tensor, k: Tensor, scale: float) -> None:
    """Stores the fact of a layer from its q and k [B, H, ., d]; without gradients, because a layer that checkpointing runs again does
    not store it again."""
    flow = run.flow
    if not isinstance(flow, Prefill):
        return
    # A static cache hands out all its slots; only those filled so far count.
    k = k[:, :, : flow.slots]
    ok = torch.ones(len(k), flow.slots, dtype=torch.bool) if flow.ok is None else flow.ok.bool()
    ok = ok.to(k.device)
    if flow.tail:
        ok = ok.index_fill(1, torch.arange(flow.slots - flow.tail, flow.slots, device=k.device), False)
    one_each = torch.arange(len(k) + 1, dtype=torch.int32, device=k.device)
    offsets = offsets_of(ok.sum(1).tolist(), k.device)
    packed = query_attention(q[:, :, -1 - flow.tail], k.transpose(1, 2)[ok], one_each, offsets, scale)
    flow.facts[Fact("last_query_attention", layer)] = packed.new_zeros(ok.shape).masked_scatter(ok, packed)
