"""Known answers of the stages that take a long video chunk by chunk: the rules of the paper token by token, in
float64."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from known_cache import attention
from known_sparse import prompt, stage

from vtoken import registry
from vtoken.stages.attention import PrefillQK
from vtoken.stages.cache import CachedLayer, Places


def laid_out(segments, seed=0):
    """A prompt of texts (a number of tokens) and pictures (frames, rows, columns, which tokens are left or None);
    several rasters make one picture."""
    image, place, frame, parts, frames = [], [], [], [], 0
    for segment in segments:
        if isinstance(segment, int):
            image += [-1] * segment
            place += [-1] * segment
            frame += [None] * segment
            continue
        rasters, left = segment
        n = sum(t * h * w for t, h, w in rasters)
        for i in range(n) if left is None else left:
            image.append(len(parts))
            place.append(i)
            frame.append(frames + (i // (rasters[0][1] * rasters[0][2]) if len(rasters) == 1 else 0))
        frames += rasters[0][0] if len(rasters) == 1 else 1
        parts.append(rasters)
    p = prompt(len(image), seed=seed)
    p = PrefillQK(p.q, p.k, p.scale, 0, torch.tensor(image), torch.tensor(place), tuple(parts), rope=p.rope)
    return p, frame


def literal(frame, per, previous, size):
    """[N][N] what each token reads: the rule for pairs of tokens, and pairs of blocks that hold such a pair."""
    n = len(frame)
    chunk = [None if f is None else f // per for f in frame]

    def near(i, j):
        return chunk[i] is not None and chunk[j] is not None and chunk[j] >= chunk[i] - previous

    whole = {(i // size, j // size) for i in range(n) for j in range(n) if near(i, j)}
    rule = [[j <= i and (chunk[i] is None or chunk[j] is None or near(i, j)) for j in range(n)] for i in range(n)]
    read = [
        [r or (j <= i and (i // size, j // size) in whole) for j, r in enumerate(row)] for i, row in enumerate(rule)
    ]
    return torch.tensor(rule), torch.tensor(read)


def chunk_prefill():
    clip = ((7, 2, 4),)
    cases = (
        # Frames of 8 tokens, two to a chunk, behind 16 words: chunks are blocks, and what is read is the rule itself.
        ([16, (((9, 2, 4),), None), 21], 2, 1, True),
        ([5, (clip, None), 3], 2, 1, False),
        ([1, (((11, 3, 3),), None)], 3, 0, False),
        ([40, (clip, None), 7, (((4, 3, 5),), None), 33], 2, 1, False),
        # A picture of two rasters is one frame, as are three pictures one after the other.
        ([3, (((1, 4, 4), (1, 4, 8)), None), 2, *[(((1, 4, 5),), None)] * 3, 18], 1, 1, False),
        # Half of the tokens are gone, of the second frame all.
        ([9, (clip, [i for i in range(56) if i % 3 and not 8 <= i < 16]), 4, (clip, None), 2], 2, 0, False),
        ([*[1, (((1, 2, 4),), None)] * 12, 20], 4, 1, False),  # a time stamp before each frame
    )
    for segments, per, previous, exact in cases:
        p, frame = laid_out(segments, seed=len(segments))
        rule, read = literal(frame, per, previous, 16)
        assert exact == torch.equal(rule, read)
        found = stage("chunk_prefill", frames=per, previous=previous, size=16).reads(p)
        v = torch.randn(p.k.shape, generator=torch.Generator().manual_seed(1))
        k, w = (x.double().repeat_interleave(2, 0) for x in (p.k, v))
        scores = (p.q.double() @ k.mT * p.scale).masked_fill(~read, -torch.inf)
        torch.testing.assert_close(
            found.apply(p.q, p.k, v, p.scale).double(), scores.softmax(-1) @ w, atol=1e-5, rtol=1e-4
        )
        assert int(read.sum()) < len(read) * (len(read) + 1) // 2, "something is left out"
        the_rest_of_the_batch(p, found, per, previous)
        far = stage("chunk_prefill", frames=per, previous=99, size=16).reads(p)
        assert torch.equal(far.blocks, torch.ones_like(far.blocks[0]).tril().expand_as(far.blocks))
        assert far.dense is None and float(far.density()) == 1
    the_account()


def the_rest_of_the_batch(p, found, per, previous):
    """Pictures of other rows, in front, change nothing."""
    image = torch.where(p.image < 0, -1, p.image + 2)
    again = replace(p, image=image, parts=(((3, 1, 1),), ((1, 2, 2), (1, 2, 2)), *p.parts), known={})
    told = stage("chunk_prefill", frames=per, previous=previous, size=16).reads(again)
    assert torch.equal(told.blocks, found.blocks) and torch.equal(told.columns, found.columns)


def the_account():
    """`vtoken flops` counts what a prompt of pictures and then text reads; in blocks of 16, 2 frames of 8 each."""
    s = stage("chunk_prefill", frames=2, previous=1, size=16)
    p, _ = laid_out([(((9, 2, 4),), None), 24])
    # Five blocks of pictures, the last half text, and one of text: 1 + 2 + 2 + 2 + 2 blocks, then 24 queries in two
    # packed blocks that read 6 blocks each, and 8 words of the fifth block as single keys where it is not read.
    assert float(s.reads(p).density()) == s.density_of(96, 0, (72,), p.parts) == (9 + 12) / 21
    assert s.density(96, 0) is None
    half = s.density_of(60, 0, (36,), p.parts)
    assert half == float(s.reads(laid_out([(((9, 2, 4),), range(0, 72, 2)), 24])[0]).density())


def bilevel_kv():
    clip = (((9, 2, 3),), None)
    kept = [i for i in range(54) if i % 4 and not 12 <= i < 18]
    for segments, options in (
        ([3, clip, 6], {"frames": 2, "top": 1, "pool": 4}),
        ([3, clip, 6], {"frames": 2, "top": 1, "pool": 4, "rotated": True}),
        ([2, clip, 4, (((4, 3, 3),), None), 9], {"frames": 3, "top": 2, "pool": 2, "window": 3}),
        ([5, (((9, 2, 3),), kept), 2], {"frames": 1, "top": 3, "pool": 3}),
        ([*[1, (((1, 2, 4),), None)] * 6], {"frames": 1, "top": 0, "pool": 5}),  # the prompt ends in a picture
        ([1, (((1, 2, 2), (1, 2, 4)), None), 1, *[(((1, 3, 3),), None)] * 4, 7], {"frames": 1, "top": 1, "pool": 4}),
    ):
        x, frame = cached(segments)
        s = registry.stage("bilevel_kv")(**options)
        found = s.compress(x)
        keys, values, counts, index = by_hand(x, frame, s)
        got = found.apply(x.keys, x.values)
        torch.testing.assert_close(got[0].double(), keys, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(got[1].double(), values, atol=1e-5, rtol=1e-5)
        assert found.counts == counts and found.index.tolist() == [index] * 2 and len(index) < len(frame)
        alone = [j for j, i in enumerate(index) if (found.into[0] == j).sum() == 1]
        for t, now in zip((x.keys, x.values), got, strict=True):
            assert torch.equal(now[:, alone], t[:, [index[j] for j in alone]]), "bit for bit"
        for all_of in ({"top": 99}, {"pool": 1}):
            same = registry.stage("bilevel_kv")(**{**options, **all_of}).compress(x)
            assert same.index.shape[1] == len(frame) and same.into is None and same.counts == x.lengths
    # Nine frames of 6 in chunks of 2: of 3 middle chunks of 12, one stays whole, two become 2 + 2 tokens a frame.
    s = registry.stage("bilevel_kv")(frames=2, top=1, pool=4)
    assert (
        s.slots_of(63, (54,), (((9, 2, 3),),))
        == 63 - 2 * 2 * (6 - 2)
        == s.compress(cached([3, clip, 6])[0]).index.shape[1]
    )
    assert s.slots_of(63, (54,), (((4, 2, 3),),)) == 63 and s.slots(63, (54,)) == 63
    assert s.query_window(63, (54,), 6) == 6 and s.query_window(63, (54,), 0) == 1
    assert s.cost(63, (54,), 4, 2, 16) == 2 * 9 * 63 * 4 * 16


def cached(segments):
    p, frame = laid_out(segments, seed=2)
    v = torch.randn(p.k.shape, generator=torch.Generator().manual_seed(3))
    slots = tuple(tuple((p.image == i).nonzero()[:, 0].tolist()) for i in range(len(p.parts)))
    places = Places(p.image, p.raster_index, p.parts)
    images = tuple(map(torch.tensor, slots))
    return CachedLayer(p.k, v, p.q, images, slots, p.scale, rope=p.rope, places=places), frame


def by_hand(x, frame, s):
    """Keys and values that are left, tokens of each image, and the slot that each stands at."""
    behind = next(i for i, f in enumerate(reversed(frame)) if f is not None)
    window = max(1, min(s.window, behind))
    maps = torch.stack([attention(x, h) for h in range(4)]).mean(0)[-window:].sum(0)
    chunks = {}
    for i, f in enumerate(frame):
        if f is not None:
            chunks.setdefault(f // s.frames, []).append(i)
    order = sorted(chunks)
    rated = sorted(order[1:-1], key=lambda c: -float(maps[chunks[c]].mean()))
    whole = {order[0], order[-1], *rated[: s.top]}
    groups, i = [], 0
    while i < len(frame):
        group = [i]
        if frame[i] is not None and frame[i] // s.frames not in whole:
            rest = [j for j in range(i, len(frame)) if frame[j] == frame[i]]
            group = rest[: s.pool]
        groups.append(group)
        i = group[-1] + 1
    out = []
    for t, turned in ((x.keys.double(), not s.rotated), (x.values.double(), False)):
        rows = []
        for group in groups:
            middle = group[(len(group) - 1) // 2]
            parts = [turn(t[:, j], -j) if turned and len(group) > 1 else t[:, j] for j in group]
            mean = torch.stack(parts).mean(0)
            rows.append(turn(mean, middle) if turned and len(group) > 1 else mean)
        out.append(torch.stack(rows, 1))
    index = [group[(len(group) - 1) // 2] for group in groups]
    counts = tuple(sum(i in slots for i in index) for slots in x.slots)
    return *out, counts, index


def turn(x, steps):
    """Llama's RoPE of so many positions, pair by pair; x [Hk, d] float64."""
    half, out = x.shape[1] // 2, torch.empty_like(x)
    for i in range(half):
        angle = steps * 10_000.0 ** (-i / half)
        a, b = x[:, i], x[:, i + half]
        out[:, i] = a * math.cos(angle) - b * math.sin(angle)
        out[:, i + half] = b * math.cos(angle) + a * math.sin(angle)
    return out
