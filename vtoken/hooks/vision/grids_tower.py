"""Inside a packed vision tower whose sequence holds every image row by row, while bounds keep images apart
(PaddleOCR-VL). A projector joins patches to tokens by the grids of the images."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vtoken.hooks.state.run import ImageLayout
from vtoken.hooks.vision.rows_tower import RowsTower
from vtoken.stages import Fact, offsets_of


class GridsTower(RowsTower):
    """See `RowsTower`: once anything was dropped, what is left lies token by token here too."""

    def _start(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        pixels, call = args[0] if args else kwargs["pixel_values"], self.run.call
        layouts: tuple[ImageLayout, ...]
        layouts = self.adapter.rasters(kwargs["grid_thw"].tolist()) if call is None else call.layouts
        self._enter(layouts, pixels.device)
        if self.pixels:
            patches = pixels.detach().float().flatten(0, 1).flatten(1)
            self.state.facts[Fact("pixels")] = self._groups(patches).flatten(1)

    def _survivors(self, layer: int, hidden: Tensor, kwargs: dict) -> dict[str, Any]:
        state, unit = self.state, self.encoder.unit
        if not state.cut:
            return {}
        if state.rotary is None:
            rows = state.patches.unflatten(0, (-1, unit))[state.live].flatten()
            state.rotary = tuple(half[rows.to(half.device)] for half in kwargs["position_embeddings"])
            lengths = [n * unit for n in state.history.counts if n]
            state.bounds[True] = offsets_of(lengths, hidden.device).to(kwargs["cu_seqlens"]), max(lengths)
        bounds, longest = state.bounds[True]
        found = {"position_embeddings": state.rotary, "cu_seqlens": bounds}
        return found if kwargs.get("max_seqlen") is None else {**found, "max_seqlen": longest}

    def _one_wide(self, sizes: Any) -> Any:
        return sizes.new_tensor([[len(self.state.live), self.side, self.side]])
