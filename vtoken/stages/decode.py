"""The vocabulary of site decode. Letters as in `tokens`; query head h reads key head h // (H / Hk).

At every generated token a stage says which cached visual tokens each key head reads; the cache stays whole. Text and
what was generated are always read, so only visual tokens count in a budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from vtoken.stages.base import Compressor
from vtoken.stages.budget import Budget
from vtoken.stages.facts import Site
from vtoken.stages.layer_size import LayerSize
from vtoken.stages.tokens import uploaded


@dataclass(frozen=True)
class DecodeStep:
    """One decoder layer at one generated token, all rows of a batch.

    Attributes:
        queries: [B, H, d] of the new token, with RoPE; keys: [B, Hk, S, d] all that are cached, its own last.
        visual: [B, V] slots of the visual tokens that may be left out, ascending; 0 after a row's last.
        lengths: number of these of each row; budgets: how many of them each row may read.
        real: [B, S] which slots hold a token that is not masked; None: all do.
        scale: factor on q . k before the softmax.
        layer: index of the layer; before: of the layer at which the stage acted last in this step, -1 for none.
        memory: scratch space of this layer and this cache, for later tokens. Tensors in it must have one entry per row,
            as rows may be reordered; it is emptied when visual tokens leave the cache. `since` and `mark` use its keys
            "last" and the name that they are given.
        shared: scratch space of this step, for later layers.
    """

    queries: Tensor
    keys: Tensor
    visual: Tensor
    lengths: tuple[int, ...]
    budgets: tuple[int, ...]
    real: Tensor | None
    scale: float
    layer: int
    before: int
    memory: dict[str, Any]
    shared: dict[str, Any]

    @property
    def slots(self) -> int:
        """S."""
        return self.keys.shape[2]

    def since(self, key: str) -> int | None:
        """Number of tokens since `mark(key)`; None if there was none, or if several tokens came at once since. Must be
        called exactly once per token."""
        at, last = self.memory.get(key), self.memory.get("last")
        self.memory["last"] = self.slots
        return None if at is None or last != self.slots - 1 else self.slots - int(at)

    def mark(self, key: str) -> None:
        """Remembers this token under a name, for `since`."""
        self.memory[key] = self.slots

    def logits(self) -> Tensor:
        """[B, Hk, H / Hk, S] fp32, scaled, -inf where no token is."""
        queries = self.queries.unflatten(1, (self.keys.shape[1], -1))
        found = (queries @ self.keys.transpose(2, 3)).float() * self.scale
        return found if self.real is None else found.masked_fill(~self.real[:, None, None], -torch.inf)

    def of_visual(self, scores: Tensor) -> Tensor:
        """[B, Hk, V] of scores [B, Hk, S]: those of the visual tokens, -inf after a row's last."""
        found = scores.gather(2, self.visual[:, None].expand(-1, scores.shape[1], -1))
        return among(found, self.lengths)


@dataclass(frozen=True)
class Choice:
    """A decision: which visual tokens the key heads read.

    Attributes:
        index: [B, Hk, K] places in `DecodeStep.visual`, ascending, -1 after a row's last.
        counts: how many there are of each row.
    """

    index: Tensor
    counts: tuple[int, ...]


def among(scores: Tensor, lengths: Sequence[int]) -> Tensor:
    """Scores [B, Hk, M] with -inf after the first `lengths` of each row."""
    if min(lengths) == scores.shape[2]:
        return scores
    real = torch.arange(scores.shape[2], device=scores.device) < uploaded(lengths, scores.device)[:, None]
    return scores.masked_fill(~real[:, None], -torch.inf)


def highest(scores: Tensor, counts: Sequence[int]) -> Tensor:
    """[B, Hk, K] ascending places of the `counts` highest of scores [B, Hk, M] in each row, -1 after a row's last.
    Which of equal scores are taken is left to torch."""
    most = max(counts)
    found = scores.topk(most, dim=-1).indices
    if min(counts) < most:
        real = torch.arange(most, device=scores.device) < uploaded(counts, scores.device)[:, None]
        found = found.masked_fill(~real[:, None], -1)
    return packed(found, counts)


def packed(index: Tensor, counts: Sequence[int]) -> Tensor:
    """[B, Hk, K] the `counts` entries of each row of index [B, Hk, M] that are not -1, ascending, with -1 after a
    row's last."""
    most = max(counts)
    if min(counts) == index.shape[2]:
        return index.sort(-1).values
    last = torch.iinfo(index.dtype).max
    found = index.masked_fill(index < 0, last).sort(-1).values[:, :, :most]
    return found.masked_fill(found == last, -1)


def by_row(which: Sequence[bool], new: Tensor, old: Tensor) -> Tensor:
    """The rows of `new` where `which` says so, else those of `old`."""
    chosen = torch.tensor(which).to(new.device, non_blocking=True)
    return torch.where(chosen.view(-1, *[1] * (new.ndim - 1)), new, old)


def with_whole_rows(step: DecodeStep, index: Tensor, counts: Sequence[int], whole: Sequence[bool]) -> Choice:
    """The choice in which rows that are `whole` read every visual token, and the others the first `counts` places of
    index [B, Hk, K]."""
    if not any(whole):
        return Choice(index, tuple(counts))
    width = step.visual.shape[1]
    every = torch.arange(width, device=index.device)
    every = every.masked_fill(every >= uploaded(step.lengths, index.device)[:, None], -1)
    every = every[:, None].expand(-1, index.shape[1], -1)
    read = tuple(n if all_ else k for n, k, all_ in zip(step.lengths, counts, whole, strict=True))
    return Choice(packed(by_row(whole, every, widened(index, width)), read), read)


def widened(index: Tensor, width: int) -> Tensor:
    """index [B, Hk, K] padded with -1 to [B, Hk, width]."""
    return torch.nn.functional.pad(index, (0, width - index.shape[2]), value=-1)


class DecodeStage(Compressor):
    """Chooses among cached visual tokens at every generated token. A pipeline has at most one.

    Acts where one token is generated per row; several at once (turns, drafts) read everything by the model's own
    attention, and so does a row whose prompt has fewer than `min_len` tokens.
    """

    site: ClassVar[Site] = "decode"

    keep: Budget = Field(description="visual tokens of each image that a generated token reads; images share them")
    min_len: int = Field(default=8192, ge=0, description="rows with fewer cached tokens are read whole")

    def layers(self, depth: int) -> tuple[int, ...]:
        """Decoder layers that may read less than everything; the others keep the model's own attention."""
        return tuple(range(depth))

    def choose(self, step: DecodeStep) -> Choice | None:
        """The decision for one layer; None: everything is read, by the model's own attention. Not called if no row has
        more visual tokens than it may read."""
        raise NotImplementedError(f"stage {self.name} defines no choose()")

    def budget(self, images: Sequence[int]) -> int:
        """Number of visual tokens that a row may read, from the number that each of its images has."""
        return sum(self.keep.counts(images, (0,) * len(images)))

    def thins(self, layer: int, acting: Sequence[int], prompt: int, images: Sequence[int]) -> bool:
        """Whether any generated token may read less than everything at a layer; arguments as in `slots_read`."""
        return layer in acting and prompt >= self.min_len and self.budget(images) < sum(images)

    def visual_read(self, layer: int, acting: Sequence[int], images: Sequence[int], step: int) -> int | None:
        """Number of visual tokens that each key head reads at a layer in one step, in a row whose `images` exceed the
        budget; None if it depends on the contents. Arguments as in `slots_read`."""
        return self.budget(images)

    def read_to_choose(self, layer: int, acting: Sequence[int], prompt: int, images: Sequence[int], step: int) -> float:
        """What the choice itself reads at that layer, in slots of 2 d numbers. Arguments as in `slots_read`."""
        return 0

    def slots_read(
        self, layer: int, acting: Sequence[int], prompt: int, images: Sequence[int], step: int
    ) -> int | None:
        """Number of slots that each key head reads at a layer in one step, the new token's own slot included.

        Args:
            layer: index of a layer that attends; acting: those of them at which the stage acts, ascending.
            prompt: tokens of the row in that layer when its prompt was read; images: visual tokens among them, per
                image.
            step: tokens generated by steps before this one: the first token of an answer is the prefill's, the second
                comes from step 0.

        Returns:
            The number; None if it depends on the contents.
        """
        every = prompt + step + 1
        if not self.thins(layer, acting, prompt, images):
            return every
        chosen = self.visual_read(layer, acting, images, step)
        return None if chosen is None else every - sum(images) + chosen

    def bytes_read(self, at: LayerSize, cached: int) -> int | None:
        """By `slots_read` and `read_to_choose`."""
        of_stage = self.layers(at.depth)
        where = at.layer, [k for k in at.attending if k in of_stage], at.prompt, at.images
        if not any(at.images) or not self.thins(*where):
            return cached
        read = self.slots_read(*where, at.generated - 1)
        return None if read is None else at.full(read + self.read_to_choose(*where, at.generated - 1))
