"""`vtoken serve`: a model with a pipeline behind an OpenAI-compatible API."""

from __future__ import annotations

import json
import os
import shlex
import socket
from importlib.util import find_spec
from typing import Any

from vtoken.config import Pipeline
from vtoken.errors import UnsupportedError, VtokenError
from vtoken.evals.shared.options import DeviceOptions, argument, as_json, option

DESCRIPTION = """\
Serves a model with a pipeline through transformers' own server: /v1/chat/completions, plain and streamed,
/v1/responses, /v1/models. `usage` tells what pruning left of a prompt. Ctrl-C ends it."""
EXAMPLES = """examples:
  vtoken serve tiny-llava fastervlm:64                                       # the shipped model, on port 8000
  vtoken serve llava-hf/llava-1.5-7b-hf fastervlm-64 --dtype bfloat16        # a model of yours
  vtoken serve Qwen/Qwen2.5-VL-3B-Instruct my-pipeline.yaml --host 0.0.0.0   # for other machines of the network too
  vtoken serve tiny-llava none                                               # dense, to compare
  vtoken serve tiny-llava fastervlm:64 --port 0 --json                       # a free port, for scripts

One request at a time, with every stage there is: for trying and testing. For many requests at once use vLLM; the
command for it is printed, or why vLLM cannot run the pipeline. Needs pip install fastapi uvicorn openai.
"""
NEEDED = ("fastapi", "uvicorn", "openai")
LAST = 5  # seconds that answers in progress have when the server ends


class Settings(DeviceOptions):
    """What is served, and where."""

    model: str = argument("MODEL", "shipped model, folder or hub id; also its name in requests")
    pipeline: str = argument("PIPELINE", "preset, method:budget or YAML file")
    host: str = option("127.0.0.1", "address to listen on", "ADDRESS")
    port: int = option(8000, "port, 0: a free one", ge=0, le=65535)
    in_json: bool = as_json("print address and vLLM command as one JSON object")


def run(asked: Settings) -> None:
    """Loads the model and serves until Ctrl-C."""
    from vtoken.config import load

    pipeline = load(asked.pipeline)
    server, uvicorn = _parts()
    from vtoken.evals import processors
    from vtoken.evals.shared import models

    with _listen(asked.host, asked.port) as listening:
        app, manager = server.app_of(
            asked.model,
            pipeline,
            lambda: models.load(asked.model, asked.device, asked.dtype),
            lambda: processors.load(asked.model),
        )
        (loaded,) = manager.loaded_models.values()
        address = f"http://{_written(*listening.getsockname()[:2])}/v1"
        command, refused = in_vllm(asked.model, asked.pipeline, pipeline, loaded.model.config)
        del loaded  # or a reset could not free it
        if asked.in_json:
            print(json.dumps({"address": address, "vllm": command, "vllm_refused": refused}), flush=True)
        else:
            print(f"serving {asked.model} with {pipeline.name} on {address}, one request at a time; Ctrl-C ends it")
            print(f"in vLLM, for many at once: {command}" if command else f"not in vLLM: {refused}", flush=True)
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=LAST)
        try:
            uvicorn.Server(config).run(sockets=[listening])
        except KeyboardInterrupt:  # raised again when everything is closed
            pass


def in_vllm(model: str, given: str, pipeline: Pipeline, model_config: Any) -> tuple[str | None, str | None]:
    """The command line with which vLLM serves the same pipeline, or else why it cannot.

    Args:
        given: the pipeline as it was written.
        model_config: of the checkpoint.
    """
    from vtoken.evals.shared.configs import locate
    from vtoken.serving import plan

    try:
        return shlex.join(["vllm", "serve", locate(model), *plan.options(pipeline, given, model_config)]), None
    except UnsupportedError as error:
        return None, str(error)


def _parts() -> tuple[Any, Any]:
    """`vtoken.serving.openai_server` and uvicorn."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise VtokenError(f"vtoken serve needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    import transformers
    import uvicorn

    try:
        from vtoken.serving import openai_server
    except (ImportError, NameError) as error:
        raise UnsupportedError(
            f"vtoken serve uses the server parts of transformers 5.14 to 5.24; in {transformers.__version__} one is "
            f"missing: {error}"
        ) from error
    return openai_server, uvicorn


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket, opened before anything is loaded."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        # str(error) would repeat the address; errors about host names have numbers that are not the system's.
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        raise VtokenError(
            f"cannot listen on {_written(host, port)}: {reason}; choose another --port, or 0, or another --host"
        ) from error


def _written(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
