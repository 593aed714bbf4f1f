"""A stage that says that its counts are exact leaves `expected_counts`, whatever it is shown; the others do not."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import gates
import pytest
import tiny
import torch
from usual import stage

from vtoken import config, registry
from vtoken.errors import VtokenError
from vtoken.stages import Pruner, VisualTokens, spec_of

DEPTH, WIDTH = 4, tiny.TEXT["hidden_size"]
SITES = ("pixels", "frames", "encoder", "tokens", "decoder")
KEEPS = (
    1,
    3,
    7,
    "25%",
    "60%",
    {"total": 29},
    {"per_crop": 5},
    {"per_frame": 4},
    {"per_frame": 4, "key_weight": 3},
    999,
)
# Options with which what stays does, or does not, depend on the picture.
OWN = {
    "attention_exit": [{"first": 1, "threshold": 0.5}],
    "damro_filter": [{"outliers": 3, "each_segment": e, "high_norm": h} for e in (False, True) for h in (False, True)],
    "dpn": [{"at": (1, 3), "sizes": (2, 2), "least": 4}, {"at": (2,), "sizes": (3,), "least": 1}],
    "dpn_routed": [{"routers": gates.routers(loud=50.0), "sizes": (1, 2), "least": 4}],
    "dtome": [{"thresholds": (0.3,) * DEPTH, "left": (0.5, 0.25, 0.125, 0.125)}],
    "dtome_post": [{"thresholds": (0.3,), "left": (0.5,)}],
    "dycoke": [{"left": left, "as_released": released} for left in (0.1, 0.5) for released in (False, True)],
    "dyvte": [{"gates": gates.file(seed)} for seed in range(4)],
    "flashvid": [
        {"keep": keep, "as_released": released, "relevance": not released}
        for keep in (*KEEPS[:6], *KEEPS[7:9], 40)
        for released in (False, True)
    ],
    "flowcut": [{"keep": keep} for keep in (1, 3, 7, "25%", {"per_crop": 5})],
    "frames_changed": [{"similarity": 0.2, "left": 0.5}],
    "holitom": [{"keep": keep, "similarity": s} for keep in (5, "25%", {"per_frame": 4}) for s in (-1.0, 0.8)],
    "pixelprune": [{}, {"threshold": 0.5, "std": (0.1,), "left": 0.3}, {"max_kept": 0.5}],
    "pool": [{"size": size} for size in (1, 2, 3)],
    "prumerge": [{"keep": keep, "plus": plus} for keep in (None, 5, {"per_crop": 5}) for plus in (False, True)],
    "prunevid": [{"similarity": s, "left": left} for s in (-1.0, 0.8) for left in (0.2, 0.5)],
    "resize": [{"keep": keep} for keep in (1, 3, 7, "25%", "60%", 999)],
    "tome": [{"r": 3}, {"r": (5, 0, 2), "inflection": 0}, {"r": 4, "inflection": 0.5}],
    "todre_exit": [{"at": (1, 2), "threshold": 0.5}],
    "var_filter": [{"tau": 2.5}],
    "vflowopt": [{"keep": keep, "cell": 2.0, "exact": exact} for keep in (3, "25%") for exact in (False, True)],
    "vidcom2": [{"keep": keep, "temperature": 0.5, "exact": exact} for keep in (5, "25%") for exact in (False, True)],
}
DECIDING = [name for name in registry.stages() if registry.stage(name).site in SITES]
TALL = torch.tensor([0] * 16 + ([1] * 4 + [2] * 4) * 4 + ([3] * 4 + [4] * 4) * 4)  # 8 x 8 in crops of 4 x 4
CUT = torch.tensor([0] * 16 + [1, 1, 1, 1, 2, 2] * 4)  # the second crop is half padding
FRAMES = torch.arange(3).repeat_interleave(8)


def variants(name):
    """The stage with all budgets and options that its presets and the lists above name."""
    cls = registry.stage(name)
    found = [cls(**options) for options in OWN[name]] if name in OWN else [stage(name)]
    if name not in OWN and issubclass(cls, Pruner) and "keep" in cls.model_fields:
        for keep in KEEPS:
            try:
                found.append(stage(name, keep=keep))
            except ValueError:
                assert isinstance(keep, dict), "only budgets of a sample, a crop or a frame are refused"
    for preset in registry.presets():
        try:
            found += [s for s in config.load(preset).stages if s.name == name and s not in found]
        except VtokenError:
            continue  # one that needs a file
    return found


def pictures():
    """Whether whole, then lengths, rasters, segments and rows."""
    yield True, (16, 9, 1, 30), (((1, 4, 4),), ((1, 3, 3),), ((1, 1, 1),), ((1, 5, 6),)), None, (0, 1, 1, 2)
    yield True, (80, 24), (((1, 4, 4), (1, 8, 8)), ((3, 2, 4),)), torch.cat([TALL, FRAMES]), (0, 1)
    yield False, (40, 24), (((1, 4, 4), (1, 4, 6)), ((3, 2, 4),)), torch.cat([CUT, FRAMES]), (0, 0)


def packed(each, shape, seed, layer, alive):
    """Random tokens and facts of pictures, of which those `alive` [ΣN] are still there."""
    _, lengths, parts, segment, row = shape
    g = torch.Generator().manual_seed(seed + 100 * (layer or 0))
    total, facts = sum(lengths), {}
    for fact in each.needs():
        spec = spec_of(fact.name, each.site)
        # Heavy tails: some tokens stand far out, as in real towers.
        one = torch.rand(total, generator=g) ** 8 if spec.holds == "one" else torch.randn(total, WIDTH, generator=g)
        facts[fact] = one[alive] if spec.per == "token" else [torch.randn(6, WIDTH, generator=g) for _ in lengths]
    x = torch.randn(total, WIDTH, generator=g)
    if seed:  # a picture that shows little: few kinds of tokens
        x = x[torch.randint(0, 3, (total,), generator=g)] + 0.01 * x
    left = tuple(int(part.sum()) for part in alive.split(lengths))
    raster_index = torch.cat([torch.arange(n) for n in lengths])[alive]
    segment = None if segment is None else segment[alive]
    return VisualTokens.pack(x[alive], left, parts, row, raster_index, segment=segment, facts=facts, layer=layer)


def decisions(each):
    """What it leaves, what it was expected to leave, whether it called that exact, and where: over pictures (whole, and
    with half of their tokens), seeds, and layer after layer."""
    deep = each.site in ("encoder", "decoder")
    each = each.for_depth(DEPTH) if deep else each
    for shape, seed, share in product(pictures(), range(2), (1.0, 0.5)):
        alive = torch.rand(sum(shape[1]), generator=torch.Generator().manual_seed(seed)) < share
        alive[torch.tensor([0, *shape[1][:-1]]).cumsum(0)] = True
        memory = {}
        for layer in each.layers(DEPTH) if deep else (None,):
            tokens = replace(packed(each, shape, seed, layer, alive), memory=memory)
            want = each.expected_counts(tokens.lengths, tokens.parts, tokens.row, layer)
            exact = each.counts_are_exact(layer, shape[0] and share == 1)
            keep = each.select(tokens)
            yield keep.lengths, want, exact, (shape[1], seed, layer, share)
            alive = torch.zeros_like(alive).index_fill(0, alive.nonzero()[:, 0][keep.index], True)


def fits(each):
    """Whether it is not for larger models than these: presets are."""
    if each.incompatibility(DEPTH, WIDTH):
        return False
    try:
        return each.site not in ("encoder", "decoder") or max(each.layers(DEPTH), default=0) < DEPTH
    except ValueError:
        return False


@pytest.mark.parametrize("name", DECIDING)
def test_counts_that_are_called_exact_are(name):
    called, surprised = set(), 0
    for each in filter(fits, variants(name)):
        for left, want, exact, where in decisions(each):
            assert not exact or left == want, f"{each!r} at {where}"
            called.add(exact)
            surprised += left != want
    # A stage that never calls its counts exact would pass all of the above.
    assert called == {True} or surprised, f"{name} could call its counts exact"
