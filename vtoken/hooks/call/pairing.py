"""Which models can draft for which, and what a draft can know of its target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import transformers

from vtoken.errors import UnsupportedError
from vtoken.hooks.call.vocabularies import MOST, words
from vtoken.hooks.state.layer_kinds import SLIDING, kinds_of, windows_go_back
from vtoken.stages import Stage
from vtoken.stages.facts import of_target

if TYPE_CHECKING:
    from vtoken.adapters.base import Adapter


def check_target(stages: Sequence[Stage], target: Adapter | None) -> None:
    """Raises UnsupportedError at facts about a target where there is none, or where it lacks the layer."""
    for stage in stages:
        for need in stage.needs():
            if not of_target(need, stage.site):
                continue
            if target is None:
                raise UnsupportedError(
                    f"stage {stage.name} chooses the visual tokens of a draft by the attention of its target, and this "
                    "model drafts for none; give the pipeline to vtoken.draft(model, draft, pipeline)"
                )
            depth = len(target.lm.layers)
            if need.layer is not None and not -depth <= need.layer < depth:
                raise UnsupportedError(
                    f"stage {stage.name} needs {need.name} from layer {need.layer} of the target on; there are "
                    f"{depth}, 0 to {depth - 1} (or -1 for the last)"
                )


def check_states(adapter: Adapter) -> None:
    """Raises UnsupportedError at a model with layers that keep a state."""
    if states := len(adapter.lm.layers) - len(adapter.attending):
        raise UnsupportedError(
            f"{adapter.model_type} can neither draft nor be drafted for: {states} of its decoder layers keep a state, "
            "from which no token can be taken back (transformers refuses assisted generation)"
        )


def check_pair(target: Adapter, draft: Adapter) -> None:
    """Refuses a draft that cannot read the prompts of its target.

    Raises:
        UnsupportedError: names what differs.
    """
    for adapter in (target, draft):
        check_states(adapter)
    if SLIDING in kinds_of(draft.lm.config) and not windows_go_back():
        raise UnsupportedError(
            f"{draft.model_type} attends in sliding windows, and transformers {transformers.__version__} cannot have a "
            "model with windows draft several tokens in a row; use a newer one, or a draft without windows"
        )
    sizes = [words(adapter.model) for adapter in (target, draft)]
    if abs(sizes[0] - sizes[1]) > MOST:
        raise UnsupportedError(
            f"the draft has {sizes[1]} words and its target {sizes[0]}, more apart than padding explains; a draft must "
            "share its target's words: take a checkpoint of the same family, or the model itself (draft=None)"
        )
    if target.placeholders != draft.placeholders:
        raise UnsupportedError(
            f"placeholders of pictures differ: {draft.placeholders} of the draft ({draft.model_type}), "
            f"{target.placeholders} of its target ({target.model_type}); both must share a processor"
        )
