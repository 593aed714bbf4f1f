"""DPN with its trained routers: the question decides how far visual tokens are pooled."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import ClassVar

import torch
from pydantic import Field, field_validator

from vtoken.compressors._cells import cells_in, pooled
from vtoken.compressors._files import Weights
from vtoken.compressors.decoder._exits import asked, last_of
from vtoken.compressors.decoder._routers import Router, chances, routers
from vtoken.stages import (
    NAMES_FILE,
    Compressor,
    Fact,
    Fused,
    Keep,
    Parts,
    Site,
    VisualTokens,
    image_of,
    keep_all,
    uploaded,
)


class DPNRouted(Compressor):
    """After each decoder layer that has a router, the mean of the row's last `read` prompt tokens goes through the
    router: a norm and two matrices with GELU between them. A softmax of its outputs at temperature 10 gives a
    probability for each of the `sizes`, and the most probable is k. The maximum over every k x k cell of the current
    grid, times that probability (even if k is 1), takes the place and position of the cell's first token. A row stays
    unchanged if one of its images has a grid of fewer than `least` cells, or a raster smaller than the largest k.

    Only for an LLM that was fine-tuned with these routers, because the probability scales what it reads. `dpn` is a
    hand-made schedule for stock models. How far tokens are pooled depends on the prompt: the plan (FLOPs) assumes no
    pooling.

    Paper: https://arxiv.org/abs/2503.20322
    """

    site: ClassVar[Site] = "decoder"
    paper: ClassVar[str] = "https://arxiv.org/abs/2503.20322"
    deviations: ClassVar[str] = (
        "The authors' checkpoints are not in the format of transformers; their routers (norm and matrix of `mlp1`, "
        "matrix of `predictor`) have to be written to a safetensors file as LAYER.norm.weight, .norm.bias, .in.weight "
        "and .out.weight, LAYER being 7, 15 and 23 in LLaVA-1.5-7B. Tried with random routers only. They read <ROUTER> "
        "tokens that they append to the prompt: append them and set `read` to their number. Original positions "
        "(positions: compact has theirs); edges of a grid are kept; the images of a row share one choice."
    )

    routers: str = Field(
        description="safetensors file with the routers that the LLM was fine-tuned with", json_schema_extra=NAMES_FILE
    )
    sizes: tuple[int, ...] = Field(
        default=(1, 2, 4),
        min_length=1,
        description="sides of the cells; a router with fewer outputs uses the first of them",
    )
    read: int = Field(default=1, ge=1, description="number of last prompt tokens whose mean the routers read")
    least: int = Field(
        default=16,
        ge=1,
        description="rows with a picture of fewer cells left stay unchanged, as in the authors' code",
    )

    @field_validator("routers")
    @classmethod
    def _readable(cls, name: str) -> str:
        routers(name)
        return name

    @field_validator("sizes")
    @classmethod
    def _positive(cls, sizes: tuple[int, ...]) -> tuple[int, ...]:
        if min(sizes) < 1:
            raise ValueError("`sizes` are sides of cells, numbers from 1 on")
        return sizes

    @cached_property
    def weights(self) -> Weights:
        """The routers, by the layer after which they are asked."""
        return Weights(routers(self.routers))

    def unload(self) -> None:
        self.weights.unload()

    def needs(self) -> tuple[Fact, ...]:
        return (Fact("later_text"),)

    def layers(self, depth: int) -> tuple[int, ...]:
        return tuple(layer + 1 for layer in self.weights.layers)

    def incompatibility(self, depth: int, width: int) -> str:
        found = {layer: Router(*router) for layer, router in self.weights.layers.items()}
        wide, outputs = ({f(r) for r in found.values()} for f in (lambda r: r.first.shape[1], lambda r: len(r.second)))
        if wide == {width} and max(found) < depth - 1 and max(outputs) <= len(self.sizes):
            return ""
        return (
            f"the routers {self.routers!r} are for layers {sorted(found)} of a decoder of width {sorted(wide)} with up "
            f"to {max(outputs)} sizes; this one has {depth} layers of width {width}, and {len(self.sizes)} sizes are "
            "given; take the routers it was fine-tuned with"
        )

    @torch.no_grad()
    def select(self, tokens: VisualTokens) -> Keep:
        assert tokens.layer is not None
        last, sides = last_of(tokens.row), tokens.memory.setdefault("sides", [1] * len(tokens.lengths))
        router = Router(*self.weights.on(tokens.layer - 1, tokens.x.device))
        sizes = self.sizes[: len(router.second)]
        fits = [self._fits(parts, side, max(sizes)) for parts, side in zip(tokens.parts, sides, strict=True)]
        rows = {k for k, ask in zip(last, asked(tokens), strict=True) if ask}
        which = sorted(k for k in rows if all(f for f, of in zip(fits, last, strict=True) if of == k))
        if not which:
            return keep_all(tokens)
        texts, factor = tokens.fact("later_text"), [1.0] * len(last)
        best = chances(router, torch.stack([texts[k][-self.read :].float().mean(0) for k in which])).max(-1)
        chosen = dict(zip(which, torch.stack([best.values, best.indices], 1).tolist(), strict=True))
        for i, k in enumerate(last):
            if k in chosen:
                factor[i], sides[i] = chosen[k][0], sides[i] * sizes[int(chosen[k][1])]
        keep = pooled(tokens, sides)
        return Keep(keep.index, keep.lengths, keep.into, fused=self._scaled(keep, factor, tokens.x.device))

    def _fits(self, parts: Parts, side: int, largest: int) -> bool:
        grids = [(-(-h // side), -(-w // side)) for _, h, w in parts]
        return cells_in(parts, side) >= self.least and all(min(grid) >= largest for grid in grids)

    def _scaled(self, keep: Keep, factor: list[float], device: torch.device) -> Fused:
        image = image_of(keep.lengths, device)
        each = uploaded(factor, device, torch.float32)[image]
        return Fused(torch.arange(len(image), device=device), each, largest=True)

    def flops(self, lengths: Sequence[int], width: int) -> int:
        """Maxima, and both matrices for one row."""
        return sum(lengths) * width + width * width // 2
