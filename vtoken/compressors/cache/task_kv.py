"""Task-KV: key heads that differ from the others of their layer keep everything, the others a part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

from vtoken.compressors.cache._slots import best, hold_text
from vtoken.compressors.cache.snapkv import SnapKV
from vtoken.stages.budget import Budget
from vtoken.stages.cache import CachedLayer, HeadClasses, HeadSlots
from vtoken.stages.layer_size import LayerSize
from vtoken.stages.query_attention import shared


class TaskKV(SnapKV):
    """At the end of the prefill, every key head of a layer gets one vector: the sum of the values of the `top`
    tokens that the last `window` prompt tokens attend to most, each times that attention (mean over these queries,
    pooled over `kernel` neighbouring tokens, mean over the query heads of the key head). The heads whose vectors are
    farthest from the layer's mean, and the one closest to it, keep everything. How many count as farthest falls
    linearly: the share `beta` of all key heads in the first layer with attention, `least` heads in the last one.

    The others keep the tokens attended to most, so many that the mean over all heads of the layer is `keep`; where the
    heads that keep everything exceed that mean already, one of each image. By default text stays and the visual tokens
    of each image compete. With `text: true`, `keep` is for the whole prompt, and the first `sink` and latest `recent`
    tokens stay in all heads. Both kinds of head are stored apart; what is generated is kept in all of them.

    Paper: https://arxiv.org/abs/2501.15113
    """

    by_head: ClassVar[bool] = False
    in_classes: ClassVar[bool] = True
    paper: ClassVar[str] = "https://arxiv.org/abs/2501.15113"
    deviations: ClassVar[str] = (
        "After the paper; its code was not at hand. Text is kept unless `text: true`: it stands for the sinks (text "
        "before the image) and the recent tokens, which then need no counts. Heads are key heads, their query heads "
        "averaged; the paper's models have as many of both, or it does not say. The window is at most the text after "
        "the last image. The number of heads is rounded, and of heads that are equally far, as two always are, the "
        "earlier counts as farther. A later turn keeps the heads of the first. A row without images is left whole."
    )

    keep: Budget = Field(description="visual tokens of each image, mean over key heads; with text: true, of the prompt")
    kernel: int = Field(default=7, ge=1, description="tokens that scores are pooled over, an odd number")
    text: bool = Field(default=False, description="text may be evicted too, as in the paper")
    beta: float = Field(0.25, ge=0, le=1, description="share of key heads that are farthest, in the first layer")
    least: int = Field(default=1, ge=0, description="key heads that are farthest in the last layer")
    top: int = Field(default=256, ge=1, description="tokens whose values describe a head")
    sink: int = Field(default=16, ge=0, description="with text: true, first tokens that stay in all heads")
    recent: int = Field(default=256, ge=0, description="with text: true, latest tokens that stay in all heads")

    def heads_incompatibility(self, heads: int, key_heads: int, width: int) -> str:
        if min(self.whole(key_heads, before, 2) for before in (0, 1)) < key_heads:
            return ""
        return f"in every layer all {key_heads} key heads would keep everything; lower beta and least, or take snapkv"

    def whole(self, key_heads: int, before: int, layers: int) -> int:
        """Key heads that keep everything in a layer, if `before` of the `layers` layers come before it."""
        first = self.beta * key_heads
        far = first - (first - self.least) * before / max(1, layers - 1)
        return min(key_heads, int(far + 0.5) + 1)

    def others(self, prompt: int, lengths: Sequence[int], key_heads: int, place: tuple[int, int]) -> tuple[int, ...]:
        """Tokens that each of the other heads keeps of every image; with text: true, one number, of the prompt."""
        whole, means = self.whole(key_heads, *place), self.left(prompt, lengths)
        sizes, least = ((prompt,), self.sink + self.recent) if self.text else (lengths, 1)
        return tuple(
            min(n, max(least, (key_heads * k - whole * n) // max(1, key_heads - whole)))
            for k, n in zip(means, sizes, strict=True)
        )

    def compress(self, layer: CachedLayer) -> HeadClasses:
        n, device, scores = layer.keys.shape[1], layer.keys.device, self.received(layer)
        every, none = torch.arange(n, device=device)[None], torch.zeros(1, 0, dtype=torch.int64, device=device)
        full, *rest = self.split(layer, scores) if layer.classes is None else layer.classes
        classes = [HeadSlots(full, every, none)]
        for heads in rest:
            mine, counts = scores[heads], self.others(n, layer.lengths, len(scores), layer.place)
            if self.text:
                always = (every < self.sink) | (every >= n - self.recent)
                stay = best(mine.masked_fill(always, torch.inf), counts[0])
            else:
                stay = hold_text(layer, mine, counts).index
            classes.append(HeadSlots(heads, stay, none))
        return HeadClasses(tuple(classes))

    def received(self, layer: CachedLayer) -> Tensor:
        """[Hk, N] attention that each token receives."""
        window = self.query_window(layer.keys.shape[1], layer.lengths, layer.behind)
        received = shared(layer.query_attention, layer.queries, layer.keys, layer.scale).received(window) / window
        pool = avg_pool1d if self.pooling == "avg" else max_pool1d
        return pool(received, self.kernel, 1, self.kernel // 2).mean(1)

    def split(self, layer: CachedLayer, received: Tensor) -> tuple[Tensor, ...]:
        """The key heads that keep everything, and the others, if there are any; ascending."""
        whole, top = self.whole(len(received), *layer.place), best(received, self.top)
        vectors = (received.gather(1, top)[..., None] * layer.values.take_along_dim(top[..., None], 1).float()).sum(1)
        far = (vectors - vectors.mean(0)).norm(dim=1)
        # Two heads are equally far from their mean, and rounding is not to choose between them.
        order = (far / far.max().clamp(min=1e-30)).round(decimals=4).argsort(descending=True, stable=True)
        full, rest = torch.cat([order[: whole - 1], order[-1:]]), order[whole - 1 : -1]
        return (full.sort().values, rest.sort().values)[: 1 + (len(rest) > 0)]

    def query_window(self, prompt: int, lengths: Sequence[int], behind: int) -> int:
        return max(1, min(self.window, behind))

    def cache_slots(self, at: LayerSize) -> float:
        whole, text = self.whole(at.kv_heads, *at.place), 0 if self.text else at.prompt - sum(at.images)
        other = text + sum(self.others(at.prompt, at.images, at.kv_heads, at.place))
        return (whole * at.prompt + (at.kv_heads - whole) * other) / at.kv_heads + at.generated

    def cost(self, prompt: int, lengths: Sequence[int], heads: int, kv_heads: int, head_dim: int) -> int:
        return 2 * head_dim * (min(self.window, prompt) * prompt * heads + min(self.top, prompt) * kv_heads)
