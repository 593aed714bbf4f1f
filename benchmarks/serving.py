"""Dense against pruned in one vLLM engine, in turns, and a load with cancellations: `python benchmarks/serving.py`, in
the environment of `make test-vllm`. Markdown to stdout, a few minutes.

One engine serves all pipelines here, which a user's would not: the model's hooks and the config's key are swapped
between turns, so that nothing but the pipeline differs. Ratios are medians over rounds of a pipeline's time to that of
the dense model in the same round.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # Runs from a checkout that is not installed, too.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # one process, whose model is at hand
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

PIPELINES = ("uniform:64", "fastervlm:64", "visionzip:64,heads=4", "divprune:64", "flowcut:64", "fastervlm:25%")
AT_ONCE = (1, 4, 16)
TOKENS = 8
Seconds = tuple[float, float]  # on the clock, and on the CPU


class Engine:
    """vLLM on a folder, and prompts about the shipped pictures."""

    def __init__(self, folder: Path) -> None:
        from vllm import LLM

        from vtoken.evals import reference
        from vtoken.evals.shared.media import still

        limits = {"max_model_len": 1024, "limit_mm_per_prompt": {"image": 3}, "enforce_eager": True}
        self.llm = LLM(str(folder), dtype="float32", hf_overrides={"vtoken": None}, **limits)
        self.config = self.llm.llm_engine.model_config.hf_config
        (self.model,) = self.llm.apply_model(lambda model: model)
        processor = reference.processor(reference.path())
        self.requests = [
            {
                "prompt": reference.prompt(processor, q),
                "multi_modal_data": {"image": still(q.image)},
            }
            for q in reference.questions(96)[::3]
        ]

    def swap(self, stage: str | None) -> None:
        """Takes another pipeline; nothing is cached from before."""
        from vtoken.serving import plan

        self.config.vtoken = stage and {"positions": "compact", "stages": [stage]}
        self.model.install(plan.pipeline_of(self.config))
        self.forget()

    def forget(self) -> bool:
        """Empties the caches; whether no KV block was in use."""
        self.llm.llm_engine.reset_mm_cache()
        self.llm.llm_engine.reset_encoder_cache()
        return bool(self.llm.reset_prefix_cache())

    def seconds(self, requests: list[Any], tokens: int) -> tuple[tuple[float, float], int]:
        """Of these requests at once, on the clock and on the CPU, and tokens of the first prompt."""
        from vllm import SamplingParams

        asked = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        start = time.perf_counter(), time.process_time()
        done = self.llm.generate(requests, asked, use_tqdm=False)
        taken = time.perf_counter() - start[0], time.process_time() - start[1]
        return taken, len(done[0].prompt_token_ids)


def turns(engine: Engine, rounds: int, pipelines: Sequence[str], at_once: Sequence[int]) -> None:
    """The table of times."""
    order: list[str | None] = [None, *pipelines]
    first: dict[Any, list[Seconds]] = {case: [] for case in order}
    whole: dict[Any, list[Seconds]] = {(case, n): [] for case in order for n in at_once}
    prompt = {}
    for turn in range(-1, rounds):  # the first round warms up
        for case in order:
            engine.swap(case)
            k = turn % len(engine.requests)
            alone, prompt[case] = engine.seconds(engine.requests[k : k + 1], 1)
            many = {}
            for n in at_once:
                engine.forget()
                many[n], _ = engine.seconds((engine.requests * 2)[k : k + n], TOKENS)
            if turn >= 0:
                first[case].append(alone)
                for n in at_once:
                    whole[case, n].append(many[n])
        order.append(order.pop(0))
    print(f"| pipeline | prompt tokens | TTFT | {' | '.join(f'{n} at once' for n in at_once)} |")
    print(f"| --- | ---: | ---: | {' | '.join('---:' for _ in at_once)} |")
    for case in (None, *pipelines):
        cells = [
            f"{1e3 * statistics.median(wall for wall, _ in first[case]):.0f} ms, {against(first[case], first[None])}"
        ]
        for n in at_once:
            rate = n / statistics.median(wall for wall, _ in whole[case, n])
            cells.append(f"{rate:.1f}/s, {against(whole[case, n], whole[None, n])}")
        print(f"| {case or 'dense'} | {prompt[case]} | {' | '.join(cells)} |")


def against(own: list[Seconds], dense: list[Seconds]) -> str:
    """Medians of the ratios, on the clock and, in brackets, on the CPU, which others on the machine disturb less."""
    pairs = list(zip(own, dense, strict=True))
    wall, cpu = (statistics.median(a[k] / b[k] for a, b in pairs) for k in range(2))
    return f"x{wall:.2f} (x{cpu:.2f})"


def load(engine: Engine, requests: int) -> None:
    """Requests of one to three pictures of several sizes, and some without, of which every fifth is cancelled on its
    way; twice, so that what is left behind by the first pass shows in the second."""
    from vllm import SamplingParams

    engine.swap("fastervlm:64")
    core = engine.llm.llm_engine
    asked = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    for turn in range(2):
        waiting = [mixed(engine, k) for k in range(requests)]
        finished, cancelled, step = set[str](), set[str](), 0
        while waiting or core.has_unfinished_requests():
            for _ in range(min(3, len(waiting))):
                name = f"{turn}-{requests - len(waiting)}"
                core.add_request(name, waiting.pop(0), asked)
                if int(name.split("-")[1]) % 5 == 4:
                    cancelled.add(name)
            finished |= {out.request_id for out in core.step() if out.finished}
            step += 1
            if step % 2 == 0 and cancelled - finished:
                core.abort_request([*(cancelled - finished)])
        lost = {f"{turn}-{k}" for k in range(requests)} - finished - cancelled
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        free = engine.forget()
        print(
            f"- pass {turn + 1}: {requests} requests, {len(cancelled - finished)} cancelled, {len(lost)} lost, all KV "
            f"blocks free: {free}, most resident memory so far {memory:.0f} MiB"
        )


def mixed(engine: Engine, k: int) -> dict[str, Any]:
    """A request of its own: a shipped picture brought to another size, with others in front of it."""
    request = engine.requests[k % len(engine.requests)]
    pictures = k % 4
    if not pictures:
        return {"prompt": request["prompt"].replace("<image>", "")}
    side = 96 + 16 * (k % 9)
    given = [request["multi_modal_data"]["image"].resize((side + 8 * i, side)) for i in range(pictures)]
    return {"prompt": request["prompt"].replace("<image>", "<image>" * pictures), "multi_modal_data": {"image": given}}


def half_billion(folder: Path) -> Path:
    """The LLaVA of the 0.5B class with random weights that cpu.py measures, with tiny-llava's tokenizer."""
    from cpu import HALF_BILLION
    from transformers import AutoConfig, AutoModelForImageTextToText

    from vtoken.evals import reference

    processor = reference.processor(reference.path())
    side = HALF_BILLION["vision_config"]["image_size"]
    processor.patch_size = HALF_BILLION["vision_config"]["patch_size"]
    processor.image_processor.size = {"shortest_edge": side}
    processor.image_processor.crop_size = {"height": side, "width": side}
    config = AutoConfig.for_model(**HALF_BILLION, eos_token_id=processor.tokenizer.eos_token_id)
    config.image_token_id = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--requests", type=int, default=200, help="of the load; 0: no load")
    parser.add_argument("--pipelines", nargs="+", default=PIPELINES, metavar="STAGE", help="in short, as fastervlm:64")
    parser.add_argument("--at-once", nargs="+", type=int, default=AT_ONCE, metavar="N", help="requests")
    parser.add_argument("--big", action="store_true", help="a LLaVA of the 0.5B class with random weights")
    args = parser.parse_args()
    import torch
    import vllm

    from vtoken.evals import reference

    with TemporaryDirectory() as folder:
        engine = Engine(half_billion(Path(folder)) if args.big else reference.path())
    turns(engine, args.rounds, args.pipelines, args.at_once)
    if args.requests:
        print()
        load(engine, args.requests)
    conditions = {
        "model": "LLaVA of the 0.5B class, random weights" if args.big else "tiny-llava",
        "rounds": args.rounds,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}",
        "torch threads": torch.get_num_threads(),
        "versions": f"vllm {vllm.__version__}, torch {torch.__version__}, Python {platform.python_version()}",
    }
    print(f"\nConditions: {json.dumps(conditions)}")


if __name__ == "__main__":
    main()
