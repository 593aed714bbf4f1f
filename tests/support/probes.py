"""Stages that exercise the joint harder than any real method: ragged counts, merges, every site."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from vtoken.stages import Compressor, Fact, Keep, Pruner, Site, VisualTokens


def above_mean(tokens: VisualTokens, score: Tensor, factor: float = 1.0) -> Keep:
    """Keeps what scores above `factor` times its image's mean: counts differ from image to image."""
    index, lengths, start = [], [], 0
    for n in tokens.lengths:
        s = score[start : start + n]
        keep = (s >= factor * s.mean()).nonzero()[:, 0]
        index.append(keep + start)
        lengths.append(len(keep))
        start += n
    return Keep(torch.cat(index), tuple(lengths))


class Ragged(Compressor):
    """Tokens site, by norm. No paper."""

    site: ClassVar[Site] = "tokens"

    def select(self, tokens: VisualTokens) -> Keep:
        return above_mean(tokens, tokens.x.float().norm(dim=-1))


class Inside(Compressor):
    """Encoder site, after chosen layers, by a fact of that layer. No paper."""

    site: ClassVar[Site] = "encoder"
    at: tuple[int, ...] = (0,)
    fact: str = "received_attention"
    uniform: bool = False

    def layers(self, depth: int) -> tuple[int, ...]:
        return self.at

    def needs(self) -> tuple[Fact, ...]:
        return (Fact(self.fact),)

    def select(self, tokens: VisualTokens) -> Keep:
        score = tokens.fact(self.fact)
        if self.uniform:
            half = [s.topk(len(s) // 2).indices.sort().values for s in score.split(tokens.lengths)]
            starts = [0, *torch.tensor(tokens.lengths).cumsum(0).tolist()]
            return Keep(torch.cat([h + o for h, o in zip(half, starts, strict=False)]), tuple(map(len, half)))
        return above_mean(tokens, score, 0.8)


class InsideOne(Inside):
    """Encoder site, drops from the first image only: the others keep everything. No paper."""

    def select(self, tokens: VisualTokens) -> Keep:
        index = torch.cat([torch.arange(0, tokens.lengths[0], 2), torch.arange(tokens.lengths[0], len(tokens.x))])
        return Keep(index, (-(-tokens.lengths[0] // 2), *tokens.lengths[1:]))


class InsideMerge(Inside):
    """Encoder site, averages pairs of neighbours: the first of each pair stays. No paper."""

    def needs(self) -> tuple[Fact, ...]:
        return ()

    def select(self, tokens: VisualTokens) -> Keep:
        index, into, start, slots = [], [], 0, 0
        for n in tokens.lengths:
            index.append(torch.arange(0, n, 2) + start)
            into.append(torch.arange(n) // 2 + slots)
            start, slots = start + n, slots + -(-n // 2)
        return Keep(torch.cat(index), tuple(-(-n // 2) for n in tokens.lengths), torch.cat(into))


class Deep(Compressor):
    """Decoder site, before chosen layers, by the last query's attention. No paper."""

    site: ClassVar[Site] = "decoder"
    at: tuple[int, ...] = (2,)
    factor: float = 1.0

    def layers(self, depth: int) -> tuple[int, ...]:
        return self.at

    def needs(self) -> tuple[Fact, ...]:
        return (Fact("last_query_attention"),)

    def select(self, tokens: VisualTokens) -> Keep:
        return above_mean(tokens, tokens.fact("last_query_attention"), self.factor)


class Failing(Pruner):
    """Raises in select. No paper."""

    site: ClassVar[Site] = "tokens"

    def select(self, tokens: VisualTokens) -> Keep:
        raise ZeroDivisionError("a bug in a stage")


class Recorder(Compressor):
    """Keeps everything and stores what it was given. No paper."""

    site: ClassVar[Site] = "tokens"
    asks: tuple[tuple[str, int | None], ...] = ()
    seen: Any = None

    def needs(self) -> tuple[Fact, ...]:
        return tuple(Fact(*ask) for ask in self.asks)

    def select(self, tokens: VisualTokens) -> Keep:
        self.seen.append(tokens)
        return Keep(torch.arange(len(tokens.x)), tokens.lengths)
