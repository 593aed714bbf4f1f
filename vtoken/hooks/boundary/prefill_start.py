"""What enters the language model: the images of a prefill, what the encoder dropped of them, and the facts about the
rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vtoken.hooks.boundary.prompt_images import prompt_images
from vtoken.hooks.boundary.resized_positions import moved_up
from vtoken.hooks.state.context import Context
from vtoken.hooks.state.forward_state import ForwardState
from vtoken.hooks.state.image_spans import ImageSpans
from vtoken.hooks.state.prefill_state import PrefillState
from vtoken.hooks.state.trace import Trace
from vtoken.stages import Keep, offsets_of


def build_prefill(
    context: Context, flow: ForwardState, visual: Tensor, deepstack: Sequence[Tensor] | None
) -> tuple[PrefillState, Tensor]:
    """Finds the images of the batch, and drops what the encoder dropped; returns the state of the prefill, and the
    values [ΣK, D] of its live tokens."""
    found = prompt_images(context, flow, visual)
    located, whole, seen, values = found.spans, found.whole, found.seen, found.values
    flow.positions, lag = moved_up(flow, found)
    trace = context.run.trace = Trace(
        visual_tokens=list(seen.lengths),
        parts=list(whole.parts),
        row=list(whole.row),
        stages=located.stages(),
        counted=located.counted,
    )
    prefill = PrefillState(
        **{**vars(flow), "counts": found.counts, "blocks": context.run.blocks},
        live=seen,
        started=seen,
        raster=whole,
        trace=trace,
        spans=located,
        policy=context.newline,
        deepstack=list(deepstack or ()),
        labels=context.run.labels,
        lag=lag,
        answer=found.answer,
        tails=found.tails,
        texts=found.texts,
        min_tokens=context.min_tokens,
        unpadded=all(n == flow.new.shape[1] for n in found.counts),
        project=partial(project, context.adapter) if context.adapter.encoder.unit == 1 else None,
    )
    trace.dense_rows = sorted(prefill.skipped)
    if found.hidden or any(encode.shortened for encode in located.encodes):
        values = entered(prefill, values, found.hidden)
    if located.newlines is not None and context.newline == "drop" and context.stages and prefill.skip_reason is None:
        prefill.leave(prefill.live)
    return prefill, values


def project(adapter: Any, features: Tensor) -> Tensor:
    """Projects features [M, D_encoder] to [M, D]. Calls `forward`, without the projector's hooks: those, vtoken's
    among them, expect whole pictures."""
    projector = adapter.projectors[0]
    device = next(projector.parameters()).device
    # Where accelerate offloads the projector, what it put around `forward` brings both together.
    here = features if device.type == "meta" else features.to(device)
    return projector.forward(here).to(features.device)


def entered(flow: PrefillState, values: Tensor, hidden: bool) -> Tensor:
    """Leaves out what the padding mask hides (if it does) and what encoder stages dropped; returns the values that
    remain of [ΣN, D].

    DeepStack features from before a merge are averaged over the merged tokens, equally weighted. Those from after it,
    which not all tokens have, are averaged over the tokens that have any.
    """
    v, encodes = flow.raster, flow.spans.encodes
    keep = None if hidden else known(flow.spans)
    if keep is None:
        keep = still_there(flow)
    left = v.after(keep.to(v.batch_row.device))
    if left.lengths == v.lengths:
        return values
    flow.leave(left, encoded=any(layout.encoded for layout in flow.spans.layouts))
    for tap, features in enumerate(flow.deepstack):
        there = mask_of(flow.spans, [encode.deep[tap] if encode.deep else None for encode in encodes])
        flow.deepstack[tap] = without(keep, ~there).to(features.device).apply(features)
    return values[keep.index.to(values.device)]


def known(spans: ImageSpans) -> Keep | None:
    """What the vision tower left, if the host knows (one call's images, in order, as the tower saw them); else None."""
    history = spans.encodes[0].history if len(spans.encodes) == 1 and spans.source is None else None
    if history is None or len(history.full) != len(spans.layouts):
        return None
    return Keep(history.places, history.counts, history.slot, complete=history.complete)


def still_there(flow: PrefillState) -> Keep:
    """Which of the unpruned tokens [ΣN] are live. Asks the device how many."""
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
    """[ΣN] bool gathered from one packed mask per encode; None stands for a mask that is True everywhere."""
    sizes = [len(encode.fingerprint) for encode in located.encodes]
    device = next((m.device for m in masks if m is not None), located.batch_row.device)
    whole = [
        torch.ones(n, dtype=torch.bool, device=device) if m is None else m for m, n in zip(masks, sizes, strict=True)
    ]
    return located.gather(whole)


def without(keep: Keep, gone: Tensor) -> Keep:
    """The decision without merging from tokens that have no value; `gone`: [ΣN] bool, which those are."""
    return keep if keep.into is None else replace(keep, into=keep.into.masked_fill(gone.to(keep.into.device), -1))
