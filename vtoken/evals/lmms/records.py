"""What is known about one request and what a run writes: the schema of `vtoken eval --out DIR`.

`DIR/requests/K-NAME.jsonl`, one file per run, one line per (task, document), fields of `Request` plus

    pipeline        name of the run: "dense", or the pipeline's; K tells runs of one name apart
    question        what the task asks, without chat template
    target          what the task expects, as it writes it
    score           the document's own number in the task's metric, null where the metric has none per document
    scores          every number the scorer gave for the document
    same_as_dense   whether the answer is the first dense run's, letter by letter
    doc_hash        sha256 of the document, media aside
    media           sha256 over the pictures and frames shown, null without any: questions about one picture share it
    stages          stage (with its layer, "fastv@2") -> milliseconds that its decision took, of the batch; empty for dense

`DIR/results.json`, rewritten after every run:

    schema          "vtoken-eval/1"
    complete        false until the last run is done
    model, command  what was asked for
    conditions      versions, commit, device, dtype, attention, pixels, frames, batch size, limit, seeds
    tasks           name -> metric, scale (what 100 % is), higher_is_better, leaves (the tasks of a group, else itself),
                    docs, hash (sha256 over the documents in order), version and generation options of each leaf
    runs            in the order they ran, the first and the last dense: name, pipeline (YAML, null for dense), requests (file), and
                    tasks: name -> value, of_dense (value / first dense value), metrics (leaf -> every number), same_as_dense (share),
                    visual_tokens, visual_tokens_entry, visual_tokens_mean, input_tokens, new_tokens (means per document),
                    ttft_s, decode_s, preprocess_s (medians over documents), ttft_to_dense (median of the ratios document by document),
                    stages (stage -> median milliseconds), flops (counted, of the prefill of the task's document with the median
                    of visual tokens, which `doc` names: total, language, stages; or `reason` where it cannot be counted)
    cases           documents that pipelines lost against dense, worst first: task, doc, and panels: run's name -> JPEG under
                    `DIR/cases/` with the tokens it kept (dense: the pictures), null where nothing can be drawn
    drift           last dense run against the first: ttft (median ratio), answers_changed (documents)
    speed           what `vtoken bench --json` prints, of a sweep with a speed pass, else null

`vtoken sweep` writes the same, and beside it `DIR/points/KEY.json`: one file per pipeline and task, from which the rest is put
together; KEY is a hash of everything that decides the numbers.

`DIR/scorers/K-NAME/TASK/` holds what a scorer wrote into the folder it ran in, if anything.

Seconds are those of the whole batch a document was in; only at batch size 1 are they the document's own. For a comparison of
speed take `vtoken bench`, which interleaves what it compares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from vtoken.adapters.base import Adapter
from vtoken.hooks.state.run import KINDS
from vtoken.hooks.state.trace import Trace

SCHEMA = "vtoken-eval/1"


@dataclass(frozen=True)
class Cost:
    """What one row of a batch cost.

    Attributes:
        prompt_tokens: as tokenised, padding left out.
        input_tokens: of these, what entered the language model.
        visual_tokens: in the prompt, newline tokens not counted.
        visual_tokens_entry: that entered the language model.
        visual_tokens_mean: averaged over its layers.
        new_tokens: generated, the closing one included.
        batch: rows of the batch.
        preprocess_s: chat template, pictures and their way to the device, of the batch.
        ttft_s: from the call of `generate` to the first token, vision included, of the batch.
        decode_s: from there to the last token of the batch.
        stages: stage, with its layer where it has one -> milliseconds of its decision, of the batch.
    """

    prompt_tokens: int
    input_tokens: int
    visual_tokens: int
    visual_tokens_entry: int
    visual_tokens_mean: float
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
    """One answered document. `repeat` counts answers to the same one, `media` tells apart what was shown."""

    task: str
    doc: int
    repeat: int
    reply: Reply
    media: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, flat."""
        about = {"task": self.task, "doc": self.doc, "repeat": self.repeat, "answer": self.reply.text}
        return {**about, **vars(self.reply.cost), "media": self.media}


@dataclass(frozen=True)
class Tokens:
    """Of one row: as in Cost."""

    prompt: int
    entered: int
    visual: int
    entry: int
    mean: float


def dense_tokens(adapter: Adapter, inputs: Any) -> list[Tokens]:
    """Tokens of every row where nothing is dropped, from the inputs alone."""
    prompt = inputs["attention_mask"].sum(1).tolist()
    visual = [0] * len(prompt)
    for kind in KINDS:
        placeholder = adapter.placeholders.get(kind)
        if placeholder is None or f"pixel_values{'_videos' if kind == 'video' else ''}" not in inputs:
            continue
        layouts = adapter.layouts(kind, inputs)
        ends = list(accumulate(layout.length for layout in layouts))
        row_ends = (inputs["input_ids"] == placeholder).sum(1).cumsum(0).tolist()
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
