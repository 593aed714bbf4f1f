"""How often a prefill makes the host wait for the device. What the model itself asks is not counted."""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Any

import pytest
import tiny
import torch
from syncs import OnDevice, Recorder, on_device
from tiny import FAMILIES, VIDEO, build, make
from torch import Tensor
from usual import stage

import vtoken
from vtoken import registry
from vtoken.errors import UnsupportedError

ENTRY = ("asked", "prompt_images.py:counted")


def waits(family: str, pipeline: object, rows: list[list[Any]], acts: bool = True) -> list[tuple[str, str]]:
    """Of the second prefill: layouts that were worked out once are known. The kernels have tests of their own on a
    GPU."""
    model = make(family)
    batch = on_device(build(model, rows))
    with torch.inference_mode(), vtoken.wrapped(model, pipeline):
        model(**batch)
        with Recorder() as recorder:
            model(**batch)
        assert vtoken.trace(model).stages[0].stood_aside is None or not acts
    return sorted(where for where in recorder.found.elements() if not where[1].endswith((":definition", ":_on_host")))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fixed_budget_waits_so_often(family: str) -> None:
    """Once for the counts of the prompt with what is checked, and for what the call's own arguments say."""
    assert waits(family, "fastervlm:4", [[3, "img", 5]]) == sorted([ENTRY, *tiny.family(family).waits])


def test_ragged_batches_wait_no_oftener() -> None:
    found = waits("llava", "fastervlm:4", [[3, "img", 5], [2, "img", 1, "img", 4]])
    assert found == [ENTRY]


def test_a_cut_inside_the_decoder_waits_no_oftener() -> None:
    assert waits("llava", "fastv:4", [[3, "img", 5]]) == [ENTRY]


@pytest.mark.parametrize("name", ["flowcut", "tome"])
def test_a_cut_inside_the_tower_waits_no_oftener(name: str) -> None:
    """How many tokens of each image came out of it is known."""
    assert waits("llava", [stage(name)], [[3, "img", 5]]) == [ENTRY]


def test_a_threshold_waits_once_more() -> None:
    """For how many visual tokens each row holds, before the tower runs."""
    pipeline = {"min_visual_tokens": 1, "stages": [{"fastervlm": {"keep": 4}}]}
    assert waits("llava", pipeline, [[3, "img", 5]]) == sorted([ENTRY, ("asked", "min_tokens.py:look")])


@pytest.mark.parametrize("pipeline", ["divprune:4", "visionzip:6", "uniform:4", "random:4"])
def test_other_choices_wait_no_oftener(pipeline: str) -> None:
    assert waits("llava", pipeline, [[3, "img", 5]]) == [ENTRY]


# Stages that ask more than once, and how often: in a prefill of 4 layers, 2 rows and 3 pictures.
MORE = {
    "adakv": 9,  # in every row and layer, how much each head keeps
    "bilevel_kv": 3,  # in every row, for its frames
    "chunk_prefill": 3,
    "dcode": 2,  # that there are tokens in a frame; how many stay
    "dpn_routed": 3,  # at both routers
    "dyvte": 4,  # at every layer that asks
    "attention_exit": 2,
    "todre_exit": 2,
    "holov": 3,  # in every picture, what its chunks are worth
    "mminference": 9,  # in every row, where each modality lies
    "prunesid": 6,  # in every picture, which tokens resemble each other
    "sparsevlm": 4,  # in every picture, which words ask
    "vflowopt": 2,  # how many windows tokens attend in, of a tower that has such; how many queries count
    "vflowopt_late": 2,
    "var": 4,  # in every row and layer
    "zipvl": 9,
    "zipvl_cache": 17,
    "frames_changed": 2,  # how much frames differ; which stay, for the trace
    "hired": 9,  # in every picture, what its crops hold, and how much of its content they show
    "dtome_post": 3,  # what crops hold; how many tokens are alike
    "dtome": 4,  # in every layer that merges, how many are alike
}


# On the host, which the recorder cannot tell from the device; or what crops and newlines take, whatever the stage.
BESIDES = {
    "_matching.py:_taken",
    "features.py:<listcomp>",
    "features.py:repacked",
    "prefill_start.py:still_there",
    "prefill_state.py:leave",
}
THREE: list[list[Any]] = [[3, "img", 5], [2, "img", 1, "img", 4]]


@cache
def own_waits(family: str) -> Counter[tuple[str, str]]:
    """Of any pipeline on that family."""
    return Counter(waits(family, "uniform:4", THREE))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", [name for name in registry.stages() if name != "kvpress"])
def test_every_stage_waits_once_more_at_most(name: str, family: str) -> None:
    """For what depends on the values, and never for a copy or a mask."""
    try:
        found = waits(family, [stage(name)], THREE, acts=False)
    except UnsupportedError as error:
        pytest.skip(str(error))
    more = Counter(where for where in found if where[1] not in BESIDES) - own_waits(family)
    assert {kind for kind, _ in more} <= {"asked"}, more
    assert more.total() <= MORE.get(name, 1), more


VIDEOS = [name for name in registry.stages() if registry.stage(name).videos_only or name.startswith("frames_")]
# In a prefill of a video in each of 2 rows.
MORE_IN_VIDEOS = {
    "fastvid": 2,  # in every video, where segments begin
    "flashvid": 2,
    "frames_changed": 6,  # in every video, how much frames differ; then as the next
    "frames_farthest": 4,  # which stay, for the trace, and where a padded tower's crops are frames
    "frames_relevant": 4,
    "frames_uniform": 4,
    "holitom": 6,  # in every video, what stands still, and how much of it
    "prunevid": 6,
    "vidcom2": 4,  # in every video, its frames, and how unusual each is
}


@pytest.mark.parametrize("family", VIDEO)
@pytest.mark.parametrize("name", VIDEOS)
def test_stages_of_videos_wait_no_oftener(name: str, family: str) -> None:
    rows: list[list[Any]] = [[3, ("video", 4), 5], [2, ("video", 4), 4]]
    try:
        found = waits(family, [stage(name)], rows)
    except UnsupportedError as error:
        pytest.skip(str(error))
    more = Counter(where for where in found if where[1] not in BESIDES)
    more -= Counter(waits(family, "uniform:4", rows))
    assert {kind for kind, _ in more} <= {"asked"}, more
    assert more.total() <= MORE_IN_VIDEOS.get(name, 1), more


@pytest.mark.parametrize("name", ["anchorattention", "flexprefill", "xattention", "proxyattn", "static_sparse"])
def test_sparse_prefill_waits_no_oftener(name: str) -> None:
    """With options that make it choose among the tokens of the prompt, which none reads whole."""
    options = {
        "anchorattention": {"size": 16, "step": 1, "theta": 4.0, "dense_tail": False, "max_columns": 3},
        "flexprefill": {"size": 16, "min_budget": 1, "max_budget": 1},
        "proxyattn": {"size": 16, "min_budget": 1},
        "static_sparse": {"size": 16, "window": 1, "sink": 0, "gates": [[0.1, 0.9]] * 4},
        "xattention": {"size": 16, "threshold": 0.1, "stride": 4},
    }
    found = waits("llava", [{name: {"min_len": 0, **options[name]}}], [[40, "img", 5]])
    assert found == [ENTRY]


@pytest.mark.parametrize(
    ("pattern", "times"),
    [("a_shape", 0), ("vertical_slash_1024", 0), ("query_boundary", 4), ("2d_boundary", 8), ("grid_frame", 2)],
)
def test_patterns_ask_where_images_lie_once_for_all_layers(pattern: str, times: int) -> None:
    """Where each modality lies, and how far frames are apart."""
    found = waits("llava", [{"mminference": {"min_len": 0, "pattern": pattern}}], [[3, "img", 5]])
    assert len(found) == times + 1 and {where for where in found if "mminference" not in where[1]} == {ENTRY}


def test_chunks_ask_once_for_all_layers() -> None:
    """How many words are read one by one, and how many chunks there are."""
    options = {"min_len": 0, "frames": 1, "previous": 0}
    found = waits("llava", [{"chunk_prefill": options}], [[3, "img", 2, "img", 5]])
    assert found == sorted([ENTRY, ("asked", "chunk_prefill.py:_reads")])


def test_the_recorder_sees_every_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values asked for, masks of bools and blocking copies, of what lies on the device; the host's own tensors do not
    count."""
    import syncs

    monkeypatch.setattr(syncs, "PACKAGE", __file__)
    x, device = torch.arange(4).as_subclass(OnDevice), torch.device("cpu")
    with Recorder() as recorder:
        y = x + torch.tensor([1, 2, 3, 4])
        bool((y > 1).all())
        x[y[0]], x[: y.max()]
        y[y > 2].tolist()
        y[torch.tensor([0])] = 7
        torch.tensor([1], device=device)
        torch.tensor([1]).to(device)
        torch.tensor([1]).to(device, non_blocking=True)
        torch.tensor([1, 2]).tolist()
    counts = {
        kind: sum(n for (k, _), n in recorder.found.items() if k == kind) for kind in ("asked", "masked", "uploaded")
    }
    assert isinstance(y, Tensor) and counts == {"asked": 4, "masked": 1, "uploaded": 2}


@pytest.mark.gpu
def test_a_gpu_agrees() -> None:
    """torch's own account: a wrapped prefill waits at most as often more than a stock one as is counted above."""
    import warnings

    model = make("llava").to("cuda")
    batch = build(model, [[3, "img", 5]])

    def count() -> int:
        with torch.inference_mode(), warnings.catch_warnings(record=True) as found:
            model(**batch)
            torch.cuda.set_sync_debug_mode("warn")
            found.clear()
            try:
                warnings.simplefilter("always")
                model(**batch)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(warning.message) for warning in found)

    stock = count()
    with vtoken.wrapped(model, "fastervlm:4"):
        assert count() <= stock + 1
