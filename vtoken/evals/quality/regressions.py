"""The documents that pruning lost, and pictures of what was kept of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from vtoken.config import Pipeline
from vtoken.evals.lmms.prompts import Prompt, encode
from vtoken.evals.pictures.overlay import scaled, sheet
from vtoken.evals.pictures.traced import for_page
from vtoken.evals.quality.analysis import read
from vtoken.evals.shared import whole
from vtoken.evals.shared.dense import DENSE
from vtoken.evals.shared.media import Media
from vtoken.session import trace

if TYPE_CHECKING:
    from vtoken.evals.lmms.model import VtokenModel

CASES = 8  # documents; of many pipelines as many as it takes to show all of them
PANELS = 7  # pipelines beside dense, of one document
SIDE = 480  # pixels
Line = Mapping[str, Any]


def lost(folder: Path) -> list[dict[str, Any]]:
    """The documents of a folder of results to be drawn: what `worst` picks."""
    found = read(folder)
    tasks, runs = found.results["tasks"].values(), found.results["runs"]
    pruned = {run["name"]: lines for run, lines in zip(runs, found.lines, strict=True) if run["pipeline"]}
    falls = {leaf: 1.0 if about["higher_is_better"] else -1.0 for about in tasks for leaf in about["leaves"]}
    return worst(found.lines[0], pruned, falls)


def worst(dense: Sequence[Line], pruned: Mapping[str, Sequence[Line]], falls: Mapping[str, float]) -> list[dict]:
    """Picks documents, pipelines in turn, for each the largest loss first; no two show the same pictures.

    Whoever had fewest turns is next, then who was shown least, so that of many pipelines none is shown again before the
    others.

    Args:
        dense: lines of the first dense run, as `results` describes them.
        pruned: name -> lines of a pipeline's run, same documents in the same order.
        falls: task -> 1, or -1 where a lower score is better.

    Returns:
        `task` (the line's), `doc`, and `shown`: at most PANELS pipelines, those that lost the document first.
    """
    losses = {
        name: [_loss(mine, base, falls) for mine, base in zip(lines, dense, strict=True)]
        for name, lines in pruned.items()
    }
    queues = {name: _by_loss(found) for name, found in losses.items()}
    turns, times = dict.fromkeys(losses, 0), dict.fromkeys(losses, 0)
    found: list[dict[str, Any]] = []
    taken: set[int] = set()
    seen: set[str] = set()
    while len(found) < max(CASES, math.ceil(len(losses) / PANELS)):
        for name, queue in queues.items():
            queues[name] = [k for k in queue if k not in taken and dense[k]["media"] not in seen]
        left = [name for name, queue in queues.items() if queue]
        if not left:
            break
        own = min(left, key=lambda name: (turns[name], times[name]))
        k = queues[own][0]
        others = sorted(losses, key=lambda name: (name != own, times[name], losses[name][k] <= 0))[:PANELS]
        shown = sorted(others, key=lambda name: losses[name][k] <= 0)
        taken.add(k)
        turns[own] += 1
        for name in shown:
            times[name] += 1
        if dense[k]["media"] is not None:
            seen.add(dense[k]["media"])
        found.append({"task": dense[k]["task"], "doc": dense[k]["doc"], "shown": shown})
    return found


def _by_loss(losses: Sequence[float]) -> list[int]:
    lost = [k for k, loss in enumerate(losses) if loss > 0]
    return sorted(lost, key=lambda k: -losses[k])


def _loss(mine: Line, base: Line, falls: Mapping[str, float]) -> float:
    if mine["score"] is None or base["score"] is None:
        return 0.0
    return falls.get(mine["task"], 1.0) * (base["score"] - mine["score"])


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
                file = BytesIO()
                picture.save(file, "JPEG", quality=85)
                whole.write(folder / name, file.getvalue())
                case["panels"][pipeline.name] = name
    model.use(DENSE)
    return cases


@torch.inference_mode()
def kept(model: VtokenModel, prompt: Prompt) -> Image.Image | None:
    """The prompt's pictures, or frames of its video, with the tokens that the model's pipeline keeps; None without any,
    or with several kinds."""
    if bool(prompt.images) == bool(prompt.clips) or len(prompt.clips) > 1:
        return None
    media = Media(prompt.images) if prompt.images else Media(prompt.clips[0].frames, video=True)
    generator = model.generator
    if generator.pipeline is None:
        return sheet([scaled(each, SIDE) for each in media.pictures], 2, gap=0 if len(media.pictures) == 1 else 12)
    inputs = encode(generator.processor, [prompt], generator.model)
    generator.model.generate(**inputs, do_sample=False, max_new_tokens=1)
    seen = trace(generator.model)
    tiles = for_page(generator.processor, inputs, media, seen, columns=2)
    return tiles[0] if len(tiles) == 1 else sheet(tiles, 2)
