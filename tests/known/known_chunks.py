"""Known answers of the stages that take a long video chunk by chunk: the rules of the paper token by token, in
float64."""

from __future__ import annotations

from dataclasses import replace

import torch
from known_sparse import prompt, stage

from vtoken.stages.attention import PrefillQK


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
    read = [[r or (j <= i and (i // size, j // size) in whole) for j, r in enumerate(row)] for i, row in enumerate(rule)]
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
