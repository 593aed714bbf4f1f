"""The vocabulary of stages of site attention that change the output of attention at every step. Letters as in
`tokens`; S counts the slots that a layer attends to, P the new ones among them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import pad

from vtoken.stages.base import Compressor
from vtoken.stages.facts import Site

CHUNK = 1 << 24  # scores in memory at once: 64 MiB
CHANNELS = 8  # that a bias adds to a head: flash attention takes multiples of 8


@dataclass(frozen=True)
class SteeredLayer:
    """One decoder layer in one forward, all rows of a batch. Query head h reads key head h // (H / Hk).

    Attributes:
        q: [B, H, P, d] queries with RoPE; k, v: [B, Hk, S, d] with what is cached; the new slots are the last.
        attend: attention of such q, k, v by the model's own backend and mask, [B, P, H, .].
        scale: factor on q . k before the softmax.
        layer: index of the layer.
        visual: [B, S] slots that hold visual tokens, those of earlier turns among them.
        behind: [B, P] queries of text after a picture: of the prompt, of later turns, generated.
        real: [B, S] slots that hold a token that is not masked; None: all do.
        images: of a prompt with pictures, per image its row and the new slots [N] of its tokens.
        hidden: [B, P, D] what entered the layer, for stages that `read_hidden`, in a prompt with pictures.
        marked: [B, S] the marks that `mark` gave every slot in the layer `marked_by`; None: no marks.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    scale: float
    layer: int
    visual: Tensor
    behind: Tensor
    real: Tensor | None = None
    images: tuple[tuple[int, Tensor], ...] = ()
    hidden: Tensor | None = None
    marked: Tensor | None = None

    def text_rows(self) -> Iterator[tuple[slice, Tensor]]:
        """Batch rows and the new slots [R] of their queries `behind` a picture: row by row in a prompt, all rows of a
        step at once. Asks the device, but not in a step."""
        if self.q.shape[2] == 1:
            yield slice(0, len(self.q)), torch.zeros(1, dtype=torch.long, device=self.q.device)
            return
        for row, behind in enumerate(self.behind):
            if len(at := behind.nonzero()[:, 0]):
                yield slice(row, row + 1), at

    def attention(self, rows: slice, at: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the attention of the queries in the new slots `at` [R] of these rows, a chunk of queries at a time, so
        that it is never all in memory: the slots [R'] of the chunk, and its attention [B', H, R', S], fp32."""
        k = self.k[rows].float()
        slots, first = torch.arange(k.shape[2], device=k.device), k.shape[2] - self.q.shape[2]
        most = max(1, CHUNK // (len(k) * self.q.shape[1] * len(slots)))
        for part in at.split(most):
            q = self.q[rows][:, :, part].float().unflatten(1, (k.shape[1], -1))
            scores = torch.einsum("bhgrd,bhsd->bhgrs", q, k).flatten(1, 2) * self.scale
            hidden = slots > part[:, None] + first
            if self.real is not None:
                hidden = hidden | ~self.real[rows, None]
            scores = scores.masked_fill(hidden if hidden.ndim == 2 else hidden[:, None], -torch.inf)
            yield part, scores.softmax(-1)

    def biased(self, gain: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
        """[B, P, H, d] attention with `gain` [H] added to the scores of queries [B, P] bool at keys [B, S] bool.

        The bias of a head has rank one, so two more channels of queries and keys add it in any attention backend
        (FlashBias, https://arxiv.org/abs/2505.12044): a key has 1 or 0 there, a query `gain`, split into two parts for
        the sake of half precision.
        """
        width, wide = self.v.shape[3], gain.float() / self.scale
        high = wide.to(self.q.dtype)
        parts = torch.stack([high, (wide - high.float()).to(self.q.dtype)], -1)  # [H, 2]
        more = parts[None, :, None] * queries[:, None, :, None].to(self.q.dtype)
        ones = keys[:, None, :, None].to(self.k.dtype).expand(-1, self.k.shape[1], -1, 2)
        q, k = (torch.cat([x, pad(e, (0, CHANNELS - 2))], -1) for x, e in ((self.q, more), (self.k, ones)))
        return self.attend(q, k, pad(self.v, (0, CHANNELS)))[..., :width]


class SteeredAttention(Compressor):
    """Changes the attention output of text tokens after a picture, layer by layer: in the prompt, in later turns and at
    every generated token. Nothing is dropped and nothing gets faster; answers change.

    Raises (in a model): UnsupportedError, of static caches and gradient checkpointing.
    """

    site: ClassVar[Site] = "attention"
    read_hidden: ClassVar[bool] = False  # whether the stage needs SteeredLayer.hidden

    first: int = Field(default=0, ge=0, description="first decoder layer in which it acts")
    last: int | None = Field(
        default=None, ge=0, description="last decoder layer in which it acts; null: the model's last"
    )

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.last is not None and self.last < self.first:
            raise ValueError(f"last ({self.last}) comes before first ({self.first})")
        return self

    def layers(self, depth: int) -> tuple[int, ...]:
        """Decoder layers in which the stage acts."""
        return tuple(range(self.first, depth if self.last is None else min(depth, self.last + 1)))

    def unknown_heads(self, depth: int, heads: int) -> str:
        """Which heads the stage names that a decoder of `depth` layers with `heads` query heads lacks, and what to do;
        "" if none."""
        return ""

    def marked_by(self, layer: int) -> int | None:
        """The layer, this one or an earlier one, whose `mark` this layer gets as `SteeredLayer.marked`; None: none."""
        return None

    def mark(self, layer: SteeredLayer) -> Tensor:
        """[B, P] bool marks on the tokens of a prompt with pictures, which are remembered as long as the tokens are
        cached. Called in layers that are `marked_by` themselves."""
        raise NotImplementedError(f"stage {self.name} defines no mark()")

    def steer(self, layer: SteeredLayer) -> Tensor | None:
        """[B, P, H, d] the attention output; None: that of the model's own attention."""
        raise NotImplementedError(f"stage {self.name} defines no steer()")
