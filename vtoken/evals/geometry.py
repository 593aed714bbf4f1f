"""What a config says about shapes: depths, widths and tokens that the account multiplies. One function per family."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vtoken.errors import UnsupportedError
from vtoken.stages import Grid

ImageSize = int | tuple[int, int]

# Decoders whose layer is four attention matrices and a gated MLP of three; norms on q and k cost nothing here.
DECODERS = ("llama", "mistral", "qwen2", "qwen3", "gemma")
TOWERS = ("clip_vision_model", "siglip_vision_model")


@dataclass(frozen=True)
class Layers:
    """A stack of equal transformer layers.

    Attributes:
        weights: numbers in the weight matrices of one layer; each costs 2 FLOPs per token.
        windows: sliding window of every layer in tokens, None where attention is full.
    """

    depth: int
    width: int
    weights: int
    heads: int
    kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...]

    def linear(self, tokens: int) -> int:
        """FLOPs of one layer's matrices."""
        return 2 * tokens * self.weights

    def scores(self, queries: int, keys: int) -> int:
        """FLOPs of one layer's q·k; the weighted sum of the values costs as much again."""
        return 2 * queries * keys * self.heads * self.head_dim


@dataclass(frozen=True)
class Tower:
    """The vision encoder.

    Attributes:
        grid: patches of one image.
        extra: tokens beside the patches (CLS).
        stem: numbers in the patch embedding, met by every patch.
        head_patch, head_image: numbers in the pooling head that every patch left, and every image, meets once.
        feature_layers: layers whose outputs the projector reads.
    """

    layers: Layers
    grid: Grid
    extra: int
    stem: int
    head_patch: int
    head_image: int
    feature_layers: tuple[int, ...]

    @property
    def patches(self) -> int:
        t, h, w = self.grid
        return t * h * w


@dataclass(frozen=True)
class Geometry:
    """A whole model, for one image.

    Attributes:
        projector: numbers in the projector's matrices, met by every visual token.
        tokens: visual tokens of one image at the language-model boundary.
        vocabulary: rows of the output embedding.
    """

    tower: Tower
    projector: int
    tokens: int
    decoder: Layers
    vocabulary: int


def geometry(config: Any, image_size: ImageSize | None, frames: int) -> Geometry:
    """The shapes of a model from its transformers config.

    Raises:
        UnsupportedError: a model family, tower or decoder whose arithmetic is not known here.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UnsupportedError(
            f"no FLOPs account for model_type {config.model_type!r}; supported: {', '.join(sorted(FAMILIES))}"
        )
    return family(config, image_size, frames)


def llava(config: Any, image_size: ImageSize | None, frames: int) -> Geometry:
    """LLaVA: every image is resized to the tower's own size, so `image_size` makes no difference."""
    if frames != 1:
        raise UnsupportedError(f"frames={frames}: llava takes no video; count every frame as one of `images`")
    features = config.vision_feature_layer
    features = [features] if isinstance(features, int) else features
    tower = vit(config.vision_config, features)
    # "default" cuts the first token off: CLS where there is one.
    tokens = tower.patches + tower.extra - (config.vision_feature_select_strategy == "default")
    text = config.text_config
    projector = (tower.layers.width * len(features) + text.hidden_size) * text.hidden_size
    return Geometry(tower, projector, tokens, decoder(text), text.vocab_size)


def vit(config: Any, features: Sequence[int]) -> Tower:
    """A CLIP or SigLIP tower; `features` are indices into its hidden states, the embeddings being number 0."""
    if config.model_type not in TOWERS:
        raise UnsupportedError(
            f"no FLOPs account for a vision tower of type {config.model_type!r}; supported: {', '.join(TOWERS)}"
        )
    width, mlp, depth = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    (image_h, image_w), (patch_h, patch_w) = _pair(config.image_size), _pair(config.patch_size)
    clip = config.model_type == "clip_vision_model"
    head = not clip and config.vision_use_head
    heads = config.num_attention_heads
    return Tower(
        layers=Layers(
            depth, width, 4 * width**2 + 2 * width * mlp, heads, heads, width // heads, windows=(None,) * depth
        ),
        grid=(1, image_h // patch_h, image_w // patch_w),
        extra=int(clip),
        stem=config.num_channels * patch_h * patch_w * width,
        # SigLIP's head attends from one query: keys and values of every patch, then query, output and MLP once.
        head_patch=head * (2 * width**2 + 2 * width),
        head_image=head * (2 * width**2 + 2 * width * mlp),
        feature_layers=tuple(h - 1 if h >= 0 else depth + h for h in features),
    )


def decoder(config: Any) -> Layers:
    """A Llama-like decoder: grouped-query attention and a gated MLP."""
    if config.model_type not in DECODERS:
        raise UnsupportedError(
            f"no FLOPs account for a decoder of type {config.model_type!r}; supported: {', '.join(DECODERS)}"
        )
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    width, depth = config.hidden_size, config.num_hidden_layers
    return Layers(
        depth,
        width,
        weights=2 * width * head_dim * (heads + kv_heads) + 3 * width * config.intermediate_size,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        windows=_windows(config),
    )


def _windows(config: Any) -> tuple[int | None, ...]:
    """The window of every layer, as transformers' DynamicCache reads it from the config."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


FAMILIES: dict[str, Callable[[Any, ImageSize | None, int], Geometry]] = {"llava": llava}
