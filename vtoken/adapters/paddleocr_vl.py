"""PaddleOCR-VL: a tower over pictures of any size, row by row, and a projector that joins patches 2 x 2."""

from __future__ import annotations

from typing import Any

from vtoken.adapters._packed import Packed
from vtoken.adapters.base import Encoder


class PaddleOcrVl(Packed):
    """`PaddleOCRVLForConditionalGeneration`. Pictures only, as in transformers."""

    model_type = "paddleocr_vl"
    features = {"image": "get_image_features"}

    def __init__(self, model: Any) -> None:
        self.find(model, tower="visual")
        self.projectors, self.merge = (self.outer.projector,), model.config.vision_config.spatial_merge_size
        layers = self.tower.vision_model.encoder.layers
        self.encoder = Encoder.of(layers, packed=True, by_grids=True, unit=self.merge**2)
        self.placeholders = {"image": model.config.image_token_id}
