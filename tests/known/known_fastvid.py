"""Known answers of FastVID: by hand, and by loops in float64 over frames, anchors and tokens."""

from __future__ import annotations

import math

import torch
from known_flashvid import clip, cosine, scenes
from packing import tokens

from vtoken import registry


def density_rank(frame):
    """Tokens of a frame, the first centres of density peaks first."""
    n, width = len(frame), len(frame[0])
    apart = [[float((a - b).norm()) / math.sqrt(width) for b in frame] for a in frame]
    density = [math.exp(-sum(v * v for v in sorted(row)[:4]) / 4) for row in apart]
    most = max(map(max, apart))
    score = []
    for i in range(n):
        denser = [apart[i][j] for j in range(n) if (density[j], -j) > (density[i], -i)]
        score.append(min(denser, default=most) * density[i])
    return sorted(range(n), key=lambda i: (-score[i], i))


def literal(x, attention, ratio, *, d=0.4, p=4, beta=0.6, cut=0.9, least=8):
    """Kept places (frame, token) and their embeddings, with the authors' rounding."""
    frames, per, _ = x.shape
    keep = int(per * ratio)
    salient = keep - int(keep * d)
    out, rest = {}, []
    for t in range(frames):
        best = sorted(range(per), key=lambda j: (-float(attention[t, j]), j))[:salient]
        out |= {(t, j): x[t, j] for j in best}
        rest.append([j for j in range(per) if j not in best])
    for a, b in scenes(x, cut, least):
        length = b - a
        each = (keep - salient) * length // -(-length // p)
        members = [(t, j) for t in range(a, b) for j in rest[t]]
        for t in range(a, b):
            if (b - 1 - t) % p:
                continue
            order = density_rank([x[t, j] for j in rest[t]])[:each]
            anchors = [rest[t][i] for i in order]
            joined = {j: [] for j in anchors}
            for s, i in members:
                near = max(sorted(anchors), key=lambda j: cosine(x[s, i], x[t, j]))
                joined[near].append(x[s, i])
            for j, group in joined.items():
                weight = max(1 / (len(group) + 1), beta)
                mean = torch.stack(group).mean(0) if group else torch.zeros_like(x[t, j])
                out[t, j] = weight * x[t, j] + (1 - weight) * mean
    return out


def run(x, attention, **options):
    stage = registry.stage("fastvid").model_validate(options)
    frames, per, _ = x.shape
    batch = tokens(x.flatten(0, 1), (frames * per,), ((frames, 1, per),), cls_attention=attention.flatten())
    keep = stage.select(batch)
    return keep, keep.embed(batch.x)


def fastvid():
    a_still_scene_by_hand()
    own = {"contextual": 0.7, "every": 2, "beta": 0.3, "cut": 0.6, "segments": 2}
    names = {"contextual": "d", "every": "p", "segments": "least"}
    for seed, (frames, per, ratio) in enumerate(((12, 10, 0.5), (9, 20, 0.25), (5, 16, 0.4), (2, 12, 0.5))):
        x, attention = clip(frames, per, seed)
        for options in ({}, own):
            want = literal(x.double(), attention, ratio, **{names.get(k, k): v for k, v in options.items()})
            keep, got = run(x, attention, keep=f"{100 * ratio}%", as_released=True, **options)
            assert keep.index.tolist() == sorted(t * per + j for t, j in want)
            values = torch.stack([want[divmod(i, per)] for i in keep.index.tolist()])
            torch.testing.assert_close(got.double(), values, atol=1e-5, rtol=1e-5)
    for seed, budget in enumerate(("10%", "31%", "50%", "80%", 7, 40)):
        x, attention = clip(7, 11, seed)
        keep, _ = run(x, attention, keep=budget)
        wanted = budget if isinstance(budget, int) else round(77 * float(budget[:-1]) / 100)
        assert len(keep.index.unique()) == len(keep.index) == keep.lengths[0] == max(7, wanted)


def a_still_scene_by_hand():
    """Two frames alike, a segment: in each a token by attention, in the last two anchors for all others."""
    x = torch.tensor([[[1.0, 0], [0, 1], [0, 1], [0, 1.0]]] * 2)
    keep, got = run(x, torch.tensor([[9.0, 1, 1, 1]] * 2), keep="50%", segments=1, contextual=0.5, as_released=True)
    # Equal tokens all join the first anchor, whose weight is then 0.6; the second has none, and stays as it is.
    assert keep.index.tolist() == [0, 4, 5, 6]
    assert keep.into.tolist() == [0, 2, 2, 2, 1, 2, 3, 2]
    torch.testing.assert_close(got, torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]]))
