"""Where the text of a prompt lies among its tokens."""

from __future__ import annotations

from torch import Tensor

from vtoken.hooks.flow import Prefill
from vtoken.stages import offsets_of


def text_columns(flow: Prefill) -> Tensor:
    """[B, L] which of the newest logical tokens are text of the prompt: no newlines of images, no drafts or answer behind it."""
    text = flow.alive.clone()
    text[flow.started.line, flow.started.column] = False
    newlines = flow.located.newlines
    if newlines is not None:
        text[newlines.line, newlines.column] = False
    text[:, text.shape[1] - flow.tail :] = False
    return text


def text_slots(flow: Prefill) -> Tensor:
    """[B, P] the same in the current physical layout."""
    return text_columns(flow).gather(1, flow.index) & flow.valid


def text_of(flow: Prefill, values: Tensor) -> list[Tensor]:
    """Per row, the values [B, P, ...] of its text tokens."""
    at = text_slots(flow).to(values.device)
    return [row[here] for row, here in zip(values, at, strict=True)]


def later_text(flow: Prefill, values: Tensor) -> list[Tensor]:
    """Per image, the values [B, P, ...] of its row's text tokens that stand behind it."""
    rows, v = text_of(flow, values), flow.started
    return [rows[row][n:] for row, n in zip(v.row, text_before(flow), strict=True)]


def text_before(flow: Prefill) -> list[int]:
    """Per image, how many of its row's text tokens stand before its last token."""
    v = flow.started
    last = offsets_of(v.lengths, v.line.device)[1:].long() - 1
    return text_columns(flow).cumsum(1)[v.line[last], v.column[last]].tolist()


def dropped_slots(flow: Prefill) -> Tensor:
    """[B, P] slots of the current layout whose token was dropped since the layout was made."""
    return flow.gone().gather(1, flow.index) & flow.valid
