"""Which heads attend to earlier copies of what they read: as RazorAttention measures it on repeated text, and the same
on a repeated picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vtoken.adapters.base import Adapter
from vtoken.compressors._rows import rows_at
from vtoken.errors import ConfigError, UnsupportedError
from vtoken.hooks.decoder.attention_tap import AttentionCall, tap
from vtoken.hooks.state.context import Context
from vtoken.hooks.state.layer_kinds import window_of
from vtoken.kernels import probe_sums

QUERIES = 256  # rows of an attention map that are in memory at once
# (q [H, N, d] after RoPE, k [Hk, N, d], factor on q . k) -> scores of the layer's query heads
Look = Callable[[Tensor, Tensor, float], Sequence[Tensor]]


def layers_of(adapter: Adapter) -> tuple[int, ...]:
    """Decoder layers whose heads are measured: those that attend to the whole prompt."""
    return tuple(k for k in adapter.attending if window_of(adapter.lm.config, k) is None)


def watch(adapter: Adapter, inputs: dict[str, Tensor], look: Look) -> list[Tensor]:
    """Runs one prompt and measures the attention of every layer of `layers_of`.

    Returns:
        [layers, Hk] float64 of every score: the largest of a key head's query heads.

    Raises:
        UnsupportedError: an attention that is more than a softmax over keys.
    """
    context, layers = Context(adapter), layers_of(adapter)
    found: dict[int, list[Tensor]] = {}

    def function(call: AttentionCall) -> Any:
        if why := call.unusual():
            raise UnsupportedError(f"the heads of decoder layer {call.layer} cannot be probed: {why}")
        scores = look(call.q[0], call.k[0], call.scale)
        found[call.layer] = [x.double().unflatten(0, (call.k.shape[1], -1)).amax(1).cpu() for x in scores]
        return call.original()

    try:
        tap(context.handle, context.lm, layers, function)
        context.handle.switch.on()
        with torch.no_grad():
            adapter.model(**inputs, logits_to_keep=1, use_cache=False)
    finally:
        context.handle.release()
    return [torch.stack(scores) for scores in zip(*(found[k] for k in layers), strict=True)]


def copies(q: Tensor, k: Tensor, scale: float, period: int) -> tuple[Tensor, Tensor]:
    """(echo, induction) [H]: the attention of a token to its earlier copies, and to the tokens after these; the mean
    over the tokens that have an earlier copy.

    Args:
        q: [H, N, d] after RoPE; k: [Hk, N, d]. The first token stands alone; after it, N - 1 tokens are the same
            `period` tokens again and again.
    """
    n = q.shape[1]
    back = torch.arange(period, n - 1, period, device=q.device)  # from a token to each of its copies
    slash = probe_sums(q[None], k[None], scale)[1][0]
    # Diagonals begin at the first token, which is nobody's copy.
    each = zip(q.split(len(q) // len(k)), k.split(1), strict=True)
    ends = torch.cat([rows_at(mine, keys, torch.cat([back - 1, back]), scale) for mine, keys in each])
    before, at = ends.split(len(back), 1)
    echo = slash[:, back].sum(1) - at[..., 0].sum(1)
    induction = slash[:, back - 1].sum(1) - before[..., 0].sum(1) - at[..., 1].sum(1)
    return tuple(x.clamp(min=0) / (n - 1 - period) for x in (echo, induction))


def shown(q: Tensor, k: Tensor, scale: float, places: Tensor) -> Tensor:
    """[H] the attention of a visual token to its earlier copies, mean over those that have one.

    Args:
        places: [R, N] where the tokens of each of R equal pictures stand in the prompt.
    """
    total, groups = q.new_zeros(len(q), dtype=torch.float64), len(q) // len(k)
    for picture in range(1, len(places)):
        for rows in torch.arange(places.shape[1], device=q.device).split(QUERIES):
            earlier = places[:picture, rows].T
            for head in range(len(q)):
                (share,) = rows_at(q[head, None], k[head // groups, None], places[picture, rows], scale)
                total[head] += share.gather(1, earlier).sum()
    return total / places[1:].numel()


def ranked(scores: Sequence[Tensor], shares: Sequence[float]) -> tuple[Tensor, int]:
    """The order in which heads come to read everything as the shares grow in proportion, and how many do at these
    shares. A head does if, by one of the scores, it is among that score's share of all heads.

    Args:
        scores: [layers, Hk] each; of equal ones the earlier layer, then the earlier head, is ranked first.
        shares: of all heads, for each score.

    Returns:
        order [layers * Hk] indices of heads, layer by layer; count.

    Raises:
        ConfigError: the shares leave no head.
    """
    heads, needed = scores[0].numel(), []
    for score, share in zip(scores, shares, strict=True):
        if count := round(share * heads):
            rank = score.flatten().argsort(descending=True, stable=True).argsort() + 1
            needed.append(rank.double() / count)
    if not needed:
        raise ConfigError(
            f"of {heads} key heads no head is left at shares of {', '.join(f'{s:g}' for s in shares)}; raise one"
        )
    share_needed = torch.stack(needed).amin(0)
    return share_needed.argsort(stable=True), int((share_needed <= 1).sum())


def table(order: Tensor, layers: Sequence[int], depth: int, key_heads: int) -> list[list[float]]:
    """A number per decoder layer and key head: 1 for the first head in the order, less for each one after it, 0 in
    layers that were not measured. No two measured heads have the same."""
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    rows = iter((1 - place.double() / len(order)).view(-1, key_heads).tolist())
    return [[round(x, 6) for x in next(rows)] if k in layers else [0.0] * key_heads for k in range(depth)]
