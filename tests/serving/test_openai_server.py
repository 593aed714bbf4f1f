"""`vtoken serve`'s server in process: OpenAI's requests, alone, streamed and at once; reset; errors and what comes
after."""

from __future__ import annotations

import base64
import gc
import json
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="fastapi is not installed: pip install fastapi uvicorn openai")
pytest.importorskip("openai", reason="openai is not installed: pip install fastapi uvicorn openai")
pytest.importorskip("uvicorn", reason="uvicorn is not installed: pip install fastapi uvicorn openai")

from fastapi.testclient import TestClient

from vtoken import config, registry
from vtoken.errors import UnsupportedError
from vtoken.evals import processors, reference
from vtoken.evals.shared import models
from vtoken.serving import openai_server
from vtoken.session import pipeline, wrapped

NAME, CHAT = "tiny-llava", "/v1/chat/completions"
QUESTIONS = reference.questions(12)
TEXT = 10  # tokens of the first prompt that are not visual


def served(given: str, name: str = NAME) -> tuple[TestClient, Any]:
    app, manager = openai_server.app_of(
        name, config.load(given), lambda: models.load(name, "cpu"), lambda: processors.load(name)
    )
    return TestClient(app, raise_server_exceptions=False), manager


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[TestClient, Any]]:
    client, manager = served("fastervlm:64")
    with client:
        yield client, manager


def asked(question: reference.Question, **more: Any) -> dict[str, Any]:
    url = "data:image/jpeg;base64," + base64.b64encode(question.image.read_bytes()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question.question}]
    return {
        "model": NAME,
        "temperature": 0,
        "max_tokens": 8,
        "messages": [{"role": "user", "content": content}],
        **more,
    }


def answer(client: TestClient, question: reference.Question) -> tuple[str, dict[str, Any]]:
    found = client.post(CHAT, json=asked(question)).json()
    return found["choices"][0]["message"]["content"], found["usage"]


def chunks(client: TestClient, question: reference.Question) -> list[dict[str, Any]]:
    text = client.post(CHAT, json=asked(question, stream=True)).text
    return [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line]


def generated(given: str, questions: list[reference.Question]) -> list[str]:
    model, processor = reference.load(NAME)
    with wrapped(model, given):
        return reference.answers(model, processor, questions, batch_size=1)


def test_answers_are_those_of_generate_and_usage_tells_both_lengths(server: Any) -> None:
    said, usage = answer(server[0], QUESTIONS[0])
    assert said == generated("fastervlm:64", QUESTIONS[:1])[0].strip() == QUESTIONS[0].answer
    assert usage["prompt_tokens"] == 576 + TEXT and usage["total_tokens"] == 576 + TEXT + usage["completion_tokens"]
    told = {"prefilled_tokens": 64 + TEXT, "visual_tokens": 576, "kept_visual_tokens": 64}
    assert usage["prompt_tokens_details"] == told


def test_a_stream_says_the_same(server: Any) -> None:
    found = chunks(server[0], QUESTIONS[3])
    said, usage = answer(server[0], QUESTIONS[3])
    parts = [chunk["choices"][0]["delta"].get("content", "") for chunk in found]
    assert "".join(parts).strip() == said and len([part for part in parts if part]) > 1
    assert found[-1]["usage"] == usage and usage["prompt_tokens_details"]["kept_visual_tokens"] == 64


def test_four_clients_at_once_get_their_own_answers_and_counts(server: Any) -> None:
    one_by_one = [answer(server[0], question) for question in QUESTIONS]
    assert len({usage["prompt_tokens"] for _, usage in one_by_one}) > 3
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda question: answer(server[0], question), QUESTIONS)) == one_by_one
    assert [said for said, _ in one_by_one] == [text.strip() for text in generated("fastervlm:64", QUESTIONS)]


def test_a_reset_lets_the_model_go_and_the_next_request_wraps_again(server: Any) -> None:
    client, manager = server
    before = answer(client, QUESTIONS[1])
    (held,) = manager.loaded_models.values()
    gone = weakref.ref(held.model)
    assert client.post("/reset").json() == {"status": "ok"} and not manager.loaded_models
    del held
    gc.collect()
    assert gone() is None
    assert answer(client, QUESTIONS[1]) == before
    (again,) = manager.loaded_models.values()
    wraps = pipeline(again.model)
    assert wraps is not None and [stage.name for stage in wraps.stages] == ["fastervlm"]


@pytest.mark.parametrize("error", [UnsupportedError('not "this"\npicture'), RuntimeError("a bug")])
def test_after_an_error_in_a_stage_the_model_answers_as_before(
    server: Any, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = server[0]
    before = answer(client, QUESTIONS[0])

    def fail(*args: Any) -> Any:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(registry.stage("fastervlm"), "score", fail)
        plain = client.post(CHAT, json=asked(QUESTIONS[0]))
        streamed = chunks(client, QUESTIONS[0])
    if isinstance(error, UnsupportedError):
        assert plain.status_code == 400 and plain.json()["error"]["message"] == str(error)
    else:
        assert plain.status_code == 500
    assert streamed[-1] == {"error": str(error)}
    assert answer(client, QUESTIONS[0]) == before


def test_a_picture_that_cannot_be_read_is_told(server: Any) -> None:
    body = asked(QUESTIONS[0])
    body["messages"][0]["content"][0]["image_url"]["url"] = "data:image/jpeg;base64,AAAA"
    found = server[0].post(CHAT, json=body)
    assert found.status_code == 400 and "cannot identify image file" in found.json()["error"]["message"]


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/x.jpg", "http://[::1"])
def test_a_picture_that_cannot_be_fetched_is_told(server: Any, url: str) -> None:
    body = asked(QUESTIONS[0])
    body["messages"][0]["content"][0]["image_url"]["url"] = url
    found = server[0].post(CHAT, json=body)
    assert found.status_code == 400 and found.json()["error"]["message"]


@pytest.mark.parametrize("messages", [None, [], "hello", ["hello"]], ids=repr)
def test_a_request_without_messages_is_told(server: Any, messages: Any) -> None:
    found = server[0].post(CHAT, json={"model": NAME, "messages": messages})
    assert found.status_code == 400 and "messages" in found.json()["error"]["message"]


@pytest.mark.parametrize(
    "part",
    [
        "hello",
        {},
        {"type": "image_url"},
        {"type": "image_url", "image_url": {}},
        {"type": "video_url"},
        {"type": "text"},
    ],
    ids=repr,
)
def test_a_part_that_lacks_something_is_a_bad_request(server: Any, part: Any) -> None:
    body = asked(QUESTIONS[0])
    body["messages"][0]["content"].insert(0, part)
    found = server[0].post(CHAT, json=body)
    assert found.status_code == 400 and "as in {" in found.json()["error"]["message"]


def test_a_picture_may_be_given_by_its_url_alone(server: Any) -> None:
    """transformers takes it, though OpenAI's clients do not send it."""
    body = asked(QUESTIONS[0])
    picture = body["messages"][0]["content"][0]
    picture["image_url"] = picture["image_url"]["url"]
    found, usual = (server[0].post(CHAT, json=each).json()["choices"] for each in (body, asked(QUESTIONS[0])))
    assert found == usual


def test_a_prompt_without_a_picture_has_no_details(server: Any) -> None:
    body = {"model": NAME, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}
    assert "prompt_tokens_details" not in server[0].post(CHAT, json=body).json()["usage"]


def test_the_one_model_is_listed_and_no_other_is_loaded(server: Any) -> None:
    client, manager = server
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == [NAME]
    assert client.post(CHAT, json=asked(QUESTIONS[0], model="gpt2")).status_code == 400
    (line,) = client.post("/load_model", json={"model": "gpt2"}).text.split("\n\n")[:1]
    assert "this server answers with 'tiny-llava' alone" in json.loads(line.removeprefix("data: "))["message"]
    assert client.get("/health").json() == {"status": "ok"} and len(manager.loaded_models) == 1


@pytest.mark.parametrize(("given", "prefilled", "kept"), [("none", None, None), ("fastv:64", 586, 64)])
def test_other_pipelines(given: str, prefilled: int | None, kept: int | None) -> None:
    """Without stages there is nothing to tell; a stage in the decoder leaves the prompt as it enters."""
    with served(given)[0] as client:
        said, usage = answer(client, QUESTIONS[0])
    assert said == generated(given, QUESTIONS[:1])[0].strip() and usage["prompt_tokens"] == 586
    told = usage.get("prompt_tokens_details", {})
    assert (told.get("prefilled_tokens"), told.get("kept_visual_tokens")) == (prefilled, kept)


def test_crops_are_those_of_the_pipeline() -> None:
    client, manager = served("fastervlm:64,anyres=2x2", "tiny-llava-next")
    with client:
        (held,) = manager.loaded_models.values()
        grids = held.model.model.config.image_grid_pinpoints
        assert held.processor.image_processor.image_grid_pinpoints == grids != held.model.config.image_grid_pinpoints


def test_a_pipeline_that_does_not_go_with_the_model_ends_before_the_server_starts() -> None:
    with pytest.raises(UnsupportedError, match="layer"):
        served("fastv:64,layer=99")


def test_other_server_parts_of_transformers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(manager: Any, oracle_handler: Any) -> None: ...

    monkeypatch.setattr(openai_server, "build_server", build)
    with pytest.raises(UnsupportedError, match=r"does not know the server parts .* takes manager, oracle_handler$"):
        served("fastervlm:64")
