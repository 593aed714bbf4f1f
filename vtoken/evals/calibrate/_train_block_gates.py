"""SeerAttention's gates: what a model attends to, block by block, and gates that learn to tell."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import cos, pi
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from vtoken.compressors._rows import rows_at
from vtoken.compressors.attention._blocks import best
from vtoken.compressors.attention._seer import chosen, logits, pooled
from vtoken.errors import ConfigError
from vtoken.evals.shared.samples import Sample, prepare
from vtoken.session import wrapped
from vtoken.stages.attention import PrefillQK, Rope, SparseAttention, SparseMask, everything

LEAST = 4  # blocks of a prompt below which there is nothing to learn
STD = 0.02  # of gates that nobody trained, the authors' for Llama and Qwen


@dataclass(frozen=True)
class Settings:
    """How gates are trained; the defaults are the authors', who take a document of 32k or 64k tokens for a prompt.

    Attributes:
        steps, batch, rate: Adam on batches of so many prompts, cosine schedule after a warm-up of 4%.
    """

    steps: int = 500
    batch: int = 16
    rate: float = 1e-3
    seed: int = 0


@dataclass(frozen=True)
class Seen:
    """One prompt in one decoder layer, in T blocks.

    Attributes:
        queries, keys: as `pooled` gives them; starts: what blocks are rotated by.
        target: [H, T, T] the largest attention between a query and a key of two blocks, rows made to sum to 1.
        mass: [H, T, T] attention that a block gives a block, mean over its queries.
    """

    queries: Tensor
    keys: Tensor
    starts: Rope
    target: Tensor
    mass: Tensor

    def to(self, device: torch.device) -> Seen:
        s = self.starts
        starts = Rope(s.cos.to(device), s.sin.to(device), s.rotate)
        queries, keys, target, mass = (x.to(device) for x in (self.queries, self.keys, self.target, self.mass))
        return Seen(queries, keys, starts, target, mass)


class Watch(SparseAttention):
    """Reads everything and keeps, layer by layer, what gates learn from. No paper: a tool."""

    name: ClassVar[str] = "watch"
    rope: ClassVar[bool] = True
    min_len: int = 0
    size: int
    found: Any

    def reads(self, prompt: PrefillQK) -> SparseMask:
        assert prompt.rope is not None
        seen = Seen(*pooled(prompt, self.size), prompt.rope.starts(self.size), *maps(prompt, self.size))
        self.found.append(seen.to(torch.device("cpu")))
        n = prompt.length
        return SparseMask(128, everything(prompt.heads, n, n, 128, prompt.q.device))


def maps(prompt: PrefillQK, size: int) -> tuple[Tensor, Tensor]:
    """`target` and `mass` of a prompt, one row of blocks of one key head at a time."""
    n, groups = prompt.length, prompt.heads // len(prompt.k)
    t = -(-n // size)
    target, mass = (prompt.q.new_zeros(prompt.heads, t, t, dtype=torch.float32) for _ in range(2))
    for head, (q, k) in enumerate(zip(prompt.q.split(groups), prompt.k.split(1), strict=True)):
        mine = slice(head * groups, (head + 1) * groups)
        for row in range(t):
            at = torch.arange(row * size, min(n, row * size + size), device=q.device)
            found = rows_at(q, k[:, : row * size + len(at)], at, prompt.scale)
            tiles = pad(found, (0, size - len(at))).unflatten(2, (row + 1, size))
            target[mine, row, : row + 1] = tiles.amax((1, 3))
            mass[mine, row, : row + 1] = tiles.sum(3).mean(1)
    return target / target.sum(-1, keepdim=True), mass


def watch(
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    size: int,
    progress: Callable[[int], None] = lambda done: None,
) -> list[list[Seen]]:
    """Runs every prompt once: per prompt, what was seen of each layer.

    Raises:
        ConfigError: a prompt too short for blocks of this size.
    """
    out = []
    for done, sample in enumerate(samples, 1):
        found: list[Seen] = []
        with wrapped(model, [Watch(size=size, found=found)]), torch.no_grad():
            model(**prepare(model, processor, sample), logits_to_keep=1)
        depth = model.config.get_text_config().num_hidden_layers
        if len(found) != depth:
            raise ConfigError(
                f"{sample.image.name}, {sample.question!r}: {len(found)} of {depth} decoder layers could be watched; a layer whose attention is "
                "not plain and causal, a sliding window for one, cannot be given gates"
            )
        blocks = found[0].target.shape[1]
        if blocks < LEAST:
            raise ConfigError(
                f"{sample.image.name}, {sample.question!r}: a prompt of {blocks} blocks of {size} tokens, and gates learn from {LEAST} on; "
                "give a smaller --size"
            )
        out.append(found)
        progress(done)
    return out


def untrained(seen: Seen, seed: int, layer: int) -> Tensor:
    """A gate [H, 3 d, d] to start from."""
    generator = torch.Generator().manual_seed(1000 * seed + layer)
    return torch.randn(len(seen.queries), seen.keys.shape[2], seen.queries.shape[2], generator=generator) * STD


def divergence(gate: Tensor, seen: Seen) -> Tensor:
    """KL divergence of a gate's shares from the target, in nats, mean over heads and rows; the first quarter of rows, in which there is little to
    choose, is left out."""
    first = seen.target.shape[1] // 4
    said = logits(seen.queries, seen.keys, gate, seen.starts).log_softmax(-1)[:, first:]
    target = seen.target[:, first:]
    return (target.xlogy(target) - target * said).sum(-1).mean()


def train(
    known: Sequence[Sequence[Seen]],
    settings: Settings,
    device: torch.device,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Tensor]:
    """A gate per layer; each has a loss of its own, so they are trained one after the other."""
    return [_train(list(seen), settings, k, device, progress) for k, seen in enumerate(zip(*known, strict=True))]


def _train(
    known: list[Seen], settings: Settings, layer: int, device: torch.device, progress: Callable[[int], None]
) -> Tensor:
    gate = untrained(known[0], settings.seed, layer).to(device).requires_grad_()
    optimizer = torch.optim.Adam([gate], lr=settings.rate)
    order, warm = _batches(len(known), settings, layer), max(1, round(0.04 * settings.steps))
    for step in range(settings.steps):
        left = settings.steps - warm
        share = (step + 1) / warm if step < warm else (1 + cos(pi * (step - warm) / left)) / 2
        optimizer.param_groups[0]["lr"] = settings.rate * share
        optimizer.zero_grad()
        batch = next(order)
        for index in batch:
            (divergence(gate, known[index].to(device)) / len(batch)).backward()
        optimizer.step()
        progress(layer * settings.steps + step + 1)
    return gate.detach().cpu()


def _batches(count: int, settings: Settings, layer: int) -> Iterator[list[int]]:
    """Numbers of prompts, pass after pass in another order."""
    generator = torch.Generator().manual_seed(1000 * settings.seed + layer)
    while True:
        for batch in torch.randperm(count, generator=generator).split(settings.batch):
            yield batch.tolist()


@torch.no_grad()
def judge(
    gates: Sequence[Tensor], kept: Sequence[Sequence[Seen]], seed: int, size: int, threshold: float, last: int
) -> dict[str, list[float]]:
    """How gates do on prompts.

    Returns:
        Per layer: `before` and `after`, divergence of gates untrained and trained; `density`, share of the causal blocks that are read at a
        threshold; `recall`, share of the attention that lies there, mean over query blocks; `best`, the most that as many blocks hold.
    """
    rows = []
    for layer, (gate, seen) in enumerate(zip(gates, zip(*kept, strict=True), strict=True)):
        start = untrained(seen[0], seed, layer)
        for s in seen:
            read = chosen(logits(s.queries, s.keys, gate, s.starts).softmax(-1), threshold, None, last)
            ideal = best(s.mass, read.sum(-1))
            recalls = [(s.mass * which).sum(-1).mean() for which in (read, ideal)]
            rows.append(
                torch.stack([divergence(start, s), divergence(gate, s), SparseMask(size, read).density(), *recalls])
            )
    means = torch.stack(rows).unflatten(0, (len(gates), -1)).mean(1)
    return dict(zip(("before", "after", "density", "recall", "best"), means.T.tolist(), strict=True))
