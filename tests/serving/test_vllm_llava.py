"""LLaVA-1.5 in vLLM against transformers with vtoken: the same tokens are kept, the same answers given."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")
from vllm_engine import Engine, Transformers, questions

pytestmark = pytest.mark.vllm
NAME = "tiny-llava"
QUESTIONS = questions(NAME, 24)


def compact(*stages):
    return {"positions": "compact", "stages": list(stages)}


@pytest.fixture(scope="module")
def engine():
    # A step takes so few tokens that every prompt is prefilled in chunks.
    return Engine(NAME, None, max_num_batched_tokens=40, enable_chunked_prefill=True)


@pytest.fixture(scope="module")
def transformers():
    return Transformers(NAME)


PIPELINES = {
    "none": None,
    "a preset": "fastervlm-64",
    "attention facts": compact("fastervlm:64"),
    "a share": compact("fastervlm:25%"),
    "no facts": compact("uniform:64"),
    "embeddings": compact("divprune:64"),
    "features through the projector": compact({"visionzip": {"keep": 64, "heads": 4}}),
    "keys": compact("vispruner:64"),
    "an early layer": compact("hired:64"),
    "all tokens stand for something": compact({"pool": {"size": 2}}),
    "two stages": compact("uniform:256", "fastervlm:64"),
    "a cut in the tower": compact("flowcut:64"),
    "a deep cut in the tower": compact("flowcut:16"),
    "a cut in the tower and one behind it": compact("flowcut:128", "fastervlm:32"),
    "guarded": {**compact("fastervlm:64"), "min_visual_tokens": 600},
}


@pytest.mark.parametrize("name", PIPELINES)
def test_answers_and_kept_tokens_are_those_of_transformers(engine, transformers, name):
    pipeline = PIPELINES[name]
    engine.swap(pipeline)
    wanted, said = transformers(pipeline, QUESTIONS), engine(QUESTIONS)
    assert said.ids == wanted.ids
    assert said.prompt_tokens == wanted.prompt_tokens
    # vLLM encodes each picture once, whatever is asked about it.
    assert said.kept == wanted.kept[::6]
