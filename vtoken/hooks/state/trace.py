"""The trace: what a wrapped model did in its last prefill."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from vtoken.errors import ConfigError
from vtoken.stages import Grid, Parts


class Deferred:
    """A field that may be given as a function, which is called when the field is first read: its value is on the
    device, and a prefill does not wait for that.

    Args:
        default: of the field, if it has one.
    """

    def __init__(self, *default: Any) -> None:
        self.default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, entry: Any, owner: type) -> Any:
        if entry is None:
            if not self.default:
                raise AttributeError(self.name)
            return self.default[0]
        value = entry.__dict__[self.name]
        if callable(value):
            value = entry.__dict__[self.name] = value()
        return value

    def __set__(self, entry: Any, value: Any) -> None:
        entry.__dict__[self.name] = value


def deferred(*default: Any) -> Any:
    """`Deferred` as the default of a typed field."""
    return Deferred(*default)


@dataclass
class StageTrace:
    """One stage of one prefill.

    Attributes:
        name, site: of the stage.
        tokens_in, tokens_out: visual tokens per image before and after it.
        kept: per image, ascending LongTensor of indices into the image's unpruned visual tokens. At site cache those
            that any KV head of the layer holds, with tokens_out their number per head (a mean); both empty where a
            method does not tell.
        into: per image, for every unpruned visual token the kept one that absorbed it (-1 dropped); None for pure
            pruning.
        stood_aside: why the stage did nothing, or None (rows of a batch that ran dense: `Trace.dense_rows`).
        substitutes: fact asked for -> fact it was given, where the family has no such fact.
        layer: the layer it acted at, for encoder, decoder, attention and cache sites.
        backend: at site attention, what computed it: torch, triton or flex; several where rows differ ("flex, torch").
        frames: at site frames, per image, the frames that stayed (in Qwen models pairs of frames); an image is one.
        patches: at site frames, per image, the patches that the vision tower's layers see of it.
        resized: of stages that resize, per image, the raster of the smaller picture; `kept` are its tokens, in the
            upper left corner of the image's own raster.
        rows_aside: at sites attention and decode, per batch row: why it read everything while others did not, or None.
        slots_read: at site decode, for every token generated since in a step of its own, per batch row: how many slots
            each key head read, summed over the layers that attend. Padding of later turns counts.
        densities: at site attention, per batch row: share of the causal blocks that was computed, head mean (scalars on
            the device).
    """

    name: str
    site: str
    tokens_in: list[int]
    tokens_out: list[int] = deferred()  # noqa: RUF009
    kept: list[Tensor] = deferred()  # noqa: RUF009
    into: list[Tensor] | None = deferred(None)  # noqa: RUF009
    stood_aside: str | None = None
    layer: int | None = None
    substitutes: dict[str, str] = field(default_factory=dict)
    backend: str | None = None
    clock: Callable[[], float] = field(default=lambda: 0.0, repr=False)
    densities: list[Tensor] = field(default_factory=list, repr=False)
    rows_aside: list[str | None] = field(default_factory=list)
    slots_read: list[list[int]] = field(default_factory=list, repr=False)
    frames: list[list[int]] = field(default_factory=list)
    patches: list[int] = field(default_factory=list)
    resized: list[Grid] = field(default_factory=list)

    @property
    def density(self) -> list[float]:
        """`densities` as numbers (reading them waits for the device); empty at other sites and where the stage stood
        aside."""
        return [float(density) for density in self.densities]

    @property
    def milliseconds(self) -> float:
        """Time the decision took (device time on a GPU; reading it waits for the device)."""
        return self.clock()

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "site": self.site,
            "layer": self.layer,
            "tokens_in": self.tokens_in,
            "tokens_out": self.tokens_out,
            "kept": [k.tolist() for k in self.kept],
            "into": None if self.into is None else [i.tolist() for i in self.into],
            "milliseconds": self.milliseconds,
            "stood_aside": self.stood_aside,
            "density": self.density,
            "rows_aside": self.rows_aside,
            "slots_read": self.slots_read,
            "backend": self.backend,
            "frames": self.frames,
            "patches": self.patches,
            "resized": [list(grid) for grid in self.resized],
            "substitutes": self.substitutes,
        }


@dataclass(repr=False)
class Trace:
    """What happened in one prefill. `repr` is a line, `table()` has a row per stage; a notebook shows the table, and
    above it what stayed of the pictures that `with_pictures` was given.

    Attributes:
        stages: one entry per stage and layer it acted at, in the order the data flowed.
        parts: rasters of each image, as in VisualTokens; `row` is its batch row.
        visual_tokens: per image, before anything was dropped.
        layers: for every decoder layer, visual tokens per image that it saw.
        prompt_tokens: per batch row, tokens that entered the first decoder layer (text and visual, no padding).
        cached: for every decoder layer, per batch row, prompt tokens that each KV head holds after a cache stage; empty
            without one.
        cache_bytes: bytes that keys and values take after prefill, quantized ones with all that is needed to read them
            (0 without a cache).
        dense_rows: batch rows that ran dense because they hold fewer visual tokens than the pipeline's
            `min_visual_tokens`.
        counted: whose visual tokens the vision tower's stages compared with `min_visual_tokens`: those of "rows", or of
            each of the "images" alone, where the prompt was not known when its pictures were encoded; None without a
            threshold, or without such stages.
    """

    stages: list[StageTrace] = field(default_factory=list)
    parts: list[Parts] = field(default_factory=list)
    row: list[int] = field(default_factory=list)
    visual_tokens: list[int] = field(default_factory=list)
    layers: list[list[int]] = field(default_factory=list)
    prompt_tokens: list[int] = field(default_factory=list)
    cached: list[list[int]] = field(default_factory=list)
    cache_bytes: int = 0
    dense_rows: list[int] = field(default_factory=list)
    counted: str | None = None
    clock: Callable[[], float] = field(default=lambda: 0.0, compare=False)
    pictures: tuple[Sequence[Any], Any] | None = field(default=None, compare=False)

    def __repr__(self) -> str:
        """One line: tokens of all images before and after each stage, milliseconds, bytes of the cache."""
        from vtoken.hooks.state.trace_text import line

        return line(self)

    def table(self) -> str:
        """The line, and a table with a row per stage, to print (reading times waits for the device)."""
        from vtoken.hooks.state.trace_text import table

        return table(self)

    def with_pictures(self, *pictures: Any, processor: Any = None) -> Self:
        """Gives the trace the pictures of the prompt, so that a notebook draws what stayed of them; returns the trace.

        Args:
            pictures: PIL images, one per image of the trace, or the frames of its only video.
            processor: of the model, needed where it crops pictures (CLIP's does, if they are not square).

        Raises:
            ConfigError: there are not as many pictures as images in the trace, and it is not of a single video.
        """
        video = len(self.parts) == 1 and self.parts[0][0][0] > 1
        if len(pictures) != len(self.parts) and not video:
            raise ConfigError(f"the trace has {len(self.parts)} images, {len(pictures)} were given; give one for each")
        self.pictures = pictures, processor
        return self

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from vtoken.evals.pictures.traced import uri
        from vtoken.hooks.state.trace_text import page

        return page(self, uri(self, *self.pictures) if self.pictures else "")

    @property
    def milliseconds(self) -> float:
        """Time of the prefill, the language model's call with all decisions in and before it, without the vision tower
        (device time on a GPU; reading it waits for the device)."""
        return self.clock()

    @property
    def kept(self) -> list[Tensor]:
        """Per image, raster indices of the tokens that were live after the last stage that chose. Tokens that a cache
        stage drops are among them: they took part in the prefill."""
        for stage in reversed(self.stages):
            if stage.kept and stage.site != "cache":
                return stage.kept
        return [torch.arange(n) for n in self.visual_tokens]

    @property
    def tokens_out(self) -> list[int]:
        """Visual tokens per image after the last stage."""
        return [len(k) for k in self.kept]

    @property
    def aside(self) -> dict[str, str]:
        """Stages that did nothing, and why."""
        return {stage.name: stage.stood_aside for stage in self.stages if stage.stood_aside is not None}

    @property
    def density(self) -> dict[str, float]:
        """Stages of site attention that acted, and the share of the causal blocks that each computed, mean over its
        layers and rows (reading it waits for the device)."""
        found: dict[str, list[Tensor]] = {}
        for stage in self.stages:
            if stage.densities:
                found.setdefault(stage.name, []).extend(stage.densities)
        return {name: float(torch.stack(shares).mean()) for name, shares in found.items()}

    @property
    def average_tokens(self) -> float:
        """Visual tokens of the whole batch, averaged over decoder layers (papers give this or the tokens at entry)."""
        counts: Sequence[int] = [sum(layer) for layer in self.layers] or [sum(self.visual_tokens)]
        return sum(counts) / len(counts)

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `json.dumps` takes."""
        return {
            "stages": [s.to_dict() for s in self.stages],
            "parts": [[list(grid) for grid in parts] for parts in self.parts],
            "row": self.row,
            "visual_tokens": self.visual_tokens,
            "layers": self.layers,
            "prompt_tokens": self.prompt_tokens,
            "cached": self.cached,
            "cache_bytes": self.cache_bytes,
            "milliseconds": self.milliseconds,
            "dense_rows": self.dense_rows,
            "counted": self.counted,
        }
