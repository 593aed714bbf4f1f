"""In front of a vision tower of variable length: stages choose by pixels the tokens that its layers see.

Stages see every token's pixels. What they drop is embedded and then left out, so that the layers run on the rest, each
at its own place. Videos keep all their tokens: their frames are chosen at site frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vtoken.errors import UnsupportedError
from vtoken.hooks.state.decide import decide
from vtoken.hooks.state.live_tokens import trace_of
from vtoken.hooks.state.run import Clock
from vtoken.hooks.state.token_history import TokenHistory
from vtoken.hooks.state.trace import StageTrace
from vtoken.hooks.vision.frames import chooses
from vtoken.hooks.vision.pixel_stages import parted
from vtoken.stages import Stage, VisualTokens

# Some of every picture must be left.
of_pictures = partial(chooses, one="token", whole="picture")


def check_pixels(stages: Sequence[Stage], adapter: Any) -> None:
    """Refuses stages of site pixels where the tower does not take pictures of any size as one sequence, and one that
    resizes pictures after another stage of that site.

    Raises:
        UnsupportedError: names the stage, the reason and what works.
    """
    resizers, others = parted(stages)
    if stages and resizers not in ([], [stages[0]]):
        raise UnsupportedError(
            f"stage {resizers[-1].name} resizes pictures, which must come first, and once; {stages[0].name} stands "
            "before it"
        )
    if adapter.encoder.by_rows or adapter.encoder.by_grids:
        how, instead = "holds pictures row by row", "make pictures smaller before the processor"
    elif adapter.encoder.packed:
        return
    elif adapter.encoder.sized:
        how, instead = "pads crops of their own sizes", "make pictures smaller before the processor"
    else:
        how = "takes crops of one fixed size, to which a smaller picture would be brought back"
        instead = "pool averages neighbouring tokens instead"
    for stage in stages:
        raise UnsupportedError(
            f"stage {stage.name} acts on pixels before the vision tower, and that of {adapter.model_type} {how}; "
            f"{'use a stage of site encoder or tokens' if stage in others else instead}"
        )


def by_channel(pixels: Tensor, unit: int, area: int) -> Tensor:
    """[ΣN, C*unit*area]: the pixels of each token, channel by channel; its `unit` patches follow each other in pixels
    [unit*ΣN, C*area]."""
    return pixels.detach().unflatten(1, (-1, area)).unflatten(0, (-1, unit)).transpose(1, 2).flatten(1)


def choose(tower: Any, stages: Sequence[Stage], x: Tensor, still: bool) -> None:
    """Lets the stages choose among the tokens x [ΣN, P] of a packed tower, and enters into its state what is left.

    Args:
        still: the tokens are of pictures, not of videos (which keep all).

    Raises:
        ValueError: a stage left a picture without tokens, or merged some.
    """
    n = len(tower.layouts)
    acts = still and not (len(tower.skipped) == n and all(tower.skipped))
    for stage in stages:
        history: TokenHistory = tower.history
        if not acts:
            tower.traces.append(idle(stage, history))
            continue
        parts = [layout.parts for layout in tower.layouts]
        tokens = VisualTokens.pack(x[history.places], history.counts, parts, range(n), history.raster_index)
        found = decide(stage, tokens, history, skipped=tower.skipped, amend=partial(of_pictures, stage))
        tower.history = found.history
        tower.traces.append(found.trace)
    token = tower.history.places
    tower.live = token[tower.slot[token].argsort()]


def idle(stage: Stage, history: TokenHistory) -> StageTrace:
    """The entry of a stage that had nothing to decide."""
    with Clock(torch.device("cpu")) as clock:
        return trace_of(stage, history.counts, history, clock, None)
