"""Packed towers with vtoken's hooks on."""

from __future__ import annotations

import tiny
import torch

from vtoken import registry
from vtoken.hooks.state.context import Context
from vtoken.hooks.state.run import FeatureCall
from vtoken.hooks.vision.varlen_tower import VarlenTower
from vtoken.stages import Fact

IMAGES = [[1, 6, 10], [1, 4, 4], [1, 10, 6]]  # in patches; windows of Qwen2.5-VL are 4 x 4
VIDEOS = [[3, 4, 6], [1, 6, 4]]


def pictures(grids, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sum(t * h * w for t, h, w in grids), 3 * 2 * 14 * 14, generator=generator), torch.tensor(grids)


class Hooked:
    """A tiny model with the hooks on, and what they found in the last call."""

    def __init__(self, family, attn="sdpa", wanted=(), stages=()):
        self.model = tiny.make(family, attn)
        self.adapter = registry.adapter(family)(self.model)
        context = Context(self.adapter, stages=tuple(stages), read=frozenset(Fact(*w) for w in wanted))
        self.run, self.handle = context.run, context.handle
        VarlenTower(context)

    @torch.no_grad()
    def __call__(self, pixels, grid, kind=None):
        kind = kind or ("video" if (grid[:, 0] > 1).any() else "image")
        # Some families hand the tower every frame as a picture of its own.
        self.run.call = FeatureCall(kind, {}, self.adapter.rasters(grid.tolist()))
        try:
            out = getattr(self.model.model, f"get_{kind}_features")(pixels, grid, return_dict=True)
        finally:
            self.run.call = None
        self.taps = [
            t if isinstance(t, torch.Tensor) else torch.cat(list(t)) for t in getattr(out, "deepstack_features", ())
        ]
        return torch.cat(list(out.pooler_output))
