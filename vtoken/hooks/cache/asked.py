"""What a cache stage asks for beside keys, values and queries."""

from __future__ import annotations

from typing import Any

import torch

from vtoken.hooks.decoder.rotation import rope_of
from vtoken.hooks.state.prefill_state import PrefillState
from vtoken.hooks.state.prompt_rows import rasters
from vtoken.stages.cache import CacheStage, Native, Places


def asked(
    stage: CacheStage, flow: PrefillState, module: Any, row: int, here: slice, device: torch.device, rotary: Any
) -> dict[str, Any]:
    """Fields of CachedLayer for a row whose prompt stands in the slots `here` of this prefill.

    Args:
        module: the layer's attention; rotary: the model's RoPE module, None if it has several axes.
    """
    found: dict[str, Any] = {}
    if stage.native:
        assert flow.notes.layer_input is not None
        hidden, rope = flow.notes.layer_input
        cos, sin = (t[(row if len(t) > 1 else 0), here][None] for t in rope)
        found["native"] = Native(module, hidden[row : row + 1, here], (cos, sin), rotary)
    if stage.rope:
        found["rope"] = rope_of(flow, module, row, here, device)
    if stage.places:
        image, raster_index, known = rasters(flow)
        image, raster_index = (x[row, here].to(device) for x in (image, raster_index))
        found["places"] = Places(image, raster_index, flow.live.parts, known[row])
    return found
