"""An OpenAI-compatible server around a wrapped model, built from transformers' own parts.

The parts are in `transformers.cli.serving`, which promises no stability: only this file depends on them. Requests run
one after the other, each as a call of `model.generate`, so every stage that works there works here.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextvars import ContextVar
from importlib import import_module
from inspect import Parameter, signature
from typing import Any

import transformers
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from openai.types import CompletionUsage
from transformers import image_utils
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import GenerationState

from vtoken.config import Pipeline
from vtoken.errors import UnsupportedError, VtokenError
from vtoken.session import match_processor, trace, wrap

# Arguments of `build_server` that are built here, and others -> module and class of transformers' own handler. Some
# releases lack the last.
OURS = ("model_manager", "chat_handler", "generation_state")
OTHERS = {
    "completion_handler": ("completion", "CompletionHandler"),
    "response_handler": ("response", "ResponseHandler"),
    "transcription_handler": ("transcription", "TranscriptionHandler"),
    "systemone_handler": ("systemone", "SystemOneHandler"),
}

# transformers uses this name for the package that fetches pictures, whichever it is.
_FETCHES: Any = getattr(image_utils, "httpx", None)
NOT_FETCHED = () if _FETCHES is None else (_FETCHES.HTTPError, _FETCHES.InvalidURL)


def app_of(
    name: str, pipeline: Pipeline, load_model: Callable[[], Any], load_processor: Callable[[], Any]
) -> tuple[FastAPI, OneModel]:
    """The server, with the model loaded and wrapped, and the manager that holds the model.

    Args:
        name: name of the model for clients.
        load_model, load_processor: called now, and again at the first request after a `/reset`.

    Raises:
        UnsupportedError: the stages do not fit the model, or this version of transformers has other server parts.
    """
    known = signature(build_server).parameters
    needed = {key for key, parameter in known.items() if parameter.default is Parameter.empty}
    if not {*OURS} <= known.keys() or not needed <= {*OURS, *OTHERS}:
        raise UnsupportedError(
            f"vtoken serve does not know the server parts of transformers {transformers.__version__} (it knows those "
            "of 5.14 to 5.24): build_server takes " + ", ".join(known)
        )
    manager, state = OneModel(name, pipeline, load_model, load_processor), GenerationState()
    given: dict[str, Any] = dict(zip(OURS, (manager, Chat(manager, state), state), strict=True))
    for key, (module, handler) in OTHERS.items():
        if key in known:
            given[key] = getattr(import_module(f"transformers.cli.serving.{module}"), handler)(manager, state)
    app = build_server(**given)
    for kind in (VtokenError, HTTPException, ValueError, *NOT_FETCHED):  # ValueError: an unreadable picture
        app.add_exception_handler(kind, _refused)
    return app, manager


class OneModel(ModelManager):
    """Holds the one model that is served, and wraps it whenever it is loaded."""

    def __init__(
        self, name: str, pipeline: Pipeline, load_model: Callable[[], Any], load_processor: Callable[[], Any]
    ) -> None:
        self.name, self.pipeline, self.loaders = name, pipeline, (load_model, load_processor)
        self.since = int(time.time())
        super().__init__(force_model=name)

    def _load_model(self, *args: Any, **kwargs: Any) -> Any:
        return wrap(self.loaders[0](), self.pipeline)

    def _load_processor(self, *args: Any, **kwargs: Any) -> Any:
        return self.loaders[1]()

    def load_model_and_processor(self, model_id_and_revision: str, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """As in transformers, but `/load_model` may not name another model.

        Raises:
            UnsupportedError: it names another model.
        """
        if model_id_and_revision != self.process_model_name(self.name):
            raise UnsupportedError(f"this server answers with {self.name!r} alone, not with {model_id_and_revision!r}")
        model, processor = super().load_model_and_processor(model_id_and_revision, *args, **kwargs)
        if self.pipeline.anyres != "model":
            match_processor(processor, model)
        return model, processor

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:  # type: ignore[override]
        """What `/v1/models` lists: the name to use in requests (transformers lists everything in its cache)."""
        return [{"id": self.name, "object": "model", "owned_by": "vtoken", "created": self.since}]

    @staticmethod
    def get_model_modality(model: Any, processor: Any = None) -> Any:
        return ModelManager.get_model_modality(model.wrapped if isinstance(model, Asked) else model, processor)


class Asked:
    """The model as seen by one request; stores what its prefill kept of the prompt. The thread that generates reads the
    trace, because another request may run before the `usage` of the answer is written."""

    def __init__(self, model: Any, traced: bool) -> None:
        self.wrapped, self.traced = model, traced
        self.counts: dict[str, int] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.wrapped, name)

    def generate(self, streamer: Any = None, **inputs: Any) -> Any:
        if streamer is None:
            ids = self.wrapped.generate(**inputs)
            self.count()
            return ids
        try:
            return self.wrapped.generate(streamer=Stream(self, streamer), **inputs)
        except VtokenError as error:
            # The handler puts the message between quotation marks without escaping it.
            raise VtokenError(json.dumps(str(error))[1:-1]) from error

    def count(self) -> None:
        """Reads the trace of the calling thread."""
        seen = trace(self.wrapped) if self.traced else None
        if seen is None or not seen.prompt_tokens:
            return  # a prompt without pictures
        mine = [i for i, row in enumerate(seen.row) if row == 0]
        kept = seen.tokens_out
        self.counts = {
            "prefilled_tokens": seen.prompt_tokens[0],
            "visual_tokens": sum(seen.visual_tokens[i] for i in mine),
            "kept_visual_tokens": sum(kept[i] for i in mine),
        }


class Stream:
    """A streamer that counts tokens before it ends, because the handler then writes `usage`."""

    def __init__(self, asked: Asked, streamer: Any) -> None:
        self.asked, self.put, self.finish = asked, streamer.put, streamer.end

    def end(self) -> None:
        self.asked.count()
        self.finish()


_ASKED: ContextVar[Asked] = ContextVar("_ASKED")


class Chat(ChatCompletionHandler):
    """Answers chat completions; `usage.prompt_tokens_details` reports what pruning kept."""

    model_manager: OneModel

    def _resolve_model(self, body: dict[str, Any]) -> tuple[str, Any, Any]:
        check_messages(body.get("messages"))
        name, model, processor = super()._resolve_model(body)
        asked = Asked(model, bool(self.model_manager.pipeline.stages))
        _ASKED.set(asked)
        return name, asked, processor

    def _build_completion(self, *args: Any, **kwargs: Any) -> Any:
        return super()._build_completion(*args, **detailed(kwargs))

    def _build_chunk_sse(self, *args: Any, **kwargs: Any) -> Any:
        return super()._build_chunk_sse(*args, **detailed(kwargs))


def check_messages(messages: Any) -> None:
    """Refuses with status 400 what transformers would fail at: no messages, parts without type, text or URL."""
    if not messages or not isinstance(messages, list) or not all(isinstance(each, dict) for each in messages):
        raise HTTPException(400, 'messages must be a list of at least one, as in {"role": "user", "content": "hi"}')
    parts = [part for each in messages if isinstance(each.get("content"), list) for part in each["content"]]
    for part in parts:
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise HTTPException(400, 'parts of a content are objects with a type, as in {"type": "text", "text": "hi"}')
        kind, given = part["type"], part.get(part["type"])
        if kind == "text" and not isinstance(given, str):
            raise HTTPException(400, 'text needs a text, as in {"type": "text", "text": "hi"}')
        url = given.get("url") if isinstance(given, dict) else given if kind == "image_url" else None
        if kind in ("image_url", "video_url") and not isinstance(url, str):
            form = {"type": kind, kind: {"url": "https://..."}}
            raise HTTPException(400, f"{kind} needs a url, as in {json.dumps(form)}")


def detailed(answer: dict[str, Any]) -> dict[str, Any]:
    """The arguments of an answer; its `usage`, if any, is extended by the token counts of this request's prefill."""
    usage, counts = answer.get("usage"), _ASKED.get().counts
    if usage is None or not counts:
        return answer
    usage_fields = {**usage.model_dump(), "prompt_tokens_details": counts}
    return {**answer, "usage": CompletionUsage.model_validate(usage_fields)}


async def _refused(request: Request, error: Exception) -> JSONResponse:
    """The reason why transformers, a stage or the model refused this request, where OpenAI's clients look for it."""
    message, status = (error.detail, error.status_code) if isinstance(error, HTTPException) else (str(error), 400)
    return JSONResponse({"error": {"message": message, "type": "invalid_request_error"}}, status_code=status)
