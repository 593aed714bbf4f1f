"""The KV cache of one row: bytes it takes, and what decode steps read of it and compute over it."""

from __future__ import annotations

from dataclasses import replace

from vtoken.evals.cost.token_flow import TokenFlow
from vtoken.stages import LayerSize, Stage
from vtoken.stages.decode import DecodeStage


def cache_bytes(flow: TokenFlow, size: int, generated: int = 0) -> int:
    """After so many decode steps; a number takes `size` bytes at full width."""
    return sum(_cached(flow, _at(flow, layer, size, generated)) for layer in flow.shape.decoder.attending)


def bytes_read(flow: TokenFlow, size: int, steps: int) -> float:
    """By a decode step, the mean over so many of them; 0 without any."""
    every = (
        _read(flow, _at(flow, layer, size, step + 1)) for step in range(steps) for layer in flow.shape.decoder.attending
    )
    return sum(every) / steps if steps else 0


def decode_flops(flow: TokenFlow, steps: int) -> int:
    """Of attention over so many decode steps, and of what choosing cached tokens computes."""
    decoder, stage = flow.shape.decoder, _decode_stage(flow)
    acting = [] if stage is None else [k for k in decoder.attending if k in stage.layers(decoder.depth)]
    slots = 0.0  # whose key and value a key head reads, the mean over heads
    for layer in decoder.attending:
        prompt, images = flow.decoded[layer], flow.decoder[layer]
        for step in range(steps):
            found = None
            if layer in flow.shrunk:
                found = flow.shrunk[layer][0].cache_slots(_shrunk(flow, _at(flow, layer, 1, step + 1)))
            elif stage is not None and any(images):
                found = stage.slots_read(layer, acting, prompt, images, step)
            slots += _stored(prompt + step, decoder.windows[layer]) + 1 if found is None else found
            if stage is not None and stage.thins(layer, acting, prompt, images):
                slots += stage.read_to_choose(layer, acting, prompt, images, step)
    return round(2 * decoder.scores(1, 1) * slots)


def chooses(stage: Stage) -> bool:
    """Whether it reads a part of what is cached."""
    return type(stage).bytes_read is not Stage.bytes_read


def left_out(flow: TokenFlow) -> list[str]:
    """Which stages read the whole cache, or are taken to, and why, one sentence each."""
    decoder, stage, found = flow.shape.decoder, _decode_stage(flow), []
    if stage is not None:
        for layer in decoder.attending:
            prompt = flow.decoded[layer]
            if layer in stage.layers(decoder.depth) and any(flow.decoder[layer]) and prompt < stage.min_len:
                found.append(f"{stage.name} stands aside: {prompt} tokens are fewer than min_len {stage.min_len}")
    layers = [_at(flow, layer, 1, 2) for layer in decoder.attending]  # of a first step more may be known
    second = [(at, _cached(flow, at)) for at in layers]
    for each in filter(chooses, flow.stages):
        if None in [each.bytes_read(at, cached) for at, cached in second]:
            found.append(f"{each.name}: which slots generated tokens read (all are counted)")
    return list(dict.fromkeys(found))


def _decode_stage(flow: TokenFlow) -> DecodeStage | None:
    return next((stage for stage in flow.stages if isinstance(stage, DecodeStage)), None)


def _stored(tokens: int, window: int | None) -> int:
    """Slots that DynamicCache keeps of so many tokens: with a sliding window, all but the newest token's own."""
    return tokens if window is None else min(tokens, window - 1)


def _at(flow: TokenFlow, layer: int, size: int, generated: int) -> LayerSize:
    decoder, parts = flow.shape.decoder, (flow.shape.parts,) * flow.images
    prompt, images = flow.cached[layer], flow.decoder[layer]
    sizes = decoder.kv_heads, decoder.head_dim, size
    return LayerSize(layer, decoder.attending, prompt, images, generated, *sizes, parts, depth=decoder.depth)


def _cached(flow: TokenFlow, at: LayerSize) -> int:
    if at.layer not in flow.shrunk:
        return at.full(_stored(at.prompt + at.generated, flow.shape.decoder.windows[at.layer]))
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
