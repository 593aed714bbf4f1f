"""One batch row on its way through the stages: how many tokens are alive in every layer, and what deciding costs."""

from __future__ import annotations

from collections.abc import Sequence

from vtoken.config import Pipeline
from vtoken.errors import OtherModelError, UnsupportedError
from vtoken.evals.cost.geometry import Geometry
from vtoken.evals.cost.smaller_pictures import before_tower
from vtoken.hooks.vision.frames import SIDE
from vtoken.stages import SITES, Fact, FactSpec, OtherModel, Parts, Site, Stage, SteeredAttention, size_of, spec_of
from vtoken.stages.attention import SparseAttention
from vtoken.stages.cache import CacheStage

Counts = tuple[int, ...]


class TokenFlow:
    """Runs every stage's `expected_counts`.

    Attributes:
        shape: what is counted, with smaller pictures and fewer frames if stages of these sites make them so.
        stages: those that act: none where the pipeline asks for more visual tokens.
        embedded: patches that the tower embeds.
        tower: units (see Tower) alive per crop when every tower layer begins; `mlps`: when its MLP does.
        decoder: visual tokens alive per image in every decoder layer.
        newlines: newline tokens of the row in every decoder layer.
        attended: prompt tokens that every decoder layer attends to at prefill; `density`: the share of its attention
            that is computed.
        cached: prompt tokens in every decoder layer's KV cache when the prefill ends; `decoded`: those that a decode
            step attends to.
        shrunk: decoder layer -> the stage that shrinks its cache, the tokens of the prompt before that, and the visual
            ones among them, per image.
        cost: FLOPs of the stages and of the facts they read.
        left_out: what could not be counted, one sentence each.
        inexact: stages whose counts depend on what the picture shows: from them on counts are expected ones.
    """

    def __init__(self, shape: Geometry, images: int, text_tokens: int, pipeline: Pipeline) -> None:
        self.shape, self.images, self.text_tokens, self.newline = shape, images, text_tokens, pipeline.newline
        stages, least = list(pipeline.stages), pipeline.min_visual_tokens
        self.tower: list[Counts] = []
        self.mlps: list[Counts] = []
        self.decoder: list[Counts] = []
        self.newlines: list[int] = []
        self.shrunk: dict[int, tuple[CacheStage, int, Counts]] = {}
        self.cost = 0
        self.left_out: list[str] = []
        self.inexact: list[str] = []
        self._thinned_by: set[str] = set()
        self._paid: set[tuple[str, str, int]] = set()
        if stages and (visual := images * size_of(shape.parts)) < least:
            self._leave_out(f"all stages stand aside: {visual} visual tokens are fewer than min_visual_tokens {least}")
            stages = []
        self._depth = {"encoder": shape.tower.layers.depth, "decoder": shape.decoder.depth}
        self.stages = stages = [s.for_depth(self._depth[s.site]) if s.site in self._depth else s for s in stages]
        for stage in stages:
            self._check(stage)
        self._at = {at: [s for s in stages if s.site == at and not s.refills()] for at in SITES}
        self._dropping = bool(self._at["tokens"] or self._at["decoder"])
        self.shape, self._by_pixels = before_tower(shape, self._at["pixels"])
        self._choose_frames()
        counts = self._encode()
        for stage in self._at["tokens"]:
            counts = self._act(stage, counts, None)
        for layer in range(shape.decoder.depth):
            for stage in self._acting("decoder", layer):
                counts = self._act(stage, counts, layer)
            self.decoder.append(counts)
            self.newlines.append(self._lines(counts))
        self.density = [float(layer not in shape.decoder.states) for layer in range(shape.decoder.depth)]
        lengths = [self.length(layer) for layer in range(shape.decoder.depth)]
        clear = max((n for s in stages if s.clears_earlier_layers() for n in s.layers(len(lengths))), default=0)
        self.attended = lengths
        self.cached = self.decoded = lengths[clear : clear + 1] * clear + lengths[clear:]
        for stage in stages:
            if isinstance(stage, SparseAttention):
                self._thin(stage)
            elif isinstance(stage, CacheStage):
                self._shrink(stage)
            elif (kept := stage.unmerge_mode()) and len(stages) > 1:
                places = images * size_of(self.shape.parts)
                self.attended = [n - sum(c) + places for n, c in zip(lengths, self.decoder, strict=True)]
                self.decoded = self.attended
                self.cached = self.attended if kept == "expanded" else lengths

    def length(self, layer: int) -> int:
        """Tokens of the row in a decoder layer, text and newlines included."""
        return self._length(self.decoder[layer])

    def _check(self, stage: Stage) -> None:
        """Refuses a stage that does not go with these shapes, as `wrap` does."""
        decoder, tower = self.shape.decoder, self.shape.tower
        if stage.unmerge_mode():
            self._leave_out(f"{stage.name}: tokens that were dropped, not merged; attention is counted as if none was")
        elif isinstance(stage, SteeredAttention) or (stage.site == "cache" and not isinstance(stage, CacheStage)):
            self._leave_out(f"{stage.name}: what a stage at site {stage.site} saves and costs")
        if decoder.states and (stage.unmerge_mode() or (isinstance(stage, SparseAttention) and stage.keeps_apart)):
            raise UnsupportedError(f"stage {stage.name}: layers of this decoder keep a state instead of attention")
        if why := stage.incompatibility(decoder.depth, decoder.width):
            raise OtherModelError(f"stage {stage.name}: {why}")
        why = stage.tower_incompatibility(tower.layers.width, tower.unit)
        if stage.site in ("attention", "cache") and not why:
            why = stage.heads_incompatibility(decoder.heads, decoder.kv_heads, decoder.head_dim)
        if stage.site == "encoder" and stage.merge_point():
            if any(mixed != 1 for _, mixed in self.shape.sources):
                why = "merges where this model interpolates features after its tower"
            elif tower.unit != 1:
                why = f"merges single patches, of which this encoder joins {tower.unit}"
            elif tower.packed:
                why = "merges single patches, which lie in one sequence in this encoder"
        if why:
            raise UnsupportedError(f"stage {stage.name}: {why}")
        if stage.site not in self._depth:
            return
        try:
            layers = stage.layers(self._depth[stage.site])
        except OtherModel as error:
            raise OtherModelError(f"stage {stage.name}: {error}") from error
        except ValueError as error:
            raise UnsupportedError(f"stage {stage.name}: {error}") from error
        first, last = (1, decoder.depth - 1) if stage.site == "decoder" else (0, min(tower.feature_layers) - 1)
        last = tower.layers.depth - 1 if stage.merge_point() else last
        if not layers or min(layers) < first or max(layers) > last:
            raise UnsupportedError(
                f"stage {stage.name} acts at {stage.site} layers {list(layers)}; this model allows {first} to {last}"
            )

    def _acting(self, site: Site, layer: int) -> list[Stage]:
        return [stage for stage in self._at[site] if layer in stage.layers(self._depth[site])]

    def _choose_frames(self) -> None:
        """Goes on with the frames that are left. A packed tower embeds all of them, though its layers see fewer."""
        given, frames, apart = self.shape, self.shape.frames, self.shape.tower.crops[0][0] == 1
        for stage in self._at["frames"]:
            counts: Counts = (frames,) * self.images
            self.cost += stage.flops(counts, 3 * SIDE**2)  # 3: channels
            frames = max(self._left(stage, counts, (((self.shape.frames, 1, 1),),) * self.images, range(self.images)))
        self._dropping |= frames < self.shape.frames
        self.shape = self.shape.thinned(frames)
        self.embedded = (self.shape if apart else given).tower.patches * self.images

    def _encode(self) -> Counts:
        """Visual tokens of every image after the tower."""
        tower = self.shape.tower
        counts: Counts = tuple(size_of((crop,)) for crop in tower.crops * self.images)
        for stage in self._by_pixels:
            counts = self._act(stage, counts, None)
        for layer in range(tower.layers.depth):
            self.tower.append(counts)
            acting = self._acting("encoder", layer)
            for stage in acting if layer <= min(tower.feature_layers) else ():
                counts = self._act(stage, counts, layer) if stage.merge_point() else counts
            self.mlps.append(counts)
            for stage in acting:
                counts = counts if stage.merge_point() else self._act(stage, counts, layer)
        each = len(tower.crops)
        if self._thinned_by & {stage.name for stage in self._at["encoder"]} and not self.shape.whole_crops:
            self.inexact += [stage.name for stage in self._at["encoder"] if stage.name not in self.inexact]
        return tuple(self.shape.tokens(counts[i * each : (i + 1) * each]) for i in range(self.images))

    def _thin(self, stage: SparseAttention) -> None:
        """Enters how much of the attention a stage leaves, where that does not depend on what the prompt says."""
        rasters = (self.shape.parts,) * self.images
        for layer in stage.layers(self.shape.decoder.depth):
            if layer in self.shape.decoder.states:
                continue
            length, counts = self.length(layer), self.decoder[layer]
            if length < stage.min_len:
                self._leave_out(f"{stage.name} stands aside: {length} tokens are fewer than min_len {stage.min_len}")
            elif (density := stage.density_of(length, layer, counts, rasters)) is not None:
                self.density[layer] = density
            else:
                self._leave_out(
                    f"{stage.name}: which blocks it reads, and what choosing them costs (attention is counted whole)"
                )

    def _shrink(self, stage: CacheStage) -> None:
        """Enters what a cache stage leaves of every layer, and costs there."""
        stack = self.shape.decoder
        self.cached = self.decoded = list(self.cached)
        rasters = (self.shape.parts,) * self.images
        whole = not self._thinned_by and self.shape.whole_crops
        self.inexact += [] if stage.counts_are_exact(None, whole) else [stage.name]
        for layer, (prompt, counts) in enumerate(zip(self.cached, self.decoder, strict=True)):
            if not sum(counts) or layer in stack.states:
                continue
            cost = stage.cost(prompt, counts, stack.heads, stack.kv_heads, stack.head_dim)
            if cost is None:
                self._leave_out(f"{stage.name}: what deciding costs")
            self.cost += cost or 0
            self.cached[layer] = stage.slots_of(prompt, counts, rasters)
            self.shrunk[layer] = stage, prompt, counts

    def _lines(self, counts: Counts) -> int:
        """Newline tokens that go with so many visual tokens per image."""
        if self.newline == "keep":
            return self.images * self.shape.newlines[0]
        if self.newline == "drop" and (self._dropping or counts != (size_of(self.shape.parts),) * self.images):
            return 0
        return sum(map(self.shape.closing, counts))

    def _act(self, stage: Stage, counts: Counts, layer: int | None) -> Counts:
        for fact in stage.needs():
            self._pay(stage, fact, counts, layer)
        if stage.site in ("pixels", "encoder"):
            # The tower does not know which crops belong to one prompt: there each is a row of its own.
            stack = self.shape.tower.layers
            self.cost += stage.flops(counts, stack.head_dim if stage.merge_point() else stack.width)
            parts = tuple((crop,) for crop in self.shape.tower.crops * self.images)
            return self._left(stage, counts, parts, range(len(parts)), layer)
        self.cost += stage.flops(counts, self.shape.decoder.width)
        return self._left(stage, counts, (self.shape.parts,) * self.images, (0,) * self.images, layer)

    def _left(
        self, stage: Stage, counts: Counts, parts: Sequence[Parts], row: Sequence[int], layer: int | None = None
    ) -> Counts:
        """What the stage leaves, and whether that is sure."""
        left = tuple(stage.expected_counts(counts, parts, row, layer))
        whole = self._thinned_by <= {stage.name} and self.shape.whole_crops
        last = min(self.shape.tower.feature_layers)  # what the last cut up to here leaves goes on from the tower
        passing = stage.site == "encoder" and layer != max(k for k in stage.layers(self._depth["encoder"]) if k <= last)
        if not passing and not stage.counts_are_exact(layer, whole) and stage.name not in self.inexact:
            self.inexact.append(stage.name)
        if left != counts:
            self._thinned_by.add(stage.name)
        return left

    def _pay(self, stage: Stage, fact: Fact, counts: Counts, layer: int | None) -> None:
        """Adds what a fact costs, once per layer it is read from. `counts` are alive where it is asked for."""
        spec = spec_of(fact.name, stage.site)
        if spec is None:
            self._leave_out(f"{stage.name}: the fact {fact.name}")
            return
        if not spec.queries:
            return  # a tensor that the model computes anyway
        if spec.read == "next layer" and layer is not None:
            self._attends(stage, fact, layer)
            self.cost += self._next_rows(layer, counts, spec.queries == "text")
            return
        decoder, tower = not spec.of_encoder, self.shape.tower
        if fact.layer is not None:
            source = fact.layer % self._depth["decoder" if decoder else "encoder"]
        elif layer is None or (stage.site == "decoder" and not decoder):
            source = tower.attention_layer
        else:
            source = layer - decoder
        if source >= len(self.decoder if decoder else self.tower):
            raise UnsupportedError(f"stage {stage.name} needs {fact.name} of layer {source}, which runs after it")
        if spec.instead and not tower.extra:
            spec = spec_of(spec.instead, stage.site)
            assert spec is not None
        if decoder:
            self._attends(stage, fact, source)
        key = (spec.read, spec.name, source)
        if key in self._paid:
            return
        self._paid.add(key)
        if decoder:
            self.cost += self._decoder_fact(spec, source)
        else:
            one_query = spec.queries == "cls"
            self.cost += sum(tower.scores(source, units, one_query=one_query) for units in self.tower[source])

    def _attends(self, stage: Stage, fact: Fact, layer: int) -> None:
        """Refuses a fact about the attention of a layer that has none, as `wrap` does."""
        if layer in self.shape.decoder.states:
            raise UnsupportedError(
                f"stage {stage.name} needs {fact.name} of layer {layer}, which keeps a state instead of attention"
            )

    def _decoder_fact(self, spec: FactSpec, source: int) -> int:
        """FLOPs of rows of decoder layer `source`. All text of the prompt is taken to stand behind every image and to
        rate it."""
        stack, counts = self.shape.decoder, self.decoder[source]
        length, text = self._length(counts), self.text_tokens
        if spec.queries == "last" and not spec.own:
            return stack.scores(1, length)
        if spec.projections == ("v",):
            return 2 * sum(counts) * stack.kv_heads * stack.head_dim
        relayed = 2 * text * length if spec.relayed else 0
        rows = {"last": 1, "text": text, "chosen": text}
        return sum(stack.scores(rows.get(str(spec.queries), n), n if spec.own else length) + relayed for n in counts)

    def _next_rows(self, layer: int, counts: Counts, text: bool) -> int:
        """FLOPs of a layer's rows before it runs: the last token's over what is left, or the text's over all."""
        stack, entering = self.shape.decoder, self._length(self.decoder[layer - 1])
        projected = stack.heads * (entering if text else 1) + stack.kv_heads * entering
        rows = stack.scores(self.images * self.text_tokens, entering) if text else stack.scores(1, self._length(counts))
        return 2 * stack.width * stack.head_dim * projected + rows

    def _length(self, counts: Counts) -> int:
        return self.text_tokens + sum(counts) + self._lines(counts)

    def _leave_out(self, sentence: str) -> None:
        if sentence not in self.left_out:
            self.left_out.append(sentence)
