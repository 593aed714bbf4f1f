"""`vtoken.serving.embeddings`: what the wrapped model feeds its decoder, cut out picture by picture."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import build, make
from torch import Tensor

import vtoken
from vtoken.errors import UnsupportedError
from vtoken.evals import reference
from vtoken.hooks.state.handle import Handle
from vtoken.serving import embeddings
from vtoken.session import wrapped

QUESTIONS = reference.questions(12)[::5]


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    return reference.load("tiny-llava", dtype=torch.float32)


@pytest.fixture(scope="module")
def crops() -> tuple[Any, Any]:
    return reference.load("tiny-llava-next", dtype=torch.float32)


def compact(*stages: Any, **more: Any) -> dict[str, Any]:
    return {"positions": "compact", "stages": [*stages], **more}


def opened(*questions: reference.Question) -> list[Image.Image]:
    return [Image.open(question.image).convert("RGB") for question in questions]


def inputs_of(processor: Any, question: reference.Question, picture: Image.Image) -> Any:
    return processor(images=[picture], text=[reference.prompt(processor, question)], return_tensors="pt")


def fed(model: Any, inputs: Any) -> Tensor:
    """[K, D] of what enters the decoder where `generate` runs, from the first to the last picture of one prompt."""
    seen: list[Tensor] = []
    watch = Handle()
    watch.before(model.model.language_model, lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]))
    model.generate(**inputs, do_sample=False, max_new_tokens=1)
    watch.release()
    visual = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0]
    behind = inputs["input_ids"].shape[1] - 1 - int(visual[-1])
    return seen[0][0, int(visual[0]) : seen[0].shape[1] - behind]


def alone(model: Any, processor: Any, question: reference.Question, picture: Image.Image) -> tuple[Any, Tensor]:
    inputs = inputs_of(processor, question, picture)
    return inputs, fed(model, inputs)


@pytest.mark.parametrize(
    "stages",
    [["fastervlm:64"], ["prumerge"], ["visionzip:64"], ["cdpruner:64"], ["flowcut:64"], ["flowcut:128", "divprune:16"]],
    ids=str,
)
def test_they_are_what_the_decoder_is_fed(pair: Any, stages: list[str]) -> None:
    model, processor = pair
    with wrapped(model, compact(*stages)):
        for question, picture in zip(QUESTIONS, opened(*QUESTIONS), strict=True):
            inputs, entered = alone(model, processor, question, picture)
            kept = vtoken.trace(model).tokens_out
            (found,) = embeddings(model, inputs)
            assert torch.equal(found, entered) and [len(found)] == kept and not found.requires_grad
            assert len(found) < 576


def test_a_text_reading_stage_reads_the_prompt(pair: Any) -> None:
    model, processor = pair
    (picture,) = opened(QUESTIONS[0])
    with wrapped(model, compact("cdpruner:64")):
        first, second = (embeddings(model, inputs_of(processor, q, picture))[0] for q in QUESTIONS[:2])
    assert first.shape == second.shape and not torch.equal(first, second)


def test_pictures_of_one_prompt_come_apart_where_they_meet(pair: Any) -> None:
    model, processor = pair
    text = "USER: <image><image>\nWhat? ASSISTANT:"
    inputs = processor(images=opened(*QUESTIONS[:2]), text=[text], return_tensors="pt")
    with wrapped(model, compact("prumerge")):
        entered = fed(model, inputs)
        counts = vtoken.trace(model).tokens_out
        found = embeddings(model, inputs)
    assert [len(each) for each in found] == counts and torch.equal(torch.cat(found), entered)


@pytest.mark.parametrize("newline", ["keep_if_row_has_token", "keep", "drop"])
@pytest.mark.parametrize("stage", ["fastervlm:64", "visionzip:{per_crop: 16}"])
def test_a_batch_of_pictures_of_several_sizes(crops: Any, stage: str, newline: str) -> None:
    """Newline tokens that stay are part of what enters, and rows of a batch are padded."""
    model, processor = crops
    pictures = opened(*QUESTIONS)
    pictures = [pictures[0], pictures[1].resize((90, 192)), pictures[2].resize((300, 200))]
    with wrapped(model, compact(stage, newline=newline)):
        expected = [alone(model, processor, q, p)[1] for q, p in zip(QUESTIONS, pictures, strict=True)]
        texts = [reference.prompt(processor, question) for question in QUESTIONS]
        found = embeddings(model, processor(images=pictures, text=texts, return_tensors="pt", padding=True))
    assert [each.shape for each in found] == [each.shape for each in expected]
    assert newline != "keep" or len({len(each) for each in found}) > 1
    for each, one in zip(found, expected, strict=True):
        torch.testing.assert_close(each, one, atol=1e-5, rtol=1e-4)


def test_another_thread_may_generate_meanwhile(pair: Any) -> None:
    model, processor = pair
    inputs, answers = inputs_of(processor, QUESTIONS[0], *opened(QUESTIONS[0])), list[Tensor]()

    def generated() -> Tensor:
        found: Tensor = model.generate(**inputs, do_sample=False, max_new_tokens=4)
        return found

    with wrapped(model, compact("fastervlm:64")):
        alone = generated()
        (expected,) = embeddings(model, inputs)
        watch = Handle()
        with ThreadPoolExecutor(1) as pool:

            def meanwhile(*args: Any) -> None:
                watch.release()  # it is a hook, and once is enough
                answers.append(pool.submit(generated).result())

            watch.after(model.model.vision_tower, meanwhile)
            (found,) = embeddings(model, inputs)
    assert torch.equal(answers[0], alone) and torch.equal(found, expected)


def test_pictures_of_onevision() -> None:
    """Those of one prompt are the visual columns of what enters the decoder."""
    model = make("llava_onevision")
    batch = build(model, [[2, ("img", (56, 112)), 3, ("img", (112, 112)), 4]])
    with wrapped(model, compact("fastervlm:5", newline="keep")):
        found = embeddings(model, batch)
        with torch.no_grad():
            model(**batch)
        trace = vtoken.trace(model)
    assert [len(each) for each in found] != trace.tokens_out and sum(map(len, found)) == trace.prompt_tokens[0] - 9


def test_the_model_goes_on_as_before(pair: Any) -> None:
    model, processor = pair
    inputs = inputs_of(processor, QUESTIONS[0], *opened(QUESTIONS[0]))
    hooks = len(model.model.language_model._forward_pre_hooks)
    with wrapped(model, compact("fastervlm:64")):
        before = model.generate(**inputs, do_sample=False, max_new_tokens=4)
        embeddings(model, inputs)
        assert torch.equal(model.generate(**inputs, do_sample=False, max_new_tokens=4), before)
        assert vtoken.trace(model).tokens_out == [64]
    assert len(model.model.language_model._forward_pre_hooks) == hooks


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (None, "not wrapped with a pipeline that has stages"),
        ("none", "not wrapped with a pipeline that has stages"),
        (compact("fastv:64"), "stage fastv acts at site decoder"),
        (compact("fastervlm:64", "snapkv:32"), "stage snapkv acts at site cache"),
        ("fastervlm:64", 'positions: compact, as in "fastervlm:64,positions=compact"'),
    ],
)
def test_what_vllm_could_not_do_alike_is_refused(pair: Any, given: Any, told: str) -> None:
    model, processor = pair
    inputs = inputs_of(processor, QUESTIONS[0], *opened(QUESTIONS[0]))
    try:
        if given is not None:
            vtoken.wrap(model, given)
        with pytest.raises(UnsupportedError, match=told):
            embeddings(model, inputs)
    finally:
        if given is not None:
            vtoken.unwrap(model)


def test_inputs_without_a_picture_and_other_families_are_refused(pair: Any) -> None:
    model, processor = pair
    with wrapped(model, compact("fastervlm:64")), pytest.raises(UnsupportedError, match="hold no picture"):
        embeddings(model, processor(text=["USER: hello ASSISTANT:"], return_tensors="pt"))
    onevision = make("llava_onevision")
    with wrapped(onevision, compact("uniform:4")), pytest.raises(UnsupportedError, match="no embeddings of videos"):
        embeddings(onevision, build(onevision, [[2, ("img", (56, 112)), 3, ("video", 2), 4]]))
    with wrapped(make("qwen2_5_vl"), "uniform:4") as qwen, pytest.raises(UnsupportedError, match="not of qwen2_5_vl"):
        embeddings(qwen, {})
