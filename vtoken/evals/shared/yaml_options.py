"""YAML files that say what to do, read strictly: an error names file and line, what is wrong, and what is accepted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from vtoken.config import yaml_source as source
from vtoken.errors import ConfigError, shown, unknown


class YamlOptions(BaseModel):
    """Options without guessing: an unknown key or a number written as text is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


S = TypeVar("S", bound=YamlOptions)


def read(cls: type[S], path: Path) -> S:
    """The file as an instance.

    Raises:
        ConfigError: no such file, no YAML, or not what the fields accept.
    """
    data, where = source.read(path)
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: write keys and values ({', '.join(cls.model_fields)}), not {shown(data)}")
    try:
        # JSON mode takes lists for tuples and texts for paths, and is strict about the rest.
        return cls.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        first = min(problems, key=lambda problem: problem["type"] != "extra_forbidden")
        place = first["loc"]
        raise where.error(place, _message(cls, place, first)) from None


def _message(cls: type[BaseModel], place: tuple[Any, ...], problem: Any) -> str:
    if problem["type"] == "extra_forbidden":
        return unknown("key", place[-1], _fields(cls, place[:-1]))
    if problem["type"] == "missing":
        return f"key {place[-1]!r} is missing: {_fields(cls, place[:-1])[place[-1]].description}"
    message = problem["msg"].removeprefix("Value error, ")
    given = "" if problem["type"] == "value_error" else f", not {shown(problem['input'])}"
    return f"{'.'.join(map(str, place))}: {message}{given}" if place else message


def _fields(cls: type[BaseModel], place: tuple[Any, ...]) -> dict[str, Any]:
    """Fields of the model at a place below another."""
    for name in place:
        if name in cls.model_fields:
            annotation = cls.model_fields[name].annotation
            nested = [
                a for a in (annotation, *get_args(annotation)) if isinstance(a, type) and issubclass(a, BaseModel)
            ]
            cls = nested[0] if nested else cls
    return cls.model_fields
