"""Presets: a file per method in `vtoken/presets/`, a variant per name.

Under `variants:` a name holds a `summary` and what a pipeline file says; what is written beside `variants:` holds for
all of them, unless a variant says otherwise.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from vtoken import registry
from vtoken.config.yaml_source import Source, read
from vtoken.errors import shown

VARIANTS, SUMMARY = "variants", "summary"


def summary(name: str) -> str:
    """What a preset is, in a sentence or two."""
    text: str = _variants(registry.preset_file(name))[0][VARIANTS][name][SUMMARY]
    return text


def recipe(name: str) -> tuple[dict[str, Any], Source]:
    """What a preset says, as a pipeline file would, and the lines where it says so.

    Raises:
        ConfigError: its file is not of the form above; with file and line.
    """
    data, source = _variants(registry.preset_file(name))
    recipe = {key: value for key, value in {**data, **data[VARIANTS][name]}.items() if key not in (VARIANTS, SUMMARY)}
    own = {path[2:]: line for path, line in source.lines.items() if path[:2] == (VARIANTS, name)}
    return recipe, Source(source.file, {**source.lines, **own})


@lru_cache(maxsize=64)
def _variants(file: Path) -> tuple[dict[str, Any], Source]:
    """A method's file, checked but for the pipelines in it."""
    data, source = read(file)
    if not isinstance(data, dict) or not isinstance(data.get(VARIANTS), dict):
        raise source.error((VARIANTS,), f"{VARIANTS} must be a mapping of names, as in {file.stem}-64, to pipelines")
    for name, variant in data[VARIANTS].items():
        path = (VARIANTS, name)
        if name.partition("-")[0] != file.stem:
            raise source.error(path, f"the name {shown(name)} must begin with that of its file, {file.stem}")
        if not isinstance(variant, dict) or not isinstance(variant.get(SUMMARY), str):
            raise source.error(path, f"{name} must be a mapping with a {SUMMARY} and stages, not {shown(variant)}")
    return data, source
