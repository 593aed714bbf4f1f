"""LFM2-VL: a SigLIP 2 tower over crops of their own size, 2 x 2 patches joined to a token, and a decoder most of whose
layers are short convolutions."""

from __future__ import annotations

from typing import Any

from vtoken.adapters._crops import of_rasters
from vtoken.adapters.base import Adapter, Encoder
from vtoken.errors import UnsupportedError
from vtoken.hooks.state.parted import side_by_side
from vtoken.hooks.state.run import ImageLayout


class Lfm2VL(Adapter):
    """`Lfm2VlForConditionalGeneration`. A large picture is cut into equal crops, followed by the whole scaled down.

    Pixels do not tell which crops are of one picture, but the prompt does: a single token stands between them.
    """

    model_type = "lfm2_vl"
    prompted = True
    final_norm = "embedding_norm"

    def __init__(self, model: Any) -> None:
        self.find(model)
        config = model.config
        kinds = config.vision_config.model_type, config.text_config.model_type
        if kinds != ("siglip2_vision_model", "lfm2"):
            raise UnsupportedError(
                f"lfm2_vl with {kinds[0]!r} and {kinds[1]!r} is not supported; 'siglip2_vision_model' and 'lfm2' are"
            )
        self.projectors, self.stack = (self.outer.multi_modal_projector,), self.tower.encoder
        self.join = config.downsample_factor
        self.encoder = Encoder.of(self.stack.layers, sized=True, unit=self.join**2)
        self.placeholders = {"image": config.image_token_id}

    def layouts(self, kind: str, arguments: dict[str, Any]) -> tuple[ImageLayout, ...]:
        pixels, sizes = arguments.get("pixel_values"), arguments.get("spatial_shapes")
        if pixels is None or sizes is None or arguments.get("pixel_attention_mask") is None:
            raise ValueError(
                "lfm2_vl needs pixel_values, spatial_shapes and pixel_attention_mask to encode; pass what its "
                "processor returns"
            )
        grids = sizes.tolist()
        if len(pixels) != len(grids) or any(r * c > pixels.shape[1] for r, c in grids):
            raise ValueError(
                f"pixel_values of shape {list(pixels.shape)} do not hold crops of {grids} patches (spatial_shapes); "
                "pass both as one call of the processor returned them"
            )
        if any(n % self.join for grid in grids for n in grid):
            raise ValueError(
                f"spatial_shapes {grids} are not whole numbers of {self.join} patches, of which a token is made"
            )
        rasters = [(1, r // self.join, c // self.join) for r, c in grids]
        ids, embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
        shown = None if ids is None and embeds is None else self.visual_kinds(ids, embeds)
        return tuple(map(of_rasters, side_by_side(rasters, shown)))
