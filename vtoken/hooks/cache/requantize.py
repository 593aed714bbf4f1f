"""Quantised caches: tokens behind the prompt are quantised too, `requantize_every` at a time."""

from __future__ import annotations

from typing import Any

import torch

from vtoken.hooks.decoder.attention_tap import AttentionCall, tap
from vtoken.hooks.state.context import Context
from vtoken.hooks.state.prefill_state import PrefillState
from vtoken.hooks.state.quantized_layer import Block, Piece, Plain, QuantizedLayer
from vtoken.stages.cache import CacheStage, GeneratedBlock


class Requantizer:
    """A tap on every decoder layer with attention."""

    def __init__(self, context: Context, stage: CacheStage) -> None:
        self.run, self.stage, self.requantize_every = context.run, stage, stage.requantize_every() or 0
        tap(context.handle, context.lm, context.attending, self._tap)

    def _tap(self, call: AttentionCall) -> Any:
        out = call.original()
        cached = None if self.run.cache is None else self.run.cache.layers[call.layer]
        if isinstance(cached, QuantizedLayer) and not isinstance(self.run.flow, PrefillState):
            # The first query of this forward is sure to stay; what comes behind it may be drafts.
            if cached.tail[0].shape[2] - call.q.shape[2] + 1 >= self.requantize_every:
                self._quantize(cached, call)
        return out

    @torch.no_grad()
    def _quantize(self, cached: QuantizedLayer, call: AttentionCall) -> None:
        packs = [any(row) for row in zip(*(block.packed() for block in cached.blocks), strict=True)]
        if not any(packs):
            return  # cropped away
        q, k, v = call.q, call.k, call.v
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
            rows.append((self.stage.requantize(GeneratedBlock(keys, values, q[r, :, 0], at, call.scale, call.layer)),))
        cached.blocks = (*cached.blocks, Block(tuple(rows)))
        keys, values = cached.tail
        cached.tail = keys[:, :, self.requantize_every :].clone(), values[:, :, self.requantize_every :].clone()
