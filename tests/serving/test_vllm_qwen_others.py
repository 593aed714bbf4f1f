"""Qwen2-VL and Qwen3-VL, of random weights, in vLLM against transformers with `vtoken.wrap`: as test_vllm_qwen."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("vllm")

import qwen_checkpoints
import tiny
from served_qwen import FRAMES, Asked, Served, Wrapped, assert_positions, assert_same

from vtoken.errors import UnsupportedError

pytestmark = pytest.mark.vllm
PER_FRAME = {"stages": [{"fastervlm": {"keep": {"per_frame": 3}}}]}
MERGED_PER_FRAME = {"stages": [{"visionzip": {"keep": {"per_frame": 4}}}]}
BY_FRAMES = (None, PER_FRAME, MERGED_PER_FRAME)
OTHERS = ("uniform:5", "fastervlm:4", "visionzip:40%", "divprune:3", "evs:50%")
FAMILIES = tiny.families(mrope=True, full_attention=None, served=True)
TIMESTAMPS = [family for family in FAMILIES if tiny.family(family).deepstack]  # between the frames of a video
PLAIN = [family for family in FAMILIES if family not in TIMESTAMPS]
SIZES = [(56, 56), (112, 112), (84, 140), (56, 168)]
ASKS = pytest.mark.parametrize("asks", [True, False], ids=["asks for positions", "does not"])


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    return qwen_checkpoints.save(family, tmp_path_factory.mktemp(family))


@pytest.fixture(scope="module")
def wrapped(folder):
    return Wrapped(folder)


@pytest.fixture(scope="module")
def served(family, folder):
    engine = Served(folder, PER_FRAME, metadata=family in TIMESTAMPS)
    yield engine
    engine.close()


def words(random, number):
    return " ".join(f"w{k}" for k in random.integers(10, 180, number))


def prompts(wrapped, videos):
    """Of one to three pictures of several sizes with text between, or a video and perhaps a picture."""
    random = np.random.default_rng(0)
    out = []
    for i in range(8):
        sizes = [SIZES[(i + k) % len(SIZES)] for k in range(i % 2 if videos else 1 + i % 3)]
        pictures = [Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]
        content = [part for _ in pictures for part in ("image", words(random, 3))]
        video = random.integers(0, 256, (FRAMES, *SIZES[i % 2 + 1], 3), dtype=np.uint8) if videos else None
        content += ["video", words(random, 4)] if videos else []
        out.append(Asked(wrapped.prompt(*content), pictures, video))
    return out


@ASKS
@pytest.mark.parametrize("pipeline", [*OTHERS, *BY_FRAMES], ids=str)
def test_pictures(served, wrapped, pipeline, asks):
    served.swap(pipeline, asks)
    assert_same(served, wrapped, prompts(wrapped, False), pipeline)


@ASKS
@pytest.mark.parametrize("pipeline", BY_FRAMES, ids=str)
def test_videos(served, wrapped, pipeline, asks):
    served.swap(pipeline, asks)
    assert_same(served, wrapped, prompts(wrapped, True), pipeline)


@ASKS
@pytest.mark.parametrize("pipeline", OTHERS)
@pytest.mark.parametrize("family", PLAIN, indirect=True)
def test_videos_whose_frames_stand_together(served, wrapped, pipeline, asks):
    served.swap(pipeline, asks)
    assert_same(served, wrapped, prompts(wrapped, True), pipeline)


@ASKS
def test_positions(served, wrapped, asks):
    served.swap(PER_FRAME, asks)
    for asked in [*prompts(wrapped, False)[:3], *prompts(wrapped, True)[:2]]:
        assert_positions(served, wrapped, asked, PER_FRAME)


@pytest.mark.parametrize("family", TIMESTAMPS, indirect=True)
def test_frames_that_keep_other_numbers_are_refused(folder, monkeypatch):
    from vllm import LLM

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    with pytest.raises(UnsupportedError, match=r"per_frame: 32.*\"video\": 0"):
        LLM(str(folder), dtype="float32", enforce_eager=True, max_model_len=1024, hf_overrides={"vtoken": "uniform:5"})


@pytest.mark.parametrize("family", PLAIN, indirect=True)
def test_pruning_that_vllm_has_not_is_refused_still(folder, monkeypatch):
    from vllm import LLM

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    with pytest.raises(UnsupportedError, match="does not prune videos"):
        LLM(str(folder), dtype="float32", enforce_eager=True, max_model_len=1024, video_pruning_rate=0.5)
