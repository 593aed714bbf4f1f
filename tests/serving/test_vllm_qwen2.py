"""Qwen2-VL in vLLM against transformers with `vtoken.wrap`, with random weights: as test_vllm_qwen."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("vllm")

import qwen_checkpoints
from served_qwen import FRAMES, Asked, Served, Wrapped, assert_same, kept_columns

pytestmark = pytest.mark.vllm
PIPELINES = [None, "uniform:5", "fastervlm:4", "visionzip:40%", "divprune:3", "evs:50%"]
SIZES = [(56, 56), (112, 112), (84, 140), (56, 168)]
ASKS = pytest.mark.parametrize("asks", [True, False], ids=["asks for positions", "does not"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return qwen_checkpoints.save("qwen2_vl", tmp_path_factory.mktemp("qwen2_vl"))


@pytest.fixture(scope="module")
def wrapped(folder):
    return Wrapped(folder)


@pytest.fixture(scope="module")
def served(folder):
    engine = Served(folder, "uniform:5", metadata=False)
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
@pytest.mark.parametrize("videos", [False, True], ids=["pictures", "videos"])
@pytest.mark.parametrize("pipeline", PIPELINES, ids=str)
def test_prompts(served, wrapped, pipeline, videos, asks):
    served.swap(pipeline, asks)
    assert_same(served, wrapped, prompts(wrapped, videos), pipeline)


@ASKS
def test_positions(served, wrapped, asks):
    served.swap("fastervlm:4", asks)
    for asked in [*prompts(wrapped, False)[:3], *prompts(wrapped, True)[:2]]:
        columns = kept_columns(wrapped.media(asked), wrapped.told(asked, "fastervlm:4").kept)
        assert torch.equal(served.positions(asked), wrapped.positions(asked)[:, columns])
