"""What the vision encoder knows of the live tokens."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from vtoken.errors import UnsupportedError
from vtoken.hooks.state.context import Context
from vtoken.hooks.state.prefill_state import PrefillState
from vtoken.stages import Fact, Stage, offsets_of


def encoder_fact(context: Context, flow: PrefillState, stage: Stage, need: Fact) -> Tensor:
    """A fact [ΣK, ...] of the encoder about the live tokens, at any time of the prefill."""
    v, located, stored = flow.live, flow.spans, context.resolve(need)
    if not located.encodes or not all(stored in encode.facts for encode in located.encodes):
        raise UnsupportedError(
            f"stage {stage.name} needs {need.name}, but the features of this call were not encoded by this model in "
            "this thread; pass pixel_values instead of precomputed features"
        )
    full = located.gather([encode.facts[stored] for encode in located.encodes])
    if v.history.counts == v.history.full:
        return full.to(flow.hidden.device)
    live = offsets_of(v.history.full, v.image.device)[:-1][v.image] + v.history.raster_index
    return full[live.to(full.device)].to(flow.hidden.device)


def substituted(stage: Stage, substitutes: Mapping[str, str]) -> dict[str, str]:
    """Fact that the stage asks for -> fact that the family gives in its place; without those that it has."""
    return {need.name: substitutes[need.name] for need in stage.needs() if need.name in substitutes}
