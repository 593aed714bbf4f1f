"""vLLM as it is started on a command line: its processes, its server, its refusals."""

from __future__ import annotations

import base64
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("vllm")
from vllm_engine import Transformers, questions

from vtoken.evals import reference

pytestmark = pytest.mark.vllm
ROOT = Path(__file__).parents[2]
MODEL = reference.path("tiny-llava")
PIPELINE = "fastervlm-64"
# As a user has it: the engine is a process of its own.
ENV = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "PYTHONPATH": str(ROOT)}
REFUSED = """
import sys
from vllm import LLM
from vtoken.errors import VtokenError
for pipeline in sys.argv[2:]:
    try:
        LLM(sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=1024, hf_overrides={"vtoken": pipeline})
    except VtokenError as error:
        print(f"{type(error).__name__}: {error}")
"""


def test_refusals_reach_the_caller_before_an_engine_starts():
    asked = ["fastv-64", "random-64", "fastervm-64", "vscan:64,positions=compact"]
    given = [sys.executable, "-c", REFUSED, str(MODEL), *asked]
    done = subprocess.run(given, env=ENV, capture_output=True, text=True, timeout=300, check=False)
    told = [line for line in done.stdout.splitlines() if re.match(r"\w+Error: ", line)]
    words = ["acts at site decoder", 'write --hf-overrides \'{"vtoken": "random-64,positions=compact"}\'']
    words += ["did you mean 'fastervlm-64'", "layer 5; there are 4"]
    assert len(told) == len(asked), done.stderr[-2000:]
    assert all(word in line for word, line in zip(words, told, strict=True)), told
    assert "EngineCore" not in done.stderr + done.stdout


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(MODEL), "--port", str(port)]
    command += ["--hf-overrides", json.dumps({"vtoken": PIPELINE}), "--served-model-name", "tiny", "--dtype", "float32"]
    command += ["--enforce-eager", "--max-model-len", "1024", "--host", "127.0.0.1"]
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as out:
        process = subprocess.Popen(command, env=ENV, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + 300
        while not healthy(address):
            assert process.poll() is None and time.monotonic() < until, log.read_text()[-3000:]
            time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait(60)


def healthy(address):
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def asked(address, question, pictures, **more):
    """What `curl` would send, with pictures as data URLs."""
    data = [base64.b64encode(path.read_bytes()).decode() for path in pictures]
    content = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{each}"}} for each in data]
    message = {"role": "user", "content": [*content, {"type": "text", "text": question}]}
    body = {"model": "tiny", "messages": [message], "max_tokens": 8, "temperature": 0, "add_special_tokens": True}
    request = urllib.request.Request(
        f"{address}/v1/chat/completions",
        data=json.dumps({**body, **more}).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return answer.read().decode()


def test_the_server_answers_and_counts_the_kept_tokens(server):
    wanted = Transformers(MODEL)(PIPELINE, questions("tiny-llava", 6))
    for question, ids, length in zip(reference.questions(6), wanted.ids, wanted.prompt_tokens, strict=True):
        said = json.loads(asked(server, question.question, [question.image], return_token_ids=True))
        assert said["usage"]["prompt_tokens"] == length < 100
        assert said["choices"][0]["token_ids"] == ids


def test_the_server_streams(server):
    question = reference.questions(1)[0]
    lines = asked(
        server, question.question, [question.image], stream=True, stream_options={"include_usage": True}
    ).splitlines()
    parts = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    text = "".join(choice["delta"].get("content") or "" for part in parts for choice in part["choices"])
    assert text.strip() == question.answer
    assert parts[-1]["usage"]["prompt_tokens"] == 74


def test_prompts_fit_that_the_dense_model_would_refuse(server):
    """Three pictures of 576 tokens are more than the 1,024 that the engine takes."""
    question = reference.questions(1)[0]
    said = json.loads(asked(server, question.question, [question.image] * 3))
    assert 3 * 64 < said["usage"]["prompt_tokens"] < 3 * 64 + 20
