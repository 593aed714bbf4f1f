"""The keys of a pipeline file, and the values that each accepts."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Literal, get_args

from vtoken.config.yaml_source import Source
from vtoken.errors import ConfigError, either, shown
from vtoken.stages import SITES, Stage

Positions = Literal["original", "compact"]
Newline = Literal["keep_if_row_has_token", "keep", "drop"]
Anyres = Literal["model", "2x2"]
# Key -> its values, the default first, and their meaning.
POLICIES: dict[str, tuple[tuple[str, ...], str]] = {
    "positions": (
        get_args(Positions),
        "original: tokens keep their position ids; compact: ids are renumbered without gaps (not with M-RoPE)",
    ),
    "newline": (
        get_args(Newline),
        "the newline token after each row of a LLaVA-NeXT or OneVision image: it stays if a token of its row stays, "
        "always, or never",
    ),
    "anyres": (
        get_args(Anyres),
        "LLaVA-NeXT: crops as the model chooses, or always 2 x 2 (as in published tables of 640, 320 and 160 tokens); "
        "pass the processor through vtoken.match_processor",
    ),
}
LEAST = "min_visual_tokens"
PRESET = "preset"
DRAFT = "draft"
CONTRAST = "contrast"
POLICY_KEYS = (*POLICIES, LEAST)
KEYS = (PRESET, *POLICY_KEYS, DRAFT, CONTRAST, "stages")


def check(given: Mapping[str, Any], source: Source) -> None:
    """Checks policies and stages one by one, and the order of the stages."""
    for key, (values, _) in POLICIES.items():
        if type(given[key]) is not str or given[key] not in values:
            raise source.error((key,), f"{key} must be {either(values)}, not {shown(given[key])}")
    least = given[LEAST]
    if type(least) is not int or not 0 <= least < 2**63:
        raise source.error((LEAST,), f"{LEAST} must be a whole number >= 0, not {shown(least)}")
    for stage in given["stages"]:
        if not isinstance(stage, Stage):
            raise ConfigError(f"{shown(stage)} is no Stage; vtoken.config.load reads a list of names and options")
    for i, (before, after) in enumerate(pairwise(given["stages"]), start=1):
        if not {before.site, after.site} <= set(SITES):
            continue  # `wrap` refuses unknown sites
        if SITES.index(after.site) < SITES.index(before.site):
            raise source.error(
                ("stages", i),
                f"stage {after.name!r} acts at site {after.site} but comes after {before.name!r}, which acts at "
                f"{before.site}; order the stages by site: {', '.join(SITES)}",
            )
