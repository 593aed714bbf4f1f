"""A naive Qwen vision tower: image by image, patches in token order, never permuted; attention is written out with a
mask that tells which patches see each other. What packed towers are held against."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import tiny
import torch


def rotate(x, cos, sin):
    """x [P, H, d], cos and sin [P, d]."""
    half = x.shape[-1] // 2
    return x * cos[:, None] + torch.cat([-x[..., half:], x[..., :half]], -1) * sin[:, None]


@dataclass
class Naive:
    """What the naive tower found in one image: per block the attention map [P, P] (head mean), q, k and v, and its
    features."""

    maps: list = field(default_factory=list)
    keys: list = field(default_factory=list)
    values: list = field(default_factory=list)
    taps: list = field(default_factory=list)
    last: torch.Tensor | None = None
    features: torch.Tensor | None = None


@torch.no_grad()
def naive(model, pixels, grid, cuts=None):
    """One image. `cuts[layer]` = (kept, into) changes the tokens after a block: into None drops, else means of equal
    weight."""
    tower, (frames, rows, columns), cuts = model.model.visual, grid.tolist(), cuts or {}
    at = [
        (f, 2 * r + i, 2 * c + j)
        for f in range(frames)
        for r in range(rows // 2)
        for c in range(columns // 2)
        for i in range(2)
        for j in range(2)
    ]
    at = torch.tensor(at)
    h = tower.patch_embed(pixels)
    if hasattr(tower, "pos_embed") or hasattr(tower, "embeddings"):
        seen = []
        hook = tower.blocks[0].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        tower(pixels, grid_thw=torch.tensor([[1, rows, columns]] * frames))
        hook.remove()
        (h,) = seen
    cos, sin = tower.rotary_pos_emb(h, at[:, 1:])
    full = getattr(tower, "fullatt_block_indexes", range(len(tower.blocks)))
    window = torch.stack([at[:, 0], at[:, 1] // 4, at[:, 2] // 4], 1)
    out, token = Naive(), torch.arange(len(h) // 4)
    for index, block in enumerate(tower.blocks):
        alike = at[:, :1] if index in full else window
        sees = (alike[:, None] == alike[None]).all(-1)
        heads = block.attn.num_heads
        q, k, v = block.attn.qkv(block.norm1(h)).unflatten(1, (3, heads, -1)).unbind(1)
        out.keys.append(k.flatten(1))
        out.values.append(v.flatten(1))
        scores = torch.einsum("qhd,khd->hqk", rotate(q, cos, sin), rotate(k, cos, sin)) * q.shape[-1] ** -0.5
        weights = scores.masked_fill(~sees, float("-inf")).softmax(-1)
        out.maps.append((weights.mean(0), sees))
        h = h + block.attn.proj(torch.einsum("hqk,khd->qhd", weights, v).flatten(1))
        h = h + block.mlp(block.norm2(h))
        if index in getattr(tower, "deepstack_visual_indexes", ()):
            merger = tower.deepstack_merger_list[len(out.taps)]
            out.taps.append(spread(merger(h), token, len(pixels) // 4))
        if index in cuts:
            kept, into = cuts[index]
            groups = h.unflatten(0, (-1, 4))
            if into is None:
                groups = groups[torch.isin(token, kept)]
            else:
                groups = torch.stack([groups[into[token] == k].mean(0) for k in kept])
            h = groups.flatten(0, 1)
            rows_left = torch.isin(token, kept).repeat_interleave(4)
            at, window, cos, sin = at[rows_left], window[rows_left], cos[rows_left], sin[rows_left]
            token = kept
    out.last, out.features = (spread(rows, token, len(pixels) // 4) for rows in (group(h), merged(tower, h)))
    return out


def merged(tower, h):
    """Patches [4K, C] -> tokens [K, D]."""
    if hasattr(tower, "downsample"):
        h = tower.downsample(tower.post_layernorm(h).view(-1, 2, 2, h.shape[1]).permute(0, 3, 1, 2)).flatten(1)
    return tower.merger(h)


def group(patches):
    return patches.unflatten(0, (-1, 4)).mean(1)


def spread(rows, token, total):
    out = rows.new_zeros(total, rows.shape[1])
    out[token] = rows
    return out


@lru_cache
def stock(family):
    return tiny.make(family)


def each(family, pixels, grid, cuts=None):
    """`naive` on every image."""
    parts = pixels.split(grid.prod(-1).tolist())
    return [naive(stock(family), p, g, cuts and cuts[i]) for i, (p, g) in enumerate(zip(parts, grid, strict=True))]
