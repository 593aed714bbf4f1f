"""What a small KV cache does to decoding, on a CPU: `python benchmarks/decode.py [PIPELINE ...]`. Markdown to stdout,
minutes.

The LLaVA of the 0.5B class with random weights that cpu.py measures. Dense and every pipeline have the same weights and
generate in turns, a token of each and then the next one, so that what the machine does besides weighs on all alike;
ratios are formed token by token. The bytes are those of the cache, not of what is worked out of it while a layer
attends.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from cpu import half_billion
from measure import against
from torch import Tensor

import vtoken
from vtoken import registry
from vtoken.config import load
from vtoken.evals.speed.inputs import random_prompt
from vtoken.evals.speed.latency import machine
from vtoken.hooks.state.pruned_cache import cache_bytes
from vtoken.hooks.state.quantized_layer import QuantizedLayer
from vtoken.stages.quantized import QuantizedKV, QuantizedTensor


@dataclass
class Side:
    """Dense, or a pipeline: its model, the last token and the cache; what was found out."""

    name: str
    model: Any
    token: Tensor = field(default_factory=lambda: torch.empty(0))
    cache: Any = None
    cached: list[int] = field(default_factory=list)
    milliseconds: list[float] = field(default_factory=list)

    def prefill(self, inputs: dict[str, Tensor]) -> None:
        out = self.model(**inputs, use_cache=True, logits_to_keep=1)
        self.cache, self.token = out.past_key_values, out.logits[:, -1:].argmax(-1)
        self.cached.append(cache_bytes(self.cache))

    def step(self) -> None:
        start = time.perf_counter()
        out = self.model(input_ids=self.token, past_key_values=self.cache, use_cache=True)
        self.token = out.logits[:, -1:].argmax(-1)
        self.milliseconds.append(1e3 * (time.perf_counter() - start))


def codes(cache: Any) -> Iterator[QuantizedTensor]:
    """Keys in few bits, of all layers."""
    for layer in cache.layers:
        pieces = [p for b in layer.blocks for row in b.rows for p in row] if isinstance(layer, QuantizedLayer) else []
        for piece in pieces:
            yield from piece.key_groups if isinstance(piece, QuantizedKV) else ()


def bits(cache: Any) -> str:
    """How many of the packed tokens have how many bits."""
    found: dict[int, int] = {}
    for each in codes(cache):
        found[each.bits] = found.get(each.bits, 0) + each.packed.shape[1]
    total = sum(found.values())
    return ", ".join(f"{n / total:.0%} in {width} bits" for width, n in sorted(found.items(), reverse=True)) or "-"


def line(side: Side, dense: Side) -> str:
    middle, quartiles = against(side.milliseconds, dense.milliseconds)
    whole = sum(side.milliseconds) / sum(dense.milliseconds)
    sizes = [f"{own / 1e6:.2f} MB ({own / of:.1%})" for own, of in zip(side.cached, dense.cached, strict=True)]
    cells = (side.name, *sizes, bits(side.cache), f"{middle:.3f} [{quartiles}]", f"{whole:.3f}")
    return f"| {' | '.join(cells)} |"


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "pipelines", nargs="*", default=["zipvl_cache:mode=quantise"], metavar="PIPELINE", help="default: %(default)s"
    )
    for option, default in (("--tokens", 200), ("--images", 1), ("--text-tokens", 32), ("--batch", 1)):
        parser.add_argument(option, type=int, default=default, metavar="N", help="default: %(default)s")
    parser.add_argument("--dtype", default="float32", metavar="NAME", help="default: %(default)s")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads of torch (default: torch's choice)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    model = half_billion().to(getattr(torch, args.dtype))
    prompt = random_prompt(
        registry.adapter("llava")(model), batch=args.batch, images=args.images, text_tokens=args.text_tokens
    )
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    sides = [Side("dense", model)]
    for each in args.pipelines:
        pipeline = load(each)
        if pipeline.contrast is not None:
            parser.error(f"{each}: a contrast acts in generate, and steps are timed without it")
        sides.append(Side(pipeline.name, vtoken.wrap(copy.deepcopy(model, dict(shared)), pipeline)))
    for side in sides:
        side.prefill(prompt.inputs)
    for turn in range(args.tokens):
        for each in range(turn, turn + len(sides)):
            sides[each % len(sides)].step()
    for side in sides:
        side.cached.append(cache_bytes(side.cache))
    print(f"| pipeline | cache after prefill | after {args.tokens} tokens | packed | time per token / dense | in all |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for side in sides:
        print(line(side, sides[0]))
    length = prompt.inputs["input_ids"].shape[1]
    print()
    for side in sides[1:]:
        for stage, why in vtoken.trace(side.model).aside.items() if vtoken.pipeline(side.model).stages else ():
            print(f"- {side.name}: {stage} stood aside, {why}")
    conditions = {**machine(model), "weights": "random", "batch": args.batch, "prompt tokens": length}
    print("\n" + "; ".join(f"{name}: {value}" for name, value in conditions.items()))


if __name__ == "__main__":
    main()
