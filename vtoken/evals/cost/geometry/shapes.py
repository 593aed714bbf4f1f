"""The numbers that the account multiplies: stacks of layers, what a tower sees of one image, what reaches the
decoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from math import comb, isqrt

from torch import Tensor

from vtoken.evals.shared.options import ImageSize
from vtoken.stages import Grid, Parts, size_of

Draw = Callable[..., Tensor]  # random numbers of a shape, as torch.randn


@dataclass(frozen=True)
class Pictures:
    """What a batch shows: in every row so many images, or videos of so many frames where `frames` is above 1; `size` in
    pixels."""

    rows: int
    images: int
    frames: int
    size: ImageSize | None

    @property
    def count(self) -> int:
        return self.rows * self.images


@dataclass(frozen=True)
class State:
    """What a decoder layer that keeps a state instead of attending computes beside its matrices: a convolution over
    time, and a gated delta rule where it has one.

    Attributes:
        conv: numbers of the convolution over time, channels x `width`.
        heads: each with a state of `key` x `value` numbers; 0 where the convolution is all.
        chunk: tokens that are taken in together.
    """

    conv: int
    width: int
    heads: int = 0
    key: int = 0
    value: int = 0
    chunk: int = 64

    def flops(self, tokens: int) -> int:
        """Of so many tokens at once, as transformers computes them: the convolution also at `width` - 1 places past the
        prompt, and at two places for a single token; the delta rule in whole chunks. The triangular system of a chunk,
        which is solved for keys and values, counts as multiplying by its inverse. What a single token adds to a state
        is not counted: it is no matrix product."""
        if tokens <= 1:
            return 4 * self.conv * tokens
        square, chunks = self.chunk**2, -(-tokens // self.chunk)
        inside = square * (3 * self.key + 2 * self.value) + 3 * self.chunk * self.key * self.value
        return 2 * (self.conv * (tokens + self.width - 1) + chunks * self.heads * inside)


@dataclass(frozen=True)
class Layers:
    """A stack of transformer layers.

    Attributes:
        weights: of every layer, the numbers in its matrices that a token is multiplied with; each costs 2 FLOPs.
        windows: sliding window of every layer in tokens, None where attention is full.
        states: layer -> what it computes instead of attention.
    """

    depth: int
    width: int
    weights: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...]
    states: Mapping[int, State] = field(default_factory=dict)

    @cached_property
    def attending(self) -> tuple[int, ...]:
        """Layers with attention and a KV cache."""
        return tuple(layer for layer in range(self.depth) if layer not in self.states)

    def linear(self, tokens: int, layer: int) -> int:
        """FLOPs of one layer's matrices, and of its state if it keeps one."""
        state = self.states[layer].flops(tokens) if layer in self.states else 0
        return 2 * tokens * self.weights[layer] + state

    def scores(self, queries: float, keys: float) -> int:
        """FLOPs of one layer's q·k; the weighted sum of the values costs as much again."""
        return round(2 * queries * keys * self.heads * self.head_dim)


@dataclass(frozen=True)
class Projector:
    """A projector or merger.

    Attributes:
        weights: numbers in its matrices, met by every unit (see Tower) that leaves the tower.
        layer: tower layer whose output it reads.
        pooled: tokens of an image that it meets whatever was dropped, where patches are pooled ahead of it; else None.
        extra: tokens of a crop beside its patches (CLS) that it meets.
    """

    weights: int
    layer: int
    pooled: int | None = None
    extra: int = 0

    def tokens(self, images: int, units: Sequence[int]) -> int:
        """Tokens that it meets in a row of so many images; `units` are left of each of their crops."""
        return sum(units) + len(units) * self.extra if self.pooled is None else images * self.pooled


@dataclass(frozen=True)
class Tower:
    """The vision encoder, and what it sees of one image or video.

    Attributes:
        crops: rasters (frames, rows, columns) that it sees one by one, in units.
        unit: patches that become one visual token at its end (2 x 2 in Qwen, else 1).
        blocks: for every layer, the attention blocks of one crop: patches in a block -> how many such blocks.
        extra: tokens of a crop beside its patches (CLS).
        patch: numbers of a patch, over channels, frames and pixels, from which its embedding makes `width` others.
        head_patch, head_image: numbers in the pooling head that every patch left, and every crop, meets once.
        feature_layers: layers whose outputs projectors read.
        attention_layer: where attention facts are read unless a stage names a layer.
        packed: all images of a batch attend in one product, which a mask cuts (Pixtral); nothing merges inside.
        resized: where pictures of any size lie in one sequence (Qwen), `blocks` of a raster in patches (frames, rows,
            columns).
        padded: units that every crop is padded to until something is dropped, then to those of the fullest (NaFlex); 0:
            none is padded.
    """

    layers: Layers
    crops: Parts
    unit: int
    blocks: tuple[Mapping[int, int], ...]
    extra: int
    patch: int
    head_patch: int
    head_image: int
    feature_layers: tuple[int, ...]
    attention_layer: int
    packed: bool = False
    resized: Callable[[Grid], tuple[Mapping[int, int], ...]] | None = None
    padded: int = 0

    @property
    def patches(self) -> int:
        """Of all crops of one image."""
        return (len(self.crops) * self.padded or size_of(self.crops)) * self.unit

    def run(self, units: Sequence[float]) -> Sequence[float]:
        """What a layer computes where so many units are left of the crops of a batch."""
        if not self.padded:
            return units
        whole = sum(units) * len(self.crops) == size_of(self.crops) * len(units)
        return (self.padded if whole else max(units),) * len(units)

    def linear(self, layer: int, units: float, late: float) -> int:
        """FLOPs of one layer's matrices on a crop with so many units left, `late` of them when its MLP runs."""
        merged = round((units - late) * self.unit)
        mlp = self.layers.weights[layer] - 4 * self.layers.width**2
        return self.layers.linear(round(units * self.unit) + self.extra, layer) - 2 * merged * mlp

    def scores(self, layer: int, units: float, *, one_query: bool = False) -> int:
        """FLOPs of q·k in one layer on a crop with so many units left, spread evenly over the blocks."""
        share = units / size_of(self.crops[:1])
        lengths = {patches * share + self.extra: many for patches, many in self.blocks[layer].items()}
        return sum(many * self.layers.scores(1 if one_query else n, n) for n, many in lengths.items())


@dataclass(frozen=True)
class Geometry:
    """A whole model, for one image or video.

    Attributes:
        parts: rasters at the language-model boundary, as in VisualTokens.
        sources: of each part, the crops it comes from, and how many patches are interpolated into each of its tokens.
        newlines: (how many, visual tokens that each of them closes).
        vocabulary: rows of the output embedding.
        parted_frames: whether text (timestamps) stands between the frames of a video.
        parted_crops: whether it stands between the crops of an image; a mark in front of each, and one after the
            image, tell which belong together.
    """

    tower: Tower
    projectors: tuple[Projector, ...]
    parts: Parts
    sources: tuple[tuple[int, int], ...]
    newlines: tuple[int, int]
    decoder: Layers
    vocabulary: int
    parted_frames: bool = False
    parted_crops: bool = False

    @property
    def frames(self) -> int:
        """Frames of a video (Qwen: pairs of frames); 1 of an image."""
        return self.parts[0][0]

    @property
    def runs(self) -> int:
        """Into how many runs text parts the tokens of one image or video."""
        return self.frames if self.parted_frames else 1

    @property
    def whole_crops(self) -> bool:
        """Whether each token is one of a crop's, and none of a crop's lies in padding."""
        return all(
            mixed == 1 and size_of((part,)) == size_of(crops)
            for part, (crops, mixed) in zip(self.parts, self._behind(), strict=True)
        )

    def _behind(self) -> list[tuple[Parts, int]]:
        """`sources` with the crops themselves."""
        ends = accumulate(crops for crops, _ in self.sources)
        return [(self.tower.crops[end - n : end], mixed) for end, (n, mixed) in zip(ends, self.sources, strict=True)]

    def thinned(self, frames: int) -> Geometry:
        """The same video with fewer frames."""
        (before, height, width), tower = self.parts[0], self.tower
        if frames == before:
            return self
        (first, down, across), many = tower.crops[0], len(tower.crops) * frames // before
        crops: Parts = tower.crops[:many] if first == 1 else ((frames, down, across),)
        blocks = (
            tower.blocks if first == 1 else tuple({n: m * frames // before for n, m in b.items()} for b in tower.blocks)
        )
        (_, mixed), (newlines, closed) = self.sources[0], self.newlines
        return replace(
            self,
            tower=replace(tower, crops=crops, blocks=blocks),
            parts=((frames, height, width),),
            sources=((len(crops), mixed),),
            newlines=(frames, closed) if newlines == before > 1 else (newlines, closed * frames // before),
        )

    def resized(self, raster: Grid) -> Geometry:
        """The same picture, or video, at another size in tokens."""
        tower, side = self.tower, isqrt(self.tower.unit)
        assert tower.resized is not None
        frames, rows, columns = raster
        blocks = tower.resized((frames, rows * side, columns * side))
        return replace(self, tower=replace(tower, crops=(raster,), blocks=blocks), parts=(raster,))

    def tokens(self, units: Sequence[int]) -> int:
        """Visual tokens that the units left of each crop become: as large a share of all as units are left. A token
        that is interpolated from several patches needs all of them; of such tokens the share is the one expected if
        patches are dropped at random."""
        first, total = 0, 0
        for part, (crops, mixed) in zip(self.parts, self._behind(), strict=True):
            left = sum(units[first : first + len(crops)])
            total += round(size_of((part,)) * (left / size_of(crops)) ** mixed)
            first += len(crops)
        return total

    def closing(self, kept: int) -> int:
        """Newline tokens beside `kept` visual tokens: those whose row has a token left. Exact where nothing or
        everything was dropped; else the number expected of tokens kept at random, rounded."""
        count, row = self.newlines
        total = size_of(self.parts)
        if not count or not kept:
            return 0
        empty = comb(total - row, kept) / comb(total, kept)
        return round(count * (1 - empty))
