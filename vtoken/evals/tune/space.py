"""The space of a search, and the pipelines that trials draw from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import Field, field_validator

from vtoken import config
from vtoken.config import Pipeline
from vtoken.config import yaml_source as source
from vtoken.errors import ConfigError
from vtoken.evals.shared.options import Options

KEYS = {"values", "low", "high", "step", "log"}


class Space(Options):
    """Alternatives by name, each a list of stages as in a pipeline file, with ranges in place of some options' values.

    A range is `{values: [a, b]}` or `{low: 1, high: 9}`, with `step: 2` or `log: true` if wanted; whole bounds give
    whole numbers.
    """

    alternatives: dict[str, list[Any]] = Field(
        description="name -> stages; options may be {values: [..]} or {low:, high:}"
    )
    positions: Any = Field("original", description="as in a pipeline file, or {values: [original, compact]}")
    newline: Any = Field("keep_if_row_has_token", description="as in a pipeline file, or a range")
    anyres: Any = Field("model", description="as in a pipeline file, or a range")
    min_visual_tokens: Any = Field(0, description="as in a pipeline file, or a range")

    @field_validator("alternatives")
    @classmethod
    def _some(cls, given: dict[str, list[Any]]) -> dict[str, list[Any]]:
        if not given:
            raise ValueError("name at least one list of stages")
        return given

    def check(self) -> list[Pipeline]:
        """Every alternative with all ranges at their first and at their last value, so that a wrong option is refused
        before a model is loaded."""
        found = []
        for name in self.alternatives:
            try:
                found.append(self.draw(name, lambda key, given: _ends(key, given)[0]))
                found.append(self.draw(name, lambda key, given: _ends(key, given)[-1]))
            except ConfigError as error:
                raise ConfigError(f"alternative {name!r}: {error}") from error
        return found

    def draw(self, name: str, choose: Callable[[str, dict[str, Any]], Any]) -> Pipeline:
        """The alternative with every range replaced by what `choose(key, range)` gives; keys are as
        "zip/0.visionzip.keep"."""
        policies = {key: getattr(self, key) for key in Space.model_fields if key != "alternatives"}
        places = {**policies, "stages": self.alternatives[name]}
        filled = _filled(places, name + "/", choose)
        return config.load(filled)

    def suggest(self, trial: Any) -> Pipeline:
        """An Optuna trial's draw."""
        names = list(self.alternatives)
        name = trial.suggest_categorical("alternative", names) if len(names) > 1 else names[0]
        return self.draw(name, lambda key, given: _suggest(trial, key, given))


def _filled(value: Any, at: str, choose: Callable[[str, dict[str, Any]], Any]) -> Any:
    if isinstance(value, dict) and value and set(value) <= KEYS:
        return choose(at.rstrip("."), value)
    if isinstance(value, dict):
        # What is plain to a reader stays out of the keys: stages are told apart by their place.
        return {key: _filled(each, at if key == "stages" else f"{at}{key}.", choose) for key, each in value.items()}
    if isinstance(value, list):
        return [_filled(each, f"{at}{k}.", choose) for k, each in enumerate(value)]
    return value


def _ends(key: str, given: dict[str, Any]) -> list[Any]:
    values = given.get("values")
    if isinstance(values, list) and values and set(given) == {"values"}:
        return values
    numbers: list[Any] = [given.get("low"), given.get("high"), given.get("step", 1)]
    plain = all(isinstance(v, int | float) and not isinstance(v, bool) for v in numbers)
    if plain and "values" not in given and isinstance(given.get("log", False), bool):
        low, high, step = numbers
        if low < high and step > 0 and not (given.get("log") and (low <= 0 or "step" in given)):
            return [low, high]
    raise ConfigError(
        f"{key}: a range is {{values: [a, b]}} or {{low: 1, high: 9}} with step or log (then low above 0, no step), "
        f"not {given}"
    )


def _suggest(trial: Any, key: str, given: dict[str, Any]) -> Any:
    ends = _ends(key, given)
    if "values" in given:
        # Optuna keeps texts and numbers only; a budget may be a mapping.
        texts = [source.dump(value, flow=True) for value in ends]
        return source.parse(trial.suggest_categorical(key, texts))[0]
    options = {name: given[name] for name in ("step", "log") if name in given}
    whole = all(isinstance(each, int) for each in (*ends, given.get("step", 1)))
    return (trial.suggest_int if whole else trial.suggest_float)(key, *ends, **options)
