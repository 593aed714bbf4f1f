"""The demo: a reference VLM, dense and pruned, on the shipped questions."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator, Sequence
from datetime import date
from typing import Any

import torch

from vtoken.config import Pipeline
from vtoken.errors import VtokenError
from vtoken.evals import reference
from vtoken.evals.cost.flops import account, picture_size
from vtoken.evals.pictures.demo_pipelines import DemoPipelines, choose, prefill
from vtoken.evals.pictures.report import Case, Panel, Report, Row
from vtoken.evals.pictures.traced import for_page
from vtoken.evals.processors import apply
from vtoken.evals.shared.bars import say
from vtoken.evals.shared.dense import DENSE
from vtoken.evals.shared.machine import processor_name, versions
from vtoken.evals.shared.media import Media, still
from vtoken.session import wrapped

ROUNDS = 21
WARMUP = 2
BATCH = 16
EXAMPLES = 4


def run(
    name: str = "tiny-llava",
    budgets: Sequence[int] | None = None,
    limit: int | None = None,
    everything: bool = False,
    command: str = "vtoken demo",
) -> Report:
    """Scores and times dense and every method at every budget: a few methods, or all there are.

    Args:
        name: a reference model.
        budgets: visual tokens to keep; None takes about 1/9, 1/18 and 1/36 of those of the first picture.
        limit: the first so many questions only.
        everything: every stage that runs on the model; kept tokens are then shown on one picture only.
        command: how the report says it was made.
    """
    model, processor = reference.load(name)
    questions = reference.questions(limit)
    prompts = [inputs_of(processor, q) for q in questions[:ROUNDS]]
    total = sum(prefill(model, DENSE, prompts[0]).visual_tokens)
    budgets = sorted(set(budgets or default_budgets(total)), reverse=True)
    if not 1 <= budgets[-1] <= budgets[0] <= total:
        raise VtokenError(f"budgets must lie between 1 and {total}, the visual tokens of {name}")
    compared = choose(model, prompts[0], budgets, everything)
    pipelines = compared.pipelines

    share = 1 / (len(pipelines) * (len(questions) + WARMUP + ROUNDS))
    done = 0
    answers: dict[str, list[str]] = {}
    for label, pipeline in pipelines.items():

        def answered(count: int, _: int, label: str = label, before: int = done) -> None:
            say(label, (before + count) * share)

        with wrapped(model, pipeline):
            answers[label] = reference.answers(model, processor, questions, batch_size=BATCH, progress=answered)
        done += len(questions)
    seconds: dict[str, list[float]] = {label: [] for label in pipelines}
    for turn, label, taken in time_to_first_token(model, pipelines, prompts):
        seconds[label] += [taken] * (turn >= 0)
        done += 1
        say("time to first token", done * share)
    rows = [
        Row(
            pipeline=label,
            method=label.partition(":")[0],
            scores=reference.score(questions, answers[label]),
            ttft=seconds[label],
            **cost(model, pipeline, prompts[0]),
        )
        for label, pipeline in pipelines.items()
    ]
    shown = {label: pipelines[label] for label in compared.shown}
    cases = tuple(
        case(model, processor, shown, questions[k], {label: answers[label][k] for label in shown})
        for k in examples(questions, 1 if everything else EXAMPLES)
    )
    about = conditions(model, command, len(questions), len(prompts))
    return Report(name, tuple(rows), cases, about | differences(model, compared, prompts[0]))


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
    model: Any, pipelines: dict[str, Pipeline], prompts: Sequence[Any]
) -> Iterator[tuple[int, str, float]]:
    """Round (below 0: warm-up), pipeline, and the seconds of `generate` up to one new token.

    All pipelines run in every round on the same prompt and in rotating order, so that a drift of the machine hits all
    alike. Wrapping and preprocessing are not timed.
    """
    order = list(pipelines)
    for turn in range(-WARMUP, ROUNDS):
        for label in order:
            with wrapped(model, pipelines[label]):
                start = time.perf_counter()
                model.generate(**prompts[turn % len(prompts)], do_sample=False, max_new_tokens=1)
                yield turn, label, time.perf_counter() - start
        order.append(order.pop(0))


@torch.inference_mode()
def cost(model: Any, pipeline: Pipeline, prompt: Any) -> dict[str, int]:
    """`tokens`, `flops`, `language_flops` and `cache_bytes` of one prefill: tokens and bytes are measured, FLOPs
    counted.

    Raises:
        VtokenError: what was measured differs from the account of a plan that is exact.
    """
    placeholders = int((prompt["input_ids"] == model.config.image_token_id).sum())
    text = prompt["input_ids"].shape[1] - placeholders
    size = picture_size(model.config, prompt)
    plan = account(model.config, pipeline, image_size=size, text_tokens=text, new_tokens=1)
    seen = prefill(model, pipeline, prompt)
    tokens, cache_bytes = [sum(layer) for layer in seen.layers], seen.cache_bytes
    newlines = seen.prompt_tokens[0] - text - tokens[0]
    # The plan knows all figures but one: of the newline tokens it has an expectation only.
    slots = sum(text + n + line for n, line in zip(plan.visual_tokens, plan.newline_tokens, strict=True))
    planned = plan.kv_bytes_prefill * sum(text + n + newlines for n in plan.visual_tokens) // slots
    if not plan.inexact and (tokens, cache_bytes) != (list(plan.visual_tokens), planned):
        raise VtokenError(
            f"{plan.pipeline}: planned {list(plan.visual_tokens)} visual tokens per layer and {planned} cache bytes, "
            f"measured {tokens} and {cache_bytes}"
        )
    language = plan.prefill_linear + plan.prefill_attention
    mean = round(sum(tokens) / len(tokens))
    return {"tokens": mean, "flops": plan.total, "language_flops": language, "cache_bytes": cache_bytes}


def examples(questions: Sequence[reference.Question], count: int) -> list[int]:
    """Which questions are shown: from every next picture the next kind, so nothing is picked by result."""
    by_picture: dict[Any, list[int]] = {}
    for k, question in enumerate(questions):
        by_picture.setdefault(question.image, []).append(k)
    return [group[turn % len(group)] for turn, group in enumerate([*by_picture.values()][:count])]


@torch.inference_mode()
def case(
    model: Any,
    processor: Any,
    pipelines: dict[str, Pipeline],
    question: reference.Question,
    answers: dict[str, str],
) -> Case:
    """One question with what every pipeline kept of its picture and answered."""
    prompt, picture, panels = inputs_of(processor, question), still(question.image), []
    for label, pipeline in pipelines.items():
        seen = prefill(model, pipeline, prompt) if pipeline.stages else None
        (shown,) = for_page(processor, prompt, Media((picture,)), seen, columns=1)
        right = bool(reference.score([question], [answers[label]])[question.kind][0])
        panels.append(Panel(label, answers[label], right, shown))
    return Case(question.question, question.answer, tuple(panels))


def conditions(model: Any, command: str, questions: int, prompts: int) -> dict[str, str]:
    """What a reader needs to run it again."""
    size = sum(p.numel() for p in model.parameters()) / 1e6
    return {
        "date": date.today().isoformat(),
        "command": command,
        "machine": f"{processor_name()}, {os.cpu_count()} CPUs, torch threads: {torch.get_num_threads()}, "
        f"{platform.system()}",
        "versions": versions(),
        "model": f"{size:.1f} M parameters, {str(model.dtype).removeprefix('torch.')}, on {model.device}",
        "accuracy": f"first {questions} questions of the held-out set, exact match, greedy, batch {BATCH}",
        "timing": f"{ROUNDS} rounds over {prompts} questions after {WARMUP} for warm-up, pipelines interleaved, batch "
        "1",
        "seed": "random keeps the same cells in every picture (seed 0); nothing else is random",
    }


def differences(model: Any, compared: DemoPipelines, prompt: Any) -> dict[str, str]:
    """Facts that this model replaced by others, options that are not the defaults, and methods that were left out."""
    traces = [prefill(model, pipeline, prompt) for pipeline in compared.pipelines.values()]
    facts = {
        f"{stage.name}: {given} for {asked}"
        for seen in traces
        for stage in seen.stages
        for asked, given in stage.substitutes.items()
    }
    options = (f"{m}: {name}={value}" for m, own in compared.options.items() for name, value in own.items())
    found = {
        "facts": f"{', '.join(sorted(facts))} (the model has no other)" if facts else "",
        "options": "; ".join(options),
        "left out": "; ".join(f"{method}: {reason}" for method, reason in compared.left_out.items()),
    }
    return {key: text for key, text in found.items() if text}
