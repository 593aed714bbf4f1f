"""`vtoken serve`: what it refuses before it loads anything, what it prints, and the real server until Ctrl-C."""

from __future__ import annotations

import base64
import json
import shlex
import signal
import socket
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import tiny

import vtoken.serving
from vtoken import config
from vtoken.cli import main
from vtoken.commands import serve
from vtoken.evals import reference
from vtoken.evals.shared import models
from vtoken.serving import plan

MISSING = [name for name in serve.NEEDED if find_spec(name) is None]
needs_parts = pytest.mark.skipif(bool(MISSING), reason=f"not installed: pip install {' '.join(MISSING)}")


def test_without_its_packages_it_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    assert main(["serve", "tiny-llava", "fastervlm:64"]) == 2
    told = "vtoken serve needs fastapi and uvicorn and openai: pip install fastapi uvicorn openai"
    assert capsys.readouterr().err == f"vtoken: error: {told}\n"


@needs_parts
def test_a_transformers_without_a_part_is_one_clear_error(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.delitem(sys.modules, "vtoken.serving.openai_server", raising=False)
    monkeypatch.delattr(vtoken.serving, "openai_server", raising=False)
    monkeypatch.setitem(sys.modules, "transformers.cli.serving.server", None)
    assert main(["serve", "tiny-llava", "fastervlm:64"]) == 2
    error = capsys.readouterr().err
    assert "server parts of transformers 5.14 to 5.24" in error and "transformers.cli.serving.server" in error


@needs_parts
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["tiny-llava", "fastervm:64"], "unknown preset 'fastervm:64', did you mean 'fastervlm-64'"),
        (["tiny-lava", "fastervlm:64"], "unknown model 'tiny-lava', did you mean 'tiny-llava'?"),
        (["tiny-llava", "fastervlm:64", "--device", "tpu"], "'tpu' is not a device"),
        (["tiny-llava", "fastervlm:64", "--dtype", "int3"], "unknown dtype 'int3'"),
        (["tiny-llava", "fastervlm:64", "--port", "70000"], "--port must be at most 65535"),
        (["tiny-llava", "fastervlm:64", "--host", "no.such.host.invalid"], "cannot listen on no.such.host.invalid:0"),
        (["tiny-llava", "fastv:64,layer=99"], "layer"),
    ],
)
def test_what_cannot_be_served_is_one_line(words: list[str], told: str, capsys: Any) -> None:
    assert main(["serve", *words, *([] if "--port" in words else ["--port", "0"])]) == 2
    out, err = capsys.readouterr()
    assert out == "" and told in err and err.splitlines()[-1].startswith("vtoken: error: ")


@needs_parts
def test_a_port_in_use_is_told_before_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(models, "load", lambda *args: pytest.fail("loaded"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", "tiny-llava", "fastervlm:64", "--port", port]) == 2
    told = f"cannot listen on 127.0.0.1:{port}: Address already in use; choose another --port"
    assert told in capsys.readouterr().err


def one(**traits: Any) -> str:
    """A family that vLLM serves, of which all this is true."""
    return next(name for name, held in plan.FAMILIES.items() if all(getattr(held, t) == v for t, v in traits.items()))


PLAIN = one(crops=False, positions="compact")


def in_vllm(family: str, given: str, **fields: Any) -> tuple[str | None, str | None]:
    """For a tiny model of the family whose config has these fields."""
    checkpoint = tiny.make(family).config
    for key, value in fields.items():
        setattr(checkpoint, key, value)
    return serve.in_vllm("me/some-model", given, config.load(given), checkpoint)


def test_the_command_for_vllm_or_why_there_is_none() -> None:
    folder = str(reference.path("tiny-llava"))
    given = "fastervlm:64,positions=compact"
    command, refused = serve.in_vllm("tiny-llava", given, config.load(given), tiny.make("llava").config)
    assert refused is None and command is not None
    words = shlex.split(command)
    assert words[:4] == ["vllm", "serve", folder, "--hf-overrides"] and json.loads(words[4]) == {plan.KEY: given}
    command, refused = in_vllm("llava", "fastv:64")
    assert command is None and refused is not None and "stage fastv cannot be served in vLLM" in refused
    apart = SimpleNamespace(model_type=one(frames_apart=True))
    assert serve.in_vllm("me/some-vl", "none", config.load("none"), apart) == ("vllm serve me/some-vl", None)


@pytest.mark.parametrize(
    ("family", "given", "fields", "told"),
    [
        (PLAIN, "todre:4,layer=99,positions=compact", {}, "layer 99"),
        (one(positions="original"), "todre:4,layer=99", {}, "layer 99"),
        (PLAIN, "fastervlm:4,positions=compact", {"vision_feature_select_strategy": "full"}, "no patches, or fewer"),
        (
            one(tower="vtoken.serving._clip:PackedAsMax9"),
            "fastervlm:4,positions=compact,newline=keep",
            {"vision_aspect_ratio": "anyres_max_2"},
            '"vision_aspect_ratio": "anyres_max_9"',
        ),
        (one(crops=True), "none,anyres=2x2", {}, "uniform:100%"),
    ],
)
def test_no_command_that_vllm_would_refuse(family: str, given: str, fields: dict[str, Any], told: str) -> None:
    command, refused = in_vllm(family, given, **fields)
    assert command is None and refused is not None and told in refused


def test_the_command_leaves_out_videos_where_text_stands_between_their_frames() -> None:
    for given, more in (("uniform:4", ["--limit-mm-per-prompt", '{"video": 0}']), ("uniform:{per_frame: 2}", [])):
        command, _ = in_vllm(one(frames_apart=True), given)
        assert command is not None and shlex.split(command)[5:] == more


@needs_parts
def test_the_server_answers_openais_client_until_ctrl_c() -> None:
    from openai import BadRequestError, OpenAI

    # A shell may have told its children to ignore it.
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); from vtoken.cli import main; sys.exit(main())"
    words = [sys.executable, "-c", code, "serve", "tiny-llava", "fastv:64", "--port", "0", "--json"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        told = json.loads(process.stdout.readline())
        assert told["vllm"] is None and "fastv" in told["vllm_refused"]
        client = OpenAI(base_url=told["address"], api_key="none", max_retries=0)
        (model,) = client.models.list()
        question = reference.questions(4)[3]
        url = "data:image/jpeg;base64," + base64.b64encode(question.image.read_bytes()).decode()
        parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question.question}]
        asked: Any = {
            "model": model.id,
            "messages": [{"role": "user", "content": parts}],
            "temperature": 0,
            "max_tokens": 8,
        }
        with client.chat.completions.create(**asked, stream=True) as left_early:
            next(iter(left_early))
        *chunks, last = client.chat.completions.create(**asked, stream=True)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        found = client.chat.completions.create(**asked)
        assert text.strip() == found.choices[0].message.content and last.usage == found.usage
        assert found.usage is not None and found.usage.prompt_tokens_details is not None
        assert found.usage.prompt_tokens_details.model_extra == {
            "prefilled_tokens": found.usage.prompt_tokens,
            "visual_tokens": 576,
            "kept_visual_tokens": 64,
        }
        with pytest.raises(BadRequestError, match="pinned to 'tiny-llava'"):
            client.chat.completions.create(**{**asked, "model": "gpt2"})
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0 and "Traceback" not in errors
    finally:
        process.kill()
        process.wait()
