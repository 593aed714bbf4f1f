"""LOOK-M: the KV cache keeps text before images, and merges evicted tokens into the kept ones most similar to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from vtoken.compressors.cache._slots import ascending, best, hold_text
from vtoken.kernels import gather_cache, nearest_tokens
from vtoken.stages import offsets_of
from vtoken.stages.budget import Budget
from vtoken.stages.cache import CachedLayer, CacheStage, KeepSlots
from vtoken.stages.query_attention import shared


class LookM(CacheStage):
    """At the end of the prefill, every layer and KV head ranks the tokens of the prompt by the attention they receive
    from the whole prompt (summed over queries, so early tokens have an advantage; averaged over the query heads of the
    KV head). It keeps the newest tokens (`recent`), all text, and the best older visual tokens, as many as `important`
    leaves room for after the older text: none, if the older text takes all of it.

    An evicted token is merged into the kept token, text included, with the most similar key direction; values are
    merged the same way. `averaged`: the mean of the kept token and all it absorbs. `pivotal`: each absorbed token is
    first averaged with the kept one. `weighted`: each is first multiplied by its similarity. Averaged and weighted
    absorb only tokens at least as similar as the mean of their head.

    Paper: https://arxiv.org/abs/2406.18139
    """

    by_head: ClassVar[bool] = True
    paper: ClassVar[str] = "https://arxiv.org/abs/2406.18139"
    deviations: ClassVar[str] = (
        "Text comes first by a mask: the authors' code subtracts 65516 from the scores of images, which loses their "
        "ranking in half precision. Their averaging pairs the wrong rows and judges by similarities averaged over "
        "heads whose evicted tokens differ; here each head pairs and judges its own tokens. Images may have any number "
        "of tokens (there 576). `keep` counts visual tokens instead; with `text: true` the budget is strict, as in the "
        "paper, and long text is evicted. A row without images is left unchanged. Shares are rounded to the nearest, "
        "there down."
    )

    important: Budget = Field(
        default=Budget("10%"), description="older tokens that stay, text first: a share of the prompt"
    )
    recent: Budget = Field(default=Budget("10%"), description="newest tokens, which always stay: a share of the prompt")
    keep: Budget | None = Field(
        default=None,
        description="visual tokens that stay of each image, recent ones first; replaces the share `important`",
    )
    merge: Literal["none", "averaged", "pivotal", "weighted"] = Field(
        default="pivotal", description="how evicted tokens are merged; pivotal is the paper's best"
    )
    text: bool = Field(default=False, description="text beyond `important` is evicted too; not with `keep`")

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        if self.text and self.keep is not None:
            raise ValueError("text: true counts on the whole prompt by `important`; leave `keep` out")
        return self

    def compress(self, layer: CachedLayer) -> KeepSlots:
        n, heads = layer.keys.shape[1], len(layer.keys)
        recent, important = (b.counts((n,), (0,))[0] for b in (self.recent, self.important))
        counts = None if self.keep is None else self.keep.counts(layer.lengths, (0,) * len(layer.lengths))
        if counts == layer.lengths or (counts is None and n <= important + recent):
            return KeepSlots(torch.arange(n, device=layer.keys.device).expand(heads, n), layer.lengths)
        scores = shared(layer.query_attention, layer.queries, layer.keys, layer.scale).received(n).mean(1)
        if counts is None:
            return self._fold(layer, self._older(layer, scores, n - recent, important))
        newest = torch.arange(n, device=scores.device) >= n - recent
        return self._fold(layer, hold_text(layer, scores.masked_fill(newest, torch.inf), counts))

    def _older(self, layer: CachedLayer, scores: Tensor, end: int, room: int) -> KeepSlots:
        """Keeps everything from slot `end` on, and of the earlier slots text first, then visual tokens, until `room` is
        used up."""
        before = [sum(slot < end for slot in slots) for slots in layer.slots]
        visual = torch.cat([slots[:n] for slots, n in zip(layer.images, before, strict=True)])
        words, n = end - len(visual), scores.shape[1]
        alive = torch.ones_like(scores, dtype=torch.bool)
        alive[:, visual] = False
        if self.text and words > room:
            rivals = ascending(alive[:1, :end], words)[0]
            alive[:, rivals] = False
            left, counts = room, None
            stay = n - end + room
        else:
            rivals, left = visual, min(len(visual), max(0, room - words))
            counts = (layer.lengths[0] - len(visual) + left,) if len(before) == 1 else None
            stay = n - len(visual) + left
        alive.scatter_(1, rivals[best(scores[:, rivals], left)], True)
        return KeepSlots(ascending(alive, stay), counts)

    def _fold(self, layer: CachedLayer, hold: KeepSlots) -> KeepSlots:
        """Sets, for every evicted token, the kept token that absorbs it and its weight there."""
        (heads, stay), n = hold.index.shape, layer.keys.shape[1]
        if self.merge == "none" or stay == n:
            return hold
        gone = torch.ones(heads, n, dtype=torch.bool, device=hold.index.device).scatter(1, hold.index, False)
        evicted = ascending(gone, n - stay)
        kept, lost = (gather_cache(layer.keys[None], i[None])[0].flatten(0, 1) for i in (hold.index, evicted))
        lost_ends, kept_ends = (offsets_of([each] * heads, torch.device("cpu")) for each in (n - stay, stay))
        found = nearest_tokens(lost, kept, lost_ends, kept_ends)
        alike, slot = (x.unflatten(0, (heads, -1)) for x in found)
        slot = slot - torch.arange(heads, device=slot.device)[:, None] * stay
        taken = alike >= (-1.0 if self.merge == "pivotal" else alike.mean(1, keepdim=True))
        count = alike.new_zeros(heads, stay).scatter_add(1, slot, taken.float())
        own = (1 + count / 2 if self.merge == "pivotal" else 1) / (1 + count)
        part = {"averaged": torch.ones_like(alike), "pivotal": torch.full_like(alike, 0.5)}.get(self.merge, alike)
        places = torch.arange(stay, device=slot.device).expand(heads, -1)
        into = torch.full((heads, n), -1, device=slot.device).scatter(1, hold.index, places)
        weight = (
            alike.new_zeros(heads, n)
            .scatter(1, hold.index, own)
            .scatter(1, evicted, part / (1 + count).gather(1, slot))
        )
        return replace(hold, into=into.scatter(1, evicted, slot.masked_fill(~taken, -1)), weight=weight)

    def slots(self, prompt: int, lengths: Sequence[int]) -> int:
        """Assumes that the text comes after the images."""
        recent, important = (b.counts((prompt,), (0,))[0] for b in (self.recent, self.important))
        visual = sum(lengths)
        if self.keep is not None:
            return prompt - visual + sum(self.keep.counts(lengths, (0,) * len(lengths)))
        words = max(0, prompt - visual - recent)
        return min(prompt, recent + (important if self.text else max(words, important)))

    def cost(self, prompt: int, lengths: Sequence[int], heads: int, kv_heads: int, head_dim: int) -> int:
        stay = self.slots(prompt, lengths)
        pairs = 0 if self.merge == "none" else (prompt - stay) * stay
        return 2 * head_dim * (heads * prompt * prompt + kv_heads * pairs)
