"""The account: FLOPs per part and KV bytes of a model and a pipeline, from the config alone.

Counted as torch's FlopCounterMode counts: a multiply-add is 2 FLOPs, attention is queries x keys, masked or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from vtoken.errors import ConfigError, UnsupportedError
from vtoken.evals.configs import resolve_config
from vtoken.evals.geometry import Geometry, ImageSize, geometry
from vtoken.stages import Fact, Site, Stage

__all__ = ["PARTS", "Account", "Pipeline", "account", "resolve_config"]

Counts = tuple[int, ...]

PARTS = ("tower", "projector", "stages", "prefill_linear", "prefill_attention", "decode")
LEFT_OUT = (
    "embeddings, biases, norms, activations, RoPE, softmax, sampling (FlopCounterMode does not count them either)",
    "the gathers and comparisons that apply a decision",
    "causality: prefill_attention is full queries x keys; prefill_attention_causal leaves the masked half out",
    "padding: all rows of the batch are equally long",
)
# Attention facts cost their query rows; the others are tensors that the model computes anyway.
ONE_QUERY = ("cls_attention", "last_query_attention")
ALL_QUERIES = ("received_attention",)
FREE = ("keys", "values", "features", "text")


class Pipeline(Protocol):
    """What the account reads of a pipeline."""

    @property
    def name(self) -> str: ...
    @property
    def stages(self) -> Sequence[Stage]: ...


@dataclass(frozen=True)
class Account:
    """FLOPs of one `generate` call on a whole batch, and bytes of its KV cache.

    Attributes:
        pipeline: its name; "dense" for the untouched model.
        images, text_tokens: per batch row; text_tokens are all prompt tokens but the visual ones.
        new_tokens: tokens generated; prefill gives the first, so decode runs new_tokens - 1 steps.
        dtype_bytes: bytes of one number in the KV cache.
        tower, projector: FLOPs of all images, unused last tower layers included where the model runs them.
        stages: FLOPs of facts and decisions.
        prefill_linear: matrices of all decoder layers, and the output embedding of the last prompt token.
        prefill_attention: full queries x keys.
        prefill_attention_causal: the same without the masked half; not part of `total`.
        decode: all decode steps: matrices, attention, output embedding.
        visual_tokens: of one batch row, for every decoder layer.
        kv_bytes_prefill, kv_bytes: of the whole batch, when prefill ends and when generation ends.
        left_out: what is not counted, one sentence each.
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
    kv_bytes_prefill: int
    kv_bytes: int
    left_out: tuple[str, ...]

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

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `json.dumps` takes."""
        return {
            **asdict(self),
            "total": self.total,
            "visual_entry": self.visual_entry,
            "visual_average": self.visual_average,
        }


def account(
    config: Any,
    pipeline: Pipeline | None = None,
    *,
    images: int = 1,
    image_size: ImageSize | None = None,
    frames: int = 1,
    text_tokens: int = 64,
    new_tokens: int = 64,
    batch: int = 1,
    dtype_bytes: int | None = None,
) -> Account:
    """Counts one `generate` call.

    Args:
        config: transformers config of a VLM, from `resolve_config` or `model.config`.
        pipeline: anything with `name` and `stages`; None is the dense model.
        images: per batch row.
        image_size: pixels, one number or (height, width); None is the model's own. Families that resize ignore it.
        frames: per image; more than one is a video.
        text_tokens: prompt tokens per row that are not visual.
        new_tokens: tokens generated per row.
        dtype_bytes: of the KV cache; None takes the config's dtype, or 2 where it names none.

    Raises:
        ConfigError: a count below 1 (text_tokens: below 0).
        UnsupportedError: a model family whose arithmetic is not known, or a stage at a layer where it cannot act.
    """
    least = {
        "images": images,
        "frames": frames,
        "new_tokens": new_tokens,
        "batch": batch,
        "text_tokens": text_tokens + 1,
    }
    for name, value in least.items():
        if value < 1:
            raise ConfigError(f"{name}: must be at least {0 if name == 'text_tokens' else 1}")
    shape = geometry(config, image_size, frames)
    walk = _Walk(shape, images, text_tokens, () if pipeline is None else pipeline.stages)
    size = dtype_bytes or _dtype_bytes(config)
    tower, decoder = shape.tower, shape.decoder
    in_tower = [n + tower.extra for counts in walk.tower for n in counts]
    in_decoder = [text_tokens + sum(counts) for counts in walk.decoder]
    head = 2 * decoder.width * shape.vocabulary
    steps = new_tokens - 1
    return Account(
        pipeline="dense" if pipeline is None else pipeline.name,
        images=images,
        text_tokens=text_tokens,
        new_tokens=new_tokens,
        batch=batch,
        dtype_bytes=size,
        tower=batch
        * (
            2 * images * (tower.patches * tower.stem + tower.head_image)
            + 2 * sum(walk.tower[-1]) * tower.head_patch
            + sum(tower.layers.linear(n) + 2 * tower.layers.scores(n, n) for n in in_tower)
        ),
        # The model projects before tokens-site stages act: they save nothing here.
        projector=batch * 2 * sum(walk.projected) * shape.projector,
        stages=batch * walk.cost,
        prefill_linear=batch * (head + sum(map(decoder.linear, in_decoder))),
        prefill_attention=batch * sum(2 * decoder.scores(n, n) for n in in_decoder),
        prefill_attention_causal=batch * sum(decoder.scores(n, n + 1) for n in in_decoder),
        decode=batch
        * (steps * (head + decoder.depth * decoder.linear(1)) + _decode_attention(shape, in_decoder, steps)),
        visual_tokens=tuple(map(sum, walk.decoder)),
        kv_bytes_prefill=batch * size * _kv_numbers(shape, in_decoder),
        kv_bytes=batch * size * _kv_numbers(shape, [n + steps for n in in_decoder]),
        left_out=(*LEFT_OUT, *walk.left_out),
    )


class _Walk:
    """One batch row on its way through the stages.

    Attributes:
        tower: patches alive per image in every tower layer.
        projected: visual tokens per image that the projector sees.
        decoder: visual tokens alive per image in every decoder layer.
        cost: FLOPs of the stages and of the facts they read.
        left_out: what could not be counted.
    """

    def __init__(self, shape: Geometry, images: int, text_tokens: int, stages: Sequence[Stage]) -> None:
        self.shape, self.images, self.text_tokens = shape, images, text_tokens
        self.tower: list[Counts] = []
        self.decoder: list[Counts] = []
        self.cost = 0
        self.left_out: list[str] = []
        self._paid: set[tuple[str, str, int]] = set()
        for stage in stages:
            if stage.site not in ("encoder", "tokens", "decoder"):
                self._leave_out(f"{stage.name}: what a stage at site {stage.site} saves and costs")
            self._check_layers(stage)
        at: dict[Site, list[Stage]] = {
            site: [s for s in stages if s.site == site] for site in ("encoder", "tokens", "decoder")
        }

        counts: Counts = (shape.tower.patches,) * images
        for layer in range(shape.tower.layers.depth):
            self.tower.append(counts)
            for stage in at["encoder"]:
                if layer in stage.layers(shape.tower.layers.depth):
                    counts = self._act(stage, counts, layer)
        counts = self.projected = tuple(n + shape.tokens - shape.tower.patches for n in counts)
        for stage in at["tokens"]:
            counts = self._act(stage, counts, None)
        for layer in range(shape.decoder.depth):
            for stage in at["decoder"]:
                if layer in stage.layers(shape.decoder.depth):
                    counts = self._act(stage, counts, layer)
            self.decoder.append(counts)

    def _check_layers(self, stage: Stage) -> None:
        """Refuses layers that do not exist or come too late to save anything, as `wrap` does."""
        if stage.site not in ("encoder", "decoder"):
            return
        tower, depth = self.shape.tower, self.shape.decoder.depth
        encoder = stage.site == "encoder"
        first, last = (0, min(tower.feature_layers) - 1) if encoder else (1, depth - 1)
        layers = stage.layers(tower.layers.depth if encoder else depth)
        if not layers or min(layers) < first or max(layers) > last:
            raise UnsupportedError(
                f"stage {stage.name} acts at {stage.site} layers {list(layers)}; this model allows {first} to {last}"
            )

    def _act(self, stage: Stage, counts: Counts, layer: int | None) -> Counts:
        for fact in stage.needs():
            self._pay(stage, fact, layer)
        stack = self.shape.tower.layers if stage.site == "encoder" else self.shape.decoder
        self.cost += stage.flops(counts, stack.width)
        # The tower does not know which pictures belong to one prompt: there each is a row of its own.
        row = tuple(range(self.images)) if stage.site == "encoder" else (0,) * self.images
        return tuple(stage.plan(counts, (self.shape.tower.grid,) * self.images, row, layer))

    def _pay(self, stage: Stage, fact: Fact, layer: int | None) -> None:
        """Adds what a fact costs, once per layer it is read from."""
        if fact.name in FREE:
            return
        if fact.name not in ONE_QUERY + ALL_QUERIES:
            self._leave_out(f"{stage.name}: the fact {fact.name}")
            return
        decoder = stage.site == "decoder"
        stack = self.shape.decoder if decoder else self.shape.tower.layers
        alive = self.decoder if decoder else self.tower
        if fact.layer is not None:
            source = fact.layer % stack.depth
        elif layer is None:
            source = max(self.shape.tower.feature_layers)
        else:
            source = layer - decoder
        if source >= len(alive):
            raise UnsupportedError(
                f"stage {stage.name} needs {fact.name} of layer {source}, which runs after the stage"
            )
        key = (stage.site if decoder else "tower", fact.name, source)
        if key in self._paid:
            return
        self._paid.add(key)
        seen = alive[source]
        lengths = [self.text_tokens + sum(seen)] if decoder else [n + self.shape.tower.extra for n in seen]
        self.cost += sum(stack.scores(1 if fact.name in ONE_QUERY else n, n) for n in lengths)

    def _leave_out(self, sentence: str) -> None:
        if sentence not in self.left_out:
            self.left_out.append(sentence)


def _stored(tokens: int, window: int | None) -> int:
    """Slots that DynamicCache keeps of so many tokens: with a sliding window, all but the newest token's own."""
    return tokens if window is None else min(tokens, window - 1)


def _decode_attention(shape: Geometry, prompt: Sequence[int], steps: int) -> int:
    """FLOPs of attention over all decode steps; `prompt` is the length at every layer."""
    return sum(
        2 * shape.decoder.scores(1, _stored(n + step, window) + 1)
        for n, window in zip(prompt, shape.decoder.windows, strict=True)
        for step in range(steps)
    )


def _kv_numbers(shape: Geometry, tokens: Sequence[int]) -> int:
    """Numbers in the KV cache of one row; `tokens` is the length at every layer."""
    slots = sum(_stored(n, window) for n, window in zip(tokens, shape.decoder.windows, strict=True))
    return slots * 2 * shape.decoder.kv_heads * shape.decoder.head_dim


def _dtype_bytes(config: Any) -> int:
    dtype = config.dtype or config.text_config.dtype
    return 2 if dtype is None else dtype.itemsize
