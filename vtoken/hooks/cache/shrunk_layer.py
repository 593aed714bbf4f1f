"""What a cache stage left in a layer, for the trace."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vtoken.hooks.state.live_tokens import LiveTokens
from vtoken.hooks.state.prompt_rows import PromptRow
from vtoken.hooks.state.run import Clock
from vtoken.hooks.state.trace import StageTrace
from vtoken.stages import Stage
from vtoken.stages.cache import HeadClasses


@dataclass(frozen=True)
class ShrunkLayer:
    """What a stage left in a layer.

    Attributes:
        group: first layer of the layer group.
        rows: the rows of the prompt as they were left.
        kept: per row, the slots [Hk, C] of its prompt that stay, or classes of heads; None: everything, or not known.
        known: whether it is known which tokens are left.
        live: the visual tokens in front of the layer.
    """

    group: int
    rows: tuple[PromptRow, ...]
    kept: tuple[Tensor | HeadClasses | None, ...]
    known: bool
    live: LiveTokens
    clock: Clock

    @cached_property
    def alive(self) -> list[tuple[Tensor, Tensor]]:
        """Per image, raster indices [N] of its tokens in front of this layer, and [Hk, N] which of them each KV head
        holds; empty where that is not known."""
        found, images = [], iter(self.live.history.kept())
        for row, kept in zip(self.rows, self.kept, strict=True):
            for slots in row.slots if self.known else ():
                index = next(images)
                alive = torch.ones(1, len(index), dtype=torch.bool, device=index.device)
                if kept is not None:
                    alive = every(kept, row.prompt)[:, list(slots)]
                found.append((index, alive))
        return found

    def trace(self, stage: Stage, layer: int) -> StageTrace:
        """What the stage did at the layer; which tokens are left is worked out when it is read."""

        def kept() -> list[Tensor]:
            return [index[alive.any(0).to(index.device)] for index, alive in self.alive]

        def left() -> list[int]:
            return [round(float(alive.float().sum(1).mean())) for _, alive in self.alive]

        later: dict[str, Any] = {"tokens_out": left, "kept": kept}
        lengths, clock = list(self.live.lengths), self.clock.milliseconds
        return StageTrace(stage.name, "cache", lengths, **later, layer=layer, clock=clock)


def every(kept: Tensor | HeadClasses, prompt: int) -> Tensor:
    """[Hk, N] which of the `prompt` tokens each KV head holds."""
    if isinstance(kept, Tensor):
        return torch.zeros(len(kept), prompt, dtype=torch.bool, device=kept.device).scatter(1, kept, True)
    heads = torch.cat([each.heads for each in kept.classes])
    out, begin = torch.zeros(len(heads), prompt, dtype=torch.bool, device=heads.device), 0
    for each in kept.classes:
        for index in (each.stay, each.latest):
            out[begin : begin + len(each.heads)].scatter_(1, index.expand(len(each.heads), -1), True)
        begin += len(each.heads)
    return out[heads.argsort()]
