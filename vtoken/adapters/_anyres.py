"""What LLaVA-NeXT, NeXT-Video and OneVision share: crops, packed by the model's own `pack_image_features`."""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from vtoken.adapters._padded import Padded
from vtoken.hooks.state.run import FeatureCall, ImageLayout, tokens_of


class Anyres(Padded):
    """Crop 0 is the whole picture scaled down; the other crops are stitched, padding is cut off, and a newline token
    ends each row.

    Where each token ends up is found by packing its row and column as if they were features, so the model's packing
    code is not repeated here.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        # Sizes come again and again, so the last ones are worked out once.
        self._layout = lru_cache(maxsize=64)(self._laid_out)

    def layouts(self, kind: str, arguments: dict[str, Any]) -> tuple[ImageLayout, ...]:
        if arguments.get("image_sizes") is None:
            raise ValueError(
                f"{self.model_type} needs pixel_values and image_sizes to encode; pass what its processor returns"
            )
        crops = self.crops(arguments)
        check_pixels(arguments["pixel_values"], crops)
        options = tuple(self.pack_options(arguments).items())
        return tuple(
            self._layout(n, tuple(map(int, s)), options) for n, s in zip(crops, arguments["image_sizes"], strict=True)
        )

    def crops(self, arguments: dict[str, Any]) -> list[int]:
        """Crops per image, the whole included."""
        count = sys.modules[type(self.outer).__module__].image_size_to_num_patches
        config = self.outer.config
        pinpoints, size = config.image_grid_pinpoints, config.vision_config.image_size
        sizes, whole = arguments["image_sizes"], self.whole(arguments)
        return [1 if w else count(s, pinpoints, size) for s, w in zip(sizes, whole, strict=True)]

    def whole(self, arguments: dict[str, Any]) -> list[bool]:
        """Which images are one crop, whatever their size."""
        return [False] * len(arguments["image_sizes"])

    @abstractmethod
    def pack_options(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Further arguments of the model's `pack_image_features`."""

    def pack(self, call: FeatureCall, values: Tensor) -> Tensor:
        split = values.split(self.crops(call.arguments))
        images = self._pack(split, call.arguments["image_sizes"], self.pack_options(call.arguments))
        packed = torch.cat(images)
        return packed[tokens_of(call.layouts, packed.device)]

    def _pack(self, images: Sequence[Tensor], sizes: Any, options: dict[str, Any]) -> list[Tensor]:
        """[crops, patches, C] of each image -> one [length, C] per image, NaN at newlines."""
        newline = torch.full((images[0].shape[-1],), float("nan"), device=images[0].device)
        out, _ = self.outer.pack_image_features(images, sizes, image_newline=newline, **options)
        return out

    def _places(self, crops: int, size: Any) -> Tensor:
        """[crops, patches, 2]: row and column of every patch in the stitched crops; (-1, -1) in the scaled-down
        whole."""
        place = torch.full((crops, self.patches, 2), -1.0)
        if crops > 1:
            shape = sys.modules[type(self.outer).__module__].get_anyres_image_grid_shape
            config = self.outer.config
            _, columns = shape(size, config.image_grid_pinpoints, config.vision_config.image_size)
            crop, patch = torch.arange(crops - 1)[:, None], torch.arange(self.patches)
            place[1:, :, 0] = crop // columns * self.side + patch // self.side
            place[1:, :, 1] = crop % columns * self.side + patch % self.side
        return place

    def _laid_out(self, crops: int, size: tuple[int, ...], options: tuple[tuple[str, Any], ...]) -> ImageLayout:
        """The layout of an image of `size` (height, width) in `crops` crops."""
        (image,) = self._pack([self._places(crops, size)], torch.tensor([size]), dict(options))
        return self._read(image, crops)

    def _read(self, image: Tensor, crops: int) -> ImageLayout:
        """The layout that the packed places [length, 2] of one image give; they are NaN at newlines."""
        newline = image[:, 0].isnan()
        content = image[~newline]
        base = (1, self.side, self.side)
        if crops == 1:
            return ImageLayout((base,), None, newline, torch.zeros(len(content), dtype=torch.long))
        n = len(content) - self.patches
        if not n:  # A picture thinner than a patch is cut away with its padding, but for newlines.
            return ImageLayout((base,), None, newline, torch.full((self.patches,), -1))
        rows = int(newline.sum())
        stitched = content[self.patches :]
        width = int(stitched[:, 1].max() // self.side) + 1
        crop = 1 + stitched[:, 0] // self.side * width + stitched[:, 1] // self.side
        segment = torch.cat([torch.zeros(self.patches), crop]).long()
        line = torch.cat([torch.full((self.patches,), -1), torch.arange(rows).repeat_interleave(n // rows)])
        exact = bool((stitched == stitched.round()).all())
        return ImageLayout((base, (1, rows, n // rows)), segment, newline, line, interpolated=not exact)


def check_pixels(pixels: Any, crops: list[int]) -> None:
    """Refuses pixels that do not hold the crops that their sizes ask for.

    Raises:
        ValueError: processor and model choose different grids.
    """
    short = pixels.shape[1] < max(crops) if pixels.ndim == 5 else len(pixels) != sum(crops)
    if short:
        raise ValueError(
            f"pixel_values of shape {list(pixels.shape)} do not hold the {crops} crops that image_sizes and the "
            "model's image_grid_pinpoints ask for; give the processor the same pinpoints "
            "(vtoken.match_processor(processor, model))"
        )
