"""Qwen-VL in vLLM against transformers with `vtoken.wrap`: answers, kept tokens and positions, in steps of 24 tokens."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("vllm")

from served_qwen import FRAMES, Asked, Served, Wrapped, assert_positions, assert_same

from vtoken.errors import UnsupportedError
from vtoken.evals import reference
from vtoken.serving import _qwen
from vtoken.stages import Fact

pytestmark = pytest.mark.vllm
FOLDER = reference.path("tiny-qwen2.5-vl")
PER_FRAME = {"stages": [{"fastervlm": {"keep": {"per_frame": 9}}}]}
PIXELS = {"stages": [{"vflowopt": {"keep": "25%", "alpha": 0.5, "merge": 4}}]}
LAYERS = {"stages": [{"vscan": {"keep": "25%", "local_layer": 0}}]}  # of windows: the next one is read
PICTURES = [None, "uniform:36", "fastervlm:36", "divprune:36", "visionzip:36", PIXELS, LAYERS]
VIDEOS = [None, "uniform:25%", "evs:40%", "vidcom2:25%", "fastervlm:25%", PER_FRAME, "divprune:30"]
ASKS = pytest.mark.parametrize("asks", [True, False], ids=["asks for positions", "does not"])


@pytest.fixture(scope="module")
def served():
    engine = Served(FOLDER, "uniform:36")
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def wrapped():
    return Wrapped(FOLDER)


@cache
def picture(file):
    return Image.open(file).convert("RGB")


def questions(wrapped, limit):
    return [Asked(wrapped.prompt("image", q.question), [picture(q.image)]) for q in reference.questions(limit)]


def several(wrapped):
    """Two and three pictures with text between them."""
    asked = reference.questions(96)
    out = []
    for i in range(6):
        chosen = [asked[(7 * i + 13 * k) % 96] for k in range(2 + i % 2)]
        between = [part for q in chosen for part in ("image", q.question)]
        out.append(Asked(wrapped.prompt(*between), [picture(q.image) for q in chosen]))
    return out


def videos(wrapped, side):
    """A window of `side` pixels that moves over a picture; every third prompt has a picture as well."""
    out = []
    for i, q in enumerate(reference.questions(96)[::8]):
        whole = np.asarray(picture(q.image).resize((192, 192)))
        frames = np.stack([whole[4 * f : 4 * f + side, 10 * f : 10 * f + side] for f in range(FRAMES)])
        pictures = [picture(q.image)] if i % 3 == 2 else []
        content = ["image"] * len(pictures) + ["video", q.question]
        out.append(Asked(wrapped.prompt(*content), pictures, frames))
    return out


@ASKS
@pytest.mark.parametrize("pipeline", PICTURES, ids=str)
def test_questions(served, wrapped, pipeline, asks):
    served.swap(pipeline, asks)
    assert_same(served, wrapped, questions(wrapped, 24), pipeline)


@ASKS
@pytest.mark.parametrize("pipeline", VIDEOS, ids=str)
def test_videos(served, wrapped, pipeline, asks):
    """Of frames wide enough that their last does not stand beyond their last column: see test_positions_behind_videos."""
    served.swap(pipeline, asks)
    assert_same(served, wrapped, videos(wrapped, 112), pipeline)


@ASKS
@pytest.mark.parametrize("pipeline", ["fastervlm:25%", "visionzip:36"])
def test_several_pictures_and_the_prefix_cache(served, wrapped, pipeline, asks):
    served.swap(pipeline, asks)
    prompts = several(wrapped)
    wanted = [wrapped.told(asked, pipeline).ids for asked in prompts]
    assert served.ids(prompts) == wanted
    cached = served.generate(prompts)
    assert [list(d.outputs[0].token_ids) for d in cached] == wanted
    # Whole blocks of 32, and of pruned prompts, whose pictures end within a block.
    assert all(d.num_cached_tokens >= 32 for d in cached)
    longer = [
        Asked(a.text + wrapped.processor.tokenizer.decode(ids[:1]), a.pictures)
        for a, ids in zip(prompts, wanted, strict=True)
    ]
    again = [wrapped.told(asked, pipeline).ids for asked in longer]
    assert served.ids(longer) == again


def test_a_stage_reads_the_prompt(served, wrapped, monkeypatch):
    """Its choice is too sensitive to rounding to be compared: what it is told, and the answers."""
    served.swap("cdpruner:25%")
    prompts = [*questions(wrapped, 12), *several(wrapped)[:2], videos(wrapped, 112)[2]]
    told, original = [], _qwen.decide

    def decide(pipeline, x, layouts, read, **more):
        told.extend(read(Fact("text")))
        return original(pipeline, x, layouts, read, **more)

    monkeypatch.setattr(_qwen, "decide", decide)
    for asked in prompts:
        told.clear()
        assert served.ids([asked]) == [wrapped.told(asked, "cdpruner:25%").ids]
        ids = wrapped.inputs(asked)["input_ids"][0]
        stays = torch.ones(len(ids), dtype=torch.bool)
        stays[wrapped.media(asked)] = False
        text = wrapped.model.get_input_embeddings()(ids[stays])
        assert len(told) == len(asked.pictures) + (asked.video is not None)
        assert all(torch.equal(each, text) for each in told)
    assert served.ids(prompts) == [wrapped.told(asked, "cdpruner:25%").ids for asked in prompts]


@ASKS
@pytest.mark.parametrize("pipeline", ["fastervlm:25%", "divprune:30"])
def test_positions(served, wrapped, pipeline, asks):
    """Of text and kept tokens, as the decoder is given them."""
    served.swap(pipeline, asks)
    for asked in [*questions(wrapped, 13)[::6], *several(wrapped)[:2], *videos(wrapped, 112)[1:3]]:
        assert_positions(served, wrapped, asked, pipeline)


@ASKS
def test_positions_behind_videos(served, wrapped, asks):
    """Text begins behind the farthest of all axes, as in vLLM without vtoken; in transformers behind rows and columns,
    here one place earlier: frames of 6 x 6 tokens, 4 of them, 2 apart."""
    served.swap("uniform:25%", asks)
    asked = videos(wrapped, 96)[0]
    columns = wrapped.columns(asked, wrapped.told(asked, "uniform:25%").kept)
    wanted = wrapped.positions(asked)
    wanted[:, wrapped.media(asked)[-1] + 1 :] += 1
    assert torch.equal(served.positions(asked), wanted[:, columns])
    served.swap(None)
    assert torch.equal(served.positions(asked), wanted)


def test_the_tower_gets_no_more_at_once_than_the_dense_model(served, wrapped, monkeypatch):
    served.swap("fastervlm:4")
    model, pictures = served.model, [asked.pictures[0] for asked in questions(wrapped, 36)[::6]]
    inputs = wrapped.processor.image_processor(pictures, return_tensors="pt")
    tokens = (inputs["image_grid_thw"].prod(-1) // 4).tolist()
    whole = model.embed_multimodal(**inputs)
    seen, process = [], model._process_image_input

    def watched(given):
        seen.append(given["image_grid_thw"].prod(-1).tolist())
        return process(given)

    monkeypatch.setattr(model, "_process_image_input", watched)
    monkeypatch.setattr(model, "most", tokens[0] + tokens[1])
    parts = model.embed_multimodal(**inputs)
    assert len(seen) == 3 and [4 * n for n in tokens] == [n for call in seen for n in call]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(whole, parts, strict=True))
    seen.clear()
    monkeypatch.setattr(model, "most", 1)
    assert len(model.embed_multimodal(**inputs)) == len(pictures) == len(seen)


def test_pruning_of_vllm_is_its_own_where_no_pipeline_is_named(served):
    served.swap(None)
    config, stock = served.config, type(served.model).__mro__[2]
    ids = [5, config.vision_start_token_id, *[config.video_token_id] * 3, config.vision_end_token_id, 6]
    embeddings = torch.cat([torch.rand(3, 128), torch.tensor([[0, 0, 1, 4], [1, 2, 0, 4], [1, 3, 3, 4]])], 1)
    given = ids, [embeddings], torch.arange(7).expand(3, -1).clone(), 0
    found, wanted = (
        served.model.recompute_mrope_positions(*given),
        stock.recompute_mrope_positions(served.model, *given),
    )
    assert torch.equal(found[0][0], wanted[0][0]) and torch.equal(found[1], wanted[1]) and found[2] == wanted[2]
    assert found[0][0].shape == (3, 128)


def test_a_prompt_ends_with_text(served):
    served.swap("uniform:36")
    text = "<|vision_start|><|image_pad|>"
    with pytest.raises(ValueError, match="ends with a picture"):
        served.generate([Asked(text, [picture(reference.questions(1)[0].image)])])


REFUSED = {
    "its own pruning of videos": ({"video_pruning_rate": 0.5}, "uniform:36", "--video-pruning-rate 0.5 .* leave one"),
    "embeddings": ({"enable_mm_embeds": True}, "uniform:36", "--enable-mm-embeds .* leave it out"),
    "pictures dealt out": ({"mm_encoder_tp_mode": "data"}, "uniform:36", "mm_encoder_tp_mode=data"),
    "cuts in the tower": ({}, "flowcut:36", "flowcut .* vision tower"),
    "a layer of windows": ({}, {"stages": [{"fopru": {"keep": 9, "layer": 0}}]}, "within windows only.* 1, 3"),
    "no such layer": ({}, {"stages": [{"fopru": {"keep": 9, "layer": 7}}]}, "layer 7; there are 4"),
    "a decoder's stage": ({}, "fastv", "acts at site decoder"),
    "compact positions": ({}, {"positions": "compact", "stages": ["uniform:36"]}, "keeps the positions of M-RoPE"),
    "a sample's budget": ({}, {"stages": [{"uniform": {"keep": {"total": 64}}}]}, "shared out among the pictures"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_reach_the_caller(case, monkeypatch):
    """With the engine in a process of its own, which never starts."""
    from vllm import LLM

    options, pipeline, message = REFUSED[case]
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    with pytest.raises(UnsupportedError, match=message):
        LLM(str(FOLDER), dtype="float32", enforce_eager=True, hf_overrides={"vtoken": pipeline}, **options)


def test_what_goes_past_the_tower_is_refused():
    from vllm import LLM

    with pytest.raises(UnsupportedError, match="compile_mm_encoder"):
        LLM(
            str(FOLDER),
            dtype="float32",
            enforce_eager=True,
            max_model_len=1024,
            hf_overrides={"vtoken": "uniform:36"},
            compilation_config={"compile_mm_encoder": True},
        )
