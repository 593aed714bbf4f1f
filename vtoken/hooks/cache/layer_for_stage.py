"""What a cache stage gets to see of a layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vtoken.hooks.cache.cached_rows import prompt_in
from vtoken.hooks.decoder.attention_tap import AttentionCall
from vtoken.hooks.decoder.rotation import rope_of
from vtoken.hooks.state.context import Context
from vtoken.hooks.state.prefill_state import PrefillState
from vtoken.hooks.state.prompt_rows import prompt_rows, rasters
from vtoken.stages.cache import CachedLayer, CacheStage, Native, Places


def layer_for(
    stage: CacheStage,
    context: Context,
    flow: PrefillState,
    call: AttentionCall,
    rows: slice,
    keys: Tensor,
    values: Tensor,
) -> CachedLayer | None:
    """A layer as the stage sees it; None where the stage does not act.

    Args:
        rows: the rows that are decided together: one, or several of equal shape.
        keys, values: [heads, N, d] of their prompts.
    """
    r, row = rows.start, prompt_rows(flow)[rows.start]
    if not any(row.slots) or r in flow.skipped:
        return None
    here = prompt_in(row, flow.index.shape[1])
    more: dict[str, Any] = {}
    if stage.native:
        assert flow.notes.layer_input is not None
        hidden, rope = flow.notes.layer_input
        cos, sin = (t[(r if len(t) > 1 else 0), here][None] for t in rope)
        rotary = None if context.adapter.mrope else context.lm.rotary_emb
        more["native"] = Native(call.module, hidden[r : r + 1, here], (cos, sin), rotary)
    if stage.rope:
        more["rope"] = rope_of(flow, call.module, r, here, keys.device)
    if stage.places:
        image, raster_index, known = rasters(flow)
        image, raster_index = (x[r, here].to(keys.device) for x in (image, raster_index))
        more["places"] = Places(image, raster_index, flow.live.parts, known[r])
    return CachedLayer(
        keys,
        values,
        call.q[rows, :, here].flatten(0, 1),
        tuple(slots.to(keys.device) for slots in row.images),
        row.slots,
        call.scale,
        call.layer,
        context.depth,
        query_attention=flow.notes.query_attention.pop((call.layer, r), None),
        attending=context.attending,
        **more,
    )
