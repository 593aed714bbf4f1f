"""The one decision protocol: a stage chooses, and its choice is timed, checked and traced, wherever it acts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from vtoken.hooks.state.live_tokens import check, skipped_entry, trace_of
from vtoken.hooks.state.run import Clock
from vtoken.hooks.state.token_history import TokenHistory
from vtoken.hooks.state.trace import StageTrace
from vtoken.stages import Keep, Stage, VisualTokens, keep_all

STILLS = "it works on videos, and leaves pictures whole"


@dataclass(frozen=True)
class Decision:
    """A decision, the history of every token after it, and its entry in the trace."""

    keep: Keep
    history: TokenHistory
    trace: StageTrace
    untouched: bool


def decide(
    stage: Stage,
    tokens: VisualTokens,
    history: TokenHistory,
    *,
    skipped: Sequence[bool] = (),
    amend: Callable[[Keep], Keep] | None = None,
    substitutes: Mapping[str, str] | None = None,
) -> Decision:
    """Lets a stage choose among the live tokens.

    Args:
        history: what became of all tokens so far.
        skipped: per image, whether it keeps all its tokens; empty when none does. The stage is given these images all
            the same, so that facts and budgets need no cutting.
        amend: enforces on a decision what must be true of all decisions here.
        substitutes: fact asked for -> fact given in its place.

    Raises:
        ValueError: the decision does not fit its tokens.
    """
    if stage.videos_only and all(parts[0][0] == 1 for parts in tokens.parts):
        entry = skipped_entry(stage, history, STILLS, tokens.layer)
        entry.substitutes = dict(substitutes or {})
        return Decision(keep_all(tokens), history, entry, True)
    with Clock(tokens.x.device) as clock:
        keep = stage.select(tokens)
    check(stage, keep, tokens.lengths)
    if any(skipped):
        keep = keep.skipping(tokens.lengths, skipped)
    if amend is not None:
        keep = amend(keep)
    untouched = keep.into is None and keep.lengths == tuple(tokens.lengths)
    if not untouched:
        history = history.advance(keep)
    entry = trace_of(stage, tokens.lengths, history, clock, tokens.layer, dict(substitutes or {}))
    return Decision(keep, history, entry, untouched)
