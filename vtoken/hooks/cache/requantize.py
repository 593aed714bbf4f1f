"""Quantised caches: tokens behind the prompt are quantised too, as soon as there are enough of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vtoken.hooks.decoder.attention_tap import tap
from vtoken.hooks.state.cache_argument import CACHE
from vtoken.hooks.state.context import Context
from vtoken.hooks.state.forward_state import eager
from vtoken.hooks.state.prefill_state import PrefillState
from vtoken.hooks.state.quantized_layer import Block, Piece, Plain, QuantizedLayer
from vtoken.stages.cache import CacheStage, GeneratedBlock


class Requantizer:
    """A pre-hook on the attention of every decoder layer, which sees the cache, and a tap, which sees queries and
    keys."""

    def __init__(self, context: Context, stage: CacheStage) -> None:
        self.run, self.stage, self.requantize_every = context.run, stage, stage.requantize_every() or 0
        for k in context.attending:
            context.handle.before(context.lm.layers[k].self_attn, self._remember)
        tap(context.handle, context.lm, context.attending, self._tap)

    @eager
    def _remember(self, module: Any, args: tuple, kwargs: dict) -> None:
        self.run.due = None
        if isinstance(self.run.flow, PrefillState):
            return
        layers: Sequence[Any] = getattr(kwargs.get(CACHE), "layers", ())
        cached = layers[module.layer_idx] if len(layers) > module.layer_idx else None
        # The first query of this forward is sure to stay; what comes behind it may be drafts.
        if isinstance(cached, QuantizedLayer) and cached.tail[0].shape[2] + 1 >= self.requantize_every:
            self.run.due = cached

    def _tap(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, original: Callable[..., Any], **kwargs: Any
    ) -> Any:
        out = original()
        self._attended(module.layer_idx, q, k, v, kwargs.get("scaling") or k.shape[-1] ** -0.5)
        return out

    @eager
    @torch.no_grad()
    def _attended(self, number: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
        cached, self.run.due = self.run.due, None
        if cached is not None:
            self._pack(cached, number, q, k, v, scale)

    def _pack(self, cached: QuantizedLayer, number: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
        packs = [any(row) for row in zip(*(block.packed() for block in cached.blocks), strict=True)]
        if not any(packs):
            return  # cropped away
        begin, end = k.shape[2] - cached.tail[0].shape[2], k.shape[2] - q.shape[2] + 1
        flow, stop = self.run.flow, begin + self.requantize_every
        key_mask = None if flow is None or flow.key_mask is None else flow.key_mask.bool().to(k.device)
        if key_mask is not None and not bool(key_mask[:, end - 1].all()):
            return  # a turn of text, padded: its first query is not every row's
        rows: list[tuple[Piece, ...]] = []
        for r, packed in enumerate(packs):
            values = v[r, :, begin:stop]
            # Padding has no place among tokens that are rounded together.
            if not packed or (key_mask is not None and not bool(key_mask[r, begin:stop].all())):
                rows.append((Plain.of(k[r, :, begin:stop], values),))
                continue
            keys = k[r, :, :end] if key_mask is None else k[r, :, :end][:, key_mask[r, :end]]
            first = keys.shape[1] - (end - begin) if key_mask is None else int(key_mask[r, :begin].sum())
            at = range(first, first + self.requantize_every)
            rows.append((self.stage.requantize(GeneratedBlock(keys, values, q[r, :, 0], at, scale, number)),))
        cached.blocks = (*cached.blocks, Block(tuple(rows)))
        keys, values = cached.tail
        cached.tail = keys[:, :, self.requantize_every :].clone(), values[:, :, self.requantize_every :].clone()
