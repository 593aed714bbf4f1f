"""One stage in a line of text: `fastervlm:64`, `random:25%,seed=3`."""

from __future__ import annotations

import re
from typing import Any

from vtoken import registry
from vtoken.config.yaml_source import parse
from vtoken.errors import ConfigError, shown

SHORT = re.compile(r"([^:,]+)(?::|,(?=\s*\w+=)|$)(.*)", re.DOTALL)


def parted(text: str) -> tuple[str, str] | None:
    """`NAME:KEEP,option=value` or `NAME,option=value` -> NAME and the rest; None if NAME is no stage."""
    match = SHORT.fullmatch(text)
    return (match[1], match[2]) if match is not None and match[1] in registry.stages() else None


def options_of(rest: str) -> dict[str, Any]:
    """`KEEP,option=value` -> options; values are YAML."""
    options: dict[str, Any] = {}
    for part in re.split(r",(?=\s*\w+=)", rest) if rest else []:
        match = re.fullmatch(r"\s*(\w+)=(.*)", part, re.DOTALL)
        key, value = match.groups() if match else ("keep", part)
        if key in options:
            raise ConfigError(f"option {key!r} is given twice; remove one")
        try:
            options[key], _ = parse(value)
        except ConfigError as error:
            raise ConfigError(
                f"{shown(value)} is not a value of {key!r} ({error}); write one as in YAML (64, 25%, [1, 2]), and "
                "every further option by name after a comma: NAME:64,option=value"
            ) from None
    return options


def bare(name: str, before: str, after: str) -> str:
    """The suggestion for a preset name at a budget that has no preset, such as `fastervlm-96`: the stage at that
    budget."""
    stage, _, keep = name.rpartition("-")
    takes = stage in registry.stages() and "keep" in registry.stage(stage).model_fields
    if not takes or not re.fullmatch(r"[1-9]\d*%?", keep) or name in registry.presets():
        return ""
    return f"{shown(f'{before}{stage}:{keep}{after}')} (the stage with its defaults)"
