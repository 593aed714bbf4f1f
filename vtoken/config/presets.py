"""Presets: one file per method in `vtoken/presets/`, with named variants.

Under `variants:` each name holds a `summary` and the keys of a pipeline file. Keys beside `variants:` apply to all
variants that do not override them.
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
    """The contents of a preset, as in a pipeline file, and the line of each key.

    Raises:
        ConfigError: its file does not have the form above; gives file and line.
    """
    data, source = _variants(registry.preset_file(name))
    recipe = {key: value for key, value in {**data, **data[VARIANTS][name]}.items() if key not in (VARIANTS, SUMMARY)}
    return recipe, Source(source.file, {**source.lines, **source.under(VARIANTS, name).lines})


@lru_cache(maxsize=64)
def _variants(file: Path) -> tuple[dict[str, Any], Source]:
    """The preset file of a method, checked except for the pipelines in it."""
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
