"""What a shrunk KV cache must amount to: a dense model without a cache in which later tokens do not see the evicted
ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import oracle
import tiny
import torch
from torch import Tensor

# Per layer: (first slot of a prefill among the row's tokens, [H, N] which of its tokens each query head lost when it
# ended).
Lost = dict[int, list[tuple[int, Tensor]]]


class Told:
    """Wraps a stage's decisions: `calls[layer]` are its (CachedLayer, KeepSlots), in the order of the rows; of rows that
    were decided together, one each."""

    def __init__(self, cls: Any, **options: Any) -> None:
        self.calls: dict[int, list[tuple[Any, Any]]] = {}
        calls, heads = self.calls, [0]

        def compressor(self: Any, model: Any) -> Any:
            heads[0] = model.config.get_text_config().num_key_value_heads
            return cls.compressor(self, model)

        def compress(self: Any, layer: Any) -> Any:
            found = cls.compress(self, layer)
            rows = len(layer.keys) // heads[0]
            told = [(layer, found)] if rows == 1 else zip(each(layer, rows), each(found, rows), strict=True)
            calls.setdefault(layer.layer, []).extend(told)
            return found

        own = {"compress": compress, "compressor": compressor, "name": cls.name}
        self.stage = type(cls.__name__, (cls,), own)(**options)

    def lost(self, row: int, begin: int = 0) -> Lost:
        """What the row (counted among those with images) lost in the last prefill, which began at slot `begin`."""
        out: Lost = {}
        for k, calls in self.calls.items():
            layer, found = calls[row]
            heads, n, _ = layer.keys.shape
            gone = torch.ones(heads, n, dtype=torch.bool).scatter(1, found.index, False)
            out[k] = [(begin, gone.repeat_interleave(len(layer.queries) // heads, 0))]
        return out


def attending(cache: Any) -> list[Any]:
    """The layers of a cache that hold keys."""
    return [layer for layer in cache.layers if hasattr(layer, "keys")]


def each(together: Any, rows: int) -> list[Any]:
    """A CachedLayer or KeepSlots of several rows, whose heads stand one after the other, as one of each."""
    names = [n for n in ("keys", "values", "queries", "index", "into", "weight") if hasattr(together, n)]
    heads = {n: [None] * rows if getattr(together, n) is None else getattr(together, n).chunk(rows) for n in names}
    return [replace(together, **{n: heads[n][row] for n in names}) for row in range(rows)]


@torch.no_grad()
def logits(
    model: Any,
    x: Tensor,
    positions: Tensor,
    lost: Lost,
    cuts: dict[int, Tensor] | None = None,
    deep: Sequence[Tensor] = (),
    seen: dict[int, Tensor] | None = None,
) -> Tensor:
    """[N, V] of one row [1, N, D]; cuts[k] [N_k] drops tokens before layer k; seen[k] [H, N, N] says what queries of
    layer k see besides themselves."""
    lm = model.get_decoder()
    for k, layer in enumerate(lm.layers):
        if cuts and k in cuts:
            x, positions = x[:, cuts[k]], positions[..., cuts[k]]
            deep = [d[:, cuts[k]] for d in deep]
        n = x.shape[1]
        mask = torch.ones(lm.config.num_attention_heads, n, n, dtype=torch.bool).tril()
        for begin, gone in lost.get(k, ()):
            end = begin + gone.shape[1]
            mask[:, end:, begin:end] &= ~gone[:, None]
        if seen is not None and k in seen:
            mask &= seen[k] | torch.eye(n, dtype=torch.bool)
        mask = mask[None]
        if not hasattr(layer, "self_attn"):
            mask = None  # it keeps a state, out of which nothing is lost
        elif lm.config._attn_implementation == "eager":
            mask = torch.where(mask, 0.0, torch.finfo(x.dtype).min).to(x.dtype)
        rope = lm.rotary_emb(x, positions)
        x = layer(x, attention_mask=mask, position_embeddings=rope, position_ids=None, past_key_values=None)
        if k < len(deep):
            x = x + deep[k]
    return model.lm_head(tiny.normed(model, x))[0]


@torch.no_grad()
def forced(
    model: Any,
    p: oracle.PrefillQK,
    row: int,
    tokens: Sequence[int],
    lost: Lost,
    keep: Tensor | None = None,
    layer_keep: dict[int, Tensor] | None = None,
    seen: dict[int, Tensor] | None = None,
) -> Tensor:
    """[n, V] logits of one row while it is made to say `tokens`.

    Args:
        lost, seen: as in `logits`.
        keep: [B, L] tokens that enter the decoder; layer_keep[k]: [B, L] those that enter layer k.
    """
    stay = p.mask[row] if keep is None else keep[row] & p.mask[row]
    said = torch.tensor([list(tokens)[:-1]], dtype=torch.long)
    x = torch.cat([p.embeds[row : row + 1, stay], model.get_input_embeddings()(said)], 1)
    more = p.positions[..., row, -1].max() + 1 + torch.arange(said.shape[1])
    positions = p.positions[..., row : row + 1, stay]
    positions = torch.cat([positions, more.expand(*positions.shape[:-1], -1)], -1)
    deep = [torch.cat([d[row : row + 1, stay], torch.zeros(1, said.shape[1], d.shape[2])], 1) for d in p.deep]
    cuts, held = {}, torch.ones(x.shape[1], dtype=torch.bool)
    for k, kept in sorted((layer_keep or {}).items()):
        now = torch.cat([kept[row][stay], torch.ones(said.shape[1], dtype=torch.bool)])
        cuts[k], held = now[held], now
    return logits(model, x, positions, lost, cuts, deep, seen)[-len(tokens) :]
