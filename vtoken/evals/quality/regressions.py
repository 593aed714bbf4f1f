"""The documents that pruning lost, and pictures of what was kept of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from vtoken.config import Pipeline
from vtoken.evals.lmms.prompts import Prompt, encode
from vtoken.evals.pictures.overlay import encoded, sheet
from vtoken.evals.pictures.traced import for_page
from vtoken.evals.quality.analysis import loss, read, sign
from vtoken.evals.shared import whole
from vtoken.evals.shared.dense import DENSE
from vtoken.evals.shared.media import Media
from vtoken.session import trace

if TYPE_CHECKING:
    from vtoken.evals.lmms.model import VtokenModel

CASES = 8  # documents; of many pipelines as many as it takes to show all of them
PANELS = 7  # pipelines beside dense, of one document
Line = Mapping[str, Any]


def lost(folder: Path) -> list[dict[str, Any]]:
    """What `worst` picks of the documents of a folder of results."""
    found = read(folder)
    tasks, runs = found.results["tasks"].values(), found.results["runs"]
    pruned = {run["name"]: lines for run, lines in zip(runs, found.lines, strict=True) if run["pipeline"]}
    return worst(found.lines[0], pruned, {leaf: sign(about) for about in tasks for leaf in about["leaves"]})


def worst(dense: Sequence[Line], pruned: Mapping[str, Sequence[Line]], signs: Mapping[str, float]) -> list[dict]:
    """Picks documents, pipelines in turn, for each the largest loss first; no two show the same pictures.

    The next turn goes to the pipeline that had fewest, and of these to the one that was shown least often, so that of
    many pipelines none is shown again before the others.

    Args:
        dense: lines of the first dense run, as `results` describes them.
        pruned: name -> lines of a pipeline's run, same documents in the same order.
        signs: task -> what `analysis.sign` says of it.

    Returns:
        `task` (the line's), `doc`, and `shown`: at most PANELS pipelines, those that lost the document first.
    """
    losses = {
        name: [loss(mine, base, signs) for mine, base in zip(lines, dense, strict=True)]
        for name, lines in pruned.items()
    }
    shows = [line["media"] or k for k, line in enumerate(dense)]  # a document without pictures is like no other
    queues = {}
    for name, lost in losses.items():
        queues[name] = sorted((k for k, much in enumerate(lost) if much > 0), key=lost.__getitem__, reverse=True)
    turns, times = dict.fromkeys(losses, 0), dict.fromkeys(losses, 0)
    found: list[dict[str, Any]] = []
    seen: set[Any] = set()
    while len(found) < max(CASES, math.ceil(len(losses) / PANELS)):
        queues = {name: [k for k in queue if shows[k] not in seen] for name, queue in queues.items()}
        left = [name for name, queue in queues.items() if queue]
        if not left:
            break
        own = min(left, key=lambda name: (turns[name], times[name]))
        k = queues[own][0]
        others = sorted(losses, key=lambda name: (name != own, times[name], losses[name][k] <= 0))[:PANELS]
        shown = sorted(others, key=lambda name: losses[name][k] <= 0)
        seen.add(shows[k])
        turns[own] += 1
        for name in shown:
            times[name] += 1
        found.append({"task": dense[k]["task"], "doc": dense[k]["doc"], "shown": shown})
    return found


def draw(
    model: VtokenModel, pipelines: Sequence[Pipeline], chosen: Sequence[Mapping[str, Any]], folder: Path
) -> list[dict[str, Any]]:
    """Asks the chosen documents once more and writes what was kept of them to DIR/cases/.

    Args:
        pipelines: dense first.

    Returns:
        What `cases` of results.json holds.
    """
    cases = [{"task": case["task"], "doc": case["doc"], "panels": {}} for case in chosen]
    try:
        for k, pipeline in enumerate(pipelines):
            model.use(pipeline)
            for n, (case, given) in enumerate(zip(cases, chosen, strict=True)):
                if k and pipeline.name not in given["shown"]:
                    continue
                picture = kept(model, model.prompt(case["task"], case["doc"]))
                case["panels"][pipeline.name] = None
                if picture is not None:
                    name = f"cases/{n}-{k}.jpg"
                    (folder / "cases").mkdir(exist_ok=True)
                    whole.write(folder / name, encoded(picture, "JPEG"))
                    case["panels"][pipeline.name] = name
    finally:
        model.use(DENSE)
    return cases


@torch.inference_mode()
def kept(model: VtokenModel, prompt: Prompt) -> Image.Image | None:
    """The prompt's pictures, or frames of its video, with the tokens that the model's pipeline keeps (all, if it has no
    stages); None without any, or with several kinds."""
    if bool(prompt.images) == bool(prompt.clips) or len(prompt.clips) > 1:
        return None
    media = Media(prompt.images) if prompt.images else Media(prompt.clips[0].frames, video=True)
    generator, seen = model.generator, None
    inputs = encode(generator.processor, [prompt], generator.model)
    if generator.pipeline is not None and generator.pipeline.stages:
        generator.model.generate(**inputs, do_sample=False, max_new_tokens=1)
        seen = trace(generator.model)
    return sheet(for_page(generator.processor, inputs, media, seen, columns=2), 2)
