"""Methods that decide pool by pool: every form of budget, crops and frames as images of their own, low precision."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from packing import tokens

from vtoken import registry
from vtoken.pruners._pools import merged, rest_of, top
from vtoken.stages import Fact, Keep, VisualTokens, offsets_of, spec_of
from vtoken.stages.budget import Budget

METHODS = ("visionzip", "divprune", "cdpruner", "vispruner", "prumerge", "vscan", "holov", "scope")
# Those for which a crop is nothing but a smaller image: the others look at the whole for relevance or windows.
ALIKE = ("visionzip", "divprune", "vispruner", "prumerge", "holov", "scope")
LENGTHS, PARTS = (40, 18, 24), (((1, 4, 4), (1, 4, 6)), ((1, 3, 6),), ((3, 2, 4),))
SEGMENT = torch.tensor([0] * 16 + [1, 1, 1, 1, 2, 2] * 4 + [0] * 18 + [0] * 8 + [1] * 8 + [2] * 8)
methods = pytest.mark.parametrize("name", METHODS)


def batch(stage, row=(0, 0, 1), dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    n = sum(LENGTHS)
    facts = {}
    for fact in stage.needs():
        spec = spec_of(fact.name, stage.site)
        one = torch.rand(n, generator=g) if spec.holds == "one" else torch.randn(n, 8, generator=g).to(dtype)
        facts[fact] = one if spec.per == "token" else [one[: 3 + r] for r in set(row)]
    packed = tokens(torch.randn(n, 8, generator=g).to(dtype), LENGTHS, row=row, parts=PARTS, segment=SEGMENT)
    return replace(packed, facts=facts)


def part_of(packed, rows):
    """These rows as an image of their own."""
    facts = {f: v if isinstance(v, list) else v[rows] for f, v in packed.facts.items()}
    n = len(rows)
    return VisualTokens(
        packed.x[rows], offsets_of((n,), rows.device), (n,), (((1, 1, n),),), (0,), torch.arange(n), facts=facts
    )


@methods
def test_budgets(name):
    cls = registry.stage(name)
    for keep, want in (
        (7, (7, 7, 7)),
        ("25%", (10, 4, 6)),
        ({"total": 29}, (20, 9, 24)),
        ({"per_crop": 5}, (15, 5, 5)),
        ({"per_frame": 4}, (4, 4, 12)),
        ({"per_frame": 4, "key_weight": 3}, (4, 4, 12)),
        (64, LENGTHS),
    ):
        stage = cls(keep=keep)
        packed = batch(stage)
        decision = stage.select(packed)
        assert decision.lengths == stage.expected_counts(LENGTHS, PARTS, packed.row) == want
        assert decision.index.tolist() == sorted(set(decision.index.tolist())) and len(decision.index) == sum(want)
        if keep == {"per_crop": 5}:
            assert SEGMENT[decision.index[:15]].bincount().tolist() == [5, 5, 5]
        assert stage.flops(LENGTHS, 8) > 0 or keep == 64


@pytest.mark.parametrize("name", ALIKE)
@pytest.mark.parametrize("per", ["per_crop", "per_frame"])
def test_a_segment_is_an_image_of_its_own(name, per):
    stage = registry.stage(name)(keep={per: 4})
    packed = batch(stage)
    decision = stage.select(packed)
    values, start = decision.apply(packed.x), 0
    segment = SEGMENT.clone()
    segment[slice(58, 82) if per == "per_crop" else slice(0, 58)] = 0
    for image, n in enumerate(LENGTHS):
        inside = torch.arange(start, start + n)
        for s in segment[inside].unique():
            rows = inside[segment[inside] == s]
            alone = registry.stage(name)(keep=4).select(part_of(packed, rows))
            at = torch.isin(decision.index, rows)
            assert torch.equal(decision.index[at], rows[alone.index]), f"image {image}, segment {s}"
            torch.testing.assert_close(values[at], alone.apply(packed.x[rows]))
        start += n


@methods
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(name, dtype):
    stage = registry.stage(name)(keep=6)
    low = batch(stage, dtype=dtype)
    exact = replace(low, x=low.x.float(), facts={f: _float(v) for f, v in low.facts.items()})
    decision, want = stage.select(low), stage.select(exact)
    assert torch.equal(decision.index, want.index)
    assert decision.apply(low.x).dtype == dtype


def _float(value):
    return [v.float() for v in value] if isinstance(value, list) else value.float()


@methods
def test_an_image_without_tokens(name):
    stage = registry.stage(name)(keep=3)
    full = batch(stage)
    empty = replace(
        full, lengths=(40, 0, 18, 24), parts=(PARTS[0], PARTS[1], *PARTS[1:]), row=(0, 0, 0, 1), segment=None
    )
    assert stage.select(empty).lengths == (3, 0, 3, 3)


def test_prumerge_without_a_budget_takes_images_as_they_are():
    stage = registry.stage("prumerge")()
    full = batch(stage)
    spiked = {f: v**12 if f == Fact("cls_attention", -1) else v for f, v in full.facts.items()}
    decision = stage.select(replace(full, facts=spiked))
    assert all(0 < k < n for k, n in zip(decision.lengths, LENGTHS, strict=True))
    assert decision.index.split(decision.lengths)[1].min() >= 40


def test_helpers():
    assert top(torch.tensor([1.0, 3, 3, 0]), 3).tolist() == [1, 2, 0]
    assert rest_of(6, torch.tensor([4, 0, 1])).tolist() == [2, 3, 5]
    keep = merged(Keep(torch.tensor([1, 4]), (2,)), torch.tensor([1, -1, 4, -1, -1, 4]))
    assert keep.into.tolist() == [0, 0, 1, -1, 1, 1]


def test_key_frames_get_more():
    """Frames of two scenes, and a still picture of two tokens: 3 : 1 : 1 : 3 : 1, as far as frames hold."""
    scene = torch.eye(2)[[0, 0, 0, 1, 1]].repeat_interleave(6, 0)
    x = torch.cat([scene + 0.01 * torch.randn(30, 2, generator=torch.Generator().manual_seed(0)), torch.ones(2, 2)])
    segment = torch.cat([torch.arange(5).repeat_interleave(6), torch.zeros(2).long()])
    packed = tokens(x, (30, 2), ((5, 2, 3), (1, 1, 2)), segment=segment)
    for per, want in ((3, [5, 2, 2, 5, 1]), (4, [6, 3, 3, 6, 2]), (1, [1] * 5), (6, [6] * 5)):
        stage = registry.stage("uniform")(keep={"per_frame": per, "key_weight": 3})
        keep = stage.select(packed)
        assert torch.bincount(segment[keep.index][: keep.lengths[0]]).tolist() == want
        assert keep.lengths == (5 * per, min(per, 2)) == stage.expected_counts((30, 2), packed.parts, (0, 0))
    video = registry.stage("flashvid")(keep={"per_frame": 4, "key_weight": 3}, alpha=1.0)
    kept = video.select(replace(packed, facts={Fact("cls_attention"): torch.rand(32)}))
    assert torch.bincount(segment[kept.index][:20]).tolist() == [6, 3, 3, 6, 2] and kept.lengths == (20, 2)
    assert Budget(stage.keep.plain()) == stage.keep != Budget({"per_frame": 6})
    for bad in ({"per_frame": 3, "key_weight": 1}, {"per_crop": 3, "key_weight": 2}, {"per_frame": 0, "key_weight": 2}):
        with pytest.raises(ValueError, match="keep: "):
            registry.stage("uniform")(keep=bad)
