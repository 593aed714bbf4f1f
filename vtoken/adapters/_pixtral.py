"""What families with a Pixtral tower share: pictures of any size in one sequence, row by row, and in the prompt a
separator token between the rows of a picture."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from vtoken.adapters._padded import check_feature_layer, feature_layers
from vtoken.adapters.base import Adapter, Encoder
from vtoken.errors import UnsupportedError
from vtoken.hooks.state.run import KINDS, ImageLayout


class Pixtral(Adapter):
    """Finds tower, projector and decoder. `merge` x `merge` patches become a token."""

    def __init__(self, model: Any, merge: int) -> None:
        config = model.config
        self.find(model)
        if config.vision_config.model_type != "pixtral":
            raise UnsupportedError(
                f"{self.model_type} with a {config.vision_config.model_type!r} vision tower is not supported; "
                "supported towers: pixtral"
            )
        self.projectors, self.merge = (self.outer.multi_modal_projector,), merge
        self.config_layer = config.vision_feature_layer
        layers = self.tower.transformer.layers
        features = feature_layers(self.config_layer, len(layers))
        self.encoder = Encoder.of(layers, features, packed=True, by_rows=True, unit=merge**2, attention="attention")
        self.placeholders = {"image": config.image_token_id}

    def layouts(self, kind: str, arguments: dict[str, Any]) -> tuple[ImageLayout, ...]:
        pixels, sizes = arguments.get("pixel_values"), arguments.get("image_sizes")
        if pixels is None or sizes is None:
            raise ValueError(
                f"{self.model_type} needs pixel_values and image_sizes to encode; pass what its processor returns"
            )
        sizes = torch.as_tensor(sizes).tolist()
        edge = self.tower.config.patch_size * self.merge
        largest = [max(column) for column in zip(*sizes, strict=True)]
        if len(pixels) != len(sizes) or any(n > m for n, m in zip(largest, pixels.shape[-2:], strict=True)):
            raise ValueError(
                f"pixel_values of shape {list(pixels.shape)} do not hold the pictures of image_sizes {sizes}; pass "
                "both as one call of the processor returned them"
            )
        if any(n % edge for size in sizes for n in size):
            raise ValueError(f"image_sizes {sizes} are not whole numbers of {edge} pixels, of which a token is made")
        return tuple(rows_of(height // edge, width // edge) for height, width in sizes)

    def check_call(self, kwargs: dict[str, Any]) -> None:
        check_feature_layer(kwargs, self.config_layer)

    def visual_kinds(self, ids: Tensor | None, embeds: Tensor | None, among: Collection[str] = KINDS) -> Tensor:
        """The token between two rows of a picture counts as an image token. Its id is not in the config: it stands
        between two image tokens and differs from the token behind the prompt's last one, which ends a picture."""
        kinds = super().visual_kinds(ids, embeds, among)
        given = embeds if ids is None else ids
        assert given is not None
        last = kinds.shape[1] - 1
        behind = (last - kinds.flip(1).argmax(1) + 1).clamp(max=last)
        end = given[torch.arange(len(given), device=given.device), behind][:, None]
        ends = given == end if ids is not None else (given == end).all(-1)
        kinds[:, 1:-1] |= kinds[:, :-2] & kinds[:, 2:] & ~ends[:, 1:-1]
        return kinds


def rows_of(rows: int, columns: int) -> ImageLayout:
    """The layout of a picture with a separator token between its rows; the token that ends the picture is text."""
    if rows == 1:
        return ImageLayout(((1, 1, columns),))
    newline = torch.arange(1, rows * (columns + 1)) % (columns + 1) == 0
    row = torch.arange(rows).repeat_interleave(columns)
    return ImageLayout(((1, rows, columns),), None, newline, torch.where(row < rows - 1, row, -1))
