"""Virtual unmerging by its definition: per row, in float64, no cache, nothing expanded but the logits of attention."""

from __future__ import annotations

import copy

import oracle
import tiny
import torch
from torch import Tensor


def owners(p: oracle.PrefillQK, trace, policy: oracle.Newlines = "keep_if_row_has_token") -> Tensor:
    """[B, L] column of the token that stands for each column, -1 for those that are gone."""
    live = oracle.keep_mask(p, trace.kept, newlines=policy) & p.mask
    owner = torch.where(live, torch.arange(live.shape[1]).expand_as(live), -1)
    into = next((s.into for s in reversed(trace.stages) if s.into is not None), None)
    for number, image in enumerate(p.images):
        columns = image.columns[~p.newline[image.row, image.columns]]
        for place, target in enumerate(into[number].tolist() if into is not None else ()):
            owner[image.row, columns[place]] = columns[target] if target >= 0 else -1
    return owner


@torch.no_grad()
def attention(module, x: Tensor, member: Tensor, angle: Tensor, neighbours: bool) -> Tensor:
    """[P, D] of x [P, D]: every place i attends to the places j <= i; logits from the angle between them.

    Args:
        member: [U] row of x that stands at each place.
        angle: [U, r] of its rotation, of 2r channels; those behind them are not rotated.
        neighbours: whether two channels that are rotated together lie side by side, else r apart.
    """
    q, k, v = (getattr(module, f"{n}_proj")(x).unflatten(-1, (-1, module.head_dim)) for n in "qkv")
    q, k = (getattr(module, f"{n}_norm", torch.nn.Identity())(y) for n, y in (("q", q), ("k", k)))
    between = angle[:, None] - angle[None]
    later = torch.ones(len(member), len(member), dtype=torch.bool).triu(1)
    average = (member == torch.arange(len(x))[:, None]).to(x.dtype)
    average /= average.sum(1, keepdim=True)
    out = torch.zeros_like(q)
    for head in range(q.shape[1]):
        shared = head * k.shape[1] // q.shape[1]
        (qa, qb, qc), (ka, kb, kc) = (
            pairs(y, 2 * angle.shape[1], neighbours) for y in (q[member, head], k[member, shared])
        )
        even = qa[:, None] * ka + qb[:, None] * kb
        odd = qa[:, None] * kb - qb[:, None] * ka
        logits = ((even * between.cos() + odd * between.sin()).sum(-1) + qc @ kc.T) * module.head_dim**-0.5
        places = logits.masked_fill(later, -torch.inf).softmax(-1) @ v[member, shared]
        out[:, head] = average @ places
    return module.o_proj(out.flatten(1))


def pairs(y: Tensor, rotated: int, neighbours: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The first and the second of all channels that are rotated together, and the channels that are not."""
    first, second = (y[:, :rotated:2], y[:, 1:rotated:2]) if neighbours else y[:, :rotated].chunk(2, -1)
    return first, second, y[:, rotated:]


@torch.no_grad()
def logits(
    lm, head, x: Tensor, member: Tensor, positions: Tensor, deep: list[Tensor], neighbours: bool = False
) -> Tensor:
    """[V] behind the last token. positions: [1, U] or [3, 1, U] of the places; deep[k] [P, D] is added after layer
    k."""
    cos, sin = lm.rotary_emb(x, positions)
    angle = torch.atan2(sin, cos)[0]
    angle = angle[:, ::2] if neighbours else angle.chunk(2, -1)[0]
    for number, layer in enumerate(lm.layers):
        attended = attention(layer.self_attn, layer.input_layernorm(x), member, angle, neighbours)
        x = x + normed(layer, "post_self_attn_layernorm", attended)
        x = x + normed(layer, "post_mlp_layernorm", layer.mlp(layer.post_attention_layernorm(x)[None])[0])
        x = x + deep[number] if number < len(deep) else x
    return head(lm.norm(x))[-1]


def normed(layer, name: str, x: Tensor) -> Tensor:
    """Behind the norm that some decoders have at the end of a branch."""
    return getattr(layer, name, torch.nn.Identity())(x)


@torch.no_grad()
def generate(model, p: oracle.PrefillQK, owner: Tensor, new_tokens: int, start=None) -> tuple[Tensor, Tensor]:
    """Greedy decoding, everything anew for every token; `start`: per row, tokens it is made to say. [B, n] and [n, B,
    V]."""
    lm, head = (copy.deepcopy(m).double() for m in (model.get_decoder(), model.lm_head))
    lm.config._experts_implementation = "eager"  # torch groups the matrices of experts in float32 at most
    neighbours = tiny.family(model).rotates_neighbours
    rows, scores = [], []
    for b, own in enumerate(owner):
        places = (own >= 0).nonzero()[:, 0]
        slots = (own == torch.arange(len(own))).nonzero()[:, 0]
        member = torch.tensor([slots.tolist().index(c) for c in own[places].tolist()])
        x, positions = p.embeds[b, slots].double(), p.positions[..., b : b + 1, places]
        deep, last = [d[b, slots].double() for d in p.deep], p.positions[..., b, -1].max()
        tokens, out = [], []
        for step in range(new_tokens):
            out.append(logits(lm, head, x, member, positions, deep, neighbours))
            tokens.append(int(out[-1].argmax()) if start is None else int(start[b][step]))
            x = torch.cat([x, lm.embed_tokens(torch.tensor([tokens[-1]]))])
            member = torch.cat([member, torch.tensor([len(x) - 1])])
            positions = torch.cat([positions, (last + 1 + step).expand(*positions.shape[:-1], 1)], -1)
            deep = [torch.cat([d, torch.zeros_like(d[:1])]) for d in deep]
        rows.append(tokens)
        scores.append(torch.stack(out))
    return torch.tensor(rows), torch.stack(scores, 1).float()
