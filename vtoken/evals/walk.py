"""One batch row on its way through the stages: how many tokens are alive where, and what deciding costs."""

from __future__ import annotations

from collections.abc import Sequence

from vtoken.cached import CacheStage
from vtoken.errors import UnsupportedError
from vtoken.evals.geometry import Geometry
from vtoken.stages import Fact, Site, Stage, size_of

Counts = tuple[int, ...]

# Attention facts cost their query rows; the others are tensors that the model computes anyway.
ONE_QUERY = ("cls_attention", "last_query_attention", "global_attention", "value_attention")
ALL_QUERIES = ("received_attention",)
FREE = (
    "keys",
    "values",
    "mean_value",
    "features",
    "pixels",
    "text",
    "later_text",
    "normed",
    "later_keys",
    "later_normed",
)


class Walk:
    """Runs every stage's `plan`.

    Attributes:
        tower: units (see Tower) alive per crop in every tower layer.
        decoder: visual tokens alive per image in every decoder layer.
        newlines: newline tokens of the row in every decoder layer.
        held: prompt tokens in every decoder layer's KV cache when the prefill ends.
        cost: FLOPs of the stages and of the facts they read.
        left_out: what could not be counted.

    Raises:
        UnsupportedError: a stage at a layer where it cannot act, or a fact that comes too late for it.
    """

    def __init__(self, shape: Geometry, images: int, text_tokens: int, stages: Sequence[Stage], newline: str) -> None:
        self.shape, self.images, self.text_tokens, self.newline = shape, images, text_tokens, newline
        self.tower: list[Counts] = []
        self.decoder: list[Counts] = []
        self.newlines: list[int] = []
        self.cost = 0
        self.left_out: list[str] = []
        self._paid: set[tuple[str, str, int]] = set()
        stages = [s.bound(shape.tower.layers.depth) if s.site == "encoder" else s for s in stages]
        for stage in stages:
            if stage.site not in ("encoder", "tokens", "decoder") and not isinstance(stage, CacheStage):
                self._leave_out(f"{stage.name}: what a stage at site {stage.site} saves and costs")
            self._check_layers(stage)
        at: dict[Site, list[Stage]] = {
            site: [s for s in stages if s.site == site] for site in ("encoder", "tokens", "decoder")
        }
        self._dropping = bool(at["tokens"] or at["decoder"])
        self.crops = shape.tower.crops * images
        counts: Counts = tuple(size_of((crop,)) for crop in self.crops)
        for layer in range(shape.tower.layers.depth):
            self.tower.append(counts)
            for stage in at["encoder"]:
                if layer in stage.layers(shape.tower.layers.depth):
                    counts = self._act(stage, counts, layer)
        each = len(shape.tower.crops)
        counts = tuple(shape.tokens(counts[i * each : (i + 1) * each]) for i in range(images))
        for stage in at["tokens"]:
            counts = self._act(stage, counts, None)
        for layer in range(shape.decoder.depth):
            for stage in at["decoder"]:
                if layer in stage.layers(shape.decoder.depth):
                    counts = self._act(stage, counts, layer)
            self.decoder.append(counts)
            self.newlines.append(self._lines(counts))
        self.held = [text_tokens + sum(c) + n for c, n in zip(self.decoder, self.newlines, strict=True)]
        for stage in stages:
            if isinstance(stage, CacheStage):
                self._shrink(stage)

    def _shrink(self, stage: CacheStage) -> None:
        """What a cache stage leaves of every layer, and costs there."""
        stack = self.shape.decoder
        for layer, (prompt, counts) in enumerate(zip(self.held, self.decoder, strict=True)):
            if not sum(counts):
                continue
            cost = stage.cost(prompt, counts, stack.heads, stack.kv_heads, stack.head_dim)
            if cost is None:
                self._leave_out(f"{stage.name}: what deciding costs")
            self.cost += cost or 0
            self.held[layer] = stage.slots(prompt, counts)

    def _lines(self, counts: Counts) -> int:
        """Newline tokens that go with so many visual tokens per image."""
        if self.newline == "keep":
            return self.images * self.shape.newlines[0]
        if self.newline == "drop" and (self._dropping or counts != (size_of(self.shape.parts),) * self.images):
            return 0
        return sum(map(self.shape.closing, counts))

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
        if stage.site == "encoder":
            # The tower does not know which crops belong to one prompt: there each is a row of its own.
            self.cost += stage.flops(counts, self.shape.tower.layers.width)
            parts = tuple((crop,) for crop in self.crops)
            return tuple(stage.plan(counts, parts, range(len(parts)), layer))
        self.cost += stage.flops(counts, self.shape.decoder.width)
        return tuple(stage.plan(counts, (self.shape.parts,) * self.images, (0,) * self.images, layer))

    def _pay(self, stage: Stage, fact: Fact, layer: int | None) -> None:
        """Adds what a fact costs, once per layer it is read from."""
        if fact.name in FREE:
            return
        if fact.name not in ONE_QUERY + ALL_QUERIES:
            self._leave_out(f"{stage.name}: the fact {fact.name}")
            return
        decoder, tower = stage.site == "decoder", self.shape.tower
        stack = self.shape.decoder if decoder else tower.layers
        if fact.layer is not None:
            source = fact.layer % stack.depth
        elif layer is None:
            source = tower.attention_layer
        else:
            source = layer - decoder
        if source >= len(self.decoder if decoder else self.tower):
            raise UnsupportedError(
                f"stage {stage.name} needs {fact.name} of layer {source}, which runs after the stage"
            )
        # Without a CLS token its attention is substituted by the attention received.
        name = "received_attention" if fact.name == "cls_attention" and not tower.extra else fact.name
        key = (stage.site if decoder else "tower", name, source)
        if key in self._paid:
            return
        self._paid.add(key)
        one_query = name in ONE_QUERY
        if decoder:
            length = self.text_tokens + sum(self.decoder[source]) + self.newlines[source]
            self.cost += stack.scores(1 if one_query else length, length)
        else:
            self.cost += sum(tower.scores(source, units, one_query=one_query) for units in self.tower[source])

    def _leave_out(self, sentence: str) -> None:
        if sentence not in self.left_out:
            self.left_out.append(sentence)
