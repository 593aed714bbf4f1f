"""Answered requests and what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from vtoken.adapters.base import Adapter
from vtoken.hooks.state.run import KINDS, pixels_of
from vtoken.hooks.state.trace import Trace


@dataclass(frozen=True)
class Tokens:
    """Token counts of one row of a batch.

    Attributes:
        prompt_tokens: as tokenised, padding left out.
        input_tokens: of these, what entered the language model.
        visual_tokens: in the prompt, newline tokens not counted.
        visual_tokens_entry: that entered the language model.
        visual_tokens_mean: averaged over its layers.
    """

    prompt_tokens: int
    input_tokens: int
    visual_tokens: int
    visual_tokens_entry: int
    visual_tokens_mean: float


@dataclass(frozen=True)
class Cost(Tokens):
    """What one row of a batch cost.

    Attributes:
        new_tokens: generated, the closing one included.
        batch: rows of the batch.
        preprocess_s: chat template, pictures and their way to the device, of the batch.
        ttft_s: from the call of `generate` to the first token, vision included, of the batch.
        decode_s: from there to the last token of the batch.
        stages: stage, with its layer where it has one -> milliseconds of its decision, of the batch.
    """

    new_tokens: int
    batch: int
    preprocess_s: float
    ttft_s: float
    decode_s: float
    stages: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Reply:
    """One answer."""

    text: str
    cost: Cost


@dataclass(frozen=True)
class Request:
    """One answered document. `repeat` numbers the answers to it; `media` is the fingerprint of what was shown."""

    task: str
    doc: int
    repeat: int
    reply: Reply
    media: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, flat."""
        about = {"task": self.task, "doc": self.doc, "repeat": self.repeat, "answer": self.reply.text}
        return {**about, **vars(self.reply.cost), "media": self.media}


def dense_tokens(adapter: Adapter, inputs: Any) -> list[Tokens]:
    """Tokens of every row where nothing is dropped, from the inputs alone."""
    prompt = inputs["attention_mask"].sum(1).tolist()
    visual = [0] * len(prompt)
    for kind in KINDS:
        if kind not in adapter.placeholders or pixels_of(kind, inputs) is None:
            continue
        layouts = adapter.layouts(kind, inputs)
        ends = list(accumulate(layout.length for layout in layouts))
        row_ends = (adapter.visual_kinds(inputs["input_ids"], None, (kind,)) > 0).sum(1).cumsum(0).tolist()
        for layout, end in zip(layouts, ends, strict=True):
            visual[next(row for row, last in enumerate(row_ends) if end <= last)] += layout.tokens
    return [Tokens(p, p, v, v, float(v)) for p, v in zip(prompt, visual, strict=True)]


def pruned_tokens(inputs: Any, seen: Trace, rows: Sequence[int]) -> list[Tokens]:
    """Tokens of every row, from the trace of its prefill.

    Args:
        rows: the trace's row of each row of the batch (under beam search a row has several, all alike).
    """
    found = []
    for prompt, row in zip(inputs["attention_mask"].sum(1).tolist(), rows, strict=True):
        own = [k for k, of in enumerate(seen.row) if of == row]
        layers = [sum(layer[k] for k in own) for layer in seen.layers]
        visual = sum(seen.visual_tokens[k] for k in own)
        found.append(Tokens(prompt, seen.prompt_tokens[row], visual, layers[0], sum(layers) / len(layers)))
    return found


def stage_times(seen: Trace) -> dict[str, float]:
    """Milliseconds of every decision of a prefill, by stage and layer."""
    found: dict[str, float] = {}
    for stage in seen.stages:
        name = stage.name if stage.layer is None else f"{stage.name}@{stage.layer}"
        found[name] = found.get(name, 0.0) + stage.milliseconds
    return found
