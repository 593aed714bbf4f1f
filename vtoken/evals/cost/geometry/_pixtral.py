"""What families with a Pixtral tower share: pictures of their own size up to the tower's, in whole tokens.

Without a size an image is a square of the tower's own. All patches of a batch attend in one product that a mask cuts
into images; that is counted, which flash attention does not do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtoken.errors import UnsupportedError
from vtoken.evals.cost.geometry._padded import chosen_layers, pair, still
from vtoken.evals.cost.geometry.decoder import decoder
from vtoken.evals.cost.geometry.shapes import Draw, Geometry, Layers, Pictures, Projector, Tower


def raster(config: Any, pictures: Pictures, merge: int) -> tuple[int, int]:
    """Rows and columns of tokens, as the image processor rounds sizes."""
    vision = config.vision_config
    most, edge = max(pair(vision.image_size)), pair(vision.patch_size)[0] * merge
    size = pair(pictures.size or vision.image_size)
    shrink = max(1.0, max(size) / most)
    rows, columns = (-(-max(1, int(n / shrink)) // edge) for n in size)
    return rows, columns


def pixtral(config: Any, pictures: Pictures, merge: int, projector: int) -> Geometry:
    """The whole model; `merge` x `merge` patches become a token, `projector`: numbers in its matrices."""
    still(config, pictures.frames)
    vision, text = config.vision_config, config.text_config
    if vision.model_type != "pixtral":
        raise UnsupportedError(
            f"no FLOPs account for {config.model_type} with a vision tower of type {vision.model_type!r}; supported: "
            "pixtral"
        )
    width, depth, heads = vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads
    rows, columns = raster(config, pictures, merge)
    features = chosen_layers(config)
    return Geometry(
        tower=Tower(
            layers=Layers(
                depth,
                width,
                weights=4 * width**2 + 3 * width * vision.intermediate_size,
                heads=heads,
                kv_heads=heads,
                head_dim=width // heads,
                windows=(None,) * depth,
            ),
            crops=((1, rows, columns),),
            unit=merge**2,
            blocks=({rows * columns * merge**2: 1},) * depth,
            extra=0,
            stem=vision.num_channels * pair(vision.patch_size)[0] ** 2 * width,
            head_patch=0,
            head_image=0,
            feature_layers=features,
            attention_layer=max(features),
            packed=True,
        ),
        projectors=(Projector(projector, max(features)),),
        parts=((1, rows, columns),),
        sources=((1, 1),),
        newlines=(rows - 1, columns),
        decoder=decoder(text),
        vocabulary=text.vocab_size,
    )


def pixtral_inputs(config: Any, asked: Pictures, merge: int, draw: Draw) -> dict[str, Tensor]:
    """Pixels of all images [images, channels, height, width], and their sizes [images, 2]."""
    edge = pair(config.vision_config.patch_size)[0] * merge
    size = [n * edge for n in raster(config, asked, merge)]
    pixels = draw(asked.count, config.vision_config.num_channels, *size)
    return {"pixel_values": pixels, "image_sizes": torch.tensor([size] * asked.count)}
