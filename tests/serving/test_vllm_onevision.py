"""LLaVA-OneVision in vLLM against transformers with vtoken: crops, pictures that are scaled down, newlines, videos."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")
import served_onevision as tiny
from vllm_engine import Engine, Transformers

pytestmark = pytest.mark.vllm


def compact(*stages, **policies):
    return {"positions": "compact", "newline": "keep", "stages": list(stages), **policies}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("onevision"))


@pytest.fixture(scope="module")
def engine(folder):
    return Engine(folder, None, limit_mm_per_prompt={"image": 3, "video": 2})


@pytest.fixture(scope="module")
def transformers(folder):
    return Transformers(folder, tiny.processor())


PICTURES = [tiny.prompt(k, [size]) for k, size in enumerate(tiny.SIZES)]
SEVERAL = [tiny.prompt(20, tiny.SIZES[:2]), tiny.prompt(21, tiny.SIZES[3:5]), tiny.prompt(22, tiny.SIZES[5:8])]
VIDEOS = [tiny.prompt(30 + n, frames=[n]) for n in (1, 3, 8)] + [tiny.prompt(40, [(100, 60)], [4])]
PER_FRAME = {"fastervlm": {"keep": {"per_frame": 2}}}
PIPELINES = {
    "none": None,
    "no facts": compact("uniform:10"),
    "newlines stay": compact("fastervlm:10"),
    "newlines go": compact("fastervlm:10", newline="drop"),
    "a share": compact("divprune:25%", newline="drop"),
    "merging": compact({"visionzip": {"keep": 10, "heads": 4}}, newline="drop"),
    "a budget per crop": compact({"fastervlm": {"keep": {"per_crop": 3}}}, newline="drop"),
    "merging, per crop": compact({"visionzip": {"keep": {"per_crop": 5}, "heads": 4}}),
    "two stages": compact({"uniform": {"keep": {"per_crop": 9}}}, {"fastervlm": {"keep": {"per_crop": 2}}}),
    "a budget per frame": compact(PER_FRAME, newline="drop"),
    "small ones stay whole": compact("fastervlm:10", newline="drop", min_visual_tokens=30),
    "2 x 2 crops": compact("fastervlm:10", anyres="2x2", newline="drop"),
}


@pytest.mark.parametrize("prompts", [PICTURES, SEVERAL, VIDEOS], ids=["pictures", "several", "videos"])
@pytest.mark.parametrize("name", PIPELINES)
def test_answers_and_kept_tokens_are_those_of_transformers(engine, transformers, name, prompts):
    pipeline = PIPELINES[name]
    engine.swap(pipeline)
    wanted, said = transformers(pipeline, prompts), engine(prompts, alone=True)
    assert said.prompt_tokens == wanted.prompt_tokens
    assert said.ids == wanted.ids
    assert sorted(said.kept) == sorted(wanted.kept)
    engine.forget()
    assert engine(prompts).ids == wanted.ids, "all at once"
