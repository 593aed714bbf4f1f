"""Which stage runs on which family: every pair is wrapped, on a model without weights."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

import torch

from vtoken import config, registry
from vtoken.config import Pipeline
from vtoken.drafts import drafting
from vtoken.errors import ConfigError, OtherModelError, UnsupportedError
from vtoken.evals.shared.configs import builtin
from vtoken.hooks.state.encoder_fact import substituted
from vtoken.session import wrapped
from vtoken.stages import Stage
from vtoken.stages.budget import Budget
from vtoken.stages.facts import of_target

Answer = Literal["yes", "substitute", "no", "depends"]


@dataclass(frozen=True)
class Cell:
    """One stage on one family.

    Attributes:
        answer: "yes"; "substitute", another fact stands in for one the family lacks; "no"; or "depends", where the
            stage has options without a default, or weights or tables of another model, so that there is nothing to try.
        reason: why it is not "yes", one sentence; "" for "yes".
    """

    answer: Answer
    reason: str = ""

    def to_dict(self) -> dict[str, str | None]:
        """Plain data that `json.dumps` takes."""
        return {"answer": self.answer, "reason": self.reason or None}


@dataclass(frozen=True)
class SupportMatrix:
    """Answers by stage and family.

    Attributes:
        models: family -> the checkpoint whose config was tried; its model_type where transformers' default config was.
        cells: stage -> family -> cell.
    """

    models: dict[str, str]
    cells: dict[str, dict[str, Cell]]

    def note(self, stage: str, family: str) -> str:
        """The reason of a cell in words that fit other cells too; "" for "yes"."""
        reason = re.sub(rf"\b{re.escape(family)}\b", "the family", self.cells[stage][family].reason)
        reason = re.sub(rf"\b(stage )?{re.escape(stage)}\b", "the stage", reason)
        return re.sub("^the stage", "The stage", reason)

    def notes(self) -> list[str]:
        """Every note once, in reading order."""
        found = (self.note(stage, family) for stage, row in self.cells.items() for family in row)
        return list(dict.fromkeys(filter(None, found)))

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `json.dumps` takes."""
        cells = {stage: {f: cell.to_dict() for f, cell in row.items()} for stage, row in self.cells.items()}
        return {"models": self.models, "cells": cells}


def support_matrix(stages: list[type[Stage]], families: list[str] | None = None) -> SupportMatrix:
    """Tries every stage with default options on every family's first built-in config, on torch's meta device.

    Args:
        families: `model_type`s; None is every adapter.
    """
    known = {fields["model_type"]: name for name, fields in reversed(builtin().items())}
    families = registry.adapters() if families is None else families
    models = {family: known.get(family, family) for family in families}
    built = {family: _build(family, models[family]) for family in families}
    given = {family: registry.adapter(family)(model).substitutes for family, model in built.items()}
    cells = {
        cls.name: {family: cell(model, example_stage(cls), given[family]) for family, model in built.items()}
        for cls in stages
    }
    return SupportMatrix(models, cells)


def cell(model: Any, stage: Stage | None, substitutes: dict[str, str]) -> Cell:
    """Whether a stage runs on a model.

    Args:
        stage: None, where it has options without a default and no preset.
        substitutes: of the model's adapter.
    """
    if stage is None:
        return Cell("depends", "It depends on options that have no default.")
    try:
        attempt(model, config.load(stage))
    except OtherModelError:
        return Cell(
            "depends", "It needs weights or tables made for the model; those of its preset are for another one."
        )
    except UnsupportedError as error:
        reason = f"{str(error).rstrip('.')}."
        return Cell("no", reason if stage.name in reason else f"{stage.name}: {reason}")
    if facts := substituted(stage, substitutes):
        pairs = ", ".join(f"{given} stands in for {asked}" for asked, given in facts.items())
        return Cell("substitute", f"{pairs}, which the family does not have.")
    return Cell("yes")


def attempt(model: Any, pipeline: Pipeline) -> None:
    """Wraps and unwraps a model; with stages for drafts, makes the model its own draft.

    Raises:
        UnsupportedError: as in `wrap` and `draft`.
    """
    drafts = any(of_target(need, stage.site) for stage in pipeline.stages for need in stage.needs())
    with drafting(model, None, pipeline) if drafts else wrapped(model, pipeline):
        pass


def example_stage(cls: type[Stage]) -> Stage | None:
    """The stage with default options and 64 tokens, or as a preset has it; None if some other option has no default."""
    required = {name for name, field in cls.model_fields.items() if field.is_required()}
    if required <= {"keep"}:
        return cls(**{name: Budget(64) for name in required})
    pipelines = (config.load(name) for name in registry.presets())
    return next((stage for pipeline in pipelines for stage in pipeline.stages if type(stage) is cls), None)


def _build(family: str, name: str) -> Any:
    from transformers import AutoConfig

    try:
        return without_weights(AutoConfig.for_model(**builtin().get(name, {"model_type": family})))
    except ValueError as error:
        raise ConfigError(f"cannot build a {family} model to try stages on: {str(error).splitlines()[0]}") from error


def without_weights(config: Any) -> Any:
    """A model of this config on torch's meta device."""
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)
