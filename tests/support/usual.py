"""Every stage with options that suit the tiny models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gates
import tiny
import token_modules

from vtoken import config, registry
from vtoken.stages import Stage, spec_of
from vtoken.stages.facts import of_target

OWN: dict[str, dict[str, Any]] = {
    # thresholds that everything exceeds: half of the tokens merge, half of the rest, ...
    "dtome": {"thresholds": (-1.0,) * 4, "left": (0.5, 0.25, 0.125, 0.125)},
    "dtome_post": {"thresholds": (-1.0,), "left": (0.5,)},
    # As dense attention as others are on short prompts; test_zipvl.py has the rest.
    # stands aside on short prompts, where it would not be as dense attention; test_composite.py has the rest
    "composite_attention": {"min_len": 4096},
    # of the two key heads one keeps a part in every layer
    "task_kv": {"beta": 0.0, "least": 0},
    "zipvl": {"tau": 1.0, "recent": 200},
    "streaming_cache": {"sink": 2, "recent": 4},
    "zipvl_cache": {"tau": 0.9, "recent": 2, "drawn": 4},
    "frames_relevant": {"relevance": (0.3, 0.1, 0.9, 0.2)},
    # everything is alike, so that one token stays, as expected
    "pixelprune": {"threshold": 1.0, "std": (0.01,), "left": 0.01},
    # only the first frame stays, as expected
    "frames_changed": {"similarity": -1.0, "left": 0.01},
    # one size and so a probability of 1: test_second_stages.py has maxima, the known answer probabilities
    "dpn_routed": {"routers": gates.routers(sizes=1), "sizes": (1,), "least": 4},
    "learned_compressor": token_modules.options(),
    # as dense attention; test_steering.py has the rest
    "amplify": {"gamma": 1.0},
    "var": {"tau": 1e9},
    # every share is above 0: as dense attention; test_seer.py has the rest
    "seerattention": {"gates": gates.seer(), "threshold": 0.0},
    # all of the cache is read, as by dense attention; test_choosing.py has the rest
    "quest": {"keep": "100%"},
    "tidal": {"keep": "100%"},
    "recycled": {"keep": "100%"},
    "dpn": {"at": (1, 3), "sizes": (2, 2), "least": 4},
}


def stage(name: str, seed: int | None = None, **options: Any) -> Stage:
    """The stage by name; what it has of the usual options is set (the tiny towers and decoders have 4 layers). `seed`
    draws gates of dyvte that let images go."""
    cls = registry.stage(name)
    usual = {"keep": 5, "local_layer": 1, "object_layer": 1, "r": 2, "table": (200, 100, 50), "min_len": 0}
    own = {key: value for key, value in {**usual, **options}.items() if key in cls.model_fields}
    if name == "dyvte":
        own["gates"] = gates.file(seed)
    return cls(**{**own, **OWN.get(name, {})})


def of_a_draft(name: str) -> bool:
    """Whether only a draft runs the stage, because it asks about the draft's target."""
    return registry.stage(name).site == "tokens" and any(of_target(need, "tokens") for need in stage(name).needs())


# What a model runs that drafts for none: test_drafts.py holds the others.
ALONE = [name for name in registry.stages() if not of_a_draft(name)]


def needs_attention(stage: Stage) -> set[int]:
    """Decoder layers (of four) that must have attention if the stage is to act on a model."""
    depth = 4
    if stage.unmerge_mode() or getattr(stage, "keeps_apart", False):
        return set(range(depth))
    layers: set[int] = set()
    for need in stage.needs() if stage.site == "decoder" else ():
        spec = spec_of(need.name, "decoder")
        if spec is not None and spec.read in ("decoder layer", "next layer", "blocks"):
            own = {k - (spec.read != "next layer") for k in stage.layers(depth)}
            layers |= own if need.layer is None else {need.layer % depth}
    return layers


def runs(family: str, stages: Sequence[Any]) -> bool:
    """Whether the decoder layers that these stages need attend."""
    states = set(tiny.family(family).states)
    return not any(needs_attention(stage) & states for stage in config.load(list(stages)).stages)


SPARSE = {"static_sparse": {"sink": 16, "window": 16, "size": 16, "min_len": 0}}
CACHE = {"snapkv": {"keep": 2, "window": 2}}
