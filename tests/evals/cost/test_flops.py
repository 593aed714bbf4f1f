"""The account against torch's FlopCounterMode and against real caches, on tiny models."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import streaming
import tiny
import torch
from flop_counts import CLOSE, MODELS, SDPA, Blind, Deep, Exit, Inside, Pipe, Quiet, counted, part
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, LlavaForConditionalGeneration

from vtoken import trace, wrapped
from vtoken.compressors.cache.snapkv import SnapKV
from vtoken.config import load
from vtoken.errors import UnsupportedError
from vtoken.evals.cost.flops import LEFT_OUT, account
from vtoken.evals.shared.configs import resolve_config
from vtoken.hooks.state.pruned_cache import cache_bytes
from vtoken.pruners.tokens.fastervlm import FasterVLM
from vtoken.pruners.tokens.uniform import Uniform
from vtoken.stages import Fact, Pruner, Site
from vtoken.stages.budget import Budget


class Odd(Pruner):
    """Wants what the account has no price for."""

    def needs(self) -> tuple[Fact, ...]:
        return (Fact("horoscope"), Fact("received_attention", -1))

    def flops(self, lengths: Any, width: int) -> int:
        return int(sum(lengths) * width)


class Frames(Odd):
    site: ClassVar[Site] = "frames"


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return tiny.llava(**MODELS[request.param])


def test_parts_of_generate(model: Any) -> None:
    """generate runs the tower, all its layers, outside model.forward: the counter wraps generate itself."""
    batch = tiny.build(model, [[7, "img", 4, "img"], [9, "img", "img", 2]])
    prompt = account(model.config, images=2, text_tokens=11, new_tokens=1, batch=2)
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=SDPA) as counter:
        model.generate(**batch, max_new_tokens=1, do_sample=False)
    inner = model.model
    everything = counter.get_total_flops()
    language = part(counter, inner.language_model, "language_model")
    attention = sum(n for op, n in language.items() if "attention" in str(op))
    head = sum(part(counter, model.lm_head, "lm_head").values())
    tower = sum(part(counter, inner.vision_tower, "vision_tower").values())
    projector = sum(part(counter, inner.multi_modal_projector, "multi_modal_projector").values())
    assert attention
    assert prompt.tower == pytest.approx(tower, rel=CLOSE)
    assert prompt.projector == pytest.approx(projector, rel=CLOSE)
    assert prompt.prefill_attention == pytest.approx(attention, rel=CLOSE)
    assert prompt.prefill_linear == pytest.approx(sum(language.values()) - attention + head, rel=CLOSE)
    assert prompt.decode == prompt.stages == 0
    assert prompt.total == pytest.approx(everything, rel=CLOSE)

    whole = account(model.config, images=2, text_tokens=11, new_tokens=6, batch=2)
    longer = counted(lambda: model.generate(**batch, max_new_tokens=6, do_sample=False))
    assert whole.decode == pytest.approx(longer - everything, rel=CLOSE)


@pytest.mark.parametrize("keep", [16, 5, 1])
def test_shortened_prefill_decode_and_cache(model: Any, keep: int) -> None:
    text, new = 9, 4
    claimed = account(model.config, Pipe((Uniform(keep=Budget(keep)),)), text_tokens=text, new_tokens=new)
    language, head = model.get_decoder(), model.lm_head
    cache: Any = DynamicCache(config=model.config.get_text_config())
    states = torch.randn(1, text + keep, 32)

    def forward(embeddings: torch.Tensor) -> None:
        out = language(inputs_embeds=embeddings, past_key_values=cache, use_cache=True)
        head(out.last_hidden_state[:, -1:])

    def cache_size() -> int:
        return sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))

    prefill = counted(lambda: forward(states))
    assert claimed.prefill_linear + claimed.prefill_attention == pytest.approx(prefill, rel=CLOSE)
    assert claimed.kv_bytes_prefill == cache_size()
    decode = sum(counted(lambda: forward(states[:, :1])) for _ in range(new - 1))
    assert claimed.decode == pytest.approx(decode, rel=CLOSE)
    assert claimed.kv_bytes == cache_size()
    assert claimed.dtype_bytes == 4
    assert claimed.visual_tokens == (keep,) * 4


@pytest.mark.parametrize("cached", ["expanded", "merged"])
def test_unmerged_attention(cached: Any) -> None:
    """Merged tokens in the matrices, all places in attention, and the cache as the stage has it; of a wrapped model
    that merges all."""
    model, text, new = tiny.llava(), 9, 4
    pipeline = load([{"pool": {"size": 2}}, {"vtu": {"cache": cached}}])
    claimed = account(model.config, pipeline, text_tokens=text, new_tokens=1)
    longer = account(model.config, pipeline, text_tokens=text, new_tokens=new)
    batch = tiny.build(model, [[4, "img", 5]])
    with wrapped(model, pipeline):
        first = counted(lambda: model.generate(**batch, max_new_tokens=1, do_sample=False))
        assert claimed.kv_bytes_prefill == trace(model).cache_bytes
        assert longer.decode == pytest.approx(
            counted(lambda: model.generate(**batch, max_new_tokens=new, do_sample=False)) - first, rel=CLOSE
        )
    assert claimed.total - claimed.stages == pytest.approx(first, rel=CLOSE)
    assert claimed.visual_tokens == (4,) * 4 and "dropped, not merged" in claimed.left_out[-1]
    alone = account(model.config, load("vtu"), text_tokens=text)
    assert alone.total == account(model.config, text_tokens=text).total, "nothing was merged"


@pytest.mark.parametrize("family", tiny.each("anyres", "mrope", "unit", window=None, split=False))
def test_unmerged_attention_of_other_mergers_and_families(family: str) -> None:
    """Merging inside the tower, newlines beside the places, and M-RoPE: with VTU and without."""
    model, one = tiny.make(family), tiny.family(family)
    merger = {"pool": {"size": 2}} if one.anyres or one.unit > 1 else {"tome": {"r": 2}}
    batch = tiny.build(model, [[4, "img", 5]], seed=3)
    size = tuple(batch["image_sizes"][0].tolist()) if "image_sizes" in batch else None
    if "image_grid_thw" in batch:
        size = tuple(model.config.vision_config.patch_size * n for n in batch["image_grid_thw"][0, 1:].tolist())
    for after in ([], ["vtu"]):
        pipeline = load({"newline": "keep", "stages": [merger, *after]})
        with wrapped(model, pipeline):
            flops = counted(lambda: model.generate(**batch, max_new_tokens=1, do_sample=False))
            seen = trace(model)
        text = int((batch["input_ids"] != tiny.IMG).sum())
        claimed = account(model.config, pipeline, image_size=size, text_tokens=text, new_tokens=1)
        assert seen.prompt_tokens == [text + claimed.visual_entry + claimed.newline_entry]
        assert claimed.total == pytest.approx(flops, rel=CLOSE), after
        assert claimed.kv_bytes_prefill == seen.cache_bytes


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_shortened_tower(tower: Any) -> None:
    """Two cuts inside the tower: its layers, run by hand on what is left."""
    model = tiny.llava(tower=tower)
    claimed = account(model.config, Pipe((Inside(keep=Budget("50%")),)))
    vision, extra = model.model.vision_tower, int(tower == "clip")
    lengths = (16, 8, 4, 4)

    def run() -> None:
        vision.embeddings(torch.randn(1, 3, 56, 56))
        for layer, n in zip(vision.encoder.layers, lengths, strict=True):
            layer(torch.randn(1, n + extra, 32), attention_mask=None)

    assert claimed.tower == pytest.approx(counted(run), rel=CLOSE)
    assert claimed.visual_tokens == (4,) * 4
    projector = model.model.multi_modal_projector
    assert claimed.projector == pytest.approx(counted(lambda: projector(torch.randn(1, 4, 32))), rel=CLOSE)
    # CLS asks once per layer; where there is none, every patch does.
    assert claimed.stages == 2 * 32 * (17 + 9 if extra else 16**2 + 8**2)


def test_siglip_pooling_head() -> None:
    """The stock head runs although LLaVA never reads it."""
    config: Any = tiny.llava(tower="siglip").config
    config.vision_config.vision_use_head = True
    model = LlavaForConditionalGeneration(config).train(False)
    counts = counted(lambda: model.model.vision_tower(torch.randn(3, 3, 56, 56)))
    assert account(config, images=3).tower == pytest.approx(counts, rel=CLOSE)


def test_several_feature_layers_and_odd_sizes() -> None:
    config: Any = tiny.llava().config
    config.vision_feature_layer = [-3, -2]
    config.vision_config.image_size = 60  # 60 / 14 leaves a margin that the patch embedding ignores
    model = LlavaForConditionalGeneration(config).train(False)
    claimed = account(config, images=2)
    flops = counted(lambda: model.model.get_image_features(torch.randn(2, 3, 60, 60)))
    assert claimed.tower + claimed.projector == flops  # exact: the projector is a small part of the sum
    assert claimed.visual_entry == 2 * 16
    config.vision_feature_select_strategy = "full"
    with pytest.raises(UnsupportedError, match="'full' with a 'clip_vision_model' tower keeps CLS"):
        account(config)


def test_facts_are_read_where_they_arise() -> None:
    """Attention costs the tokens of the layer it is read from, not the ones that are left when it is asked for."""
    config, width, text = tiny.llava().config, 32, 10
    inside = Quiet(keep=Budget("50%"))
    # The features come from layer 2, where 4 of 16 patches and CLS are alive; CLS attention is read there.
    both = account(config, Pipe((inside, FasterVLM(keep=Budget(2)))))
    assert both.stages == 2 * width * 5
    last = account(config, Pipe((inside, Odd(keep=Budget(2)))))
    assert last.stages == 2 * width * 5 * 5 + 4 * width
    # Before layer 1 the attention is that of layer 0, before layer 3 that of layer 2.
    blind = account(config, Pipe((Blind(keep=Budget("50%")), Deep(keep=Budget("50%")))), text_tokens=text)
    assert blind.visual_tokens == (16, 4, 4, 1)
    assert blind.stages == 2 * width * ((text + 16) + (text + 4))


def test_decoder_stages() -> None:
    config = tiny.llava().config
    text, width = 10, 32
    claimed = account(config, Pipe((Deep(keep=Budget("25%")),)), text_tokens=text, new_tokens=3)
    assert claimed.visual_tokens == (16, 4, 4, 1)
    assert (claimed.visual_entry, claimed.visual_average) == (16, 6.25)
    assert claimed.stages == 2 * width * ((text + 16) + (text + 4))
    slots = (text + 16) + 2 * (text + 4) + (text + 1)
    numbers = 2 * 2 * 8
    assert claimed.kv_bytes_prefill == 4 * numbers * slots
    assert claimed.kv_bytes == 4 * numbers * (slots + 4 * 2)
    gone = account(config, Pipe((Exit(layer=2),)), text_tokens=text)
    assert gone.visual_tokens == (16, 16, 0, 0)
    for layer in (0, 4):
        with pytest.raises(UnsupportedError, match=rf"decoder layers \[{layer}\]; this model allows 1 to 3"):
            account(config, Pipe((Exit(layer=layer),)))


def test_a_budget_per_sample_counts_rows_alone() -> None:
    config = tiny.llava().config
    one = account(config, Pipe((Uniform(keep=Budget({"total": 6})),)), images=3)
    two = account(config, Pipe((Uniform(keep=Budget({"total": 6})),)), images=3, batch=2)
    assert one.visual_tokens == two.visual_tokens == (6,) * 4
    assert two.total == 2 * one.total
    assert two.kv_bytes == 2 * one.kv_bytes
    # The tower does not know which pictures share a prompt.
    assert account(config, Pipe((Quiet(keep=Budget({"total": 6})),)), images=3).visual_tokens == (18,) * 4


def test_overhead_of_facts_and_stages() -> None:
    config = tiny.llava().config
    stage = FasterVLM(keep=Budget(4))
    # CLS attention is read from one layer however often it is asked for.
    once, twice = (account(config, Pipe((stage,) * n)) for n in (1, 2))
    assert once.stages == twice.stages == 2 * 17 * 32
    odd = account(config, Pipe((Odd(keep=Budget(4)),)))
    assert odd.stages == 2 * 17 * 17 * 32 + 16 * 32
    assert odd.left_out == (*LEFT_OUT, "test_flops: the fact horoscope")
    frames = account(config, Pipe((Frames(keep=Budget(4)),)))
    assert frames.left_out == LEFT_OUT and frames.total == account(config).total + 3 * 16**2, "a picture is one frame"


@pytest.mark.parametrize("bits", [(4, 2), (3, 8)], ids=str)
@pytest.mark.parametrize("family", tiny.each("mrope", window=None))
def test_bytes_of_a_packed_cache(family: str, bits: tuple[int, int]) -> None:
    """As many tokens as the account expects to be important: all, then those of the text."""
    model = tiny.make(family)
    batch = tiny.build(model, [[4, "img", 5]], seed=3)
    size = None
    if "image_grid_thw" in batch:
        size = tuple(model.config.vision_config.patch_size * n for n in batch["image_grid_thw"][0, 1:].tolist())
    text = int((batch["input_ids"] != model.config.image_token_id).sum())
    for tau, left in ((1.0, 1.0), (1e-6, 1e-6)):
        options = {"mode": "quantise", "bits": bits, "tau": tau, "left": left, "recent": 2, "drawn": 4, "every": None}
        pipeline = load({"stages": [{"zipvl_cache": options}]})
        with wrapped(model, pipeline):
            out = model.generate(**batch, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
            seen = trace(model)
        claimed = account(model.config, pipeline, image_size=size, text_tokens=text, new_tokens=3)
        assert claimed.kv_bytes_prefill == seen.cache_bytes
        assert claimed.kv_bytes == cache_bytes(out.past_key_values)
        assert claimed.left_out == LEFT_OUT


@pytest.mark.parametrize("family", tiny.each("mrope", window=None))
def test_bytes_of_heads_that_stream(family: str) -> None:
    """When the prefill ends, and when the answer does."""
    model = tiny.make(family)
    batch = tiny.build(model, [[4, "img", 5]], seed=3)
    size = None
    if "image_grid_thw" in batch:
        size = tuple(model.config.vision_config.patch_size * n for n in batch["image_grid_thw"][0, 1:].tolist())
    text = int((batch["input_ids"] != model.config.image_token_id).sum())
    heads = streaming.gates(model)
    for more in ({}, {"gates": heads}, {"text": False}, {"compensate": True, "gates": heads}):
        pipeline = load({"stages": [{"streaming_cache": {"sink": 2, "recent": 4, **more}}]})
        with wrapped(model, pipeline):
            out = model.generate(
                **batch, max_new_tokens=9, min_new_tokens=9, do_sample=False, return_dict_in_generate=True
            )
            seen = trace(model)
        claimed = account(model.config, pipeline, image_size=size, text_tokens=text, new_tokens=9)
        assert claimed.kv_bytes_prefill == seen.cache_bytes
        assert claimed.kv_bytes == cache_bytes(out.past_key_values)


def test_a_cache_stage_saves_bytes_and_decoding_only() -> None:
    config = tiny.llava().config
    kwargs = {"text_tokens": 40, "new_tokens": 3}
    dense, small = account(config, **kwargs), account(config, Pipe((SnapKV(keep=Budget(5), window=8),)), **kwargs)
    per_token = dense.kv_bytes_prefill // (40 + 16)
    assert small.kv_bytes_prefill == per_token * 45 and small.kv_bytes == per_token * 47
    text, layers = config.text_config, 4
    wide = text.num_attention_heads * (text.hidden_size // text.num_attention_heads)
    assert dense.decode - small.decode == layers * 2 * 2 * 2 * 11 * wide, (
        "two steps, q k and the values, 11 tokens fewer"
    )
    assert small.stages == layers * 2 * 8 * 56 * wide
    assert small.prefill_attention == dense.prefill_attention and small.visual_tokens == dense.visual_tokens


@pytest.mark.parametrize(
    ("config", "pipeline", "inexact"),
    [
        ("llava-hf/llava-1.5-7b-hf", "fastervlm:64", ()),
        ("llava-hf/llava-1.5-7b-hf", "flowcut-64", ()),
        ("llava-hf/llava-1.5-7b-hf", [{"tome": {"r": 16}}, {"fastervlm": {"keep": 64}}], ()),
        ("llava-hf/llava-1.5-7b-hf", "prumerge-adaptive", ("prumerge",)),
        ("tiny-llava", "dymu-low-tiny-llava", ("dtome",)),  # it names a layer behind that of the features, too
        ("llava-hf/llava-1.5-7b-hf", [{"pool": {}}], ()),
        ("llava-hf/llava-1.5-7b-hf", [{"uniform": {"keep": 64}}, {"pool": {}}], ("pool",)),
        (
            "llava-hf/llava-1.5-7b-hf",
            [{"damro_filter": {"high_norm": True}}, {"uniform": {"keep": 64}}],
            ("damro_filter",),
        ),
        ("llava-hf/llava-v1.6-vicuna-7b-hf", [{"fastervlm": {"keep": {"per_crop": 64}}}], ()),
        ("llava-hf/llava-v1.6-vicuna-7b-hf", [{"flowcut": {"keep": 64}}], ()),
        ("Qwen/Qwen2.5-VL-7B-Instruct", "fastervlm:25%", ()),
    ],
    ids=str,
)
def test_the_account_names_stages_that_leave_what_the_picture_allows(config, pipeline, inexact):
    found = account(resolve_config(config), load(pipeline), image_size=(672, 672), text_tokens=30, new_tokens=1)
    assert found.inexact == found.to_dict()["inexact"] == inexact


def test_padding_of_crops_makes_counts_uncertain():
    config = resolve_config("llava-hf/llava-v1.6-vicuna-7b-hf")
    for pipeline, name in (
        ([{"fastervlm": {"keep": {"per_crop": 64}}}], "fastervlm"),
        ([{"flowcut": {"keep": 64}}], "flowcut"),
    ):
        found = account(config, load(pipeline), image_size=(600, 400), text_tokens=30, new_tokens=1)
        assert found.inexact == (name,)
