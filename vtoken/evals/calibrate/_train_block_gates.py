"""SeerAttention's gates: which blocks a model attends to, and how gates learn to predict it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from vtoken.compressors._rows import rows_at
from vtoken.compressors.attention._blocks import best
from vtoken.compressors.attention._seer import chosen, logits, pooled
from vtoken.errors import ConfigError
from vtoken.evals.calibrate._training import batches, fit
from vtoken.evals.shared.bars import say
from vtoken.evals.shared.options import Options, option
from vtoken.evals.shared.samples import Sample, prepare
from vtoken.session import wrapped
from vtoken.stages.attention import PrefillQK, Rope, SparseAttention, SparseMask, everything

LEAST = 4  # blocks of a prompt below which there is nothing to learn
STD = 0.02  # of gates that nobody trained, the authors' for Llama and Qwen
WARM_UP = 0.04


class Training(Options):
    """How gates are trained, by default as the authors do: Adam, a cosine schedule after a warm-up of 4%."""

    steps: int = option(500, "batches to learn from", gt=0)
    batch: int = option(16, "prompts per step", gt=0)
    rate: float = option(1e-3, "learning rate", "R", gt=0)
    seed: int = option(0, "of weights and order")


@dataclass(frozen=True)
class Seen:
    """One prompt in one decoder layer, in T blocks.

    Attributes:
        queries, keys: as `pooled` gives them.
        starts: RoPE of the first token of every block.
        target: [H, T, T] the largest attention between a query and a key of two blocks, rows made to sum to 1.
        mass: [H, T, T] attention that a block gives a block, mean over its queries.
    """

    queries: Tensor
    keys: Tensor
    starts: Rope
    target: Tensor
    mass: Tensor

    def to(self, device: torch.device) -> Seen:
        starts = replace(self.starts, cos=self.starts.cos.to(device), sin=self.starts.sin.to(device))
        moved = {name: getattr(self, name).to(device) for name in ("queries", "keys", "target", "mass")}
        return Seen(starts=starts, **moved)


class Recorder(SparseAttention):
    """Keeps the attention dense and records, layer by layer, what gates learn from. No paper: a tool."""

    name: ClassVar[str] = "recorder"
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


def watch(model: Any, processor: Any, samples: Sequence[Sample], size: int) -> list[list[Seen]]:
    """Runs every prompt once: per prompt, what was seen of each layer."""
    out = []
    for done, sample in enumerate(samples, 1):
        found: list[Seen] = []
        with wrapped(model, [Recorder(size=size, found=found)]), torch.no_grad():
            model(**prepare(model, processor, sample), logits_to_keep=1)
        depth, where = model.config.get_text_config().num_hidden_layers, f"{sample.image.name}, {sample.question!r}"
        if len(found) != depth:
            raise ConfigError(
                f"{where}: {len(found)} of {depth} decoder layers could be watched; a layer whose attention is not "
                "plain and causal, a sliding window for one, cannot be given gates"
            )
        if (blocks := found[0].target.shape[1]) < LEAST:
            raise ConfigError(
                f"{where}: a prompt of {blocks} blocks of {size} tokens, and gates learn from {LEAST} on; give a "
                "smaller --size"
            )
        out.append(found)
        say("prompts", done / len(samples))
    return out


def untrained(seen: Seen, seed: int, layer: int) -> Tensor:
    """The gate [H, 3 d, d] that training of a layer starts from."""
    generator = torch.Generator().manual_seed(1000 * seed + layer)
    return torch.randn(len(seen.queries), seen.keys.shape[2], seen.queries.shape[2], generator=generator) * STD


def divergence(gate: Tensor, seen: Seen) -> Tensor:
    """KL divergence of a gate's shares from the target, in nats, mean over heads and rows; the first quarter of rows,
    in which there is little to choose, is left out."""
    first = seen.target.shape[1] // 4
    said = logits(seen.queries, seen.keys, gate, seen.starts).log_softmax(-1)[:, first:]
    target = seen.target[:, first:]
    return (target.xlogy(target) - target * said).sum(-1).mean()


def train(known: Sequence[Sequence[Seen]], asked: Training, device: torch.device) -> list[Tensor]:
    """A gate per layer, trained one after the other: each has a loss of its own."""
    depth = len(known[0])
    return [_train(seen, asked, (k, depth), device) for k, seen in enumerate(zip(*known, strict=True))]


def _train(known: Sequence[Seen], asked: Training, gate_of: tuple[int, int], device: torch.device) -> Tensor:
    layer = gate_of[0]
    gate = untrained(known[0], asked.seed, layer).to(device).requires_grad_()
    order = batches(len(known), asked.batch, torch.Generator().manual_seed(1000 * asked.seed + layer))

    def backward(index: Tensor) -> None:
        for k in index.tolist():
            (divergence(gate, known[k].to(device)) / len(index)).backward()

    fit([gate], asked.rate, WARM_UP, asked.steps, order, backward, gate_of)
    return gate.detach().cpu()


@torch.no_grad()
def judge(
    gates: Sequence[Tensor], kept: Sequence[Sequence[Seen]], seed: int, size: int, threshold: float, last: int
) -> dict[str, list[float]]:
    """How gates do on prompts.

    Returns:
        Per layer: `before` and `after`, divergence of gates untrained and trained; `density`, share of the causal
        blocks that are read at a threshold; `recall`, share of the attention that lies there, mean over query blocks;
        `best`, the most that as many blocks hold.
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
