"""LLaVA-OneVision in vLLM against transformers with vtoken: crops, pictures that are scaled down, newlines, videos."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("vllm")
import served_onevision as tiny
import torch
from vllm_engine import Engine, Transformers

from vtoken import registry
from vtoken.errors import UnsupportedError
from vtoken.pruners.tokens.cdpruner import CDPruner
from vtoken.serving._onevision import Packing

pytestmark = pytest.mark.vllm


def compact(*stages, **policies):
    return {"positions": "compact", "newline": "keep", "stages": list(stages), **policies}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("onevision"))


@pytest.fixture(scope="module")
def engine(folder):
    """A step takes so few tokens that most prompts are prefilled in chunks."""
    options = {"max_num_batched_tokens": 40, "enable_chunked_prefill": True}
    return Engine(folder, compact("fastervlm:10"), limit_mm_per_prompt={"image": 3, "video": 2}, **options)


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
    if pipeline is None and prompts is VIDEOS:  # vLLM's own class takes videos of one length at a time
        prompts, wanted = prompts[-1:], replace(wanted, ids=wanted.ids[-1:])
    assert engine(prompts).ids == wanted.ids, "all at once"


def test_a_text_reader_is_told_the_prompt_of_every_picture_and_video(engine, transformers, monkeypatch):
    """Not its kept tokens are compared: among so many alike, rounding decides which CDPruner takes."""
    told, original = [], CDPruner.select

    def select(self, tokens):
        told.extend(text.clone() for text in tokens.fact("text"))
        return original(self, tokens)

    monkeypatch.setattr(CDPruner, "select", select)
    pipeline, prompts = compact("cdpruner:10", newline="drop"), [*SEVERAL, *VIDEOS]
    engine.swap(pipeline)
    wanted = transformers(pipeline, prompts)
    assert len(told) == len(prompts)
    expected = [text for p, text in zip(prompts, told, strict=True) for _ in (*p.pictures, *p.videos)]
    told.clear()
    said = engine(prompts, alone=True)
    assert said.prompt_tokens == wanted.prompt_tokens
    for text, other in zip(told, expected, strict=True):
        torch.testing.assert_close(text, other)


def test_small_pictures_and_videos_stay_whole(engine, transformers):
    """Of prompts with one, which transformers counts by the prompt."""
    pipeline, prompts = compact("fastervlm:10", newline="drop", min_visual_tokens=33), PICTURES + VIDEOS[:3]
    engine.swap(pipeline)
    wanted, said = transformers(pipeline, prompts), engine(prompts)
    assert said.prompt_tokens == wanted.prompt_tokens and said.ids == wanted.ids
    assert {10, 16, 32} <= {len(kept) for kept in wanted.kept}


@pytest.mark.parametrize("name", ["none", "newlines stay"])
def test_chunks_and_cached_prefixes(engine, transformers, name):
    """Prompts of several blocks of 32 tokens; the second time they are read from the cache, but for the last block."""
    pipeline = PIPELINES[name] and compact("fastervlm:50%")
    engine.swap(pipeline)
    wanted = transformers(pipeline, SEVERAL)
    assert engine(SEVERAL).ids == wanted.ids
    again = engine(SEVERAL)
    assert again.ids == wanted.ids
    assert again.cached >= sum(32 * ((n - 1) // 32) for n in again.prompt_tokens) > 64 * len(SEVERAL)


def test_the_tower_is_given_as_many_frames_as_the_dense_model_would_be(engine, monkeypatch):
    engine.swap(compact("fastervlm:4", newline="drop"))
    videos, sizes = torch.randn(5, 3, 3, 56, 56), []
    hook = engine.model.vision_tower.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    scheduler = engine.llm.llm_engine.vllm_config.scheduler_config
    monkeypatch.setattr(scheduler, "max_num_encoder_input_tokens", 30)  # two videos of 3 x 4 tokens and a newline
    with torch.inference_mode():
        together = engine.model.embed_multimodal(pixel_values_videos=videos)
        apart = [engine.model.embed_multimodal(pixel_values_videos=[one])[0] for one in videos]
    hook.remove()
    assert sizes == [6, 6, 3, 3, 3, 3, 3, 3]
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_layouts_are_those_of_transformers(transformers):
    """Of pictures of many shapes: as vLLM packs them, and as the adapter finds them in transformers."""
    adapter = registry.adapter("llava_onevision")(transformers.model)
    sizes = [(height, width) for height in range(1, 400, 23) for width in range(1, 400, 19)]
    given = {"image_sizes": sizes, "pixel_values": torch.zeros(len(sizes), 17, 1, 1, 1)}
    found = Packing(transformers.model.config).layouts_of(sizes)
    for layout, other in zip(found, adapter.layouts("image", given), strict=True):
        assert (layout.parts, layout.interpolated) == (other.parts, other.interpolated)
        for name in ("segment", "newline", "closed_by"):
            one, two = getattr(layout, name), getattr(other, name)
            assert torch.equal(one, two) if torch.is_tensor(one) else one is two
    assert {layout.interpolated for layout in found} == {False, True}
    assert {len(layout.parts) for layout in found} == {1, 2}


REFUSED = {
    "no pipeline for other packing": (compact("fastervlm:10"), {"vision_aspect_ratio": "anyres_max_2"}, "anyres_max_9"),
    "newlines that depend on the picture": (
        compact("fastervlm:10", newline="keep_if_row_has_token"),
        {},
        "write newline",
    ),
    "positions": ({"newline": "keep", "stages": ["fastervlm:10"]}, {}, '"positions": "compact"'),
    "cuts in the tower": (compact("flowcut:10"), {}, "unpadding takes away"),
    "a prompt's pictures together": (compact({"fastervlm": {"keep": {"total": 10}}}), {}, "shared out"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_come_in_the_process_that_asks(folder, name):
    from vllm import LLM

    pipeline, more, words = REFUSED[name]
    with pytest.raises(UnsupportedError, match=words):
        LLM(str(folder), dtype="float32", enforce_eager=True, hf_overrides={"vtoken": pipeline, **more})
