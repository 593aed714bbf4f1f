"""Facts of the vision tower by name: what they read, and who may ask for them."""

from __future__ import annotations

from collections.abc import Mapping

from vtoken.stages import Stage

# Which projections a fact reads.
PROJECTIONS: dict[str, tuple[str, ...]] = {
    "cls_attention": ("q_proj", "k_proj"),
    "received_attention": ("q_proj", "k_proj"),
    "keys": ("k_proj",),
    "values": ("v_proj",),
    "global_attention": ("q_proj", "k_proj"),
    "value_attention": ("v_proj",),
    "mean_value": ("v_proj",),
    "mean_key": ("k_proj",),
}
# What stages inside the decoder may ask of the encoder too; other names mean something of the decoder's there.
INSIDE_DECODER = ("received_attention", "pixels")
# These look at the whole image, also in a layer that attends within windows.
GLOBAL = ("global_attention", "value_attention")


def substituted(stage: Stage, substitutes: Mapping[str, str]) -> dict[str, str]:
    """Facts that the stage asks for and the family replaces -> what it gives."""
    return {need.name: substitutes[need.name] for need in stage.needs() if need.name in substitutes}
