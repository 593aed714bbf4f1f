"""The account of every family against FlopCounterMode: image sizes, several images, frames, newlines, windows,
DeepStack."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import tiny
import torch
import transformers
from flop_counts import CLOSE, SDPA, Deep, Exit, Inside, Pipe, Quiet, counted, part
from torch.utils.flop_counter import FlopCounterMode

from vtoken import registry, trace, wrapped
from vtoken.config import Pipeline
from vtoken.errors import ConfigError, UnsupportedError
from vtoken.evals.cost.flops import account
from vtoken.evals.cost.geometry import geometry
from vtoken.evals.cost.geometry._packed import windows_of
from vtoken.pruners.tokens.fastervlm import FasterVLM
from vtoken.pruners.tokens.uniform import Uniform
from vtoken.stages import Fact, Pruner, Site, VisualTokens, size_of
from vtoken.stages.budget import Budget

CASES = [
    pytest.param(family, (h, w), frames, images, id=f"{family}-{h}x{w}-{frames}f-{images}")
    for family in tiny.FAMILIES
    for h, w, frames in tiny.family(family).pictures
    for images in (1, 3)
]


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {family: tiny.make(family) for family in tiny.FAMILIES}


@pytest.mark.parametrize(("family", "size", "frames", "images"), CASES)
def test_parts_of_generate(models: Any, family: str, size: tuple[int, int], frames: int, images: int) -> None:
    model = models[family]
    row = [2, *[tiny.family(family).item(*size, frames), 1] * images]
    batch = tiny.build(model, [row, row])
    length = batch["input_ids"].shape[1]
    placeholders = torch.isin(batch["input_ids"], torch.tensor([tiny.IMG, tiny.VID]))
    visual = int((placeholders | tiny.family(family).breaks(batch["input_ids"])).sum()) // 2
    options: Any = {"images": images, "image_size": size, "frames": frames, "text_tokens": length - visual, "batch": 2}
    claimed = account(model.config, new_tokens=3, **options)
    assert claimed.visual_entry + claimed.newline_entry == visual
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=SDPA) as counter:
        model.generate(**batch, max_new_tokens=1, do_sample=False)
    everything = counter.get_total_flops()
    language = part(counter, model.get_decoder(), ("language_model", "text_model"))
    attention = sum(n for op, n in language.items() if "attention" in str(op))
    head = sum(part(counter, model.lm_head, "lm_head").values())
    assert claimed.prefill_attention == pytest.approx(attention, rel=CLOSE)
    assert claimed.prefill_linear == pytest.approx(sum(language.values()) - attention + head, rel=CLOSE)
    # Up to 5.17 Pixtral's tower multiplies positions with frequencies as matrices, a few hundred FLOPs.
    old = tiny.family(family).by_rows and transformers.__version__ < "5.18"
    rope = 1e-3 * everything if old else 0
    assert 0 <= everything - sum(language.values()) - head - claimed.tower - claimed.projector <= rope
    longer = counted(lambda: model.generate(**batch, max_new_tokens=3, do_sample=False))
    assert claimed.decode == pytest.approx(longer - everything, rel=CLOSE)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_geometry_is_the_adapters(models: Any, family: str) -> None:
    """Rasters, newlines and layers are what the adapter finds on the model."""
    model = models[family]
    adapter = registry.adapter(family)(model)
    for h, w, frames in tiny.family(family).pictures:
        shape = geometry(model.config, (h, w), 1, frames)
        batch = tiny.build(model, [[1, tiny.family(family).item(h, w, frames), 1]])
        (layout,) = adapter.layouts("video" if frames > 1 else "image", batch)
        assert shape.parts == layout.parts
        assert shape.closing(layout.tokens) == layout.length - layout.tokens
    tower, encoder = shape.tower, adapter.encoder
    assert (tower.feature_layers, tower.attention_layer) == (encoder.feature_layers, encoder.attention_layer)
    assert (tower.unit, tower.extra, tower.layers.heads) == (encoder.unit, int(encoder.cls), encoder.heads)
    full = encoder.full_attention or range(tower.layers.depth)
    assert [i for i, blocks in enumerate(tower.blocks) if blocks == tower.blocks[full[0]]] == list(full)


def test_windows_are_those_of_the_tower(models: Any) -> None:
    vision = models["qwen2_5_vl"].config.vision_config
    assert windows_of(vision, (3, 6, 10)) == {16: 6, 8: 9, 4: 3}
    assert windows_of(vision, (1, 8, 4)) == {16: 2}


class Norm(Pruner):
    """The longest vectors stay."""

    def score(self, tokens: VisualTokens) -> torch.Tensor:
        return tokens.x.norm(dim=-1)


class Everywhere(Norm):
    """Cuts after the first tower layer."""

    site: ClassVar[Site] = "encoder"

    def layers(self, depth: int) -> tuple[int, ...]:
        return (0,)


class Late(Norm):
    """Cuts before two decoder layers."""

    site: ClassVar[Site] = "decoder"

    def layers(self, depth: int) -> tuple[int, ...]:
        return (1, depth - 1)


HALF = Budget("50%")
ALL_SITES = (Everywhere(keep=HALF), Norm(keep=HALF), Late(keep=HALF))


@pytest.mark.parametrize("newline", ["keep", "drop"])
@pytest.mark.parametrize("stages", [ALL_SITES, ALL_SITES[:1], ALL_SITES[1:2], ALL_SITES[2:]], ids=len)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_wrapped_models_do_what_the_account_says(models: Any, family: str, stages: Any, newline: Any) -> None:
    """No padding is cut off the picture, so shares of patches are shares of tokens; windows are a small part."""
    model, size = models[family], tiny.family(family).unpadded
    batch = tiny.build(model, [[3, tiny.family(family).item(*size), 4]])
    placeholders = torch.isin(batch["input_ids"], torch.tensor([tiny.IMG, tiny.VID]))
    text = int((~placeholders & ~tiny.family(family).breaks(batch["input_ids"])).sum())
    pipeline = Pipeline("p", "original", stages, newline)
    claimed = account(model.config, pipeline, image_size=size, text_tokens=text, new_tokens=1)
    with wrapped(model, pipeline):
        flops = counted(lambda: model.generate(**batch, max_new_tokens=1, do_sample=False))
        seen = trace(model)
    assert claimed.visual_tokens == tuple(map(sum, seen.layers))
    assert seen.prompt_tokens == [text + claimed.visual_entry + claimed.newline_entry]
    assert claimed.kv_bytes_prefill == seen.cache_bytes
    assert claimed.total == pytest.approx(flops, rel=CLOSE)


@pytest.mark.parametrize("family", tiny.families(grouped=True))
def test_shortened_packed_tower(models: Any, family: str) -> None:
    """Half of the merge groups leave after block 0: the blocks, run by hand on what is left, and the mergers."""
    model: Any = models[family]
    visual, units = model.model.visual, 12
    claimed = account(model.config, Pipe((Everywhere(keep=Budget("50%")),)), image_size=(84, 112))
    assert claimed.visual_tokens == (6,) * 4
    per_block = [sum(m * m * n for m, n in b.items()) for b in geometry(model.config, (84, 112)).tower.blocks]
    linear = counted(lambda: [visual.patch_embed(torch.randn(4 * units, 1176))])
    for layer, block in enumerate(visual.blocks):
        left = 4 * (units if layer == 0 else units // 2)
        linear += counted(lambda b=block, n=left: b.mlp(torch.randn(n, 32)))
        linear += counted(lambda b=block, n=left: b.attn.proj(b.attn.qkv(torch.randn(n, 32))[:, :32]))
        linear += per_block[layer] * (4 if layer == 0 else 1) * 32
    assert claimed.tower == linear
    merged = [(visual.merger, 6)]
    if tiny.family(family).deepstack:
        # It reads layer 0 before the cut after it, and layer 1.
        merged += zip(visual.deepstack_merger_list, (12, 6), strict=True)
    joined = getattr(visual, "downsample", None)
    if joined is None:
        assert claimed.projector == sum(counted(lambda m=m, n=n: m(torch.randn(4 * n, 32))) for m, n in merged)
    else:
        made = counted(lambda: visual.merger(joined(torch.randn(6, 32, 2, 2)).flatten(1)))
        assert claimed.projector == made


def test_facts_without_cls(models: Any) -> None:
    """CLS attention is substituted by attention received: every patch asks, within its frame."""
    for family in tiny.VIDEO:
        config, one = models[family].config, tiny.family(family)
        if tiny.adapter(models[family]).encoder.cls:
            continue
        claimed = account(config, Pipe((FasterVLM(keep=Budget(2)),)), image_size=(56, 84), frames=4)
        (video,) = one.found(tiny.build(models[family], [[1, one.item(56, 84, 4)]]))[1]
        frames, patches = one.frames(video.spec)
        assert claimed.stages == frames * 2 * patches**2 * 32
    # Once, whatever it is called; free facts cost nothing.
    both = account(models["qwen2_vl"].config, Pipe((FasterVLM(keep=Budget(3)), Received(keep=Budget(2)))))
    assert both.stages == 2 * 1024**2 * 32


class Received(Pruner):
    def needs(self) -> tuple[Fact, ...]:
        return (Fact("received_attention"), Fact("pixels"), Fact("features"))


def test_facts_of_crops(models: Any) -> None:
    config = models["llava_next"].config
    pipe = Pipe((FasterVLM(keep=Budget(4)),))
    assert account(config, pipe, image_size=(100, 60), images=2).stages == 2 * 5 * 2 * 17 * 32
    # Encoder-site stages see every crop as a picture of its own.
    inside = account(config, Pipe((Inside(keep=Budget(4)),)), image_size=(100, 60))
    assert inside.stages == 5 * 2 * 32 * (17 + 5)


def test_newlines_are_dropped_with_their_rows(models: Any) -> None:
    """100 x 60 is 16 tokens and a raster of 8 rows of 4, a newline behind each."""
    config = models["llava_next"].config
    size = (100, 60)

    def entering(*stages: Any, **policy: Any) -> tuple[int, int]:
        found = account(config, Pipe(stages, **policy), image_size=size)
        assert found.kv_bytes_prefill == 4 * 32 * sum(
            64 + v + n for v, n in zip(found.visual_tokens, found.newline_tokens, strict=True)
        )
        return found.visual_entry, found.newline_entry

    shape = geometry(config, size)
    assert (shape.parts, shape.newlines) == (((1, 4, 4), (1, 8, 4)), (8, 4))
    assert [shape.closing(n) for n in (48, 45, 0)] == [8, 8, 0]
    assert account(config, image_size=size).newline_tokens == (8,) * 4
    generator = torch.Generator().manual_seed(0)
    for kept in (1, 4, 12, 30):
        rows = torch.rand(4000, 48, generator=generator).argsort(1)[:, :kept] // 4
        mean = torch.stack([((rows >= 4) & (rows == r)).any(1) for r in range(4, 12)]).sum(0).float().mean()
        assert abs(shape.closing(kept) - float(mean)) < 0.6
    uniform = Uniform(keep=Budget(4))
    assert entering(uniform) == (4, shape.closing(4)) == (4, 2)
    assert entering(uniform, newline="keep") == (4, 8)
    assert entering(uniform, newline="drop") == (4, 0)
    gone = account(config, Pipe((Exit(layer=2),)), image_size=size)
    assert (gone.visual_tokens, gone.newline_tokens) == ((48, 48, 0, 0), (8, 8, 0, 0))
    late = account(config, Pipe((Deep(keep=Budget("50%")),), newline="drop"), image_size=size, text_tokens=5)
    assert late.newline_tokens == (0, 0, 0, 0)
    late = account(config, Pipe((Deep(keep=Budget("50%")),), newline="keep"), image_size=size, text_tokens=5)
    assert late.stages == 2 * 32 * ((5 + 48 + 8) + (5 + 24 + 8))


def test_encoder_stages_and_packing(models: Any) -> None:
    """A share of the patches is the same share of the tokens that are packed of them, of interpolated ones less."""
    half = Pipe((Quiet(keep=Budget("50%")),))
    config = models["llava_next"].config
    assert account(config, half, image_size=(300, 40)).visual_tokens == (4 + 4,) * 4
    assert size_of(geometry(config, (300, 40)).parts) == 16 + 16
    video = models["llava_onevision"].config
    assert account(video, Pipe((Everywhere(keep=Budget(8)),)), frames=4).visual_tokens == (1,) * 4


def test_anyres_policy(models: Any) -> None:
    config = models["llava_next"].config
    forced = account(config, Pipe((), anyres="2x2"), image_size=(56, 112))
    assert (forced.visual_entry, forced.newline_entry) == (16 + 32, 4)
    assert config.image_grid_pinpoints == tiny.make("llava_next").config.image_grid_pinpoints
    with pytest.raises(UnsupportedError, match="qwen2_vl does not have crop grids"):
        account(models["qwen2_vl"].config, Pipe((), anyres="2x2"))


@pytest.mark.parametrize("family", tiny.families(anyres=True))
def test_the_default_is_the_towers_size(models: Any, family: str) -> None:
    config = models[family].config
    assert account(config).total == account(config, image_size=56).total == account(config, image_size=(56, 56)).total


@pytest.mark.parametrize("family", tiny.families(grouped=True))
def test_qwen_sizes(models: Any, family: str) -> None:
    config, one = models[family].config, tiny.family(family)
    assert account(config).visual_entry == account(config, image_size=(440, 455)).visual_entry == 16 * 16
    assert account(config, image_size=8).visual_entry == one.least  # of Qwen never below 56 x 56
    assert account(config, image_size=4000).visual_entry == one.most  # nor above a million pixels
    assert account(config, frames=3).visual_entry == 2 * 256
    with pytest.raises(ConfigError, match="image_size 1000x2: absolute aspect ratio"):
        account(config, image_size=(1000, 2))
    with pytest.raises(ConfigError, match="at least 1 pixel"):
        account(config, image_size=(0, 56))
