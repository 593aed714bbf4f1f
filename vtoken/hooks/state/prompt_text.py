"""Where the text of a prompt lies among its tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from vtoken.hooks.state.prefill_state import PrefillState
from vtoken.stages import offsets_of


def answered(kinds: Tensor, new: Tensor, tail: int, labels: Tensor | None) -> Tensor | None:
    """[B, L] which tokens stand behind the prompt: drafts, or an answer that is scored; None where neither can be.

    Args:
        kinds: [B, L] kind of visual token, 0 for text; new: [B, L] what is real.
        tail: columns at the end that stand behind the prompt, read off logits_to_keep. If 0, labels tell: an answer
            begins with the first that counts (is not -100) behind the last image of its row.
    """
    if tail:
        return new & (torch.arange(new.shape[1], device=new.device) >= new.shape[1] - tail)
    if labels is None or labels.shape != new.shape:
        return None
    ahead = (kinds > 0).flip(1).cumsum(1).flip(1)
    counts = (labels.to(new.device) != -100) & new & (ahead == 0)
    return new & (counts.cumsum(1) > 0)


def text_columns(flow: PrefillState) -> Tensor:
    """[B, L] which logical columns hold text of the prompt: no newlines of images, no drafts or answer behind it."""
    text = flow.alive.clone()
    text[flow.started.batch_row, flow.started.column] = False
    newlines = flow.spans.newlines
    if newlines is not None:
        text[newlines.batch_row, newlines.column] = False
    return text if flow.answer is None else text & ~flow.answer


def text_slots(flow: PrefillState) -> Tensor:
    """[B, P] which slots of the current layout hold text of the prompt."""
    return text_columns(flow).gather(1, flow.index) & flow.valid


def text_at(flow: PrefillState) -> list[Tensor]:
    """Per row, the slots [T] of its text tokens in the current layout."""
    first = text_slots(flow).byte().argsort(dim=1, descending=True, stable=True)
    return [row[:n] for row, n in zip(first, flow.texts, strict=True)]


def text_of(flow: PrefillState, values: Tensor) -> list[Tensor]:
    """Per row, the values [B, P, ...] of its text tokens."""
    return [row[at.to(values.device)] for row, at in zip(values, text_at(flow), strict=True)]


def later_text(flow: PrefillState, values: Tensor) -> list[Tensor]:
    """Per image, the values [B, P, ...] of its row's text tokens that stand behind it."""
    rows, v = text_of(flow, values), flow.raster
    return [rows[row][n:] for row, n in zip(v.row, text_before(flow), strict=True)]


def text_before(flow: PrefillState) -> list[int]:
    """Per image, how many of its row's text tokens stand before its last token. Asks the device once."""
    if flow.before is None:
        v = flow.raster
        last = offsets_of(v.lengths, v.batch_row.device)[1:].long() - 1
        flow.before = text_columns(flow).cumsum(1)[v.batch_row[last], v.column[last]].tolist()
    return flow.before


def dropped_slots(flow: PrefillState) -> Tensor:
    """[B, P] slots of the current layout whose token was dropped since the layout was made."""
    return ~flow.left().gather(1, flow.index) & flow.valid
