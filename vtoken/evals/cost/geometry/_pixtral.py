"""What families with a Pixtral tower share: pictures of their own size up to the tower's, in whole tokens.

Without a size an image is a square of the tower's own. All patches of a batch attend in one product that a mask cuts
into images; that is counted, which flash attention does not do.
"""

from __future__ import annotations

from dataclasses import replace
from math import isqrt
from typing import Any

from torch import Tensor

from vtoken.evals.cost.geometry.from_config import check_still, check_tower, image_sizes, model, pair, vision_tower
from vtoken.evals.cost.geometry.shapes import Draw, Geometry, Pictures


def pixtral(config: Any, pictures: Pictures, merge: int, projector: int) -> Geometry:
    """The whole model; `merge` x `merge` patches become a token, `projector`: numbers in its matrices."""
    check_still(config, pictures)
    check_tower(config, "pixtral")
    vision = config.vision_config
    # Rows and columns of tokens, as the image processor rounds sizes.
    most, edge = max(pair(vision.image_size)), pair(vision.patch_size)[0] * merge
    size = pair(pictures.size or vision.image_size)
    shrink = max(1.0, max(size) / most)
    rows, columns = (-(-max(1, int(n / shrink)) // edge) for n in size)
    mlp = 3 * vision.hidden_size * vision.intermediate_size
    encoder = replace(vision_tower(config, ((1, rows, columns),), merge**2, mlp=mlp), packed=True)
    return model(config, encoder, projector, newlines=(rows - 1, columns))


def inputs(config: Any, shape: Geometry, pictures: Pictures, draw: Draw) -> dict[str, Tensor]:
    """Pixels of all images [images, channels, height, width], and their sizes [images, 2]."""
    vision, (_, rows, columns) = config.vision_config, shape.parts[0]
    edge = pair(vision.patch_size)[0] * isqrt(shape.tower.unit)
    size = rows * edge, columns * edge
    return {
        "pixel_values": draw(pictures.count, vision.num_channels, *size),
        "image_sizes": image_sizes(size, pictures),
    }
