"""Chunk prefill on every family: whole models against the stock layers under the mask that the rule says."""

from __future__ import annotations

import oracle
import pytest
import tiny
import torch
from batches import suited
from known_chunks import literal
from modes import LOGITS, alone, greedy, whole

import vtoken

PICTURES = [[9, "img", 2, "img", 3, "img", 20, "img", 21], [1, "img", 30], [4]]
CLIPS = [[7, ("video", 8), 30], [20, ("video", 8), 1]]
CHUNKS = {"frames": 1, "previous": 0, "size": 16, "min_len": 0}


def rows_for(family, kind):
    if kind == "pictures":
        return PICTURES
    return suited(family, CLIPS) if family in tiny.VIDEO else None


def frames(p, trace, row):
    """Per token of a row without padding, its frame or None: frames of a video are equally long."""
    count, out = 0, [None] * p.mask.shape[1]
    for image, parts in zip(p.images, trace.parts, strict=True):
        if image.row != row:
            continue
        columns = [c for c in image.columns.tolist() if p.visual[row, c]]
        number = parts[0][0] if len(parts) == 1 else 1
        for i, column in enumerate(columns):
            out[column] = count + i * number // len(columns)
        count += number
    return [f for f, real in zip(out, p.mask[row].tolist(), strict=True) if real]


@whole
@pytest.mark.parametrize("kind", ["pictures", "clips"])
def test_equals_the_stock_layers_under_a_mask(family, kind):
    """And a batch its rows."""
    rows = rows_for(family, kind)
    if rows is None:
        pytest.skip("the family takes no video")
    model = tiny.make(family)
    batch = tiny.build(model, rows, seed=3)
    p, thin = oracle.prompt(model, batch), False
    with vtoken.wrapped(model, [{"chunk_prefill": CHUNKS}]):
        got, trace = greedy(model, batch, 3, **LOGITS), vtoken.trace(model)
        assert {s.layer for s in trace.stages} == set(tiny.family(family).attending)
        for row in range(len(rows)):
            one = torch.stack(greedy(model, alone(model, batch, row), 3, **LOGITS).logits)
            torch.testing.assert_close(one[:, 0], torch.stack(got.logits)[:, row], atol=2e-4, rtol=1e-4)
    for row in range(len(rows)):
        stay, frame = p.mask[row], frames(p, trace, row)
        _, read = literal(frame, 1, 0, 16)
        thin |= not bool((read == torch.ones_like(read).tril()).all())
        deep = [d[row : row + 1, stay] for d in p.deep]
        x, positions = p.embeds[row : row + 1, stay], p.positions[..., row : row + 1, stay]
        want = oracle.logits(model, x, positions, deep=deep, unseen=~read)[0, -1]
        torch.testing.assert_close(got.logits[0][row], want, atol=3e-4, rtol=1e-4)
    assert thin, "something is left out"


def test_tokens_that_were_dropped_before_leave_frames_where_they_were():
    """Half of a video's tokens are gone, more of one frame than of another."""
    family = tiny.families(leading=True, mrope=True)[0]
    model = tiny.make(family)
    batch = tiny.build(model, [[7, ("video", 16), 30]], seed=3)
    p = oracle.prompt(model, batch)
    with vtoken.wrapped(model, [{"random": {"keep": "50%"}}, {"chunk_prefill": {**CHUNKS, "frames": 2}}]):
        got, trace = greedy(model, batch, 1, **LOGITS), vtoken.trace(model)
    keep = oracle.keep_mask(p, trace.kept)[0]
    frame = [f for f, stay in zip(frames(p, trace, 0), keep.tolist(), strict=True) if stay]
    _, read = literal(frame, 2, 0, 16)
    assert len({frame.count(f) for f in set(frame) - {None}}) > 1 and not bool(read.equal(torch.ones_like(read).tril()))
    x, positions = p.embeds[:, keep], p.positions[..., keep]
    want = oracle.logits(model, x, positions, deep=[d[:, keep] for d in p.deep], unseen=~read)[0, -1]
    torch.testing.assert_close(got.logits[0][0], want, atol=3e-4, rtol=1e-4)
