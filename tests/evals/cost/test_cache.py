"""Bytes that a cache takes and that a step reads of it: by hand, and of real caches."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, ClassVar

import pytest
import tiny
import torch
from flop_counts import Pipe, counted
from modes import VERSION
from packaging.version import Version
from usual import stage

from vtoken import registry, trace, wrapped
from vtoken.compressors.cache.snapkv import SnapKV
from vtoken.compressors.cache.zipvl_cache import ZipVLCache
from vtoken.config import load
from vtoken.evals.cost.flops import account
from vtoken.evals.shared.options import BenchOptions
from vtoken.evals.speed.latency import bytes_read
from vtoken.evals.speed.timing import Subject
from vtoken.hooks.state.pruned_cache import cache_bytes
from vtoken.stages import CacheStage, LayerSize, Site, Stage
from vtoken.stages.budget import Budget

SLOT = 2 * 2 * 8 * 4  # key and value, of two key heads of 8 numbers of 4 bytes
LAYERS, PICTURE = 4, 16
PRESSES = {"press": "KnormPress", "compression_ratio": 0.5}


class Half(Stage):
    """Reads every other slot of the prompt, in the layers behind the first."""

    site: ClassVar[Site] = "cache"
    kind: ClassVar[Any] = "compressor"
    known: bool = True

    def bytes_read(self, at: LayerSize, cached: int) -> int | None:
        assert cached == at.full(at.prompt + at.generated) and sum(at.images) == PICTURE and len(at.attending) == LAYERS
        if not self.known:
            return None
        return cached if at.layer == at.attending[0] else at.full(at.prompt // 2 + at.generated)


def of(stages: tuple[Stage, ...] = (), new: int = 4, **options: Any) -> Any:
    return account(tiny.llava(**options).config, Pipe(stages), text_tokens=8, new_tokens=new)


def test_dense_reads_what_it_holds() -> None:
    found = of()
    assert found.kv_bytes_prefill == LAYERS * SLOT * 24 and found.kv_bytes == LAYERS * SLOT * 27
    assert found.kv_bytes_read == LAYERS * SLOT * (25 + 26 + 27) // 3
    assert of(new=1).kv_bytes_read == 0, "no step is made"
    two = account(tiny.llava().config, text_tokens=8, new_tokens=4, batch=2)
    assert two.kv_bytes == 2 * found.kv_bytes and two.kv_bytes_read == found.kv_bytes_read, "of one row"


def test_a_window_reads_one_slot_more_than_it_keeps() -> None:
    found = of(text="mistral", sliding_window=12)
    assert found.kv_bytes == LAYERS * SLOT * 11 and found.kv_bytes_read == LAYERS * SLOT * 12


def test_a_smaller_cache_is_read_whole() -> None:
    found = of((SnapKV(keep=Budget(5), window=2),))
    assert found.kv_bytes_prefill == LAYERS * SLOT * 13 and found.kv_bytes_read == LAYERS * SLOT * 15


def test_a_stage_that_reads_a_part_of_a_whole_cache() -> None:
    dense, half, unknown = of(), of((Half(),)), of((Half(known=False),))
    assert half.kv_bytes == unknown.kv_bytes == dense.kv_bytes
    assert half.kv_bytes_read == SLOT * (26 + (LAYERS - 1) * (12 + 2))
    assert unknown.kv_bytes_read == dense.kv_bytes_read and "which slots generated tokens read" in unknown.left_out[-1]
    assert not any("which slots" in each for each in half.left_out)


def test_bench_tells_what_stages_that_choose_read() -> None:
    """By the account, for what the cache holds says nothing about them."""
    model, asked = tiny.llava(), BenchOptions(text_tokens=8, new_tokens=4, batch=2)
    for stages, want in (((), 300), ((Half(),), of((Half(),)).kv_bytes_read)):
        subject = Subject(Pipe(stages), (16,), (400, 500, 600, 700), None, None)
        assert bytes_read(subject, model, asked, drawn=True) == want
    assert bytes_read(subject, model, asked, drawn=False) is None, "pictures of another size"
    assert bytes_read(Subject(None, (16,), (400,), None, None), model, asked, drawn=True) is None, "no step"


def options(family: str) -> dict[str, Any]:
    """Size and text of the prompt [4, img, 5]."""
    model = tiny.make(family)
    batch = tiny.build(model, [[4, "img", 5]], seed=3)
    size = tuple(batch["image_sizes"][0].tolist()) if "image_sizes" in batch else None
    if "image_grid_thw" in batch:
        size = tuple(model.config.vision_config.patch_size * n for n in batch["image_grid_thw"][0, 1:].tolist())
    if "spatial_shapes" in batch:
        size = tuple(model.config.vision_config.patch_size * n for n in batch["spatial_shapes"][0].tolist())
    return {"model": model, "batch": batch, "size": size}


def measured(family: str, pipeline: Any, new: int) -> tuple[Any, int, int]:
    """The account, and bytes of the real cache when the prefill ends and at the end."""
    made = options(family)
    model, batch = made["model"], made["batch"]
    text = int((batch["input_ids"] != tiny.IMG).sum())
    with wrapped(model, pipeline), torch.no_grad():
        out = model.generate(
            **batch, max_new_tokens=new, min_new_tokens=new, do_sample=False, return_dict_in_generate=True
        )
        seen = trace(model)
    claimed = account(model.config, pipeline, image_size=made["size"], text_tokens=text, new_tokens=new)
    return claimed, seen.cache_bytes, cache_bytes(out.past_key_values)


CACHES = [name for name in registry.stages() if issubclass(registry.stage(name), CacheStage)]


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("family", tiny.each("mrope", "deepstack", "states", window=None, anyres=False, split=False))
def test_every_cache_stage_holds_what_the_account_says(family: str, name: str) -> None:
    if name == "kvpress" and find_spec("kvpress") is None:
        pytest.skip("kvpress is not installed")
    made = registry.stage(name)(**PRESSES) if name == "kvpress" else stage(name)
    if not made.counts_are_exact():
        pytest.skip("what stays depends on the picture; test_flops.py and the test below set options for that")
    claimed, first, last = measured(family, load([made]), new=4)
    assert (claimed.kv_bytes_prefill, claimed.kv_bytes) == (first, last)
    assert not claimed.inexact


def test_blocks_of_generated_tokens_get_smaller() -> None:
    """Eleven steps: two blocks of four and three tokens behind them, all of them important."""
    made = ZipVLCache(mode="quantise", tau=1.0, recent=2, drawn=4, every=4)
    claimed, first, last = measured("llava", load([made]), new=12)
    assert (claimed.kv_bytes_prefill, claimed.kv_bytes) == (first, last)
    plain = made.model_copy(update={"every": None})
    assert claimed.kv_bytes < measured("llava", load([plain]), new=12)[0].kv_bytes


@pytest.mark.parametrize("before", [[], [{"fastv": {"keep": 6, "layer": 2}}]], ids=["whole", "behind a cut"])
@pytest.mark.parametrize("name", CACHES)
def test_decoding_over_a_smaller_cache_is_counted_step_by_step(name: str, before: list[Any]) -> None:
    """What leaves as an answer grows is not attended to, and layers and heads are counted for themselves."""
    if name == "kvpress" and find_spec("kvpress") is None:
        pytest.skip("kvpress is not installed")
    one = registry.stage(name)(**PRESSES) if name == "kvpress" else stage(name)
    if not one.counts_are_exact(whole=not before):
        pytest.skip("what stays depends on the picture")
    made, pipeline = options("llava"), load([*before, one])
    model, batch, new = made["model"], made["batch"], 9
    with wrapped(model, pipeline):
        first, all_of = (
            counted(lambda n=n: model.generate(**batch, max_new_tokens=n, min_new_tokens=n, do_sample=False))  # type: ignore[misc]
            for n in (1, new)
        )
    claimed = account(model.config, pipeline, text_tokens=9, new_tokens=new)
    # RoPE is a matrix product up to transformers 5.17, and not counted.
    assert claimed.decode == pytest.approx(all_of - first, rel=1e-6 if VERSION >= Version("5.18") else 1e-3)
