"""LLaVA-NeXT as vLLM serves it, with a pipeline after its packing (crops, unpadding, newlines)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from functools import lru_cache, partial
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor

# `Anyres` looks these up in the module of its model.
from transformers.models.llava_next.modeling_llava_next import (  # noqa: F401
    get_anyres_image_grid_shape,
    image_size_to_num_patches,
)
from vllm.model_executor.models import llava_next as stock
from vllm.model_executor.models.llava import LlavaDummyInputsBuilder
from vllm.multimodal import MULTIMODAL_REGISTRY

from vtoken.adapters._anyres import Anyres
from vtoken.config import Pipeline
from vtoken.hooks.state.run import FeatureCall, ImageLayout
from vtoken.serving import plan
from vtoken.serving._clip import ClipLike
from vtoken.serving._engine import groups
from vtoken.serving._keyed import Keyed
from vtoken.serving._llava import NAMES, Pruned

Sizes = Sequence[tuple[int, int]]


def cut(config: Any, pipeline: Pipeline | None) -> Any:
    """The config, with the crop grid of the pipeline's `anyres` policy."""
    if pipeline is None or pipeline.anyres == "model":
        return config
    side, changed = 2 * config.vision_config.image_size, copy(config)
    changed.image_grid_pinpoints = [[side, side]]
    return changed


class Model(SimpleNamespace):
    """A stand-in for a model: it has a config and, for packing, a newline."""


class Packing(Anyres):
    """How pictures are cut and packed, according to the config."""

    model_type = "llava_next"

    def __init__(self, config: Any) -> None:
        self.outer, self.side = Model(config=config), ClipLike(config).side
        self.patches = self.side**2
        self._layout = lru_cache(maxsize=256)(self._laid_out)

    def pack_options(self, arguments: dict[str, Any]) -> dict[str, Any]:
        return {}

    def layouts_of(self, sizes: Sizes) -> list[ImageLayout]:
        """Layouts of pictures with these (height, width)."""
        crops = self.crops({"image_sizes": sizes})
        return [self._layout(n, size, ()) for n, size in zip(crops, sizes, strict=True)]

    def _pack(self, images: Sequence[Tensor], sizes: Any, options: dict[str, Any]) -> list[Tensor]:
        """Uses vLLM's own packing, which reads only config and newline from its model."""
        newline = torch.full((images[0].shape[-1],), float("nan"), device=images[0].device)
        model = Model(config=self.outer.config, image_newline=newline)
        return [
            self._merge(model, torch.as_tensor(size), image, strategy="spatial_unpad")
            for image, size in zip(images, sizes, strict=True)
        ]

    def _merge(self, model: Any, size: Tensor, image: Tensor, **options: Any) -> Any:
        merge = stock.LlavaNextForConditionalGeneration._merge_image_patch_embeddings
        return merge(model, size, image, **options)


class Info(stock.LlavaNextProcessingInfo):
    """Counts as many placeholders as the pipeline keeps tokens and newlines."""

    packs: ClassVar[type[Packing]] = Packing
    _packing: Packing | None = None

    def get_hf_config(self) -> Any:
        config = super().get_hf_config()
        return cut(config, plan.pipeline_of(config))

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        config = self.get_hf_config()
        pipeline = plan.pipeline_of(config)
        if pipeline is None:
            full: int = super().get_num_image_tokens(image_width=image_width, image_height=image_height)
            return full
        grids = config.image_grid_pinpoints
        if self._packing is None or self._packing.outer.config.image_grid_pinpoints != grids:
            self._packing = self.packs(config)
        (layout,) = self._packing.layouts_of([(image_height, image_width)])
        return plan.placeholders(pipeline, layout)


class Processor(Keyed, stock.LlavaNextMultiModalProcessor):
    family = "llava_next"

    def _call_hf_processor(self, hf_data: Any, hf_kwargs: Any) -> Any:
        pipeline = self.pipeline
        if pipeline is None or pipeline.anyres == "model":
            return super()._call_hf_processor(hf_data, hf_kwargs)
        # vLLM caches processors by their arguments, which cannot be lists; arguments of the call can.
        options = {**hf_kwargs, "image_grid_pinpoints": self.info.get_hf_config().image_grid_pinpoints}
        return self.info.ctx.call_hf_processor(self.info.get_hf_processor(**hf_kwargs), hf_data, options)


class Cropped(Pruned):
    """A mixin for models that cut pictures into crops."""

    packs: ClassVar[type[Packing]] = Packing
    packing: Packing | None = None
    vision_tower: Any
    image_newline: Any

    def install(self, pipeline: Pipeline | None) -> None:
        self.config = cut(self.engine.model_config.hf_config, pipeline)
        super().install(pipeline)
        self.packing = None if pipeline is None else self.packs(self.config)

    def _process_image_input(self, image_input: Any) -> Any:
        if self.packing is None or image_input["type"] != "pixel_values":
            return super()._process_image_input(image_input)  # type: ignore[misc]
        sizes = [(int(height), int(width)) for height, width in image_input["image_sizes"].tolist()]
        packing, layouts, out = self.packing, self.packing.layouts_of(sizes), list[Tensor]()
        # Pictures processed together are padded with empty crops to the number of the largest.
        crops = packing.crops({"image_sizes": sizes})
        pixels = [each[:n] for each, n in zip(image_input["pixel_values"], crops, strict=True)]
        # The dense model would be given this many at once; the engine counts only kept tokens.
        for some in groups([layout.length for layout in layouts], self.most):
            call = FeatureCall("image", {"image_sizes": sizes[some]}, tuple(layouts[some]))
            out += self._left(pixels[some], layouts[some], some.start, partial(packing.pack, call))
        return out

    def _left(
        self, pixels: Sequence[Tensor], layouts: Sequence[ImageLayout], first: int, pack: Any, kind: str = "image"
    ) -> Iterator[Tensor]:
        """The kept tokens of pictures, with the newlines that the pipeline keeps. Arguments as in `choose`."""

        def packed(values: Tensor) -> Tensor:
            whole: Tensor = pack(values if values.ndim == 3 else values[..., None])
            return whole if values.ndim == 3 else whole[:, 0]

        features = self._image_pixels_to_features(self.vision_tower, torch.cat(list(pixels)))
        left, history = self.choose(self.multi_modal_projector(features), layouts, first, packed, kind)
        for tokens, places, layout in zip(left.split(history.counts), history.kept(), layouts, strict=True):
            newlines = plan.newlines(self.pipeline, layout)
            yield self._closed(tokens, places, layout, newlines) if newlines else tokens

    def _closed(self, tokens: Tensor, places: Tensor, layout: ImageLayout, newlines: int) -> Tensor:
        """Tokens [K, D] at these places of their picture, with its newlines inserted."""
        assert layout.newline is not None
        content, closing = (mask.nonzero()[:, 0].to(places.device) for mask in (~layout.newline, layout.newline))
        column = torch.cat([content[places], closing])
        return torch.cat([tokens, self.image_newline.expand(newlines, -1).to(tokens)])[column.argsort()]


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=LlavaDummyInputsBuilder)
class LlavaNext(Cropped, stock.LlavaNextForConditionalGeneration):
    """`LlavaNextForConditionalGeneration`."""

    family = "llava_next"
    hf_to_vllm_mapper = stock.LlavaNextForConditionalGeneration.hf_to_vllm_mapper | NAMES
