"""Bytes of the KV cache of one row: what it takes, and what a decode step reads of it."""

from __future__ import annotations

from dataclasses import replace

from vtoken.evals.cost.token_flow import TokenFlow
from vtoken.stages import LayerSize, Stage


def stored(tokens: int, window: int | None) -> int:
    """Slots that DynamicCache keeps of so many tokens: with a sliding window, all but the newest token's own."""
    return tokens if window is None else min(tokens, window - 1)


def cache_bytes(flow: TokenFlow, size: int, generated: int = 0) -> int:
    """After so many decode steps; a number takes `size` bytes at full width."""
    return sum(_cached(flow, _at(flow, layer, size, generated)) for layer in flow.shape.decoder.attending)


def bytes_read(flow: TokenFlow, size: int, steps: int) -> float:
    """By a decode step, the mean over so many of them; 0 without any."""
    every = (
        _read(flow, _at(flow, layer, size, step + 1)) for step in range(steps) for layer in flow.shape.decoder.attending
    )
    return sum(every) / steps if steps else 0


def cache_slots(flow: TokenFlow, layer: int, generated: int) -> float | None:
    """Of a layer whose cache a stage shrinks, the tokens that a head holds after so many decode steps, mean over its
    heads; None: no stage does."""
    if layer not in flow.shrunk:
        return None
    return flow.shrunk[layer][0].cache_slots(_shrunk(flow, _at(flow, layer, 1, generated)))


def chooses(stage: Stage) -> bool:
    """Whether it reads a part of what is cached."""
    return type(stage).bytes_read is not Stage.bytes_read


def unknown(flow: TokenFlow) -> list[str]:
    """Which stages do not know how much of the cache a step reads, one sentence each."""
    layers = [_at(flow, layer, 1, 2) for layer in flow.shape.decoder.attending]  # of a first step more may be known
    second = [(at, _cached(flow, at)) for at in layers]
    found = [s.name for s in flow.stages if chooses(s) and None in [s.bytes_read(at, cached) for at, cached in second]]
    return [f"{name}: which slots generated tokens read (all are counted)" for name in found]


def _at(flow: TokenFlow, layer: int, size: int, generated: int) -> LayerSize:
    decoder, parts = flow.shape.decoder, (flow.shape.parts,) * flow.images
    cached, shown = flow.cached[layer], flow.decoder[layer]
    sizes = decoder.kv_heads, decoder.head_dim, size
    return LayerSize(layer, flow.shape.decoder.attending, cached, shown, generated, *sizes, parts, depth=decoder.depth)


def _cached(flow: TokenFlow, at: LayerSize) -> int:
    if at.layer not in flow.shrunk:
        return at.full(stored(at.prompt + at.generated, flow.shape.decoder.windows[at.layer]))
    return flow.shrunk[at.layer][0].cache_bytes(_shrunk(flow, at))


def _shrunk(flow: TokenFlow, at: LayerSize) -> LayerSize:
    """The layer with the prompt before its stage shrank it."""
    _, prompt, images = flow.shrunk[at.layer]
    return replace(at, prompt=prompt, images=images)


def _read(flow: TokenFlow, at: LayerSize) -> int:
    """A layer with a sliding window reads one slot more than it keeps: the newest token's."""
    window = flow.shape.decoder.windows[at.layer]
    cached = _cached(flow, at) if window is None else at.full(min(at.prompt + at.generated, window))
    found = [stage.bytes_read(at, cached) for stage in filter(chooses, flow.stages)]
    return next((each for each in found if each is not None), cached)
