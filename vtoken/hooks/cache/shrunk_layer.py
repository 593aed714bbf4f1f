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
    """What a stage left in a layer: `held` [Hk, C] slots per row, or its classes of heads (None: all of them, or the
    stage does not tell), out of `live`, in the layer group `group`."""

    group: int
    rows: tuple[PromptRow, ...]
    held: tuple[Tensor | HeadClasses | None, ...]
    told: bool
    live: LiveTokens
    clock: Clock

    @cached_property
    def alive(self) -> list[tuple[Tensor, Tensor]]:
        """Per image, raster indices [N] of its tokens in front of this layer, and [Hk, N] which of them each KV head
        holds; empty where a method does not tell."""
        found, images = [], iter(self.live.history.kept())
        for row, held in zip(self.rows, self.held, strict=True):
            for slots in row.slots if self.told else ():
                index = next(images)
                alive = torch.ones(1, len(index), dtype=torch.bool, device=index.device)
                if held is not None:
                    alive = every(held, row.prompt)[:, list(slots)]
                found.append((index, alive))
        return found

    def trace(self, stage: Stage, layer: int) -> StageTrace:
        """What the stage did at the layer; which tokens are left is worked out when it is read."""

        def kept() -> list[Tensor]:
            return [index[alive.any(0).to(index.device)] for index, alive in self.alive]

        def left() -> list[int]:
            return [round(float(alive.float().sum(1).mean())) for _, alive in self.alive]

        told: dict[str, Any] = {"tokens_in": list(self.live.lengths), "tokens_out": left, "kept": kept}
        return StageTrace(stage.name, "cache", **told, layer=layer, clock=self.clock.milliseconds)


def every(held: Tensor | HeadClasses, prompt: int) -> Tensor:
    """[Hk, N] which tokens of a prompt every KV head holds."""
    if isinstance(held, Tensor):
        return torch.zeros(len(held), prompt, dtype=torch.bool, device=held.device).scatter(1, held, True)
    heads = torch.cat([each.heads for each in held.classes])
    out, begin = torch.zeros(len(heads), prompt, dtype=torch.bool, device=heads.device), 0
    for each in held.classes:
        for index in (each.stay, each.latest):
            out[begin : begin + len(each.heads)].scatter_(1, index.expand(len(each.heads), -1), True)
        begin += len(each.heads)
    return out[heads.argsort()]
