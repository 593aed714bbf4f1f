"""The size of a decoder layer, as stages get it for the account of bytes: LayerSize."""

from __future__ import annotations

from dataclasses import dataclass

from vtoken.stages.tokens import Parts


@dataclass(frozen=True)
class LayerSize:
    """One decoder layer of one row at one point of an answer, always a layer with attention.

    Attributes:
        layer: its index; attending: indices of all layers that attend, ascending.
        prompt: tokens of the row in that layer when its prompt was read; images: visual tokens among them, per image;
            parts: rasters of each image.
        generated: tokens since, the newest one among them, each by a step of its own.
        depth: number of decoder layers.
        kv_heads, head_dim: of the layer; number_bytes: bytes of a number at full width.
    """

    layer: int
    attending: tuple[int, ...]
    prompt: int
    images: tuple[int, ...]
    generated: int
    kv_heads: int
    head_dim: int
    number_bytes: int
    parts: tuple[Parts, ...] = ()
    depth: int = 0

    @property
    def place(self) -> tuple[int, int]:
        """How many layers with attention come before this one, and how many there are."""
        return self.attending.index(self.layer), len(self.attending)

    def full(self, slots: float) -> int:
        """Bytes of that many slots at full width, a key and a value in every head. If heads have different numbers of
        slots, `slots` is their mean."""
        return round(slots * 2 * self.kv_heads * self.head_dim * self.number_bytes)
