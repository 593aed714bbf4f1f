"""Digits in one frame of a video, dense and with every stage that leaves visual tokens out of attention, of the cache
or of what is read of it: `python benchmarks/needle.py [PIPELINE ...]`. Markdown to stdout, a heat map of length and
depth to --out; an hour on one core.

Whoever answers finds two digits among a thousand visual tokens (reference_models/needle.py). The first is said by the
prefill, which no stage of the cache touches; the other one shows what the cache, or what is read of it, has left. All
pipelines are asked the same questions. Without PIPELINE these are the presets with a stage at one of SITES, whatever
stages there are, and what BESIDE names. `min_len` is set to 0, for the videos are shorter than what it waits for. What
does not run on the model is said below the table.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, product
from pathlib import Path
from statistics import fmean
from textwrap import fill
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # Runs from a checkout that is not installed, too.

import torch

import vtoken
from reference_models.needle import DEPTHS, LENGTHS, Needle, needle
from vtoken import registry
from vtoken.config import Pipeline, load
from vtoken.errors import VtokenError
from vtoken.evals import reference
from vtoken.evals.shared.dense import DENSE
from vtoken.evals.shared.machine import machine
from vtoken.evals.statistics import wilson
from vtoken.session import watched

MODEL = "tiny-qwen2.5-vl"
SITES = ("attention", "cache", "decode")
TITLE = 28  # characters that are as wide as a map
# Published budgets are for longer prompts; these leave something out of a short one, too.
BESIDE: dict[str, Any] = {
    "snapkv, 10 %": {"snapkv": {"keep": "10%"}},
    "kvpress KnormPress, 50 %": {"kvpress": {"press": "KnormPress", "compression_ratio": 0.5}},
    "kvpress KeyDiffPress, 50 %": {"kvpress": {"press": "KeyDiffPress", "compression_ratio": 0.5}},
    "adakv, 64": {"adakv": {"keep": 64}},
    "task_kv, 60 %": {"task_kv": {"keep": "60%", "beta": 0, "least": 0}},
    "streaming_cache, 16 + 64": {"streaming_cache": {"sink": 16, "recent": 64}},
    "streaming_cache, 16 + 64, compensated": {"streaming_cache": {"sink": 16, "recent": 64, "compensate": True}},
    "bilevel_kv, 2 frames": {"bilevel_kv": {"frames": 2, "top": 4}},
    "bilevel_kv, 2 frames, all pooled": {"bilevel_kv": {"frames": 2, "top": 0}},
    "chunk_prefill, 4 frames": {"chunk_prefill": {"frames": 4, "previous": 1}},
    "quest, 128": {"quest": {"keep": 128}},
    "tidal, 64": {"tidal": {"keep": 64, "layer": 2}},
    "recycled, 128": {"recycled": {"keep": 128, "every": 2}},
    "static_sparse, 64 + 256": {"static_sparse": {"sink": 64, "window": 256, "size": 64}},
    "flexprefill, from 128": {"flexprefill": {"gamma": 0.9, "tau": 0.1, "min_budget": 128, "size": 64}},
    "proxyattn, from 128": {"proxyattn": {"min_budget": 128, "size": 64}},
}


@dataclass
class Answers:
    """What a pipeline said.

    Attributes:
        right: (length, depth) -> one entry per question; cached: length -> bytes of the cache when the prefill ended;
            density: length -> share of the causal blocks, mean over stages that say one.
        refused: why it does not run on the model; aside: why a stage did nothing.
    """

    pipeline: Pipeline | None
    right: dict[tuple[int, int], list[bool]] = field(default_factory=dict)
    cached: dict[int, list[int]] = field(default_factory=dict)
    density: dict[int, list[float]] = field(default_factory=dict)
    refused: str = ""
    aside: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.pipeline.name if self.pipeline else "dense"

    def at(self, length: int) -> list[bool]:
        return [each for (n, _), found in self.right.items() if n == length for each in found]


def pipelines() -> Iterator[Pipeline]:
    """Those that are asked when none are named."""
    for name in registry.presets():
        try:
            found = load(name)
        except VtokenError:
            continue  # it needs a file
        if any(stage.site in SITES for stage in found.stages):
            yield found
    for name, stage in BESIDE.items():
        if next(iter(stage)) in registry.stages():
            yield replace(load([stage]), name=name)


def short(pipeline: Pipeline) -> Pipeline:
    """The same for prompts of any length."""
    stages = (
        stage.model_copy(update={"min_len": 0}) if "min_len" in type(stage).model_fields else stage
        for stage in pipeline.stages
    )
    return replace(pipeline, stages=tuple(stages))


def prompt(model: Any, processor: Any, asked: Needle) -> dict[str, Any]:
    """Arguments of `generate`: the frames as a video, each of them two of the model's, which it merges. Pictures pass
    through Pillow, so that no torchvision is needed."""
    seen = processor.image_processor(images=list(asked.frames), return_tensors="pt")
    grid = seen["image_grid_thw"]
    count = int(grid.prod(1).sum()) // processor.image_processor.merge_size**2
    message = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": asked.question}]}
    (text,) = processor.apply_chat_template([[message]], add_generation_prompt=True)
    token = processor.tokenizer.convert_ids_to_tokens(model.config.video_token_id)
    ids = processor.tokenizer(text.replace(token, token * count), return_tensors="pt", add_special_tokens=False)
    ids = ids["input_ids"]
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": 2 * (ids == model.config.video_token_id),
        "pixel_values_videos": seen["pixel_values"],
        "video_grid_thw": torch.tensor([[len(grid), *grid[0, 1:].tolist()]]),
        "second_per_grid_ts": torch.ones(1),
    }


@torch.inference_mode()
def ask(model: Any, processor: Any, inputs: dict[str, Any], asked: Needle, of: Answers, cell: tuple[int, int]) -> None:
    """Enters one answer, or why there is none."""
    try:
        with watched(model, short(of.pipeline) if of.pipeline else DENSE):
            out = model.generate(**inputs, do_sample=False, max_new_tokens=5)
            seen = vtoken.trace(model)
    except (VtokenError, ImportError, ValueError) as error:
        of.refused = str(error).splitlines()[0]
        return
    (said,) = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    of.right.setdefault(cell, []).append(said.split() == asked.answer.split())
    of.cached.setdefault(cell[0], []).append(seen.cache_bytes)
    of.aside |= seen.aside
    if seen.density:
        of.density.setdefault(cell[0], []).append(fmean(seen.density.values()))


def table(found: Sequence[Answers], lengths: Sequence[int]) -> str:
    """Recall per length and in all, the cache at the longest, and what of attention was computed there."""
    dense, last = found[0], lengths[-1]
    heads = ("pipeline", *(f"{n} frames" for n in lengths), "all", f"cache at {last}", f"attention at {last}")
    lines = [heads, ("---", *["---:"] * (len(heads) - 1))]
    for one in found:
        if one.refused or not one.right:
            continue
        every = [each for cell in one.right.values() for each in cell]
        low, high = wilson(sum(every), len(every))
        cells = [f"{fmean(one.at(n)):.0%}" for n in lengths]
        share = fmean(one.cached[last]) / fmean(dense.cached[last])
        density = f"{fmean(one.density[last]):.0%}" if last in one.density else ""
        lines.append((one.name, *cells, f"{fmean(every):.1%} ({low:.0%}–{high:.0%})", f"{share:.1%}", density))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(found: Sequence[Answers], lengths: Sequence[int], file: Path) -> None:
    """A map of length and depth for every pipeline."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ran = [one for one in found if one.right and not one.refused]
    columns = min(5, len(ran))
    rows = -(-len(ran) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(2.3 * columns, 2.2 * rows), squeeze=False)
    for axis, one in zip(axes.flat, ran, strict=False):
        cells = [[fmean(one.right[n, depth]) for n in lengths] for depth in DEPTHS]
        axis.imshow(cells, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        for (row, column), share in zip(product(range(len(DEPTHS)), range(len(lengths))), chain(*cells), strict=True):
            shade = "black" if 0.2 < share < 0.8 else "white"  # the ends of the scale are dark
            axis.text(column, row, f"{share:.0%}", ha="center", va="center", fontsize=6, color=shade)
        axis.set_title(fill(one.name.replace(",", ", "), TITLE), fontsize=8)
        axis.set_xticks(range(len(lengths)), lengths, fontsize=7)
        axis.set_yticks(range(len(DEPTHS)), [f"{depth} %" for depth in DEPTHS], fontsize=7)
    for axis in axes.flat[len(ran) :]:
        axis.axis("off")
    figure.supxlabel("frames", fontsize=8)
    figure.supylabel("place of the digits", fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def saved(found: Sequence[Answers], conditions: dict[str, Any]) -> str:
    """All single answers as JSON."""
    rows = [
        {
            "pipeline": one.name,
            "right": {f"{n} frames, {depth} %": each for (n, depth), each in one.right.items()},
            "held": one.cached,
            "density": one.density,
            "refused": one.refused,
            "aside": one.aside,
        }
        for one in found
    ]
    return json.dumps({"conditions": conditions, "rows": rows}, indent=1) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipelines", nargs="*", metavar="PIPELINE", help="default: presets with a stage of these sites")
    parser.add_argument("--model", default=MODEL, metavar="NAME", help="one that reads videos (default: %(default)s)")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS), metavar="N", help="frames")
    parser.add_argument("--each", type=int, default=4, metavar="N", help="questions per length and depth")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="default: %(default)s")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads of torch (default: torch's choice)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all answers here, as they come")
    parser.add_argument("--out", type=Path, metavar="FILE", help="PNG of the maps")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    model, processor = reference.load(args.model, device=args.device)
    asked = [load(each) for each in args.pipelines] or list(pipelines())
    found = [Answers(None), *map(Answers, asked)]
    conditions = {**machine(model), "model": args.model, "questions": f"{args.each} per length and depth"}
    for length in args.lengths:
        for depth in DEPTHS:
            for number in range(args.each):
                drawn = needle(length, depth, number)
                inputs = {k: v.to(model.device) for k, v in prompt(model, processor, drawn).items()}
                for one in found:
                    if not one.refused:
                        ask(model, processor, inputs, drawn, one, (length, depth))
            if args.json:
                args.json.write_text(saved(found, conditions))
    print(table(found, args.lengths), end="\n\n")
    for one in found:
        if one.refused:
            print(f"- {one.name} did not run: {one.refused}")
        for name, why in one.aside.items():
            print(f"- {one.name}: {name} stood aside, {why}")
    print("\n" + "; ".join(f"{name}: {value}" for name, value in conditions.items()))
    if args.out:
        draw(found, args.lengths, args.out)


if __name__ == "__main__":
    main()
