"""Options from a YAML file, read strictly: an error names file and line, what is wrong, and what is accepted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from vtoken.config import yaml_source as source
from vtoken.errors import ConfigError, shown, unknown
from vtoken.evals.shared.options import Options, problem

Kind = TypeVar("Kind", bound=Options)


def read(cls: type[Kind], path: Path) -> Kind:
    """The file as options."""
    data, where = source.read(path)
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: write keys and values ({', '.join(cls.model_fields)}), not {shown(data)}")
    try:
        # JSON mode takes lists for tuples and texts for paths, and is strict about the rest.
        return cls.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        first = min(error.errors(include_url=False), key=lambda each: each["type"] != "extra_forbidden")
        raise where.error(first["loc"], _message(cls, first)) from None


def _message(cls: type[BaseModel], first: Any) -> str:
    *above, name = first["loc"] or ("",)
    if first["type"] not in ("extra_forbidden", "missing"):
        return problem(first)
    for key in above:
        if key in cls.model_fields:
            kinds = (cls.model_fields[key].annotation, *get_args(cls.model_fields[key].annotation))
            cls = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), cls)
    if first["type"] == "extra_forbidden":
        return unknown("key", name, cls.model_fields)
    return f"key {name!r} is missing: {cls.model_fields[name].description}"
