"""What a pipeline file says under `contrast:`."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Any

from vtoken.config.policies import CONTRAST, DRAFT
from vtoken.errors import ConfigError, shown

if TYPE_CHECKING:
    from vtoken.config.pipeline import Pipeline


@dataclass(frozen=True)
class Contrast:
    """Answers come from the logits (1 + alpha) l - alpha l', where l' are the logits of the same model under
    `pipeline`; words with l below ln beta + max l are excluded. With alpha 0 nothing changes."""

    pipeline: Pipeline
    alpha: float = 1.0
    beta: float = 0.1

    def __post_init__(self) -> None:
        from vtoken.config.pipeline import Pipeline

        if not isinstance(self.pipeline, Pipeline):
            raise ConfigError(
                f"{CONTRAST} takes a pipeline, as vtoken.config.load makes it, not {shown(self.pipeline)}"
            )
        if self.pipeline.draft is not None or self.pipeline.contrast is not None:
            raise ConfigError(f"the pipeline of {CONTRAST} can have neither {DRAFT} nor {CONTRAST} itself")
        check_number("alpha", self.alpha, inf)
        check_number("beta", self.beta, 1)


def check_number(name: str, value: Any, most: float) -> None:
    """Checks that an option of the contrast is a number from 0 to `most`.

    Raises:
        ConfigError: it is not; names it.
    """
    if type(value) not in (int, float) or not 0 <= value <= most or value == inf:
        raise ConfigError(
            f"{CONTRAST}: {name} must be a number >= 0{'' if most == inf else f' and <= {most:g}'}, not {shown(value)}"
        )


def check_beside(pipeline: Pipeline) -> None:
    """Refuses a draft with a draft or a contrast, and other crops than the pipeline's.

    Raises:
        ConfigError: the draft has a contrast, or one of the two asks for other crops than the pipeline.
    """
    if pipeline.draft is not None and pipeline.draft.draft is not None:
        raise ConfigError(f"{DRAFT} must be a pipeline that has no {DRAFT} itself; leave the inner one out")
    if pipeline.draft is not None and pipeline.draft.contrast is not None:
        raise ConfigError(f"{DRAFT} must be a pipeline that has no {CONTRAST}: answers are the target's")
    against = None if pipeline.contrast is None else pipeline.contrast.pipeline
    for key, other in ((DRAFT, pipeline.draft), (CONTRAST, against)):
        if other is not None and other.anyres not in ("model", pipeline.anyres):
            raise ConfigError(f"{key} is given the crops of the pipeline: write anyres: {other.anyres} beside {key}")
