"""Rows that run dense beside rows that do not: whatever a decision holds, the others' part of it stays."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import tiny
import torch
from batches import uneven
from modes import LOGITS, alone, families, greedy
from usual import ALONE, stage

import vtoken
from vtoken import registry
from vtoken.errors import UnsupportedError
from vtoken.stages import Fused, Keep

SITES = ("encoder", "tokens", "decoder")
MERGING = [name for name in ALONE if registry.stage(name).site in SITES]
VALUES = torch.arange(6.0).view(3, 2)  # of the fused slots


def decision():
    """Three images of 3, 2 and 3 tokens, one kept of each, every field filled."""
    fused = Fused(
        torch.tensor([0, 1, 2]),
        torch.tensor([2.0, 3.0, 4.0]),
        torch.arange(16.0).view(8, 2),
        largest=True,
        values=VALUES,
    )
    into = torch.tensor([0, 0, -1, 1, 1, 2, -1, 2])
    return Keep(torch.tensor([1, 4, 7]), (1, 1, 1), into, torch.arange(8.0) + 1, fused)


def test_every_field_of_a_decision_is_told_apart():
    """The decision that the next test copies leaves no field of Keep or Fused at its default."""
    keep = replace(decision(), complete=True)
    for held in (keep, keep.fused):
        assert all(getattr(held, f.name) is not f.default for f in fields(held))


def test_every_field_survives_where_nothing_is_spared():
    keep = replace(decision(), complete=True)
    for got in (keep.skipping((3, 2, 3), [False] * 3), keep.to(torch.device("cpu"))):
        for mine, other in ((got, keep), (got.fused, keep.fused)):
            for f in fields(other):
                a, b = getattr(mine, f.name), getattr(other, f.name)
                assert torch.equal(a, b) if torch.is_tensor(b) else f.name == "fused" or a == b, f.name


def test_the_spared_image_gets_its_tokens_back():
    """The second image is spared; slots of the third move behind its two tokens."""
    keep = decision()
    got = keep.skipping((3, 2, 3), [False, True, False])
    assert got.index.tolist() == [1, 3, 4, 7] and got.lengths == (1, 2, 1)
    assert got.into.tolist() == [0, 0, -1, 1, 2, 3, -1, 3] and got.weight.tolist() == [1, 2, 3, 1, 1, 6, 7, 8]
    assert got.fused.slots.tolist() == [0, 3] and got.fused.factor.tolist() == [2, 4] and got.fused.largest
    assert torch.equal(got.fused.features, keep.fused.features) and torch.equal(got.fused.values, VALUES[[0, 2]])
    x = torch.arange(8.0)[:, None]
    plain = replace(got, fused=None).apply(x)[:, 0]
    torch.testing.assert_close(plain, torch.tensor([(0 * 1 + 1 * 2) / 3, 3, 4, (5 * 6 + 7 * 8) / 14]))
    dropped = Keep(torch.tensor([0, 5]), (1, 0, 1)).skipping((3, 2, 3), [False, True, False])
    assert dropped.index.tolist() == [0, 3, 4, 5] and dropped.lengths == (1, 2, 1) and dropped.into is None


@families
@pytest.mark.parametrize("name", MERGING)
def test_a_row_beside_dense_rows_is_as_alone(family, name):
    """Row 0 holds one picture, row 1 two, row 2 text alone; only row 1 reaches the threshold."""
    model, tested = tiny.make(family), stage(name, seed=18)
    batch = tiny.build(model, uneven(family), seed=3)
    try:
        with vtoken.wrapped(model, [tested]):
            want = greedy(model, alone(model, batch, 1), **LOGITS)
            single = vtoken.trace(model)
    except UnsupportedError:
        pytest.skip("the family cannot have this stage")
    least = sum(single.visual_tokens)
    with vtoken.wrapped(model, {"min_visual_tokens": least, "stages": [tested]}):
        got = greedy(model, batch, **LOGITS)
        trace = vtoken.trace(model)
    assert trace.dense_rows == [0, 2]
    assert [k.tolist() for k in trace.kept[1:]] == [k.tolist() for k in single.kept]
    logits, alike = torch.stack(got.logits)[:, 1], torch.stack(want.logits)[:, 0]
    torch.testing.assert_close(logits, alike, atol=2e-4, rtol=1e-4)
