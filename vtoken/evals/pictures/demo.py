"""The demo: the reference VLM, dense and pruned, on the shipped questions."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from datetime import date
from typing import Any

import torch
import transformers
from PIL import Image

import vtoken
from vtoken.config import Pipeline, load
from vtoken.errors import VtokenError
from vtoken.evals import reference
from vtoken.evals.cost.flops import account
from vtoken.evals.pictures.demo_pipelines import applied, choose, prefill
from vtoken.evals.pictures.overlay import drawn, owners, views
from vtoken.evals.pictures.report import Case, Panel, Report, Row
from vtoken.evals.processors import apply
from vtoken.evals.shared.media import Media, still

ROUNDS = 21
WARMUP = 2
BATCH = 16
EXAMPLES = 4
Progress = Callable[[str, float], None]


def run(
    name: str = "tiny-llava",
    budgets: Sequence[int] | None = None,
    limit: int | None = None,
    everything: bool = False,
    command: str = "vtoken demo",
    progress: Progress = lambda what, share: None,
) -> Report:
    """Scores and times dense and every method at every budget: a few methods, or all there are.

    Args:
        name: a shipped reference model.
        budgets: visual tokens to keep; None takes about 1/9, 1/18 and 1/36 of those of the first picture.
        limit: the first so many questions only.
        everything: every stage that runs on the model; kept tokens are then shown on one picture only.
        command: how the report says it was made.
        progress: called with what is being done and the share of the work that is done.

    Raises:
        VtokenError: a budget that does not fit, or a trace that disagrees with the plan.
    """
    if limit is not None and limit < 1:
        raise VtokenError(f"the limit must be at least 1 question, not {limit}")
    model, processor = reference.load(name)
    questions = reference.questions(limit)
    prompts = [inputs_of(processor, q) for q in questions[:ROUNDS]]
    total = sum(prefill(model, load("none"), prompts[0]).visual_tokens)
    budgets = sorted(set(budgets or default_budgets(total)), reverse=True)
    if not 1 <= budgets[-1] <= budgets[0] <= total:
        raise VtokenError(f"budgets must lie between 1 and {total}, the visual tokens of {name}")
    compared = choose(model, prompts[0], budgets, everything)
    pipelines = compared.pipelines

    work = len(pipelines) * (len(questions) + WARMUP + ROUNDS)
    done = 0

    def advance(what: str, by: int) -> None:
        nonlocal done
        done += by
        progress(what, done / work)

    answers: dict[str, list[str]] = {}
    for label, pipeline in pipelines.items():
        before = done

        def answered(count: int, _: int, label: str = label, before: int = before) -> None:
            advance(label, before + count - done)

        with applied(model, pipeline):
            answers[label] = reference.answers(model, processor, questions, batch_size=BATCH, progress=answered)

    seconds = time_to_first_token(model, pipelines, prompts, lambda: advance("time to first token", 1))
    rows = [
        Row(
            pipeline=label,
            method=label.partition(":")[0],
            scores=reference.score(questions, answers[label]),
            ttft=tuple(seconds[label]),
            **cost(model, pipeline, prompts[0]),
        )
        for label, pipeline in pipelines.items()
    ]
    shown = {label: pipelines[label] for label in compared.shown}
    cases = tuple(
        case(model, processor, shown, question, {label: answers[label][k] for label in shown})
        for k, question in examples(questions, 1 if everything else EXAMPLES)
    )
    about = conditions(model, command, len(questions), len(prompts))
    about |= stand_ins(model, pipelines, prompts[0])
    if compared.options:
        about["options"] = "; ".join(
            f"{method}: {name}={value}"
            for method, options in compared.options.items()
            for name, value in options.items()
        )
    if compared.left_out:
        about["left out"] = "; ".join(f"{method}: {reason}" for method, reason in compared.left_out.items())
    return Report(name, tuple(rows), cases, about)


def default_budgets(total: int) -> tuple[int, int, int]:
    """Powers of two near 1/9, 1/18 and 1/36 of the visual tokens: 64, 32 and 16 of 576."""
    most = max(4, 1 << (total // 9).bit_length() - 1)
    return most, most // 2, most // 4


def inputs_of(processor: Any, question: reference.Question) -> Any:
    """Model inputs of one question, batch 1."""
    text = reference.prompt(processor, question)
    return apply(processor, str(question.image), images=still(question.image), text=text)


@torch.inference_mode()
def time_to_first_token(
    model: Any, pipelines: dict[str, Pipeline | None], prompts: Sequence[Any], step: Callable[[], None]
) -> dict[str, list[float]]:
    """Seconds of `generate` up to one new token, for every pipeline one number per round.

    All pipelines run in every round on the same prompt and in rotating order, so that a drift of the machine hits all alike.
    Wrapping and preprocessing are not timed.
    """
    seconds: dict[str, list[float]] = {label: [] for label in pipelines}
    order = list(pipelines)
    for turn in range(-WARMUP, ROUNDS):
        prompt = prompts[turn % len(prompts)]
        for label in order:
            with applied(model, pipelines[label]):
                start = time.perf_counter()
                model.generate(**prompt, do_sample=False, max_new_tokens=1)
                seconds[label].append(time.perf_counter() - start)
            step()
        order.append(order.pop(0))
    return {label: values[WARMUP:] for label, values in seconds.items()}


@torch.inference_mode()
def cost(model: Any, pipeline: Pipeline | None, prompt: Any) -> dict[str, int]:
    """`tokens`, `flops`, `language_flops` and `cache_bytes` of one prefill: tokens and bytes are measured, FLOPs counted.

    Raises:
        VtokenError: what was measured differs from the account of the plan. A stage without a budget is spared: how many tokens a
            filter drops may depend on the picture.
    """
    placeholders = int((prompt["input_ids"] == model.config.image_token_id).sum())
    text = prompt["input_ids"].shape[1] - placeholders
    plan = account(model.config, pipeline, image_size=image_size(model.config, prompt), text_tokens=text, new_tokens=1)
    if pipeline is None:
        layers = model(**prompt, use_cache=True).past_key_values.layers
        cache_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
        newlines = plan.newline_entry
        tokens = [placeholders - newlines] * len(layers)
    else:
        seen = prefill(model, pipeline, prompt)
        tokens, cache_bytes = [sum(layer) for layer in seen.layers], seen.cache_bytes
        newlines = seen.prompt_tokens[0] - text - tokens[0]
    # The plan knows all figures but one: of the newline tokens it has an expectation only.
    slots = sum(text + n + line for n, line in zip(plan.visual_tokens, plan.newline_tokens, strict=True))
    planned = plan.kv_bytes_prefill * sum(text + n + newlines for n in plan.visual_tokens) // slots
    promised = pipeline is None or all("keep" in type(stage).model_fields for stage in pipeline.stages)
    if promised and (tokens, cache_bytes) != (list(plan.visual_tokens), planned):
        raise VtokenError(
            f"{plan.pipeline}: planned {list(plan.visual_tokens)} visual tokens per layer and {planned} cache bytes, "
            f"measured {tokens} and {cache_bytes}"
        )
    language = plan.prefill_linear + plan.prefill_attention
    mean = round(sum(tokens) / len(tokens))
    return {"tokens": mean, "flops": plan.total, "language_flops": language, "cache_bytes": cache_bytes}


def image_size(config: Any, prompt: Any) -> tuple[int, int] | None:
    """(height, width) in pixels of a prompt's picture as the account takes it; None where the model resizes every picture."""
    if "image_grid_thw" in prompt:
        _, rows, columns = prompt["image_grid_thw"][0].tolist()
        return rows * config.vision_config.patch_size, columns * config.vision_config.patch_size
    if "image_sizes" in prompt:
        height, width = prompt["image_sizes"][0].tolist()
        return height, width
    return None


def examples(questions: Sequence[reference.Question], count: int) -> list[tuple[int, reference.Question]]:
    """Place and question of the shown examples: from every next picture the next kind, so nothing is picked by result."""
    by_picture: dict[Any, list[int]] = {}
    for k, question in enumerate(questions):
        by_picture.setdefault(question.image, []).append(k)
    groups = list(by_picture.values())[:count]
    return [(k, questions[k]) for k in (group[turn % len(group)] for turn, group in enumerate(groups))]


@torch.inference_mode()
def case(
    model: Any,
    processor: Any,
    pipelines: dict[str, Pipeline | None],
    question: reference.Question,
    answers: dict[str, str],
) -> Case:
    """One question with what every pipeline kept of its picture and answered."""
    prompt = inputs_of(processor, question)
    picture = still(question.image)
    panels = []
    for label, pipeline in pipelines.items():
        if pipeline is None:
            shown = picture.resize((480, round(480 * picture.height / picture.width)), Image.Resampling.BICUBIC)
        else:
            seen = prefill(model, pipeline, prompt)
            (rasters,) = views(processor, prompt.get("pixel_values"), Media((picture,)), seen.parts)
            # The page scales pictures to about 260 pixels; labels of several rasters must stay legible there.
            side = 480 if len(rasters) == 1 else 240
            shown = drawn(rasters, seen.parts[0], seen.kept[0], owners(seen, 0), side=side, columns=1)
        right = bool(reference.score([question], [answers[label]])[question.kind][0])
        panels.append(Panel(label, answers[label], right, shown))
    return Case(question.question, question.answer, tuple(panels))


def conditions(model: Any, command: str, questions: int, prompts: int) -> dict[str, str]:
    """What a reader needs to run it again."""
    size = sum(p.numel() for p in model.parameters()) / 1e6
    return {
        "date": date.today().isoformat(),
        "command": command,
        "machine": f"{processor_name()}, {os.cpu_count()} CPUs, torch threads: {torch.get_num_threads()}, {platform.system()}",
        "versions": f"vtoken {vtoken.__version__}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"Python {platform.python_version()}",
        "model": f"{size:.1f} M parameters, {str(model.dtype).removeprefix('torch.')}, on {model.device}",
        "accuracy": f"first {questions} questions of the held-out set, exact match, greedy, batch {BATCH}",
        "timing": f"{ROUNDS} rounds over {prompts} questions after {WARMUP} for warm-up, pipelines interleaved, batch 1",
        "seed": "random keeps the same cells in every picture (seed 0); nothing else is random",
    }


def stand_ins(model: Any, pipelines: dict[str, Pipeline | None], prompt: Any) -> dict[str, str]:
    """Facts that this model replaced by others, for the conditions."""
    traces = [prefill(model, pipeline, prompt) for pipeline in pipelines.values() if pipeline is not None]
    found = {
        f"{stage.name}: {given} for {asked}"
        for seen in traces
        for stage in seen.stages
        for asked, given in stage.substitutes.items()
    }
    return {"facts": f"{', '.join(sorted(found))} (the model has no other)"} if found else {}


def processor_name() -> str:
    """The CPU's name as the system gives it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as info:
            return next(line.partition(":")[2].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
