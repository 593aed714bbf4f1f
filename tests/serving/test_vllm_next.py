"""LLaVA-NeXT in vLLM against transformers with vtoken: crops, unpadding and newlines."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("vllm")
from vllm_engine import Engine, Transformers, questions, several

from vtoken.evals import reference

pytestmark = pytest.mark.vllm
NAME = "tiny-llava-next"
# (width, height): whole crops, and such that lose padding. vLLM's processor resizes pictures with torchvision, ours with
# Pillow, so none of these is resized.
SIZES = ((192, 192), (192, 96), (96, 192), (96, 96))
PADDED = ((192, 120), (90, 192), (300, 200))


def compact(*stages, **policies):
    return {"positions": "compact", "newline": "keep", "stages": list(stages), **policies}


@pytest.fixture(scope="module")
def engine():
    return Engine(reference.path(NAME), None)


@pytest.fixture(scope="module")
def transformers():
    return Transformers(reference.path(NAME))


PIPELINES = {
    "none": None,
    "newlines stay": compact("fastervlm:64"),
    "newlines go": compact("fastervlm:64", newline="drop"),
    "a budget per crop": compact({"fastervlm": {"keep": {"per_crop": 16}}}, newline="drop"),
    "merging, per crop": compact({"visionzip": {"keep": {"per_crop": 16}, "heads": 4}}, newline="drop"),
    "a share": compact("divprune:10%"),
    "shared out by the method": compact("hired:80"),
    "two stages, per crop": compact({"uniform": {"keep": {"per_crop": 40}}}, {"fastervlm": {"keep": {"per_crop": 9}}}),
    "small pictures stay whole": compact("fastervlm:64", newline="drop", min_visual_tokens=300),
    "2 x 2 crops": compact("fastervlm:64", anyres="2x2", newline="drop"),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_answers_and_kept_tokens_are_those_of_transformers(engine, transformers, name):
    pipeline, prompts = PIPELINES[name], questions(NAME, 24, SIZES)
    engine.swap(pipeline)
    wanted, said = transformers(pipeline, prompts), engine(prompts, alone=True)
    assert said.prompt_tokens == wanted.prompt_tokens
    assert said.ids == wanted.ids
    # A picture that is asked about again is not encoded again.
    assert pipeline is None or [kept for kept in wanted.kept if kept in said.kept] == wanted.kept


@pytest.mark.parametrize("name", ["none", "newlines stay", "a budget per crop", "2 x 2 crops"])
def test_pictures_with_padding(engine, transformers, name):
    """All at once, so that pictures of several sizes are encoded together."""
    pipeline, prompts = PIPELINES[name], questions(NAME, 24, PADDED)
    engine.swap(pipeline)
    wanted, said = transformers(pipeline, prompts), engine(prompts)
    assert said.prompt_tokens == wanted.prompt_tokens
    assert said.ids == wanted.ids


@pytest.mark.parametrize("name", ["newlines stay", "a budget per crop"])
def test_pictures_of_several_sizes_in_a_prompt(engine, transformers, name):
    """They are processed together, and have as many crops as the largest then."""
    pipeline, prompts = PIPELINES[name], several(NAME, 9)
    for i, p in enumerate(prompts):
        sizes = [SIZES[(i + k) % len(SIZES)] for k in range(len(p.pictures))]
        pictures = [picture.resize(size) for picture, size in zip(p.pictures, sizes, strict=True)]
        prompts[i] = replace(p, pictures=pictures)
    engine.swap(pipeline)
    wanted, said = transformers(pipeline, prompts), engine(prompts)
    assert said.prompt_tokens == wanted.prompt_tokens
    assert said.ids == wanted.ids
