"""Runs the stages of site tokens on the packed tokens of one encoder call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from vtoken.config import Pipeline
from vtoken.hooks.state.decide import decide as decide_one
from vtoken.hooks.state.run import ImageLayout, segments
from vtoken.hooks.state.token_history import TokenHistory
from vtoken.serving import plan
from vtoken.stages import Fact, Keep, Stage, VisualTokens, place_in_image


def decide(
    pipeline: Pipeline,
    x: Tensor,
    layouts: Sequence[ImageLayout],
    read: Callable[[Fact], Any],
    *,
    project: Callable[[Tensor], Tensor] | None = None,
    agree: Callable[[Keep], Keep] | None = None,
    history: TokenHistory | None = None,
    width: int | None = None,
) -> tuple[Tensor, TokenHistory]:
    """Lets the stages choose among the visual tokens of all pictures of a call; each picture is a batch row of its own.

    Args:
        x: [ΣN, D] tokens of all pictures, without newlines.
        layouts: of every picture.
        read: returns a fact that a stage asks for: [ΣN, ...] for the rows of `x`; for `text`, one [T, D] per picture.
        project: as in Keep.apply.
        agree: applied to every decision (tensor parallel ranks take that of the first).
        history: what stages inside the tower kept, if `x` holds only that; None if `x` holds all tokens.
        width: channels of the embedding; further channels of `x` (DeepStack) are kept or merged with it. None: all.

    Returns:
        [ΣK, D] kept tokens, and what became of all tokens.

    Raises:
        RuntimeError: names a stage that kept another number of tokens than planned.
    """
    full, device = tuple(layout.tokens for layout in layouts), x.device
    if history is None:
        history = TokenHistory(full, place_in_image(full, device))
    segment, live = segments(layouts), None
    segment = None if segment is None else segment.to(device)[history.places]
    skipped = [n < pipeline.min_visual_tokens for n in full]
    planned = [plan.counts(pipeline, layout) for layout in layouts]
    for k, stage in enumerate(pipeline.stages):
        if stage.site == "tokens":
            facts = {need: _live(read(need), need, live) for need in stage.needs()}
            tokens = VisualTokens.pack(
                x[:, :width],
                history.counts,
                [layout.parts for layout in layouts],
                range(len(full)),
                history.raster_index,
                segment=segment if segment is None or live is None else segment[live],
                facts=facts,
                size=history.size,
            )
            found = decide_one(stage, tokens, history, skipped=skipped if any(skipped) else (), amend=agree)
            if not found.untouched:
                index, history = found.keep.index, found.history
                x, live = found.keep.embed(x, project), index if live is None else live[index]
        elif k + 1 < len(pipeline.stages) and pipeline.stages[k + 1].site == "encoder":
            continue  # All cuts in the tower are done: of its stages only the last can be checked.
        check_counts(stage, history.counts, [left[k] for left in planned])
    return x, history


def _live(fact: Any, need: Fact, live: Tensor | None) -> Any:
    return fact if need.name == "text" or live is None else fact[live]


def check_counts(stage: Stage, left: Sequence[int], planned: Sequence[int]) -> None:
    """Refuses counts that do not fill the placeholders already in the prompts.

    Raises:
        RuntimeError: names the stage.
    """
    if list(left) != list(planned):
        raise RuntimeError(
            f"stage {stage.name} left {list(left)} tokens of the pictures, and {list(planned)} were planned: its "
            "expected_counts() do not tell what it leaves, so it cannot be served in vLLM"
        )
