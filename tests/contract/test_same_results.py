"""What users call stays what it was: stages, options, presets, the schema, and what every preset does with a fixed
batch.

`golden/results.json` was made before the rooms were rebuilt; `PYTHONPATH=tests/support python
tests/contract/test_same_results.py` writes it anew, which a change of results needs and a change of places does not.
What is added later need not be in it.
"""

from __future__ import annotations

import json
import sys
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import vtoken
from vtoken import config, registry
from vtoken.commands.list import describe, presets
from vtoken.config.schema import schema
from vtoken.errors import UnsupportedError
from vtoken.session import watched

FILE = Path(__file__).parent / "golden" / "results.json"
PROSE = ("summary", "paper")
BATCH = [[3, "img", 5], [4, "img", 2, "img", 3]]


def without_prose(value: Any) -> Any:
    """Sentences may be rewritten."""
    if isinstance(value, dict):
        return {key: without_prose(each) for key, each in value.items() if key not in ("description", "title")}
    return [without_prose(each) for each in value] if isinstance(value, list) else value


def digest(value: Any) -> str:
    return sha256(json.dumps(value).encode()).hexdigest()[:16]


def told(entry: Any) -> list[Any]:
    """Name, site, tokens in and out, and a digest of which tokens they are."""
    kept = [each.tolist() for each in entry.kept or ()]
    into = None if entry.into is None else [each.tolist() for each in entry.into]
    return [entry.name, entry.site, entry.tokens_in, entry.tokens_out, digest([kept, into]), entry.stood_aside]


@cache
def model(family: str) -> Any:
    return tiny.make(family)


def ran(preset: str, family: str) -> Any:
    """The trace of a preset on a tiny model, or that it was refused."""
    try:
        with watched(model(family), preset), torch.no_grad():
            model(family).generate(**tiny.build(model(family), BATCH), max_new_tokens=3, min_new_tokens=3)
            trace = vtoken.trace(model(family))
    except UnsupportedError:
        return "refused"
    return {"stages": [told(entry) for entry in trace.stages], "layers": trace.layers, "bytes": trace.cache_bytes}


def described() -> list[dict[str, Any]]:
    return [describe(cls) for cls in registry.catalogue()[0].values()]


def surface() -> dict[str, Any]:
    return {
        "stages": {row["stage"]: {k: v for k, v in row.items() if k not in PROSE} for row in described()},
        "presets": {row["preset"]: {k: v for k, v in row.items() if k not in PROSE} for row in presets()},
        "schema": without_prose(schema()),
    }


@cache
def golden() -> dict[str, Any]:
    return json.loads(FILE.read_text(encoding="utf-8"))


def contains(now: Any, then: Any, where: str = "") -> None:
    """All that was there is there, and is the same."""
    if isinstance(then, dict):
        for key, each in then.items():
            assert key in now, f"{where}/{key} is gone"
            contains(now[key], each, f"{where}/{key}")
    elif isinstance(then, list) and any(isinstance(each, dict) for each in then) and len(now) == len(then):
        for i, (there, each) in enumerate(zip(now, then, strict=True)):
            contains(there, each, f"{where}/{i}")
    elif isinstance(then, list) and all(isinstance(each, (str, dict)) for each in then):
        for each in then:
            assert each in now, f"{where}: {each} is gone"
    else:
        assert now == then, where


@pytest.mark.parametrize("what", ["stages", "presets", "schema"])
def test_surface(what: str) -> None:
    contains(json.loads(json.dumps(surface()[what])), golden()[what], what)


@pytest.mark.parametrize("preset", golden()["traces"] if FILE.exists() else [])
def test_presets_do_the_same(preset: str) -> None:
    for family, then in golden()["traces"][preset].items():
        assert json.loads(json.dumps(ran(preset, family))) == then, family


def main() -> None:
    """One preset per list of stages runs on every family, its variants on the first and the last."""
    traces: dict[str, Any] = {}
    seen: set[Any] = set()
    families = list(tiny.FAMILIES)
    for name in registry.presets():
        kind = tuple(stage.name for stage in config.load(name).stages)
        on = families if kind not in seen else [families[0], families[-1]]
        seen.add(kind)
        traces[name] = {family: ran(name, family) for family in on}
    FILE.write_text(json.dumps({**surface(), "traces": traces}, indent=None, separators=(",", ":")), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
