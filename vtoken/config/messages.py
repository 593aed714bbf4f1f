"""Error messages about the options of a stage: what is wrong, and what may be written instead."""

from __future__ import annotations

import json
from typing import Any, get_args

from pydantic import ValidationError

from vtoken.errors import shown, unknown
from vtoken.stages import Stage
from vtoken.stages.budget import Budget

WORDS = {
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "string": "text",
    "array": "a list",
    "object": "a mapping",
}
BUDGETS: dict[str, int | str | dict[str, int]] = {
    "a count per image (64)": 64,
    "a share (25%)": "25%",
    "a count per sample ({total: 640})": {"total": 640},
    "per frame ({per_frame: 32})": {"per_frame": 32},
    "per crop ({per_crop: 64})": {"per_crop": 64},
}


def explain(cls: type[Stage], error: ValidationError) -> tuple[str, str]:
    """The option at fault and what to write instead. Misspelled options come first, because they explain missing
    ones."""
    problems = error.errors(include_url=False)
    first = min(problems, key=lambda p: p["type"] != "extra_forbidden")
    option = str(first["loc"][0]) if first["loc"] else ""
    if first["type"] == "extra_forbidden":
        return option, unknown("option", option, cls.model_fields)
    if option not in cls.model_fields:
        return option, first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return option, f"option {option!r} is missing: write {accepts(cls, option)}"
    # Where several types are accepted, pydantic adds the type it tried to the location.
    place = f"option {'.'.join(str(part) for part in first['loc'] if '[' not in str(part))!r}"
    if first["type"] == "value_error":  # A validator's own message; that of a budget already lists what is accepted.
        message = first["msg"].removeprefix("Value error, ").removeprefix("keep: ").partition("; write a count")[0]
    else:
        message = f"{first['msg']}, not {shown(first['input'])}"
    if "; take " in message or accepts(cls, option) == "text":
        return option, f"{place}: {message}"
    return option, f"{place}: {message}; accepted: {accepts(cls, option)}"


def accepts(cls: type[Stage], option: str) -> str:
    """What may be written for an option, in words."""
    annotation = cls.model_fields[option].annotation
    if annotation is Budget or Budget in get_args(annotation):
        *most, last = [words for words, value in BUDGETS.items() if takes(cls, option, value)] or BUDGETS
        return f"{', '.join(most)} or {last}" if most else last
    return _in_words(cls.model_json_schema()["properties"][option])


def takes(cls: type[Stage], option: str, value: Any) -> bool:
    """Whether the option may have this value beside the defaults of the others; what is missing does not count."""
    try:
        cls.model_validate({option: value})
    except ValidationError as error:
        return all(problem["loc"][:1] not in ((), (option,)) for problem in error.errors(include_url=False))
    return True


def _in_words(node: dict[str, Any]) -> str:
    if "anyOf" in node:
        return " or ".join(_in_words(each) for each in node["anyOf"])
    if "enum" in node or "const" in node:
        return " or ".join(json.dumps(value) for value in node.get("enum", [node.get("const")]))
    words = WORDS.get(node.get("type", "object"), "null")
    if isinstance(node.get("items"), dict):
        words += f" of {_in_words(node['items'])}"
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {node[key]}" for key, sign in signs.items() if key in node]
    return " ".join([words, " and ".join(bounds)]).strip()
