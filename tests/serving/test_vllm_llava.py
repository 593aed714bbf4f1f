"""LLaVA-1.5 in vLLM against transformers with vtoken: the same tokens are kept, the same answers given."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm")
from vllm_engine import Engine, Transformers, questions, several

from vtoken.evals import reference
from vtoken.pruners.tokens.cdpruner import CDPruner
from vtoken.stages import Fact

pytestmark = pytest.mark.vllm
NAME = "tiny-llava"
QUESTIONS = questions(NAME, 24)  # six about each of four pictures
CHUNK = 40


def compact(*stages):
    return {"positions": "compact", "stages": list(stages)}


@pytest.fixture(scope="module")
def engine():
    """A step takes so few tokens that every prompt is prefilled in chunks. The pipeline that it starts with leaves all
    tokens, and reads the last layer of the tower, which vLLM would not build for the features alone."""
    options = {"max_num_batched_tokens": CHUNK, "enable_chunked_prefill": True, "enable_mm_embeds": True}
    return Engine(reference.path(NAME), compact("prumerge:576"), **options)


@pytest.fixture(scope="module")
def transformers():
    return Transformers(reference.path(NAME))


PIPELINES = {
    "none": None,
    "a preset": "fastervlm-64",
    "attention facts": compact("fastervlm:64"),
    "a share": compact("fastervlm:25%"),
    "no facts": compact("uniform:64"),
    "embeddings": compact("divprune:64"),
    "features through the projector": compact({"visionzip": {"keep": 64, "heads": 4}}),
    "keys": compact("vflowopt:64"),
    "an early layer": compact("hired:64"),
    "the last layer": compact("todre:64"),
    "the last layer, merging": compact("prumerge:64"),
    "all tokens stand for something": compact({"pool": {"size": 2}}),
    "two stages": compact("uniform:256", "fastervlm:64"),
    "a cut in the tower": compact("flowcut:64"),
    "a deep cut in the tower": compact("flowcut:16"),
    "a cut in the tower and one behind it": compact("flowcut:128", "fastervlm:32"),
    "guarded": {**compact("fastervlm:64"), "min_visual_tokens": 600},
    "a guarded cut in the tower": {**compact("flowcut:64"), "min_visual_tokens": 600},
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


def test_a_text_reader_is_told_the_prompt_of_every_picture(engine, transformers, monkeypatch):
    """Not its kept tokens are compared: among so many alike, rounding decides which CDPruner takes, and on some CPUs the
    answer of a picture or two with them."""
    told, original = [], CDPruner.select

    def select(self, tokens):
        told.extend(tokens.fact("text"))
        return original(self, tokens)

    monkeypatch.setattr(CDPruner, "select", select)
    pipeline = compact("cdpruner:64")
    engine.swap(pipeline)
    wanted = transformers(pipeline, QUESTIONS)
    expected = [text.clone() for text in told]
    told.clear()
    said = engine(QUESTIONS, alone=True)
    assert len(said.kept) == len(told) == len(QUESTIONS), "a picture is encoded for every prompt around it"
    for text, other in zip(told, expected, strict=True):
        torch.testing.assert_close(text, other)
    assert sum(mine != its for mine, its in zip(said.ids, wanted.ids, strict=True)) <= len(QUESTIONS) // 20


@pytest.mark.parametrize("pipeline", [compact("fastervlm:64"), compact("flowcut:64")], ids=["fastervlm", "flowcut"])
def test_several_pictures_chunks_and_cached_prefixes(engine, transformers, pipeline):
    engine.swap(pipeline)
    prompts = several(NAME, 9)
    wanted, first = transformers(pipeline, prompts), engine(prompts)
    assert first.ids == wanted.ids and first.prompt_tokens == wanted.prompt_tokens
    assert min(first.prompt_tokens) > CHUNK
    again = engine(prompts)
    assert again.ids == wanted.ids
    # All but the last block, of 32 tokens.
    assert again.cached >= sum(32 * ((n - 1) // 32) for n in again.prompt_tokens) > 64 * 9
    engine.forget()
    assert engine(prompts, alone=True).ids == wanted.ids


def test_caches_tell_pipelines_apart(engine):
    engine.swap("fastervlm-64")
    first = engine(QUESTIONS[:6])
    engine.swap("fastervlm-64,min_visual_tokens=1", forget=False)
    other = engine(QUESTIONS[:6])
    assert other.ids == first.ids and other.kept == first.kept, "encoded again"
    engine.swap("fastervlm-64", forget=False)
    assert not engine(QUESTIONS[:6]).kept


def test_the_tower_is_given_as_many_pictures_as_the_dense_model_would_be(engine, monkeypatch):
    engine.swap(compact("flowcut:64"))
    pixels, sizes = torch.randn(5, 3, 192, 192), []
    hook = engine.model.vision_tower.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    scheduler = engine.llm.llm_engine.vllm_config.scheduler_config
    monkeypatch.setattr(scheduler, "max_num_encoder_input_tokens", 1200)
    with torch.inference_mode():
        together = engine.model.embed_multimodal(pixel_values=pixels)
        apart = [engine.model.embed_multimodal(pixel_values=one[None])[0] for one in pixels]
    hook.remove()
    assert sizes == [2, 2, 1, 1, 1, 1, 1, 1]
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_embeddings_of_different_lengths_pass_through(engine):
    """Pruned by a client; stock vLLM takes one length at a time."""
    from vllm import SamplingParams

    prompts, wanted, embeddings = QUESTIONS[:2], [], []
    processor = reference.processor(reference.path(NAME))
    for prompt, stage in zip(prompts, ("fastervlm:64", "uniform:32"), strict=True):
        engine.swap(compact(stage))
        wanted += engine([prompt]).ids
        given = processor(images=list(prompt.pictures), text=[prompt.text], return_tensors="pt")
        with torch.inference_mode():
            embeddings.append(engine.model.embed_multimodal(pixel_values=given["pixel_values"])[0][None])
    for pipeline in (None, "fastervlm-64"):
        engine.swap(pipeline)
        requests = [
            {"prompt": p.text, "multi_modal_data": {"image": e}} for p, e in zip(prompts, embeddings, strict=True)
        ]
        done = engine.llm.generate(requests, SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
        assert [list(out.outputs[0].token_ids) for out in done] == wanted


def test_hooks_are_taken_off(engine):
    engine.swap(None)
    bare = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in engine.model.modules()]
    engine.swap(compact("flowcut:64", {"visionzip": {"keep": 32, "heads": 4}}))
    assert engine.model.served.context.wanted >= {Fact("features")}
    engine.swap(None)
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in engine.model.modules()] == bare
