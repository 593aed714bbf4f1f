"""`vtoken app`: what a question gets, without and (where gradio is installed) with the page around it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import clips
import pytest
import tiny
from PIL import Image
from tiny_processors import processor

from vtoken.cli import main
from vtoken.commands import app
from vtoken.errors import ConfigError, UnsupportedError
from vtoken.evals import reference
from vtoken.evals.pictures import asked
from vtoken.session import session_of, wrapped

NO_GRADIO = "gradio is not installed: pip install 'gradio>=6,<7' (it takes pillow<13, unlike constraints.txt)"
needs_gradio = pytest.mark.skipif(find_spec("gradio") is None, reason=NO_GRADIO)


@pytest.fixture(scope="module")
def answerer() -> asked.Answerer:
    return asked.Answerer(*reference.load("tiny-llava"), new_tokens=8)


def test_without_gradio_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(app, "find_spec", lambda name: None)
    assert main(["app"]) == 2
    assert capsys.readouterr().err == 'vtoken: error: vtoken app needs gradio: pip install "gradio>=6,<7"\n'


@pytest.mark.parametrize(
    ("method", "budget", "tokens", "average"), [("fastervlm", "32", 32, 32), ("fastv", " 25% ", 576, 360)]
)
def test_a_question_is_asked_dense_and_pruned(
    answerer: asked.Answerer, method: str, budget: str, tokens: int, average: int
) -> None:
    question = reference.questions(1)[0]
    with Image.open(question.image) as picture:
        found = answerer(picture, None, question.question, method, budget)
    assert found.dense == question.answer
    rows = {name: (dense, pruned) for name, dense, pruned in found.rows}
    assert tuple(rows) == asked.MEASURES
    assert rows["tokens at entry"] == ("576", f"{tokens}")
    assert rows["mean over layers"] == ("576", f"{average}")
    dense, pruned = (float(kilobytes) for kilobytes in rows["KV cache, kB"])
    assert pruned < 0.7 * dense and float(rows["seconds"][1]) > 0
    assert found.picture.width == 720 and found.picture.height > 720  # the caption below
    assert session_of(answerer.model) is None and found.aside == ""


def test_the_answers_are_those_of_the_pipeline(answerer: asked.Answerer) -> None:
    questions = reference.questions(4)
    with wrapped(answerer.model, "uniform:12"):
        expected = reference.answers(answerer.model, answerer.processor, questions)
    dense = reference.answers(answerer.model, answerer.processor, questions)
    assert expected != dense
    for question, pruned, stock in zip(questions, expected, dense, strict=True):
        with Image.open(question.image) as picture:
            found = answerer(picture.convert("RGBA"), None, question.question, "uniform", "12")
        assert (found.dense, found.pruned) == (stock.strip(), pruned.strip())


def test_what_cannot_be_asked_is_told(answerer: asked.Answerer) -> None:
    picture = Image.new("RGB", (40, 40))
    with pytest.raises(ConfigError, match="choose a picture first"):
        answerer(None, None, "what?", "fastervlm", "32")
    with pytest.raises(ConfigError, match="a picture or a video, not both"):
        answerer(picture, "clip.gif", "what?", "fastervlm", "32")
    with pytest.raises(ConfigError, match="'many' is not a budget; accepted: a count per image"):
        answerer(picture, None, "what?", "fastervlm", "many")
    assert session_of(answerer.model) is None


def test_methods_have_a_budget_and_run_on_the_model(answerer: asked.Answerer) -> None:
    found = answerer.methods()
    assert {"fastervlm", "flowcut", "fastv", "snapkv", "random"} <= {*found}
    # Needs layer 5 of a tower of 4; chooses frames; leaves all tokens; has no budget; needs gates.
    assert not {"vscan", "frames_uniform", "flexprefill", "pool", "dyvte"} & {*found}
    assert session_of(answerer.model) is None


@pytest.mark.parametrize("kind", clips.KINDS)
def test_a_model_without_videos_says_so(kind: str, answerer: asked.Answerer, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="LlavaProcessor takes pictures only: this family has no videos"):
        answerer(None, str(clips.write(tmp_path, kind)), "what?", "uniform", "4")
    assert session_of(answerer.model) is None


class Batch(dict):
    def to(self, device: Any) -> Batch:
        return self


@pytest.mark.parametrize("kind", clips.KINDS)
@pytest.mark.parametrize("family", tiny.VIDEO)
def test_a_video_is_asked_about(family: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the video half of the processor, which needs torchvision."""
    model, stock, seen = tiny.make(family), processor(family), []
    steps = 4 // getattr(model.config.vision_config, "temporal_patch_size", 1)

    def call(self: Any, text: str, return_tensors: str, videos: Any, do_sample_frames: bool) -> Any:
        seen.append((stock.video_token in text, [len(video) for video in videos], do_sample_frames))
        return Batch(tiny.build(model, [[3, ("video", steps), 4]]))

    stock.video_processor = object()
    monkeypatch.setattr(type(stock), "__call__", call)
    answerer = asked.Answerer(model, stock, new_tokens=2, frames=4)
    found = answerer(None, str(clips.write(tmp_path, kind)), "w3", "uniform", "{per_frame: 2}")
    assert seen == [(True, [4], False)]
    assert found.rows[0][2] == f"{2 * steps}" and int(found.rows[0][1]) > 2 * steps
    assert found.picture.width > 280, "the frames beside each other"


@needs_gradio
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_videos_have_a_place_where_the_model_takes_them(family: str) -> None:
    blocks = app.page("any", asked.Answerer(tiny.make(family), processor(family), new_tokens=2)).get_config_file()
    (place,) = (part["props"] for part in blocks["components"] if part["type"] == "file")
    assert place["visible"] == tiny.family(family).takes_video and {".mp4", ".webm", ".gif"} <= {*place["file_types"]}


@needs_gradio
def test_the_page_answers_over_http_until_ctrl_c() -> None:
    from gradio_client import Client, handle_file
    from gradio_client.exceptions import AppError

    # A shell may have told its children to ignore it.
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); from vtoken.cli import main; sys.exit(main())"
    words = [sys.executable, "-c", code, "app", "tiny-llava", "--port", "0", "--json"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        client = Client(json.loads(process.stdout.readline())["address"], verbose=False)
        question = reference.questions(1)[0]
        picture = handle_file(str(question.image))
        file, dense, pruned, table, aside = client.predict(
            picture, None, question.question, "fastervlm", "32", api_name="/answer"
        )
        assert (dense, pruned, aside) == ("9", "9", "") and Image.open(file).width == 720
        assert table["headers"] == ["", "dense", "pruned"] and table["data"][0] == ["tokens at entry", "576", "32"]
        with pytest.raises(AppError, match="is not a budget"):
            client.predict(picture, None, question.question, "fastervlm", "many", api_name="/answer")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode in (0, 130) and "Traceback" not in errors
    finally:
        process.kill()
        process.wait()
