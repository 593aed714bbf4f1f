"""The `min_visual_tokens` of the presets, by a model of cost, and which have none: no time is measured here. `python benchmarks/break_even.py`

A decoder layer takes as long as its matrices are multiplied or, for few tokens, read; attention and the vision tower (a twentieth of the
decoder) are left out, which stages leave alone or make only cheaper. What a pipeline costs is taken as 2 ms of host work where tokens are
first dropped (measured, benchmarks/RESULTS.md) and as much again at every further cut, and in every layer of the tower in which a stage
acts: a cut there takes more operations (counted on a CPU, benchmarks/operations.py). Facts are part of those 2 ms. A preset gets the least number of visual tokens from which on it is not slower than the dense model.
"""

from __future__ import annotations

from fnmatch import fnmatch
from itertools import takewhile
from math import prod
from typing import NamedTuple

from vtoken import config, registry
from vtoken.stages import Parts, Stage, size_of

DEPTH, PARAMETERS = 28, 233e6  # of Qwen2.5-VL-7B's decoder, per layer
FLOPS, BYTES = 600e12, 4.8e12  # a second: an H200 in bfloat16, dense matrices; its memory
OVERHEAD = 2e-3  # seconds of every cut
TEXT = 40  # tokens of the prompt that are none of the image's
FRAMES, LARGEST, STEP = 4, 8192, 16
TOWERS = {"qwen": 32, "": 24}  # layers of a vision tower, by what the preset is called
EXITS = ("todre_exit",)  # whose plans count on nobody leaving: they are taken to leave, or they would cost no cut
FEW = ("var_filter",)  # whose plans keep everything, not knowing how few leave: a cut all the same


class Without(NamedTuple):
    """Presets that have no threshold.

    Attributes:
        names: patterns of their names, `but` those of this one.
        why: the reason.
        modelled: whether this model says from where on they pay.
    """

    names: tuple[str, ...]
    why: str
    modelled: bool = False
    but: str = ""


# They were published for LLaVA-1.5 alone: prompts of one, two, ... pictures of 576 tokens.
PICTURES = ("flowcut-64", "flowcut-128", "flowcut-192", "tome-*")
CROPS = "*-next-*"  # LLaVA-NeXT's pictures in 2 x 2 crops and the whole, wider than they are high
LLAVA = Without(
    (
        *(
            f"{name}-*"
            for name in ("cdpruner", "divprune", "fastervlm", "hired", "holov", "prumerge", "scope", "sparsevlm")
        ),
        *("visionzip-*", "vispruner-*", "vscan-*", "pyramiddrop-270"),
    ),
    "Renumbered positions go with LLaVAs only, and no picture of theirs holds fewer than 576 tokens.",
    modelled=True,
    but=CROPS,
)
SPARSE = Without(
    ("anchorattention-*", "flexprefill-*", "mminference-*", "proxyattn-*", "static_sparse-*", "xattention-*"),
    "They go by the length of the prompt, text included: `min_len`.",
)
CACHE = Without(
    ("lookm-*", "snapkv-*", "zipvl-9*"),
    "Stages of site cache cost time when the prefill ends, and save memory and reading while decoding: they are not claimed to make prefill "
    "faster. The attention of `zipvl` has its `min_len`.",
)
BITS = Without(
    ("zipvl-4-2-bits",),
    "Saves memory, not time: every decode step works the cache out anew (on a CPU 13 to 27 % slower per token, RESULTS).",
)
WITHOUT = (
    LLAVA,
    SPARSE,
    CACHE,
    BITS,
    Without(("dymu-*-tiny-llava", "dyvte-tiny-llava"), "Only for the reference model, which is no 7B."),
    Without(("none",), "The stock model."),
)


def seconds(tokens: list[int]) -> float:
    """Of a decoder whose layers see so many visual tokens."""
    return sum(max(2 * PARAMETERS * (n + TEXT) / FLOPS, 2 * PARAMETERS / BYTES) for n in tokens)


def layers(stages: tuple[Stage, ...], images: tuple[Parts, ...], tower: int) -> tuple[list[int], int]:
    """Visual tokens per layer of the decoder, as the stages plan, and how often they cut."""
    counts, row, cuts, out = tuple(sum(map(prod, parts)) for parts in images), (0,) * len(images), 0, []
    for stage in (s.bound(tower) for s in stages if s.site == "encoder"):
        for layer in stage.layers(tower):
            if layer < tower - 1:  # LLaVA reads the features before the last layer
                cuts, counts = cuts + 1, tuple(stage.plan(counts, images, row, layer))
    bound = [stage.bound(DEPTH) for stage in stages if stage.site != "encoder"]
    for layer in (None, *range(DEPTH)):
        for stage in bound:
            if (stage.site == "tokens") == (layer is None) and (layer is None or layer in stage.layers(DEPTH)):
                after = (0,) * len(images) if stage.name in EXITS else tuple(stage.plan(counts, images, row, layer))
                cuts, counts = cuts + (after != counts or stage.name in FEW), after
        if layer is not None:
            out.append(sum(counts))
    return out, cuts


def pays(stages: tuple[Stage, ...], images: tuple[Parts, ...], tower: int) -> bool:
    """Whether a pipeline takes less time than the dense model."""
    after, cuts = layers(stages, images, tower)
    return seconds(after) + OVERHEAD * cuts < seconds([sum(prod(grid) for parts in images for grid in parts)] * DEPTH)


def least(stages: tuple[Stage, ...], tower: int = TOWERS[""]) -> int | None:
    """The visual tokens from which on the pipeline pays, up to STEP, in a video of FRAMES square frames; None: it never does."""
    sides = range(int((LARGEST / FRAMES) ** 0.5), 1, -1)
    return smallest(stages, [((FRAMES, side, side),) for side in sides], tower)


def crops(stages: tuple[Stage, ...]) -> int | None:
    """The same in a picture of LLaVA-NeXT without its padding."""
    return smallest(stages, [((1, 24, 24), (1, rows, 48)) for rows in range(48, 0, -1)], TOWERS[""])


def smallest(stages: tuple[Stage, ...], shapes: list[Parts], tower: int) -> int | None:
    """Tokens of the last of these images, which get smaller, up to which the pipeline pays; None: not even on the first."""
    paying = list(takewhile(lambda parts: pays(stages, (parts,), tower), shapes))
    return -(-size_of(paying[-1]) // STEP) * STEP if paying else None


def pictures(stages: tuple[Stage, ...]) -> int | None:
    """The same in prompts of pictures of 576 tokens."""
    one = (((1, 24, 24),),)
    return next((n * 576 for n in range(1, 65) if pays(stages, one * n, TOWERS[""])), None)


def of(name: str) -> int | None:
    """`least`, `crops` or `pictures` of a preset."""
    stages = config.load(name).stages
    if fnmatch(name, CROPS):
        return crops(stages)
    if any(fnmatch(name, pattern) for pattern in PICTURES):
        return pictures(stages)
    return least(stages, next(n for part, n in TOWERS.items() if part in name))


def without(name: str) -> list[Without]:
    """The entries that excuse a preset: none, or one."""
    return [e for e in WITHOUT if any(fnmatch(name, pattern) for pattern in e.names) and not fnmatch(name, e.but)]


def presets() -> dict[str, int | None]:
    """What the presets that are not excused must carry."""
    return {name: of(name) for name in registry.presets() if not without(name)}


def paying(each: Without) -> str:
    """From how many tokens on the presets of an entry pay."""
    if not each.modelled:
        return "–"
    numbers = sorted({n for name in registry.presets() if each in without(name) and (n := of(name)) is not None})
    return f"{numbers[0]} to {numbers[-1]} tokens"


def named(each: Without) -> str:
    """Its presets."""
    return ", ".join(f"`{n}`" for n in each.names) + (f" (but not `{each.but}`)" if each.but else "")


def tables() -> str:
    """Both tables of docs/methods.md."""
    by_number: dict[int | None, list[str]] = {}
    for name, n in presets().items():
        by_number.setdefault(n, []).append(f"`{name}`")
    rows = [f"| {n} | {', '.join(by_number[n])} |" for n in sorted(by_number, key=lambda n: n or 0)]
    excused = [f"| {named(e)} | {paying(e)} | {e.why} |" for e in WITHOUT]
    head = ("| min_visual_tokens | presets |", "| --- | --- |")
    return "\n".join([*head, *rows, "", "| presets without | pay from | why |", "| --- | --- | --- |", *excused])


if __name__ == "__main__":
    print(tables())
