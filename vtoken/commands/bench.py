"""`vtoken bench`: what a pipeline saves in time and memory, and what it costs above the ideal."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtoken.errors import ConfigError
from vtoken.evals.shared.options import FRAMES, VIDEO, BenchOptions, ModelCommand, argument, option

if TYPE_CHECKING:
    from vtoken.config import Pipeline
    from vtoken.evals.shared.media import Media
    from vtoken.evals.speed.break_even import Measured, Step
    from vtoken.evals.speed.drafted import Drafted
    from vtoken.evals.speed.latency import Bench, Row
    from vtoken.evals.statistics import Spread

DESCRIPTION = "Latency and memory of dense, pipelines and their oracles, interleaved in one process."
EXAMPLES = """\
examples:
  vtoken bench tiny-llava fastervlm:64
      the shipped model on this machine, dense and pruned
  vtoken bench llava-hf/llava-1.5-7b-hf fastervlm:64 uniform:64 --batch 8 --dtype bfloat16
      two pipelines on one model, eight prompts at a time
  vtoken bench llava-hf/llava-1.5-7b-hf fastervlm:64 --random-weights --device cuda --dtype bfloat16
      7B shapes without a download: latency does not depend on what the weights say
  vtoken bench Qwen/Qwen2.5-VL-3B-Instruct fastervlm:128 --random-weights --image-size 448x672 --frames 8
      a video of random pixels
  vtoken bench tiny-qwen2.5-vl vidcom2:25% --media clip.mp4 --frames 8
      a video of yours, which matters to methods whose counts depend on what they see (needs PyAV and torchvision)
  vtoken bench tiny-llava my_pipeline.yaml --repeats 21 --json | jq '.rows[1].to_oracle.ttft'
      the overhead alone
  vtoken bench llava-hf/llava-1.5-7b-hf flowcut-64 fastv-64 --break-even --random-weights --device cuda --dtype bfloat16
      from how many visual tokens each is faster than dense on this machine, and the line for its file
  vtoken bench tiny-llava specvlm-90 random:10% none --drafts --new-tokens 16
      the model drafts for itself under each: how many drafts are accepted, and decoding against plain decoding

Dense, pipelines and oracles run interleaved in one process. The oracle is the same unwrapped model on a prompt that is
short already: pipeline / oracle is what vtoken itself costs. TTFT runs from the call to the first token, vision
included. The KV cache is that of the whole batch, after the prefill and at the end; what a step reads of it is that of
one row, the mean over the answer, without the weights, which every step reads besides. Numbers are medians,
[25 % - 75 %] below; ratios are formed within a round. Visual tokens are those of the whole batch that enter the
decoder, and their mean over its layers.
"""

# Column -> its cell; _spread and the others stand below.
COLUMNS: dict[str, Callable[[Row], str]] = {
    "pipeline": lambda row: row.name,
    "visual tokens": lambda row: str(row.visual_entry),
    "over layers": lambda row: f"{row.visual_average:.1f}".removesuffix(".0"),
    "vision ms": lambda row: _spread(row.milliseconds["vision"], 2),
    "stages ms": lambda row: _spread(row.milliseconds["stages"], 2),
    "TTFT ms": lambda row: _spread(row.milliseconds["ttft"], 2),
    "decode ms/token": lambda row: _spread(row.milliseconds["decode"], 2),
    "end to end ms": lambda row: _spread(row.milliseconds["end_to_end"], 2),
    "peak memory": lambda row: "" if row.peak_bytes is None else _bytes(row.peak_bytes),
    "KV cache": lambda row: _bytes(row.kv_bytes),
    "at the end": lambda row: _bytes(row.kv_bytes_end),
    "KV read/token": lambda row: "" if row.kv_bytes_read is None else _bytes(row.kv_bytes_read),
    "TTFT / dense": lambda row: _spread((row.to_dense or {}).get("ttft"), 3),
    "TTFT / oracle": lambda row: _spread((row.to_oracle or {}).get("ttft"), 3),
    "end / dense": lambda row: _spread((row.to_dense or {}).get("end_to_end"), 3),
    "end / oracle": lambda row: _spread((row.to_oracle or {}).get("end_to_end"), 3),
    "break-even tokens": lambda row: "" if row.break_even is None else str(row.break_even),
}


ENOUGH = 4  # rounds, so that each quarter holds one


class Settings(BenchOptions, ModelCommand):
    """What is measured, on what."""

    pipelines: tuple[str, ...] = argument("PIPELINE", "preset, method:budget or YAML file", ())
    threads: int | None = option(None, "CPU threads of torch (default: torch's choice)", ge=1)
    media: Path | None = option(None, f"in place of random pixels: a picture file, or a video: {VIDEO}", "IMAGE")
    random_weights: bool = option(False, "build the model from its config; nothing is downloaded")
    break_even: bool = option(
        False,
        "longer and longer prompts instead: from how many visual tokens on each pipeline is faster than dense, end to "
        "end",
    )
    drafts: bool = option(
        False, "pipelines of drafts instead: acceptance, and time against plain decoding, in turns (batch 1)"
    )
    draft_model: str | None = option(None, "with --drafts: the checkpoint that drafts (default: the model itself)")
    up_to: int = option(4608, "visual tokens of the longest prompt of --break-even", ge=1)


def run(asked: Settings) -> None:
    """Measures and prints."""
    from vtoken.config import load
    from vtoken.evals.shared import models
    from vtoken.evals.shared.media import read
    from vtoken.evals.speed.drafted import check, measure
    from vtoken.evals.speed.latency import bench

    if asked.break_even and (asked.images > 1 or asked.media or not asked.pipelines):
        raise ConfigError(
            "--break-even compares pipelines over more and more images: name some, and leave --images and --media out"
        )
    if (asked.drafts and (asked.break_even or not asked.pipelines)) or (asked.draft_model and not asked.drafts):
        raise ConfigError("--drafts compares pipelines of a draft with plain decoding: name some, without --break-even")
    if asked.drafts:
        check(asked)
    if asked.media and asked.image_size:
        raise ConfigError("--media has a size of its own: leave --image-size out")
    pipelines = [load(each) for each in asked.pipelines]  # A typing error must not cost the loading of a model.
    models.set_threads(asked.threads)
    media = read([asked.media], asked.frames if asked.frames > 1 else FRAMES) if asked.media else None
    load_model = partial(
        models.load, device=asked.device, dtype=asked.dtype, random_weights=asked.random_weights, seed=asked.seed
    )
    model = load_model(asked.model)
    found: Bench | Measured | Drafted
    if asked.drafts:
        other = load_model(asked.draft_model) if asked.draft_model else None
        found = measure(model, pipelines, other, **_options(asked, media))
    elif asked.break_even:
        found = _break_even(model, pipelines, asked)
    else:
        found = bench(model, pipelines, **_options(asked, media))
        if media is not None:
            found = replace(found, conditions=found.conditions | {"media": str(asked.media)})
    weights = "random" if asked.random_weights else "as loaded"
    if asked.in_json:
        print(json.dumps({"model": asked.model, "weights": weights, **found.to_dict()}))
    else:
        _print(asked.model, weights, found)


def _options(asked: Settings, media: Media | None) -> dict[str, Any]:
    """The options of a measurement, with the pictures of --media."""
    from vtoken.evals import processors
    from vtoken.evals.speed.inputs import prepared

    options = asked.model_dump(include=set(BenchOptions.model_fields))
    if media is None:
        return options
    pictures = prepared(media, processors.load(asked.model), asked.batch, asked.images)
    return options | {"pictures": pictures, "frames": len(media.pictures)}


def _break_even(model: Any, pipelines: list[Pipeline], asked: Settings) -> Measured:
    from vtoken.evals.speed.break_even import lengths, measure

    tried = lengths(model.config, asked.up_to, asked.image_size, asked.frames)
    options = asked.model_dump(include=set(BenchOptions.model_fields) - {"images", "image_size"})
    return measure(model, pipelines, tried, **options)


def _print(name: str, weights: str, found: Bench | Measured | Drafted) -> None:
    from vtoken.evals.shared.tables import show
    from vtoken.evals.speed.drafted import Drafted
    from vtoken.evals.speed.latency import Bench

    if isinstance(found, Drafted):
        show(f"{name} and its drafts", drafted(found), width=160, lines=True)
        print(f"weights: {weights}", *_conditions(found.conditions), sep="\n")
        return
    if isinstance(found, Bench):
        show(name, cells(found), width=280, lines=True)  # Folded cells would be hard to read in a file.
        print(f"weights: {weights}", *notes(found), sep="\n")
        return
    rows = [("visual tokens", *found.steps)]
    for steps in zip(*found.steps.values(), strict=True):
        rows.append((str(steps[0].visual_tokens), *map(_against_dense, steps)))
    show(f"{name}: end to end / dense", rows, width=160)
    for pipeline in found.steps:
        print(_advice(pipeline, found))
    print(*filter(None, [found.stopped]), f"weights: {weights}", *_conditions(found.conditions), sep="\n")


def drafted(found: Drafted) -> list[tuple[str, ...]]:
    """Head and rows as text."""
    head = (
        "draft",
        "accepted",
        "tokens per step",
        "decode ms/token",
        "decode / plain",
        "end to end / plain",
        "answers",
    )
    rows: list[tuple[str, ...]] = [head, ("plain decoding", "", "1", _spread(found.plain, 2), "", "", "")]
    for row in found.rows:
        ratios = [_spread(row.to_plain[part], 3) for part in ("decode", "end_to_end")]
        same = "the same" if row.same else "differ"
        accepted = (f"{row.acceptance:.1%}", f"{row.per_step:.2f}")
        rows.append((row.name, *accepted, _spread(row.decode, 2), *ratios, same))
    return rows


def _against_dense(step: Step) -> str:
    if step.aside is not None:
        return "did nothing"
    return _spread(step.end_to_end, 3).replace("\n", " ") + (" faster" if step.faster else "")


def _advice(name: str, found: Measured) -> str:
    """What the numbers say, and the line of YAML that follows from it."""
    steps, least = found.steps[name], found.least(name)
    if not steps:
        return f"{name}: nothing was measured"
    longest = f"{steps[-1].visual_tokens} visual tokens, the longest measured"
    if all(step.aside is not None for step in steps):
        return f"{name}: did nothing at any length measured, up to {longest}: {steps[-1].aside}"
    if least is None and any(step.faster for step in steps):
        return f"{name}: faster than dense at some lengths, but not at {longest}"
    if least is None:
        return f"{name}: not faster than dense at any length measured, up to {longest}"
    shorter = [step.visual_tokens for step in steps if step.visual_tokens < least]
    below = f"not at {shorter[-1]}" if shorter else "the shortest measured"
    return (
        f"{name}: faster than dense from {least} visual tokens on ({below}); for its file:\nmin_visual_tokens: {least}"
    )


def cells(measured: Bench) -> list[tuple[str, ...]]:
    """Head and rows as text; columns that are empty throughout are left out."""
    from vtoken.evals.shared.tables import table

    rows = table(COLUMNS, measured.rows)
    used = [any(row[column] for row in rows[1:]) for column in range(len(COLUMNS))]
    return [tuple(cell for cell, use in zip(row, used, strict=True) if use) for row in rows]


def markdown(measured: Bench) -> str:
    """The table in Markdown, notes below."""
    from vtoken.evals.shared import tables

    table = tables.markdown([[cell.replace("\n", " ") for cell in row] for row in cells(measured)], numbers=True)
    return "\n".join([table, "", *(f"- {note}" for note in notes(measured))])


def notes(measured: Bench) -> list[str]:
    """Conditions, and what is not in the table and why."""
    found, rows = _conditions(measured.conditions), measured.rows
    if measured.drift is not None:
        found.append(f"drift: dense end to end, second half of the rounds / first: {measured.drift:.3f}")
    if all(row.peak_bytes is None for row in rows):
        found.append("peak memory: not measured on a CPU, where one process has no figure per pipeline")
    found += [f"{row.name}: {name} stood aside, {why}" for row in rows for name, why in row.stood_aside.items()]
    found += [
        f"{row.name}: {name} computed {share:.1%} of its layers' attention at prefill"
        for row in rows
        for name, share in row.density.items()
    ]
    return found + [f"{row.name}: no oracle, {row.no_oracle}" for row in rows if row.no_oracle]


def _conditions(conditions: dict[str, Any]) -> list[str]:
    """A line for each condition, and a warning where rounds are few."""
    found = [f"{name.replace('_', ' ')}: {value}" for name, value in conditions.items()]
    if conditions.get("repeats", ENOUGH) < ENOUGH:
        found.append(f"quartiles of fewer than {ENOUGH} rounds are drawn between single ones; take more --repeats")
    return found


def _spread(value: Spread | None, digits: int) -> str:
    return "" if value is None else f"{value.median:.{digits}f}\n[{value.low:.{digits}f} - {value.high:.{digits}f}]"


def _bytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"
