"""FLOPs of pipelines on a task, counted on its document with the median of visual tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vtoken.config import Pipeline
from vtoken.errors import VtokenError
from vtoken.evals.cost.flops import account
from vtoken.evals.lmms.prompts import encode, workload
from vtoken.evals.lmms.records import dense_tokens
from vtoken.evals.shared.dense import DENSE
from vtoken.evals.shared.options import Workload

if TYPE_CHECKING:
    from vtoken.evals.lmms.model import VtokenModel


@dataclass(frozen=True)
class Typical:
    """The document that FLOPs are counted on: its prefill as `account` takes it, and the visual tokens of the model."""

    doc: int
    work: Workload
    visual_tokens: int


def cut_anew(model: VtokenModel, documents: Iterable[tuple[str, int]]) -> dict[tuple[str, int], int]:
    """Visual tokens that documents (task, number) have on the stock model, if they were asked on other crops; without
    those that another process answered."""
    found = {}
    for task, doc in documents:
        with suppress(KeyError):
            inputs = encode(model.generator.processor, [model.prompt(task, doc)], model.generator.model)
            found[task, doc] = dense_tokens(model.generator.adapter, inputs)[0].visual_tokens
    return found


def typical(model: VtokenModel, counts: Mapping[tuple[str, int], int]) -> Typical | str:
    """The document with the median of visual tokens, or why the account cannot take it.

    Args:
        model: dense.
        counts: (task, document) -> its visual tokens on this model, of one of lmms-eval's tasks or groups.

    Raises:
        KeyError: another process answered it.
    """
    chosen = sorted(counts, key=lambda document: counts[document])[len(counts) // 2]
    prompt, generator = model.prompt(*chosen), model.generator
    if bool(prompt.images) == bool(prompt.clips):
        return "the prompt shows no picture" if not prompt.images else "the prompt shows pictures and videos"
    inputs = encode(generator.processor, [prompt], generator.model)
    grids = [inputs[key] for key in ("video_grid_thw", "image_grid_thw", "image_sizes") if key in inputs]
    alike = len({i.parts for i in generator.adapter.layouts("image", inputs)}) == 1 if prompt.images else True
    if not alike or any((grid != grid[0]).any() for grid in grids):
        return "the pictures of the prompt differ in size"
    if len({len(clip.frames) for clip in prompt.clips}) > 1:
        return "the videos of the prompt differ in length"
    return Typical(chosen[1], workload(generator.adapter, prompt, inputs), counts[chosen])


def flops(config: Any, pipeline: Pipeline, document: Typical | str) -> dict[str, Any]:
    """FLOPs of the prefill: `doc`, `total`, `language` (the decoder's part), `stages` (facts and decisions); or
    `reason`, why not."""
    if isinstance(document, str):
        return {"reason": document}
    try:
        dense = account(config, DENSE, **vars(document.work))
        counted = account(config, pipeline, **vars(document.work))
    except VtokenError as error:
        return {"doc": document.doc, "reason": str(error)}
    if dense.visual_entry != document.visual_tokens:
        reason = f"the account expects {dense.visual_entry} visual tokens, the model had {document.visual_tokens}"
        return {"doc": document.doc, "reason": reason}
    language = counted.prefill_linear + counted.prefill_attention
    return {"doc": document.doc, "total": counted.total, "language": language, "stages": counted.stages}
