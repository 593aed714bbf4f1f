"""Kept embeddings of pictures as they enter the language model, for an engine that takes embeddings."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vtoken.errors import UnsupportedError, either
from vtoken.hooks.call.min_tokens import pictured
from vtoken.hooks.state.handle import Handle
from vtoken.hooks.state.left_padding import SlotLayout
from vtoken.hooks.state.prefill_state import PrefillState
from vtoken.serving import plan
from vtoken.session import Session, session_of, whole

BEFORE = ("pixels", "frames", "encoder", "tokens")  # sites before the language model


def embeddings(model: Any, inputs: Mapping[str, Any]) -> list[Tensor]:
    """Kept embeddings of every picture, for a stock vLLM that was started with `--enable-mm-embeds`.

    Runs the vision tower and the pipeline, but not the decoder. Adaptive stages and those that read the prompt work:
    they read `inputs`, so send the embeddings with the same prompt.

    Args:
        model: wrapped LLaVA-1.5, LLaVA-NeXT or LLaVA-OneVision, with stages before the decoder and `positions:
            compact`, which is how vLLM numbers tokens.
        inputs: from the processor, [B, L] `input_ids` and pixels; a batch may hold several prompts and pictures.

    Returns:
        For each picture, in the order of the prompts, [K, D] in the model's dtype and on its device: merged and
            projected, including newline tokens that stay. vLLM takes `{"image": e[None]}` as `multi_modal_data`.
            vLLM 0.32 fails if the pictures of one step differ in K.

    Raises:
        UnsupportedError: the model is not wrapped, belongs to another family, has positions other than compact, or
            stages that act in the decoder or its cache; the inputs hold no picture, or a video.
    """
    session = _checked(model)
    if "video" in pictured(dict(inputs)):
        raise UnsupportedError("vLLM takes no embeddings of videos; give pictures alone")
    inner, entrance = whole(model), Handle()
    device = inner.get_input_embeddings().weight.device
    given = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    mine = threading.get_ident()

    def stop(module: Any, args: tuple, kwargs: dict) -> None:
        """Runs after vtoken's own hook on the language model. Other threads may run the model meanwhile."""
        if threading.get_ident() == mine:
            raise _Entered(kwargs["inputs_embeds"])

    entrance.before(session.context.lm, stop)
    try:
        with torch.no_grad():
            inner(**given, use_cache=False)
    except _Entered as entered:
        return _pictures(session.context.run.flow, entered.embeds)
    finally:
        entrance.release()
        session.context.handle.switch.off()
        session.context.run.flow = None
        session.context.run.forget()
    raise AssertionError("the language model was not called")


class _Entered(Exception):
    """Ends a forward when it reaches the decoder."""

    def __init__(self, embeds: Tensor) -> None:
        self.embeds = embeds


def _checked(model: Any) -> Session:
    session = session_of(model)
    if session is None or session.boundary is None:
        raise UnsupportedError("the model is not wrapped with a pipeline that has stages: vtoken.wrap(model, ...)")
    family = session.adapter.model_type
    # With M-RoPE, vLLM derives the number of placeholders from the size of the picture.
    taken = [name for name, served in plan.FAMILIES.items() if served.positions == "compact"]
    if family not in taken:
        raise UnsupportedError(
            f"vLLM takes kept embeddings of {either(taken)}, not of {family}; serve the pipeline with vLLM's plugin or "
            "with `vtoken serve`"
        )
    for stage in session.pipeline.stages:
        if stage.site not in BEFORE:
            raise UnsupportedError(
                f"stage {stage.name} acts at site {stage.site}, after the embeddings; {plan.ELSEWHERE}"
            )
    if session.pipeline.positions != "compact":
        raise UnsupportedError(
            "vLLM numbers the embeddings without gaps; wrap the model with positions: compact, as in "
            f'"{session.pipeline.name},positions=compact"'
        )
    return session


def _pictures(flow: Any, embeds: Tensor) -> list[Tensor]:
    """[K, D] per picture, from embeddings [B, P, D] in the layout of the prefill."""
    if not isinstance(flow, PrefillState):
        raise UnsupportedError("the inputs hold no picture; give what the processor makes of text and images")
    spans, left = flow.spans, flow.left()
    visual = torch.zeros_like(left)
    visual[spans.batch_row, spans.column] = True
    if spans.newlines is not None:
        visual[spans.newlines.batch_row, spans.newlines.column] = True
    at_home = SlotLayout(flow.index, flow.valid, flow.index).restore(embeds, left.shape[1])
    lengths = [layout.length for layout in spans.layouts]
    by_picture = zip(at_home[visual].split(lengths), left[visual].split(lengths), strict=True)
    return [there[kept] for there, kept in by_picture]
