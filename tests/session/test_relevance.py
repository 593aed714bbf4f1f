"""What the model itself says about the frames of a video."""

from __future__ import annotations

import pytest
import tiny
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

import vtoken
from vtoken import registry
from vtoken.errors import UnsupportedError
from vtoken.evals import reference
from vtoken.relevance import distinct

VIDEO = pytest.mark.parametrize("family", tiny.VIDEO)


def eager(model, batch):
    """Attention maps of the stock model, [layers][B, H, L, L]."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return model(**batch, output_attentions=True).attentions


@VIDEO
@pytest.mark.parametrize("rows", [[[2, "video", 5]], [[2, "video", 5], [1, "video", 2]]], ids=["one", "padded"])
def test_it_is_the_attention_of_the_last_token(family, rows):
    model = tiny.make(family)
    batch = tiny.build(model, rows, seed=4)
    before = model(**batch).logits
    found = vtoken.frame_relevance(model, batch)
    assert torch.equal(model(**batch).logits, before), "the model is as it was"
    attending = registry.adapter(family)(model).attending
    maps = dict(zip(attending, eager(model, batch), strict=True))
    layers = [k for k in attending if 1 <= k <= 2]
    assert layers and len(found) == len(rows)
    for video, got in zip(tiny.segments(model, batch), found, strict=True):
        columns = torch.as_tensor(video.columns)
        columns = columns[~tiny.family(family).leads(batch["input_ids"])[video.row, columns]]
        each = len(columns) // len(got)  # without the newline behind a video
        paid = torch.stack([maps[k][video.row].mean(0)[-1] for k in layers]).mean(0)[columns[: each * len(got)]]
        torch.testing.assert_close(torch.tensor(got), paid.view(len(got), each).sum(1), atol=1e-5, rtol=1e-4)


def test_it_names_what_is_wrong():
    model = tiny.make("llava_onevision")
    with pytest.raises(UnsupportedError, match="no video"):
        vtoken.frame_relevance(model, tiny.build(model, [[2, "img", 5]], seed=1))
    with vtoken.wrapped(model, "uniform:4"), pytest.raises(UnsupportedError, match="unwrap"):
        vtoken.frame_relevance(model, tiny.build(model, [["video", 5]], seed=1))


@VIDEO
def test_it_feeds_frames_relevant(family):
    model = tiny.make(family)
    batch = tiny.build(model, [[2, "video", 5]], seed=4)
    scores = vtoken.frame_relevance(model, batch)
    best = max(range(len(scores[0])), key=scores[0].__getitem__)
    with vtoken.wrapped(model, [{"frames_relevant": {"keep": 1, "relevance": scores, "rule": "top"}}]):
        model.generate(**batch, max_new_tokens=1)
        assert vtoken.trace(model).stages[0].frames == [[best]]


@pytest.fixture(scope="module")
def clip():
    """A tiny CLIP with random weights, and its processor."""
    tokenizer = reference_tokenizer()
    side = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    words = {"vocab_size": len(tokenizer), "max_position_embeddings": 12, "eos_token_id": tokenizer.eos_token_id}
    sizes = {"image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(text_config={**side, **words}, vision_config={**side, **sizes}, projection_dim=8)
    ).eval()
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return model, CLIPProcessor(images, tokenizer)


def reference_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(reference.path())
    tokenizer.model_max_length = 12
    return tokenizer


def test_a_question_is_compared_with_every_frame(clip, tmp_path):
    model, processor = clip
    frames = [Image.new("RGB", (20, 16), (40 * k, 200 - 30 * k, 9)) for k in range(5)]
    found = vtoken.question_relevance(frames, "what color is the 4?", clip, batch=2)
    both = processor(text=["what color is the 4?"], images=frames, padding="max_length", return_tensors="pt")
    with torch.no_grad():
        logits = model(**both).logits_per_image[:, 0] / model.logit_scale.exp()
    torch.testing.assert_close(torch.tensor(found), logits, atol=1e-5, rtol=1e-4)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert vtoken.question_relevance(frames, "what color is the 4?", str(tmp_path)) == pytest.approx(found, abs=1e-5)
    assert len(vtoken.question_relevance(frames, "what digit is " * 40, clip)) == 5, "a long question is cut"


def test_what_compares_nothing_is_refused(clip):
    with pytest.raises(UnsupportedError, match="compares no pictures"):
        vtoken.question_relevance([Image.new("RGB", (8, 8))], "what?", (torch.nn.Linear(1, 1), clip[1]))
    with pytest.raises(ValueError, match="no frames"):
        vtoken.question_relevance([], "what?", clip)


def test_distinct_frames_by_hand():
    """Of six frames, 0 and 5 evenly; then 3, which is least like both, then 1, less like these three than 2 and 4."""
    x = torch.tensor([[1.0, 0, 0], [0.6, 0.8, 0], [1, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 0]])
    x = torch.nn.functional.normalize(x, dim=1)
    assert distinct(x @ x.T, 2, 1.0) == [0, 5]
    assert distinct(x @ x.T, 3, 0.7) == [0, 3, 5]
    means = {j: float((x[j] @ x[[0, 3, 5]].T).mean()) for j in (1, 2, 4)}
    assert distinct(x @ x.T, 4, 0.5) == sorted([0, 3, 5, min(means, key=means.get)])
    assert distinct(x @ x.T, 1, 0.85) == [0] and distinct(x @ x.T, 6, 0.85) == list(range(6))


def test_distinct_frames_feed_frames_relevant(clip):
    frames = [Image.new("RGB", (20, 16), (40 * k, 200 - 30 * k, 9)) for k in range(5)]
    scores = vtoken.distinct_frames(frames, 3, evenly=0.7, encoder=clip, batch=2)
    assert len(scores) == 5 and sum(scores) == 3 and scores[0] == scores[4] == 1
    stage = registry.stage("frames_relevant")(keep=3, relevance=tuple(scores), rule="top")
    assert stage.chosen(torch.tensor(scores), 3) == [k for k, score in enumerate(scores) if score]
    for keep, evenly in ((0, 0.5), (6, 0.5), (3, 1.5)):
        with pytest.raises(ValueError, match="keep 1 to all"):
            vtoken.distinct_frames(frames, keep, evenly, clip)
