"""FLOPs per part and KV-cache bytes of a model with a pipeline, from the config alone.

Counted as torch's FlopCounterMode counts: a multiply-add is 2 FLOPs, attention is queries x keys, masked or not.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from vtoken.config import Pipeline
from vtoken.errors import about
from vtoken.evals.cost import cache
from vtoken.evals.cost.geometry import cut_alike, geometry
from vtoken.evals.cost.refilled import Units, refilled
from vtoken.evals.cost.token_flow import Counts, TokenFlow
from vtoken.evals.shared.dense import DENSE
from vtoken.evals.shared.options import Workload

PARTS = ("tower", "projector", "stages", "prefill_linear", "prefill_attention", "decode")
LEFT_OUT = (
    "embeddings, biases, norms, activations, RoPE, softmax, sampling (FlopCounterMode does not count them either)",
    "the gathers and comparisons that apply a decision",
    "causality: prefill_attention is full queries x keys; prefill_attention_causal leaves the masked half out",
    "padding: all rows of the batch are equally long",
)

CONTRAST = "the contrast, which runs the model once more, under its own pipeline and with a cache of its own"
STATES = "what a decode step adds to the states of layers that keep one, number by number; those are of fixed size"


@dataclass(frozen=True)
class Account:
    """FLOPs of one `generate` call on a whole batch, and bytes of its KV cache.

    Attributes:
        pipeline: its name; "dense" for the untouched model.
        images, text_tokens: per batch row; text_tokens are all prompt tokens but the visual ones and newlines.
        new_tokens: tokens generated; prefill gives the first, so decode runs new_tokens - 1 steps.
        dtype_bytes: bytes of one number in the KV cache.
        tower, projector: FLOPs of all images, unused last tower layers included where the model runs them.
        stages: FLOPs of facts and decisions. Where text rates images, all of the prompt's text does: an upper bound.
        prefill_linear: matrices of all decoder layers, states of those that keep one, and the output embedding of the
            last prompt token.
        prefill_attention: full queries x keys; with sparse prefill the share of it that is read.
        prefill_attention_causal: the same without the masked half; not part of `total`.
        decode: all decode steps: matrices, attention, what choosing cached tokens computes, output embedding.
        visual_tokens: of one batch row, for every decoder layer; newline tokens are counted apart.
        newline_tokens: the same of LLaVA-NeXT's and OneVision's newlines. Where tokens were dropped, how many rows
            still have one is an expectation: that of tokens drawn at random.
        kv_bytes_prefill, kv_bytes: of the whole batch, when prefill ends and when generation ends; keys and values
            alone, of the layers that attend.
        kv_bytes_read: of one row, what a decode step reads of its cache, the mean over all of them; without weights,
            and without copies that are worked out of a cache in few bits. 0 where no step is made.
        left_out: what is not counted, one sentence each.
        inexact: stages whose counts depend on what the picture shows; without any, visual_tokens are exact.
    """

    pipeline: str
    images: int
    text_tokens: int
    new_tokens: int
    batch: int
    dtype_bytes: int
    tower: int
    projector: int
    stages: int
    prefill_linear: int
    prefill_attention: int
    prefill_attention_causal: int
    decode: int
    visual_tokens: Counts
    newline_tokens: Counts
    kv_bytes_prefill: int
    kv_bytes: int
    kv_bytes_read: int
    left_out: tuple[str, ...]
    inexact: tuple[str, ...]

    @property
    def total(self) -> int:
        """FLOPs of all parts."""
        return sum(getattr(self, part) for part in PARTS)

    @property
    def visual_entry(self) -> int:
        """Visual tokens of one batch row that enter the first decoder layer."""
        return self.visual_tokens[0]

    @property
    def visual_average(self) -> float:
        """Visual tokens of one batch row, averaged over decoder layers."""
        return sum(self.visual_tokens) / len(self.visual_tokens)

    @property
    def newline_entry(self) -> int:
        """Newline tokens of one batch row that enter the first decoder layer."""
        return self.newline_tokens[0]

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `json.dumps` takes."""
        derived = ("total", "visual_entry", "visual_average", "newline_entry")
        return {**asdict(self), **{name: getattr(self, name) for name in derived}}


def account(
    config: Any, pipeline: Pipeline | None = None, *, batch: int = 1, dtype_bytes: int | None = None, **options: Any
) -> Account:
    """Counts one `generate` call.

    Args:
        config: transformers config of a VLM, from `resolve_config` or `model.config`.
        pipeline: None is the dense model.
        dtype_bytes: bytes of a number in the KV cache; None takes the config's dtype, or 2 where it names none.
        options: fields of `Workload`, per batch row. Sizes are rounded as the family's image processor does by default.

    Raises:
        ConfigError: an option out of bounds, or an image size that the model's processor refuses.
        UnsupportedError: a model family whose arithmetic is not known, video for one that has none, or a stage at a
            layer where it cannot act.
    """
    work = Workload.given(**options)
    applied = pipeline or DENSE
    with about(applied.written):
        shape = geometry(config, work.image_size, work.images, work.frames, applied.anyres)
        flow = TokenFlow(shape, work.images, work.text_tokens, applied)
    shape, decoder = flow.shape, flow.shape.decoder
    dtype = config.dtype or config.text_config.dtype
    size = dtype_bytes or (2 if dtype is None else dtype.itemsize)
    layers = range(decoder.depth)
    lengths = [flow.length(layer) for layer in layers]
    read = list(zip(flow.attended, flow.density, strict=True))
    head = 2 * decoder.width * shape.vocabulary
    steps = work.new_tokens - 1
    attended, met, choosing = refilled(flow)
    absent = [text for text, holds in ((STATES, decoder.states), (CONTRAST, applied.contrast)) if holds]
    return Account(
        pipeline=applied.name,
        images=work.images,
        text_tokens=work.text_tokens,
        new_tokens=work.new_tokens,
        batch=batch,
        dtype_bytes=size,
        tower=batch * _tower(flow, batch, attended, met),
        # The model projects before tokens-site stages act: they save nothing here.
        projector=batch
        * sum(2 * each.weights * each.tokens(work.images, flow.mlps[each.layer]) for each in shape.projectors),
        stages=batch * (flow.cost + choosing),
        prefill_linear=batch * (head + sum(map(decoder.linear, lengths, layers))),
        prefill_attention=batch * sum(round(2 * decoder.scores(n, n) * share) for n, share in read),
        prefill_attention_causal=batch * sum(round(decoder.scores(n, n + 1) * share) for n, share in read),
        decode=batch
        * (steps * (head + sum(decoder.linear(1, layer) for layer in layers)) + cache.decode_flops(flow, steps)),
        visual_tokens=tuple(map(sum, flow.decoder)),
        newline_tokens=tuple(flow.newlines),
        kv_bytes_prefill=batch * cache.cache_bytes(flow, size),
        kv_bytes=batch * cache.cache_bytes(flow, size, steps),
        kv_bytes_read=round(cache.bytes_read(flow, size, steps)),
        left_out=(*LEFT_OUT, *absent, *flow.left_out, *cache.left_out(flow)),
        inexact=tuple(flow.inexact),
    )


def picture_size(config: Any, prompt: Any) -> tuple[int, int] | None:
    """(height, width) in pixels of a prompt's picture as the account takes it, or another that is cut alike; None where
    the model resizes every picture."""
    if "image_grid_thw" in prompt:
        _, rows, columns = prompt["image_grid_thw"][0].tolist()
        return rows * config.vision_config.patch_size, columns * config.vision_config.patch_size
    if "image_sizes" in prompt:
        height, width = prompt["image_sizes"][0].tolist()
        return height, width
    return cut_alike(config, prompt)


def _tower(flow: TokenFlow, batch: int, attended: Units, met: Units) -> int:
    """FLOPs of the tower for one row of a batch. `attended` and `met`: units that attention and MLPs compute, by layer
    and crop."""
    tower = flow.shape.tower
    crops = len(flow.tower[0])
    together = batch * crops if tower.packed else 1
    around = flow.embedded * tower.patch * tower.layers.width + crops * tower.head_image
    around += sum(flow.tower[-1]) * tower.unit * tower.head_patch
    layers = sum(
        tower.linear(layer, units, late) + 2 * together * tower.scores(layer, units)
        for layer, rows in enumerate(zip(attended, met, strict=True))
        for units, late in zip(*map(tower.run, rows), strict=True)
    )
    return 2 * around + layers
