"""The vocabulary of site attention. Letters as in `tokens`; `T` and `M` count query blocks and key blocks."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from math import log
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vtoken.kernels import block_sparse_attention
from vtoken.kernels._flex import backend_of
from vtoken.stages.base import Compressor
from vtoken.stages.facts import Site
from vtoken.stages.query_attention import Once, QueryAttention
from vtoken.stages.tokens import Parts


@dataclass(frozen=True)
class Rope:
    """How a decoder layer rotated the queries and keys of one row.

    Attributes:
        cos, sin: [N, r] as passed to the layer: axes of M-RoPE joined, times YaRN's factor; r < d where only part of a
            head is rotated.
        rotate: the model's own function, (q [1, H, N, d], k [1, Hk, N, d], cos [1, N, r], sin [1, N, r]) -> q and k
            rotated.
    """

    cos: Tensor
    sin: Tensor
    rotate: Callable[..., tuple[Tensor, Tensor]]

    def starts(self, size: int) -> Rope:
        """The RoPE of the first token of every block."""
        return Rope(self.cos[::size], self.sin[::size], self.rotate)

    def turn(self, x: Tensor) -> Tensor:
        """Rotates x [H, N, d]; fp32."""
        return self._turned(x, self.cos.float(), self.sin.float())

    def turn_to(self, x: Tensor, index: Tensor) -> Tensor:
        """Rotates x [H, C, d] to the places index [H, C] of each head; fp32."""
        x = x[:, None].float()
        return self.rotate(x, x, self.cos[index].float(), self.sin[index].float())[0][:, 0]

    def undo(self, x: Tensor) -> Tensor:
        """Undoes the rotation of x [H, N, d], up to rounding; fp32."""
        cos, sin = self.cos.float(), self.sin.float()
        square = cos * cos + sin * sin  # 1 up to rounding, times the square of YaRN's factor
        return self._turned(x, cos / square, -sin / square)

    def _turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x[None].float()
        return self.rotate(x, x[:, :1], cos[None], sin[None])[0][0]


@dataclass(frozen=True)
class PrefillQK(Once):
    """Queries and keys of one batch row of a prefill in one decoder layer, without padding. What `once` computes may
    depend on image, raster_index and parts, but not on q and k: it is shared by all layers with these tokens.

    Attributes:
        q: [H, N, d] queries with RoPE; k: [Hk, N, d] keys. Query head h reads key head h // (H / Hk).
        scale: factor on q . k before the softmax.
        image: [N] image of each token, as an index into `parts`; -1 for text (newlines and time stamps included).
        raster_index: [N] position among its image's unpruned tokens, -1 for text.
        parts: rasters of every image of the batch, as in VisualTokens.
        query_attention: shared with a stage of site cache; use it through `query_attention.shared`.
        rope: the rotation of q and k, if the stage asks for it.
        known: results of `once`.
    """

    q: Tensor
    k: Tensor
    scale: float
    layer: int
    image: Tensor
    raster_index: Tensor
    parts: tuple[Parts, ...] = ()
    query_attention: QueryAttention | None = None
    rope: Rope | None = None
    known: dict[Hashable, Any] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """N."""
        return self.q.shape[1]

    @property
    def heads(self) -> int:
        """H."""
        return self.q.shape[0]


@dataclass(frozen=True)
class SparseMask:
    """A decision: which keys the queries of a prompt read, within the causal mask.

    Attributes:
        size: tokens of a block, a power of two, at least 16.
        blocks: [H, T, M] bool, the key blocks that each query block reads.
        columns: [H, G, C] int32, lists of single keys to read in addition (-1 = none). Query block t reads list
            `of[t]`, or `t // share` without `of`.
        of: [T] int32, the list of each query block.
        dense: [H, N] bool, queries that read all keys before them.
        own: [N] bool, queries that also read their own key, where no block or list holds it.
    """

    size: int
    blocks: Tensor
    columns: Tensor | None = None
    share: int = 1
    dense: Tensor | None = None
    own: Tensor | None = None
    of: Tensor | None = None

    def apply(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Attention [H, N, d] of queries [H, N, d] over keys and values [Hk, N, d]."""
        blocks = self.blocks & causal(self.blocks)
        out, lse = block_sparse_attention(q, k, v, blocks, scale, self.size, self.columns, self.share, of=self.of)
        if self.own is not None:
            out = torch.where(self.own[:, None], with_own(out, lse, q, k, v, scale), out)
        if self.dense is None:
            return out
        rows, read = self._dense()
        whole, _ = block_sparse_attention(q, k, v, read, scale, self.size, rows=rows)
        return torch.where(self.dense[..., None], whole, out)

    def backend(self, q: Tensor, k: Tensor, v: Tensor) -> str:
        """Which implementation computes `apply`: torch, triton or flex.

        Raises:
            RuntimeError: flex is forced and does not support single keys or dense queries, or triton is forced and
                cannot run.
        """
        return backend_of(q, k, v, self.columns, self.dense)

    def _dense(self) -> tuple[Tensor, Tensor]:
        """Lists [H, N] of the dense queries of every head, padded with -1, and the blocks [H, T, M] that they read."""
        assert self.dense is not None
        heads, n = self.dense.shape
        _, tiles, blocks = self.blocks.shape
        index = torch.arange(n, device=self.dense.device, dtype=torch.int32)
        rows = torch.where(self.dense, index, n).sort(-1).values
        rows = torch.where(rows < n, rows, -1)
        padded = torch.nn.functional.pad(rows, (0, tiles * self.size - n), value=-1)
        last = padded.view(heads, tiles, self.size).amax(-1, keepdim=True).div(self.size, rounding_mode="floor")
        return rows, torch.arange(blocks, device=rows.device) <= last

    def density(self) -> Tensor:
        """[] computed share of all causal blocks, mean over heads. A single key counts 1 / size of a block for every
        query block that reads it, dense queries count as whole query blocks, own keys count nothing; a head counts at
        most 1. The density of an empty prompt is 1."""
        below = causal(self.blocks)
        if not below.numel():
            return torch.ones((), device=below.device)
        total = torch.count_nonzero(self.blocks & below, dim=(1, 2)).float()
        if self.columns is not None:
            # Looked up in counts per list and key block, eight heads at a time, as tensors here are as long as the
            # lists.
            parts = zip(total.split(8), self.columns.split(8), self._unread(below).split(8), strict=True)
            for mine, columns, unread in parts:
                times = unread.gather(2, (columns.clamp(min=0) // self.size).long())
                mine += torch.where(columns < 0, 0, times).sum((1, 2)) / self.size
        if self.dense is not None:
            # Dense queries are packed into query blocks; the last query of a block decides how far the whole block
            # reads.
            rank = self.dense.cumsum(1, dtype=torch.int32)
            last = self.dense & ((rank % self.size == 0) | (rank == rank[:, -1:]))
            ends = torch.arange(self.dense.shape[1], device=last.device, dtype=torch.int32) // self.size + 1
            total += torch.where(last, ends, 0).sum(1)
        return (total / torch.count_nonzero(below)).clamp(max=1).mean()

    def _unread(self, below: Tensor) -> Tensor:
        """[H, G, M] int32: how many query blocks of a list read this key block through the list only."""
        assert self.columns is not None
        alone = below & ~self.blocks
        groups = self.columns.shape[1]
        if self.of is not None:
            mine = self.of == torch.arange(groups, device=self.of.device)[:, None]
            return torch.stack([(alone & m[:, None]).sum(1, dtype=torch.int32) for m in mine], 1)
        alone = torch.nn.functional.pad(alone, (0, 0, 0, groups * self.share - alone.shape[1]))
        return alone.unflatten(1, (groups, self.share)).sum(2, dtype=torch.int32)


@dataclass(frozen=True)
class DenseSubset:
    """The other kind of decision: of N = `length` tokens, those at `index` [P] (ascending) attend causally to each
    other. The attention output of all other tokens is zero."""

    index: Tensor
    length: int

    def apply(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """As SparseMask.apply, by dense attention over the gathered tokens."""
        q_, k_, v_ = (x[None, :, self.index] for x in (q, k, v))
        out = scaled_dot_product_attention(q_, k_, v_, is_causal=True, scale=scale, enable_gqa=True)[0]
        return q.new_zeros(*q.shape[:2], v.shape[2]).index_copy(1, self.index, out)

    def backend(self, q: Tensor, k: Tensor, v: Tensor) -> str:
        """As SparseMask.backend."""
        return "torch"

    def density(self) -> Tensor:
        """[] computed share of all causal scores."""
        share = len(self.index) * (len(self.index) + 1) / (self.length * (self.length + 1))
        return torch.full((), share, device=self.index.device)


def with_own(out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention [H, N, d] with every query's own key added to `out` and `lse` from `block_sparse_attention`."""
    k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
    wide = torch.promote_types(q.dtype, torch.float32)
    own = (q.to(wide) * k.to(wide)).sum(-1) * (scale / log(2))
    share = torch.sigmoid((own - lse) * log(2))[..., None]
    return (out * (1 - share) + v * share).to(out.dtype)


def causal(blocks: Tensor) -> Tensor:
    """[T, M] bool, for a map [..., T, M] of a whole prompt: the key blocks that start no later than each query
    block."""
    t, m = (torch.arange(n, device=blocks.device) for n in blocks.shape[-2:])
    return m <= t[:, None]


def everything(heads: int, queries: int, keys: int, size: int, device: torch.device) -> Tensor:
    """[H, T, M] bool: all key blocks that the last `queries` of `keys` tokens may see."""
    last = (torch.arange(-(-queries // size), device=device) + 1) * size + keys - queries - 1
    return (torch.arange(-(-keys // size), device=device) * size <= last[:, None]).expand(heads, -1, -1)


class SparseAttention(Compressor):
    """Decides which keys the queries of a prompt read, layer by layer; no token is dropped, and the cache stays whole.

    Acts where a prompt with pictures enters the decoder in one piece. Text turns, decode steps and prompts of fewer
    than `min_len` tokens use the model's own attention; the trace says why.
    """

    site: ClassVar[Site] = "attention"
    rope: ClassVar[bool] = False  # whether the stage needs PrefillQK.rope
    # Whether some tokens must not read each other at all. Only a decoder in which every layer has attention can promise
    # that.
    keeps_apart: ClassVar[bool] = False

    min_len: int = Field(
        8192, ge=0, description="prompts of fewer tokens (after pruning) keep the model's own attention"
    )
    dense_layers: tuple[int, ...] = Field(default=(), description="decoder layers that keep the model's own attention")

    def layers(self, depth: int) -> tuple[int, ...]:
        dense = {k % depth if -depth <= k < depth else k for k in self.dense_layers}
        return tuple(k for k in range(depth) if k not in dense)

    def reads(self, prompt: PrefillQK) -> SparseMask | DenseSubset:
        """The decision for one row in one layer."""
        raise NotImplementedError(f"stage {self.name} defines no reads()")

    def density(self, length: int, layer: int) -> float | None:
        """The density that `reads` will have for a prompt of `length` tokens; None if it depends on their contents."""
        return None

    def density_of(self, length: int, layer: int, counts: Sequence[int], parts: Sequence[Parts]) -> float | None:
        """As `density`, for stages whose density depends on where pictures stand. The account assumes that they come
        first, one after the other, each with the `counts` tokens that are left of its rasters, and then text."""
        return self.density(length, layer)
