"""Bytes of the KV cache of one row: what it takes, and what a decode step reads of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from vtoken.evals.cost.token_flow import TokenFlow
from vtoken.stages import HeldLayer, Stage


def stored(tokens: int, window: int | None) -> int:
    """Slots that DynamicCache keeps of so many tokens: with a sliding window, all but the newest token's own."""
    return tokens if window is None else min(tokens, window - 1)


def bytes_held(flow: TokenFlow, size: int, generated: int = 0) -> int:
    """After so many decode steps; a number takes `size` bytes at full width."""
    return sum(_held(flow, at) for at in _layers(flow, size, generated))


def bytes_read(flow: TokenFlow, size: int, steps: int) -> float:
    """By a decode step, the mean over so many of them; 0 without any."""
    every = [_read(flow, at) for step in range(steps) for at in _layers(flow, size, step + 1)]
    return sum(every) / steps if steps else 0


def choosers(flow: TokenFlow) -> list[Stage]:
    """Stages that read a part of what is held."""
    return [stage for stage in flow.stages if type(stage).bytes_read is not Stage.bytes_read]


def unknown(flow: TokenFlow) -> list[str]:
    """Which stages do not know how much of the cache a step reads, one sentence each."""
    first = list(_layers(flow, 1, 1))
    found = [stage.name for stage in choosers(flow) if None in [stage.bytes_read(at, 0) for at in first]]
    return [f"{name}: what a decode step reads of the cache depends on the prompt (all is counted)" for name in found]


def _layers(flow: TokenFlow, size: int, generated: int) -> Iterator[HeldLayer]:
    """The layers that attend."""
    decoder = flow.shape.decoder
    attending = tuple(layer for layer in range(decoder.depth) if layer not in decoder.states)
    for layer in attending:
        images = flow.decoder[layer]
        yield HeldLayer(layer, attending, flow.held[layer], images, generated, decoder.kv_heads, decoder.head_dim, size)


def _held(flow: TokenFlow, at: HeldLayer) -> int:
    if at.layer not in flow.shrunk:
        return at.full(stored(at.prompt + at.generated, flow.shape.decoder.windows[at.layer]))
    stage, prompt, images = flow.shrunk[at.layer]
    return stage.bytes_held(replace(at, prompt=prompt, images=images))


def _read(flow: TokenFlow, at: HeldLayer) -> int:
    """A layer with a sliding window reads one slot more than it keeps: the newest token's."""
    window = flow.shape.decoder.windows[at.layer]
    held = _held(flow, at) if window is None else at.full(min(at.prompt + at.generated, window))
    found = [stage.bytes_read(at, held) for stage in choosers(flow)]
    return min([held, *(each for each in found if each is not None)])
