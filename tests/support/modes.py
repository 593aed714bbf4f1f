"""What the tests of modes of use share: families with pipelines, and batches that are taken apart and put together
picture by picture."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import oracle
import pytest
import tiny
import torch
import transformers
from packaging.version import Version
from probes import Deep, Ragged
from torch import Tensor

import vtoken
from vtoken.errors import UnsupportedError

LOGITS: dict[str, Any] = {"return_dict_in_generate": True, "output_logits": True}
VERSION = Version(transformers.__version__)
ROWS: list[list[Any]] = [[3, "img", 5], [1, "img", 2, "img", 7], [4]]
VIDEOS: list[list[Any]] = [[2, "video", 3, "img", 1], [1, "img", 6], [3]]
STAGES: dict[str, dict[str, Any]] = {
    "tokens": {"stages": [{"fastervlm": {"keep": 5}}, Ragged()]},
    "compact": {"positions": "compact", "stages": [{"fastervlm": {"keep": 5}}, Ragged()]},
    "deep": {"stages": [Ragged(), Deep()]},
}
COMPACT = tiny.each("anyres", "window", mrope=False)  # positions with several axes cannot be renumbered
CASES = [(f, name) for f in tiny.FAMILIES for name in STAGES if name != "compact" or f in COMPACT]
every = pytest.mark.parametrize("family, pipeline", CASES, ids=lambda case: case)
families = pytest.mark.parametrize("family", tiny.FAMILIES)
# In all layers of the decoder, to all of the prompt.
attending = pytest.mark.parametrize("family", tiny.families(states=(), window=None))
# Where attention is thinned, spread or evicted, decoders whose layers see a window of the prompt are refused:
# tests/hooks/decoder/test_windows.py.
whole = pytest.mark.parametrize("family", tiny.families(window=None))
# The pictures of a batch: pixels, and what tells their size.
PER_CROP = ("pixel_values", "pixel_values_videos", "pixel_attention_mask", "spatial_shapes")
INPUTS = {
    "image": (
        "pixel_values",
        "pixel_values_images",
        "image_sizes",
        "image_grid_thw",
        "pixel_attention_mask",
        "spatial_shapes",
    ),
    "video": ("pixel_values_videos", "video_grid_thw", "second_per_grid_ts"),
}


def expands_several(family: str) -> bool:
    """Whether transformers itself keeps the images of a row that holds several, once beams or return sequences expand
    the batch; up to 5.17 it does for no family."""
    return Version("5.18") <= VERSION and tiny.family(family).expands_several


def expandable(family: str) -> list[list[Any]]:
    return ROWS if expands_several(family) else [[3, "img", 5], [1, "img", 7], [4]]


def mrope(model: Any) -> bool:
    """Whether positions have several axes."""
    return tiny.family(model).mrope


def greedy(model: Any, batch: dict[str, Tensor], n: int = 6, **options: Any) -> Any:
    return model.generate(**batch, max_new_tokens=n, do_sample=False, **options)


def masks(p: oracle.PrefillQK, stages: Sequence[Any]) -> tuple[Tensor, dict[int, Tensor]]:
    """What the traced stages leave to the decoder, and to its layers."""
    entry = [s for s in stages if s.site != "decoder"]
    return oracle.keep_mask(p, entry[-1].kept), {
        s.layer: oracle.keep_mask(p, s.kept) for s in stages if s.site == "decoder"
    }


def forced(model: Any, p: oracle.PrefillQK, stages: Sequence[Any], tokens: Tensor, compact: bool = False) -> Tensor:
    """[n, B, V] logits of the oracle while it is made to say `tokens` [B, n]."""
    keep, inner = masks(p, stages)
    return oracle.generate(model, p, keep, tokens.shape[1], compact, inner, start=tokens.tolist())[1]


def pictures(model: Any, batch: dict[str, Tensor]) -> list[tuple[int, str, dict[str, Tensor], bool]]:
    """(row, kind, its encoder inputs, whether OneVision encodes it as one crop) of each picture of a batch, in reading
    order."""
    held: dict[str, list[dict[str, Tensor]]] = {"image": [], "video": []}
    one, found = tiny.family(model), tiny.family(model).found(batch)
    for (kind, names), shown in zip(INPUTS.items(), found, strict=True):
        given = {name: batch[name] for name in names if name in batch}
        if not given:
            continue
        sizes = list(map(one.rows, shown))
        each = {name: x.split(sizes if name in PER_CROP else 1) for name, x in given.items()}
        held[kind] = [dict(zip(each, values, strict=True)) for values in zip(*each.values(), strict=True)]
    single = [n > 1 for n in batch.get("batch_num_images", torch.tensor([])).tolist() for _ in range(n)]
    queues = {kind: iter(each) for kind, each in held.items()}
    ones = iter(single or [False] * len(held["image"]))
    segments = tiny.segments(model, batch)
    return [(s.row, s.kind, next(queues[s.kind]), s.kind == "image" and next(ones)) for s in segments]


def join(found: Sequence[tuple[int, str, dict[str, Tensor], bool]]) -> dict[str, Tensor]:
    """The encoder inputs of these pictures."""
    out: dict[str, Tensor] = {}
    for kind in INPUTS:
        each = [inputs for _, k, inputs, _ in found if k == kind]
        for name in each[0] if each else ():
            values = [inputs[name] for inputs in each]
            crops = max(v.shape[1] if v.ndim == 5 else 0 for v in values)
            if crops and kind == "image":
                values = [torch.cat([v, v.new_zeros(1, crops - v.shape[1], *v.shape[2:])], 1) for v in values]
            out[name] = torch.cat(values)
    singles = [one for _, kind, _, one in found if kind == "image"]
    if any(singles):
        groups = [(one, len(list(g))) for one, g in groupby(singles)]
        out["batch_num_images"] = torch.tensor([m for one, n in groups for m in ([n] if one else [1] * n)])
    return out


def alone(model: Any, batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One row of a batch, without its padding."""
    real = batch["attention_mask"][row].bool()
    names = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
    one = {name: batch[name][row, real][None] for name in names if name in batch}
    return one | join([found for found in pictures(model, batch) if found[0] == row])


def skip_refused(model: Any, stages: Any) -> None:
    """Skips where decoders with windows or states refuse a stage; test_windows.py and test_states.py hold that they
    do."""
    one = tiny.family(model)
    if one.window is None and not one.states:
        return
    try:
        vtoken.unwrap(vtoken.wrap(model, stages))
    except UnsupportedError as error:
        pytest.skip(str(error))
