"""Known answers of the stages that thin prefill attention: independent definitions, one head and one query at a time,
in float64."""

from __future__ import annotations

import json
import math
import tempfile
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from vtoken import registry
from vtoken.compressors.attention._singles import listed
from vtoken.evals.calibrate.mminference import visible
from vtoken.stages.attention import PrefillQK, Rope

NO_IMAGES = torch.full((4096,), -1)


def stage(name, **options):
    return registry.stage(name)(min_len=0, **options)


def prompt(n, heads=(4, 2), d=16, seed=0, layer=0):
    """Random queries and keys with a few keys that all like, and queries that like what is near."""
    g = torch.Generator().manual_seed(seed)
    q, k = torch.randn(heads[0], n, d, generator=g), torch.randn(heads[1], n, d, generator=g)
    near = torch.randn(n // 8 + 1, d, generator=g).repeat_interleave(8, 0)[:n]
    q[0] += 1.5 * near
    k[0] += 1.5 * near
    k[1, ::29] += 2 * q[-1, -20:].mean(0)
    return PrefillQK(q, k, d**-0.5, layer, NO_IMAGES[:n], NO_IMAGES[:n], rope=rope(n, d))


def rope(n, d):
    """Llama's, of positions 0 to n - 1."""
    angles = torch.arange(n)[:, None] * 10_000.0 ** -torch.arange(0, 1, 2 / d)
    return Rope(angles.cos().repeat(1, 2), angles.sin().repeat(1, 2), apply_rotary_pos_emb)


def heads_of(p):
    for h in range(p.heads):
        yield h, p.q[h].double(), p.k[h // (p.heads // len(p.k))].double()


def flexprefill():
    aware = 0
    for n, size, gamma, tau, least, drop in (
        (300, 32, 0.6, 0.0, 32, False),
        (300, 32, 0.9, 0.3, 64, True),
        (320, 32, 0.52, 2.0, 32, True),  # at 0.5 whole rows add up to it exactly, and rounding decides
        (301, 32, 0.7, 2.0, 1, False),
        (200, 16, 0.8, 0.25, 40, False),
    ):
        p = prompt(n, seed=n)
        found = stage("flexprefill", gamma=gamma, tau=tau, min_budget=least, size=size, drop_crossing=drop).reads(p)
        for h, q, k in heads_of(p):
            want, of_blocks = flex_head(q, k, p.scale, size, gamma, tau, -(-least // size), drop)
            assert set(map(tuple, found.blocks[h].nonzero().tolist())) == want
            aware += of_blocks
    assert 0 < aware < 20, "both patterns were seen"
    whole = stage("flexprefill", min_budget=256, size=32).reads(prompt(250))
    assert bool(whole.blocks.equal(torch.ones(8, 8, dtype=torch.bool).tril().expand(4, 8, 8)))
    few = stage("flexprefill", min_budget=1, max_budget=32, gamma=1.0, tau=0.0, size=32).reads(prompt(320))
    assert int(few.blocks[0].sum()) == 10 + 9, "the first block and the diagonal"
    dense = [
        float(stage("flexprefill", gamma=g, min_budget=1, size=16).reads(prompt(400)).density())
        for g in (0.3, 0.6, 0.9)
    ]
    assert dense == sorted(dense) and dense[0] < dense[-1]


def flex_head(q, k, scale, size, gamma, tau, least, drop):
    """({(query block, key block)}, whether block means were followed) as section by section of the paper's
    algorithm."""
    n, t = len(q), -(-len(q) // size)
    vertical, slash = [0.0] * n, [0.0] * n
    for i in range(n - size, n):
        for j, share in enumerate((k[: i + 1] @ q[i] * scale).softmax(0).tolist()):
            vertical[j] += share / size
            slash[i - j] += share / size

    def blocks_for(x):
        within = sum(held <= gamma for held in accumulate(sorted(x, reverse=True)))
        return max(least, (within + 1) // size + 1)

    by_column = [sum(vertical[c * size : (c + 1) * size]) for c in range(t)]
    # The farthest distances fill the first band.
    far = slash[::-1]
    by_band = [sum(far[b * size : (b + 1) * size]) for b in range(t)][::-1]
    mean_q = [q[r * size : (r + 1) * size].mean(0) for r in range(t)]
    mean_k = [k[c * size : (c + 1) * size].mean(0) for c in range(t)]
    guess = torch.stack([q[-size:].mean(0) @ m * scale for m in mean_k]).softmax(0).tolist()
    js = 0.0
    for a, b in zip(guess, by_column, strict=True):
        m = (a + b) / 2
        js += (a * math.log(a / m) if a else 0) / 2 + (b * math.log(b / m) if b else 0) / 2
    aware = math.sqrt(js) < tau
    columns, bands = (least, least) if aware else (blocks_for(vertical), blocks_for(slash))
    taken = [0, *sorted(range(1, t), key=lambda c: -by_column[c])][:columns]
    near = [0, *sorted(range(1, t), key=lambda b: -by_band[b])][:bands]
    chosen = {(r, c) for r in range(t) for c in range(r + 1) if c in taken or r - c in near}
    if aware:
        entries = {}
        for r in range(t):
            row = torch.stack([mean_q[r] @ mean_k[c] * scale for c in range(r + 1)]).softmax(0).tolist()
            entries |= {(r, c): value for c, value in enumerate(row)}
        held = 0.0
        for place in sorted(entries, key=lambda place: -entries[place]):
            if held + entries[place] * drop > gamma * t:
                break
            chosen.add(place)
            held += entries[place]
    return chosen, aware


def static_sparse():
    for n, sink, window, last in ((100, 16, 20, 0), (97, 0, 1, 0), (130, 33, 48, 5)):
        s = stage("static_sparse", sink=sink, window=window, last=last, size=16)
        found = s.reads(prompt(n))
        for r in range(-(-n // 16)):
            rows = range(16 * r, 16 * r + 16)
            want = {j // 16 for i in rows for j in range(i + 1) if j < sink or j > i - window}
            assert set(found.blocks[0, r].nonzero()[:, 0].tolist()) == want
        assert s.density(n, 0) == pytest.approx(float(found.density()))
        assert (found.dense is None) == (last == 0) and (not last or found.dense[0].sum() == last)
    gates = ((0.9, 0.1), (0.2, 0.3), (0.8, 0.05))
    duo = stage("static_sparse", gates=gates, sparsity=0.5, window=16, sink=16, size=16)
    assert [duo.streams(k) for k in range(3)] == [(False, True), (True, False), (False, True)]
    blocks = duo.reads(prompt(160, layer=1)).blocks
    assert bool((blocks[2:] == torch.ones(10, 10, dtype=torch.bool).tril()).all()), "query heads of key head 1 read all"
    assert torch.equal(blocks[0], stage("static_sparse", window=16, sink=16, size=16).reads(prompt(160)).blocks[0])
    assert duo.density(160, 1) == pytest.approx(float(duo.reads(prompt(160, layer=1)).density()))
    with pytest.raises(ValidationError, match="equally many"):
        stage("static_sparse", gates=((0.1,), (0.1, 0.2)))
    planned_windows()


def planned_windows():
    """Window by window: -100 + 0.5 * 300 = 50 is one block of 64, -500 + 0.75 * 300 none, 64 one, 0.25 * 300 two."""
    plan = [[[0, 1.0]] * 4, [[-100, 0.5], [-500, 0.75], [64, 0], [0, 0.25]]]
    widths, n, sink, size = (64, 64, 64, 128), 300, 33, 32
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "plan.json")
        file.write_text(json.dumps({k: dict(enumerate(row)) for k, row in enumerate(plan)}))
        s = stage("static_sparse", plan=str(file), sink=sink, size=size, last=3)
        found = s.reads(prompt(n, layer=1))
        for head, width in enumerate(widths):
            for r in range(-(-n // size)):
                rows = range(size * r, size * r + size)
                want = {j // size for i in rows for j in range(i + 1) if j < sink or j > i - width}
                assert set(found.blocks[head, r].nonzero()[:, 0].tolist()) == want
        assert s.density(n, 1) == pytest.approx(float(found.density())) and s.density(n, 1) < s.density(n, 0)
        whole = s.reads(prompt(n)).blocks
        assert bool((whole == torch.ones(10, 10, dtype=torch.bool).tril()).all()), "alpha 0, beta 1 reads all"
        file.write_text(
            json.dumps(
                {name: [[pair[i] for pair in row[:2]] for row in plan] for i, name in enumerate(("alphas", "betas"))}
            )
        )
        key_heads = stage("static_sparse", plan=str(file), sink=sink, size=size, last=3).reads(prompt(n, layer=1))
        assert torch.equal(key_heads.blocks, found.blocks[[0, 0, 1, 1]]), "a plan of key heads is their query heads'"


def xattention():
    for n, size, stride, threshold in ((160, 32, 8, 0.7), (130, 32, 8, 0.9), (203, 16, 4, 0.5), (129, 64, 16, 0.95)):
        p = prompt(n, seed=n)
        s = stage("xattention", size=size, stride=stride, threshold=threshold)
        found = s.reads(p).blocks
        for h, q, k in heads_of(p):
            score = antidiagonals(q, k, p.scale, size, stride)
            got = s.scores(p.q[h : h + 1], k[None].float(), p.scale)[0]
            torch.testing.assert_close(got.double(), score, atol=1e-5, rtol=1e-4)
            for r in range(len(score)):
                want, row = {0, r}, score[r].tolist()
                for c in sorted(set(range(r + 1)) - want, key=lambda c: -row[c]):
                    if sum(row[i] for i in want) >= threshold * sum(row):
                        break
                    want.add(c)
                assert set(found[h, r].nonzero()[:, 0].tolist()) == want
    dense = [float(stage("xattention", threshold=t, size=16).reads(prompt(400)).density()) for t in (0.3, 0.6, 1.0)]
    assert dense == sorted(dense) and dense[0] < dense[-1]
    with pytest.raises(ValidationError):
        stage("xattention", stride=5)


def antidiagonals(q, k, scale, size, stride):
    """[T, T]: for every group of queries the softmax over groups of keys of the mean product along the antidiagonal of
    the pair."""
    n, t = len(q), -(-len(q) // size)
    groups, out = -(-n // stride), torch.zeros(t, t, dtype=torch.float64)
    for a in range(groups):
        products = []
        for b in range(a + 1):
            pairs = [(a * stride + stride - 1 - s, b * stride + s) for s in range(stride)]
            products.append(sum(float(q[i] @ k[j]) for i, j in pairs if i < n and j < n) * scale / stride)
        for b, share in enumerate(torch.tensor(products, dtype=torch.float64).softmax(0).tolist()):
            out[a * stride // size, b * stride // size] += share
    return out


def seen_by(reads, n):
    """[H, N, N] bool of a decision."""
    mask = reads.blocks.repeat_interleave(reads.size, 1).repeat_interleave(reads.size, 2)[:, :n, :n].clone()
    for h in range(len(mask)):
        for i in range(n):
            if reads.columns is not None:
                at = list_of(reads, h, i // reads.size)
                mask[h, i, at[at >= 0].long()] = True
        if reads.dense is not None:
            mask[h, reads.dense[h]] = True
    return mask.tril()


def list_of(reads, head, tile):
    """The single keys that a query block reads, and -1s."""
    return reads.columns[head, tile // reads.share if reads.of is None else reads.of[tile]]


def video(n, frames, rows, width, gap, before, seed=0, heads=(4, 2)):
    """A prompt with one video whose frames are parted by `gap` text tokens."""
    image, place = torch.full((n,), -1), torch.full((n,), -1)
    for f in range(frames):
        at = before + f * (rows * width + gap)
        image[at : at + rows * width] = 0
        place[at : at + rows * width] = torch.arange(rows * width) + f * rows * width
    p = prompt(n, heads, seed=seed)
    return PrefillQK(p.q, p.k, p.scale, 0, image, place, (((frames, rows, width),),), rope=p.rope)


def mminference():
    from vtoken.compressors.attention import _mminference as parts

    clip = video(900, 80, 2, 4, 2, 5)
    assert parts.strides(clip, "frame") == 10 and parts.strides(clip, "row") is None, "rows of 4, then 6 with the gap"
    assert parts.strides(video(900, 80, 1, 8, 1, 5), "row") == 9 == parts.strides(video(900, 80, 1, 8, 1, 5), "frame")
    the_grid(clip)
    the_slashes()
    the_modalities()
    n, options = clip.length, {"local": 64, "vertical": 40, "window": 64, "sink": 10}
    for row in (
        ("a_shape", "query_boundary", "2d_boundary", "grid_frame"),
        ("a_shape", "a_shape", "vertical_slash_1024", "grid_frame"),
    ):
        s = stage("mminference", heads=(row,), **options)
        mixed = seen_by(s.reads(clip), n)
        for h, name in enumerate(row):
            assert torch.equal(mixed[h], seen_by(stage("mminference", pattern=name, **options).reads(clip), n)[h])
    i, j = torch.arange(n)[:, None], torch.arange(n)
    end = int((clip.image >= 0).nonzero()[-1]) + 1
    assert torch.equal(mixed[0], ((i // 64 - j // 64 <= 1) | (j < 64) | (i >= end)).logical_and(j <= i))
    images = video(900, 3, 2, 4, 2, 5)
    assert bool(
        (seen_by(stage("mminference", pattern="grid_frame").reads(images), 900).sum((1, 2)) == 900 * 901 / 2).all()
    )
    assert "for 4 heads in a layer, this model has 2" in s.heads_incompatibility(2, 2, 16)
    assert not s.incompatibility(1, 32) and not s.heads_incompatibility(4, 2, 16)


def the_grid(clip):
    """The boolean definition, the window in whole blocks of 64; the phase by adding up one key after the other."""
    n, first, end, stride, local = clip.length, 5, 5 + 80 * 10 - 2, 10, 64
    sink, chunk = 64, 64 * stride
    region = (end - sink - local) // chunk * chunk
    assert region == chunk
    i, j = torch.arange(n)[:, None], torch.arange(n)
    for rows in (False, True):
        name = "grid_frame" if rows else "grid_frame_columns"
        found = seen_by(stage("mminference", pattern=name, local=local).reads(clip), n)
        for h, q, k in heads_of(clip):
            probe = torch.zeros(n, dtype=torch.float64)
            for r in range(n - 64, n):
                probe[: r + 1] += (k[: r + 1] @ q[r] * clip.scale).softmax(0)
            whole = first + (end - first) // stride * stride
            phase = max(range(stride), key=lambda p: float(probe[first + p : whole : stride].sum()))
            on_keys = (j >= sink) & (j < sink + region) & ((j - first - phase) % stride == 0)
            on_rows = (i >= sink + local) & (i < sink + local + region) & ((i - first - phase) % stride == 0)
            want = (i // 64 - j // 64 <= 1) | (j < sink) | (i >= sink + local + region) | on_keys | (on_rows & rows)
            assert torch.equal(found[h], want & (j <= i))


def vertical_slash(q, k, scale, vertical, slash, probe, n):
    """(keys, {(query block, key block)}) of an index that is built from the last `probe` of these queries."""
    column, distance = torch.zeros(len(k)), torch.zeros(len(k))
    for i in range(len(k) - probe, len(k)):
        share = (k[: i + 1] @ q[i] * scale).softmax(0).float()
        column[: i + 1] += share
        distance[: i + 1] += share.flip(0)
    column[:30], distance[:100] = math.inf, math.inf
    keys = set(column.argsort(descending=True, stable=True)[: max(30, vertical)].tolist())
    blocks = set()
    for delta in distance.argsort(descending=True, stable=True)[: max(100, slash)].tolist():
        for r in range(-(-n // 64)):
            start = 64 * (r + 1) - delta - 64
            blocks |= {(r, c) for c in (start // 64, (start + 63) // 64) if c >= 0}
    return keys, blocks


def the_slashes():
    p = prompt(500, seed=5)
    s = stage("mminference", pattern="vertical_slash_1024", vertical=40)
    found = s.reads(p)
    assert float(found.density()) == pytest.approx(1.0), "1024 distances are all of 500 tokens"
    from vtoken.compressors.attention import _mminference as parts

    for h, q, k in heads_of(p):
        columns, distances = parts.index(p.q[h : h + 1], p.k[h // 2][None], p.scale, 40, 130)
        keys, blocks = vertical_slash(q, k, p.scale, 40, 130, 64, 500)
        assert set(columns[0].nonzero()[:, 0].tolist()) == keys
        assert set(map(tuple, parts.bands(distances, 8)[0].nonzero().tolist())) == blocks
        assert listed(columns, 40)[0].tolist() == sorted(keys)
    for distance, near in ((0, {0}), (1, {0, 1}), (64, {1}), (65, {1, 2})):
        (blocks,) = parts.bands(torch.arange(256)[None] == distance, 4)
        assert {r - c for r, c in blocks.nonzero().tolist()} == near
    some = torch.tensor([[[False, True, False, True]], [[False] * 4], [[True] * 4]])
    assert listed(some, 3).tolist() == [[[1, 3, -1]], [[-1, -1, -1]], [[0, 1, 2]]]
    assert listed(some, 9).tolist() == [[[1, 3, -1, -1]], [[-1, -1, -1, -1]], [[0, 1, 2, 3]]]


def the_modalities():
    """200 text, 300 image, 150 text tokens: image queries read what the last 64 image tokens say, up to block
    borders."""
    from vtoken.compressors.attention import _mminference as parts

    p = prompt(650, seed=6)
    image = torch.full((650,), -1)
    image[200:500] = 0
    p = PrefillQK(p.q, p.k, p.scale, 0, image, image, (((1, 15, 20),),))
    spans = [(start, end) for _, start, end in parts.modalities(p)]
    assert spans == [(500, 650), (200, 500)]
    found = stage("mminference", pattern="query_boundary", vertical=35, slash=110).reads(p)
    assert found.of.tolist() == [0, 0, 0, 2, 1, 1, 1, 2, 0, 0, 0] and found.columns.shape == (4, 3, 70)
    for h, q, k in heads_of(p):
        of = {end: vertical_slash(q[:end], k[:end], p.scale, 35, 110, 64, 650) for _, end in spans}
        for r in range(11):
            ends = {500 if 200 <= i < 500 else 650 for i in range(64 * r, min(64 * r + 64, 650))}
            listed = [x for x in list_of(found, h, r).tolist() if x >= 0]
            assert len(listed) == len(set(listed)) and set(listed) == set().union(*(of[e][0] for e in ends))
            blocks = set().union(*({c for row, c in of[e][1] if row == r} for e in ends))
            assert set(found.blocks[h, r].nonzero()[:, 0].tolist()) == blocks


def composite_attention():
    """Query by query: text reads all before it, a visual token itself and, with `prefix`, the text before it."""
    for n, prefix in ((70, True), (70, False), (300, True), (300, False)):
        p = video(n, 3, 2, 4, 2, 5, seed=n)
        v = torch.randn(p.k.shape, generator=torch.Generator().manual_seed(n))
        found = stage("composite_attention", prefix=prefix).reads(p)
        got = found.apply(p.q, p.k, v, p.scale)
        visual = (p.image >= 0).tolist()
        assert any(visual) and not all(visual)
        for h, q, k in heads_of(p):
            for i in range(n):
                keys = [j for j in range(i + 1) if not visual[i] or j == i or (prefix and not visual[j])]
                weight = (k[keys] @ q[i] * p.scale).softmax(0)
                want = weight @ v[h // 2].double()[keys]
                torch.testing.assert_close(got[h, i].double(), want, atol=1e-5, rtol=1e-4)
                assert visible(found, torch.tensor([i]))[h, 0].nonzero().flatten().tolist() == keys
    layers = registry.stage("composite_attention")
    assert layers().layers(5) == (2, 3, 4) and layers(first=0, dense_layers=(1, -1)).layers(5) == (0, 2, 3)
    with pytest.raises(ValidationError):
        layers(first=-1)
