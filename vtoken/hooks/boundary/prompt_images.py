"""The images of a prefill: where they stand, and whether they are those that were encoded last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtoken.errors import UnsupportedError
from vtoken.hooks.state.context import Context
from vtoken.hooks.state.forward_state import ForwardState
from vtoken.hooks.state.image_spans import (
    HIDDEN,
    ImageSpans,
    apart,
    check,
    locate,
    same_features,
    visual_positions,
)
from vtoken.hooks.state.live_tokens import LiveTokens
from vtoken.hooks.state.prompt_text import answered
from vtoken.hooks.state.run import segments
from vtoken.hooks.state.token_history import TokenHistory
from vtoken.stages import Keep, image_of, place_in_image, positions


@dataclass(frozen=True)
class PromptImages:
    """The images of a prefill, and how its rows divide.

    Attributes:
        spans: where its images came from and stand.
        whole, seen: their unpruned tokens, and those that the padding mask shows; hidden: whether it hides any.
        values: [ΣN, D] hidden states at `whole`.
        counts, texts, tails: tokens per row: all that the mask shows, those of text, and those of the tail.
        answer: [B, L] bool, which are of the tail; None where none is.
    """

    spans: ImageSpans
    whole: LiveTokens
    seen: LiveTokens
    values: Tensor
    hidden: bool
    counts: list[int]
    texts: list[int]
    tails: list[int]
    answer: Tensor | None


def prompt_images(context: Context, flow: ForwardState, kinds: Tensor) -> PromptImages:
    """Finds the images in `kinds` [B, L]. Asks the device once where `first_look` holds, else more often.

    Raises:
        UnsupportedError, ValueError: see `locate`, `unmasked` and `check`.
    """
    answer = answered(kinds, flow.new, context.run.tail, context.run.labels)
    positions = flow.positions if context.adapter.mrope else None
    look = first_look(context, flow, kinds, positions)
    fine = None if look is None else look.fine
    placeholders, tails, shown, counts, checked = counted(
        kinds, flow.new, answer, len(context.adapter.placeholders), fine
    )
    if look is not None and len(look.values) != sum(map(sum, placeholders)):
        look, checked = None, False
    located = locate(kinds, placeholders, context.run.encodes, context.adapter, None if look is None else look.at)
    whole = unpruned(located, flow.index[0])
    hidden = sum(shown) < sum(map(sum, placeholders))
    seen = unmasked(whole, flow.new, context.adapter) if hidden else whole
    values = flow.hidden[whole.batch_row, whole.column] if look is None else look.values
    if hidden or not checked:
        check(values, positions, located, seen)
    texts = [n - tail - v for n, tail, v in zip(counts, tails, shown, strict=True)]
    return PromptImages(located, whole, seen, values, hidden, counts, texts, tails, answer if any(tails) else None)


@dataclass(frozen=True)
class FirstLook:
    """What the device works out before the host knows the counts, assuming that the visual tokens are those that were
    encoded last, of one kind, each once.

    Attributes:
        at: batch row and column [ΣN] of each.
        values: [ΣN, D] hidden states there.
        fine: [] bool, False where `check` has to look again.
    """

    at: tuple[Tensor, Tensor]
    values: Tensor
    fine: Tensor


def first_look(context: Context, flow: ForwardState, kinds: Tensor, positions: Tensor | None) -> FirstLook | None:
    """None where not one kind alone was encoded, newlines stand in between, or `kinds` has too few columns."""
    encodes = list(context.run.encodes.values())
    if len(encodes) != 1 or any(layout.newline is not None for layout in encodes[0].layouts):
        return None
    if len(encodes[0].fingerprint) > kinds.numel():
        return None
    at = visual_positions(kinds, len(encodes[0].fingerprint), several=False)
    values = flow.hidden[at]
    fine = same_features(encodes[0].fingerprint, values)
    if positions is not None and any(r * c > 1 for layout in encodes[0].layouts for _, r, c in layout.parts):
        fine = fine.to(values.device) & apart(positions, *at).to(values.device)
    return FirstLook(at, values, fine)


def counted(
    kinds: Tensor, new: Tensor, answer: Tensor | None, number: int, fine: Tensor | None
) -> tuple[list[list[int]], list[int], list[int], list[int], bool]:
    """Asks the device once: the placeholders of each kind per row; per row, tokens of the tail, visual tokens that the
    padding mask shows, and all tokens that it shows; and `fine` [] bool (False if None)."""
    each = [kinds == kind + 1 for kind in range(number)]
    visual = each[0] if number == 1 else kinds > 0
    found = [*each, visual & new, new]
    found += [] if answer is None else [answer]
    found += [] if fine is None else [fine.to(new.device).expand_as(new)]
    numbers = torch.stack(found).sum(-1).tolist()
    tails = numbers[number + 2] if answer is not None else [0] * len(kinds)
    return numbers[:number], tails, numbers[number], numbers[number + 1], fine is not None and bool(numbers[-1][0])


def unpruned(located: ImageSpans, arange: Tensor) -> LiveTokens:
    """All visual tokens of the batch, newlines left out. `arange` [L]: 0, 1, 2, ..."""
    layouts, device = located.layouts, located.batch_row.device
    lengths = tuple(layout.tokens for layout in layouts)
    if lengths == (len(located.column),) and located.row == (0,):
        # One picture in the first row: all that is zero, and all that counts up, is there already.
        image, raster_index = located.batch_row, arange[: lengths[0]]
    else:
        image = image_of(lengths, device)
        raster_index = place_in_image(lengths, device)
    segment = segments(layouts)
    return LiveTokens(
        lengths,
        tuple(layout.parts for layout in layouts),
        located.row,
        located.batch_row,
        located.column,
        image,
        TokenHistory(lengths, raster_index, lengths),
        None if segment is None else segment.to(device, non_blocking=True),
        None if located.newlines is None else located.newlines.closed_by,
    )


def unmasked(whole: LiveTokens, new: Tensor, adapter: Any) -> LiveTokens:
    """The visual tokens that the padding mask `new` [B, L] does not hide. Asks the device.

    Raises:
        UnsupportedError: a part of a picture is hidden, of a model that numbers pictures by rows and columns.
    """
    shown = new[whole.batch_row, whole.column]
    counts = whole.image.new_zeros(len(whole.lengths)).index_add_(0, whole.image, shown.to(whole.image)).tolist()
    if adapter.mrope and any(0 < n < length for n, length in zip(counts, whole.lengths, strict=True)):
        raise UnsupportedError(HIDDEN)
    return whole.after(Keep(positions(shown, sum(counts)), tuple(counts)))
