"""What enters the language model: the images of a prefill, what the encoder dropped of them, and the facts about the
rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
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
from vtoken.hooks.state.prefill_state import PrefillState
from vtoken.hooks.state.prompt_text import answered
from vtoken.hooks.state.run import segments
from vtoken.hooks.state.token_history import TokenHistory
from vtoken.hooks.state.trace import Trace
from vtoken.stages import Keep, image_of, offsets_of, place_in_image


def build_prefill(
    context: Context, flow: ForwardState, visual: Tensor, deepstack: Sequence[Tensor] | None
) -> tuple[PrefillState, Tensor]:
    """Finds the images of the batch, and drops what the encoder dropped; returns the values [ΣK, D] of the live tokens
    too."""
    answer = answered(visual, flow.new, context.run.tail, context.run.labels)
    positions = flow.positions if context.adapter.mrope else None
    look = first_look(context, flow, visual, positions)
    fine = None if look is None else look.fine
    held, tails, shown, counts, checked = counted(visual, flow.new, answer, len(context.adapter.placeholders), fine)
    if look is not None and len(look.values) != sum(map(sum, held)):
        look = None
    located = locate(visual, held, context.run.encodes, context.adapter, None if look is None else look.at)
    whole = unpruned(located, flow.index[0])
    hidden = sum(shown) < sum(map(sum, held))
    seen = unmasked(whole, flow.new, context.adapter) if hidden else whole
    values = flow.hidden[whole.batch_row, whole.column] if look is None else look.values
    if look is None or hidden or not checked:
        check(values, positions, located, seen)
    trace = context.run.trace = Trace(
        visual_tokens=list(seen.lengths),
        parts=list(whole.parts),
        row=list(whole.row),
        stages=located.stages(),
        counted=located.counted,
    )
    prefill = PrefillState(
        **{**vars(flow), "counts": counts},
        live=seen,
        started=seen,
        raster=whole,
        trace=trace,
        spans=located,
        policy=context.newline,
        deepstack=list(deepstack or ()),
        labels=context.run.labels,
        answer=answer if any(tails) else None,
        tails=tails,
        texts=[n - tail - v for n, tail, v in zip(counts, tails, shown, strict=True)],
        min_tokens=context.min_tokens,
        unpadded=all(n == flow.new.shape[1] for n in counts),
        project=partial(project, context.adapter) if context.adapter.encoder.unit == 1 else None,
    )
    trace.dense_rows = sorted(prefill.skipped)
    if hidden or any(encode.shortened for encode in located.encodes):
        values = entered(prefill, values, hidden)
    if located.newlines is not None and context.newline == "drop" and context.stages and prefill.skip_reason is None:
        prefill.leave(prefill.live)
    return prefill, values


@dataclass(frozen=True)
class FirstLook:
    """What the device can work out before the host knows the counts, if the visual tokens are those that were encoded
    last, all of one kind, each once.

    Attributes:
        at: batch row and column [ΣN] of each.
        values: [ΣN, D] what stands there.
        fine: [] bool, False where `check` has to look again.
    """

    at: tuple[Tensor, Tensor]
    values: Tensor
    fine: Tensor


def first_look(context: Context, flow: ForwardState, kinds: Tensor, positions: Tensor | None) -> FirstLook | None:
    """None where more than one kind was encoded, or newlines stand in between."""
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
    """Asks the device once: per kind its placeholders in every row; per row, tokens behind the prompt, visual ones that
    the padding mask shows, and all that it shows; and whether it is `fine` [] bool."""
    each = [kinds == kind + 1 for kind in range(number)]
    visual = each[0] if number == 1 else kinds > 0
    found = [*each, visual & new, new]
    found += [] if answer is None else [answer]
    found += [] if fine is None else [fine.to(new.device).expand_as(new)]
    told = torch.stack(found).sum(-1).tolist()
    tails = told[number + 2] if answer is not None else [0] * len(kinds)
    return told[:number], tails, told[number], told[number + 1], fine is not None and bool(told[-1][0])


def project(adapter: Any, features: Tensor) -> Tensor:
    """[M, D] of features [M, D_encoder]. By `forward`: the projector's hooks, vtoken's among them, are about whole
    pictures."""
    projector = adapter.projectors[0]
    device = next(projector.parameters()).device
    # Where accelerate offloads the projector, what it put around `forward` brings both together.
    here = features if device.type == "meta" else features.to(device)
    return projector.forward(here).to(features.device)


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
    return whole.after(Keep(shown.nonzero()[:, 0], tuple(counts)))


def entered(flow: PrefillState, values: Tensor, hidden: bool) -> Tensor:
    """Leaves out what the padding mask hides (if it does) and what encoder stages dropped; returns the values that
    remain of [ΣN, D].

    Of merged tokens, DeepStack features from before the merge are averaged, equally weighted; later ones, of which only
    some tokens have any, are those of the token that absorbed them.
    """
    v, encodes = flow.raster, flow.spans.encodes
    keep = None if hidden else known(flow.spans)
    if keep is None:
        keep = found(flow)
    left = v.after(keep.to(v.batch_row.device))
    if left.lengths == v.lengths:
        return values
    flow.leave(left)
    for tap, features in enumerate(flow.deepstack):
        there = mask_of(flow.spans, [encode.deep[tap] if encode.deep else None for encode in encodes])
        flow.deepstack[tap] = without(keep, ~there).to(features.device).apply(features)
    return values[keep.index.to(values.device)]


def known(spans: ImageSpans) -> Keep | None:
    """What the vision tower left, where the host knows: one call's images, in their order, as the tower saw them."""
    history = spans.encodes[0].history if len(spans.encodes) == 1 and spans.source is None else None
    if history is None or len(history.full) != len(spans.layouts):
        return None
    return Keep(history.places, history.counts, history.slot, complete=history.complete)


def found(flow: PrefillState) -> Keep:
    """What is live of the unpruned tokens [ΣN]. Asks the device how many."""
    v, encodes = flow.raster, flow.spans.encodes
    gone = ~(mask_of(flow.spans, [e.left() for e in encodes]).to(v.image.device) & flow.new[v.batch_row, v.column])
    counts = v.image.new_zeros(len(v.lengths)).index_add_(0, v.image, (~gone).to(v.image)).tolist()
    # As nonzero(), whose size the device would be asked for.
    keep = Keep(torch.argsort(gone, stable=True)[: sum(counts)], tuple(counts))
    absorbed = [encode.absorbed() for encode in encodes]
    if all(each is None for each in absorbed):
        return keep
    flat = [torch.full((len(e.fingerprint),), -2) if a is None else a for e, a in zip(encodes, absorbed, strict=True)]
    absorbed_by = flow.spans.gather(flat).to(v.batch_row.device)
    absorbed_by = torch.where(absorbed_by == -2, torch.where(gone, -1, v.history.raster_index), absorbed_by)
    slot = torch.full_like(absorbed_by, -1)
    slot[keep.index] = torch.arange(len(keep.index), device=slot.device)
    target = absorbed_by + offsets_of(v.lengths, slot.device)[:-1][v.image]
    return replace(keep, into=slot[target.clamp(min=0)].masked_fill(absorbed_by < 0, -1))


def mask_of(located: ImageSpans, masks: Sequence[Tensor | None]) -> Tensor:
    """[ΣN] bool of one packed mask per encode, None for one that is True everywhere."""
    sizes = [len(encode.fingerprint) for encode in located.encodes]
    device = next((m.device for m in masks if m is not None), located.batch_row.device)
    whole = [
        torch.ones(n, dtype=torch.bool, device=device) if m is None else m for m, n in zip(masks, sizes, strict=True)
    ]
    return located.gather(whole)


def without(keep: Keep, gone: Tensor) -> Keep:
    """The decision when some of the tokens [ΣN] have no value to give."""
    return keep if keep.into is None else replace(keep, into=keep.into.masked_fill(gone.to(keep.into.device), -1))
