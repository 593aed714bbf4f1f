"""How many operations a stage adds to a prefill, the decision included: what a host has to launch. `python
benchmarks/operations.py`

One picture of 576 tokens, a tower of 24 layers as in LLaVA-1.5 and a decoder of 4, narrow and with random weights: the
numbers depend on neither width nor machine. Operations that compute are counted; views are not, which launch nothing.
Against the unwrapped model.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlavaConfig, LlavaForConditionalGeneration

import vtoken

IMAGE, TOKENS, TEXT = 3, 576, 40
# Name -> pipeline, and how many operations it adds at most: what it added when this was last written
# (tests/benchmarks/test_operations.py).
PIPELINES: dict[str, tuple[Any, int]] = {
    "none": ("none", 0),
    "random:64": ("random:64", 26),
    "uniform:64": ("uniform:64", 22),
    "fastervlm:64": ("fastervlm:64", 50),
    "hired:64": ("hired:64", 68),
    "visionzip:64": ("visionzip:64", 146),
    "divprune:64": ("divprune:64", 419),
    "vispruner:64": ("vispruner:64", 381),
    "scope:64": ("scope:64", 637),
    "cdpruner:64": ("cdpruner:64", 1598),
    "fastv, one cut": ([{"fastv": {"keep": 300, "layer": 1}}], 74),
    "fastv, two cuts": ([{"fastv": {"keep": 300, "layer": 1}}, {"fastv": {"keep": 64, "layer": 2}}], 129),
    "fitprune, one cut": ([{"fitprune": {"table": [100, 0, 0, 0]}}], 214),
    "fitprune, three cuts": ([{"fitprune": {"table": [100, 100, 100, 0]}}], 568),
    "flowcut:64, 22 layers": ("flowcut:64", 1842),
    "tome:r=16, 23 layers": ("tome:r=16", 3968),
    "snapkv:64, 4 layers": ("snapkv:64", 216),
    "lookm-20, 4 layers": ("lookm-20", 548),
}


class Count(TorchDispatchMode):
    """Counts what torch dispatches, views left out."""

    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += not any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        return func(*args, **(kwargs or {}))


def model() -> Any:
    small = {"num_attention_heads": 4, "hidden_size": 64, "intermediate_size": 64}
    vision = {"model_type": "clip_vision_model", "num_hidden_layers": 24, "image_size": 336, "patch_size": 14, **small}
    text = {"model_type": "llama", "num_hidden_layers": 4, "vocab_size": 8, "max_position_embeddings": 1024, **small}
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    ).eval()


def operations(model: Any, pipeline: Any = None) -> int:
    """Of a second prefill; without a pipeline, of the unwrapped model."""
    ids = torch.tensor([[1] * (TEXT // 2) + [IMAGE] * TOKENS + [2] * (TEXT // 2)])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.zeros(1, 3, 336, 336)}
    with nullcontext() if pipeline is None else vtoken.wrapped(model, pipeline), torch.no_grad():
        model(**batch, use_cache=True)
        with Count() as count:
            model(**batch, use_cache=True)
    return count.calls


def main() -> None:
    stock = model()
    dense = operations(stock)
    print(f"| pipeline | operations besides the {dense} of the stock model |\n| --- | ---: |")
    for name, (pipeline, _) in PIPELINES.items():
        print(f"| {name} | {operations(stock, pipeline) - dense} |")


if __name__ == "__main__":
    main()
