"""How many operations a stage adds to a prefill, the decision included: what a host has to launch. `python
benchmarks/operations.py`

Pictures of 576 tokens, a tower of 24 layers as in LLaVA-1.5 and a decoder of 4, narrow and with random weights: the
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
# Name -> pipeline, and how many operations it adds at most to a prompt with a picture and to a batch of four: what it
# added when this was last written (tests/benchmarks/test_operations.py).
PIPELINES: dict[str, tuple[Any, int, int]] = {
    "none": ("none", 0, 0),
    "random:64": ("random:64", 25, 34),
    "uniform:64": ("uniform:64", 21, 25),
    "fastervlm:64": ("fastervlm:64", 29, 42),
    "hired:64": ("hired:64", 33, 52),
    "visionzip:64": ("visionzip:64", 79, 95),
    "divprune:64": ("divprune:64", 364, 368),
    "vispruner:64": ("vispruner:64", 360, 371),
    "scope:64": ("scope:64", 559, 570),
    "cdpruner:64": ("cdpruner:64", 470, 532),
    "fastv, one cut": ([{"fastv": {"keep": 300, "layer": 1}}], 47, 61),
    "fastv, two cuts": ([{"fastv": {"keep": 300, "layer": 1}}, {"fastv": {"keep": 64, "layer": 2}}], 77, 103),
    "fitprune, one cut": ([{"fitprune": {"table": [100, 0, 0, 0]}}], 115, 125),
    "fitprune, three cuts": ([{"fitprune": {"table": [100, 100, 100, 0]}}], 295, 321),
    "flowcut:64, 22 layers": ("flowcut:64", 512, 914),
    "tome:r=16, 23 layers": ("tome:r=16", 811, 932),
    "dtome, 23 layers": ([{"dtome": {"thresholds": [0.7] * 24, "left": [1 - 0.04 * k for k in range(24)]}}], 857, 1020),
    "snapkv:64, 4 layers": ("snapkv:64", 97, 117),
    "lookm-20, 4 layers": ("lookm-20", 305, 325),
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
    made = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    ).eval()
    # Attention that is not the same everywhere: flowcut then drops patches at every second layer.
    for layer in made.model.vision_tower.encoder.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            projection.weight.data *= 20
    return made


def inputs(pictures: int = 1) -> dict[str, Any]:
    """A batch of so many prompts, a picture each."""
    ids = torch.tensor([[1] * (TEXT // 2) + [IMAGE] * TOKENS + [2] * (TEXT // 2)] * pictures)
    pixels = torch.zeros(pictures, 3, 336, 336)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def operations(model: Any, pipeline: Any = None, pictures: int = 1) -> int:
    """Of a second prefill; without a pipeline, of the unwrapped model."""
    batch = inputs(pictures)
    with nullcontext() if pipeline is None else vtoken.wrapped(model, pipeline), torch.no_grad():
        model(**batch, use_cache=True)
        with Count() as count:
            model(**batch, use_cache=True)
    return count.calls


def step(model: Any, pipeline: Any = None) -> float:
    """Of a generated token after the first."""

    def of(tokens: int) -> int:
        with nullcontext() if pipeline is None else vtoken.wrapped(model, pipeline), torch.no_grad(), Count() as count:
            model.generate(**inputs(), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
        return count.calls

    return (of(6) - of(2)) / 4


def main() -> None:
    stock = model()
    dense, four, token = operations(stock), operations(stock, pictures=4), step(stock)
    print(f"| pipeline | operations besides the stock model's {dense} | four pictures | a token |")
    print("| --- | ---: | ---: | ---: |")
    for name, (pipeline, *_) in PIPELINES.items():
        each = operations(stock, pipeline) - dense, operations(stock, pipeline, pictures=4) - four
        print(f"| {name} | {each[0]} | {each[1]} | {step(stock, pipeline) - token:g} |")


if __name__ == "__main__":
    main()
