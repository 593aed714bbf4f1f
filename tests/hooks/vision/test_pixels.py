"""Stages that act on pixels before the vision tower, inside models: every family whose tower takes pictures of any
size."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, ClassVar

import pytest
import smaller
import tiny
import torch
from against_oracle import compare
from batches import inside, suited
from flop_counts import SDPA, Pipe, part
from modes import LOGITS, alone, greedy
from probes import Deep, Inside, InsideMerge, Ragged, above_mean
from tiny_processors import processor
from torch.utils.flop_counter import FlopCounterMode

import vtoken
from vtoken.errors import UnsupportedError
from vtoken.evals.cost.flops import account
from vtoken.pruners.pixels.pixelprune import PixelPrune
from vtoken.stages import Compressor, Keep, Site, VisualTokens

FAMILIES = tiny.families(grouped=True)
families = pytest.mark.parametrize("family", FAMILIES)
PICTURES = [[3, ("img", (1, 8, 12)), 5, ("img", (1, 4, 4)), 6], [1, ("img", (1, 8, 8)), 2], [4]]
WITH_VIDEOS = [[2, ("video", 3, 8, 12), 3, ("img", (1, 8, 8)), 1], [1, ("img", (1, 4, 12)), 6, ("video", 2, 4, 4), 2]]
RESIZE = {"resize": {"keep": "30%"}}
BEHIND: dict[str, list[Any]] = {
    "nothing": [],
    "pixels": [PixelPrune()],
    "frames": [{"frames_uniform": {"keep": 1}}],
    "encoder": [Inside(at=(1,))],
    "merged inside": [InsideMerge(at=(1,))],
    "tokens": [{"fastervlm": {"keep": 2}}, Ragged()],
    "pooled": [{"pool": {"size": 2}}],
    "even": [{"uniform": {"keep": 2}}],
    "even inside": [{"uniform": {"keep": 3}}, {"dpn": {"at": (1, 3), "sizes": (2, 2), "least": 1}}],
    "deep": [Ragged(), Deep()],
    "cache": [{"snapkv": {"keep": 2, "window": 2}}],
}


class Bright(Compressor):
    """Pixels site, by the mean of a token's pixels: another number of each picture. No paper."""

    site: ClassVar[Site] = "pixels"
    fails: ClassVar[bool] = False
    merges: bool = False

    def select(self, tokens: VisualTokens) -> Keep:
        if type(self).fails:
            raise ZeroDivisionError("a bug in a stage")
        keep = above_mean(tokens, tokens.x.mean(1))
        return Keep(keep.index, keep.lengths, torch.zeros(len(tokens.x), dtype=torch.long)) if self.merges else keep


def page(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with pictures that are blank but for some tokens."""
    pixels = batch["pixel_values"].unflatten(0, (-1, 4))
    seen = torch.rand(len(pixels), generator=torch.Generator().manual_seed(1)) < 0.3
    return {**batch, "pixel_values": torch.where(seen[:, None, None], pixels, 1.0).flatten(0, 1)}


@families
@pytest.mark.parametrize("rows", [PICTURES, WITH_VIDEOS], ids=["pictures", "videos"])
@pytest.mark.parametrize("stages", BEHIND)
def test_a_resized_prompt_is_that_of_the_smaller_pictures(family: str, rows: list[Any], stages: str) -> None:
    model = tiny.make(family)
    batch = tiny.build(model, suited(family, rows), seed=3)
    trace = smaller.compare(model, batch, [RESIZE, *inside(family, BEHIND[stages])])
    first = trace.stages[0]
    assert first.name == "resize" and sum(first.tokens_out) < sum(first.tokens_in) / 2
    assert all(stage.tokens_in == first.tokens_out for stage in trace.stages[1:2])


@families
def test_a_resized_forward_and_its_loss(family: str) -> None:
    model = tiny.make(family)
    batch = tiny.build(model, PICTURES[:1], seed=3)
    real = (batch["input_ids"] < 180) & (batch["input_ids"] >= 10)
    labels = torch.where(real, batch["input_ids"], -100)
    with vtoken.wrapped(model, [RESIZE]):
        got = model(**batch, labels=labels)
        small = smaller.smaller(model, {**batch, "labels": labels}, smaller.of_trace(model, batch, vtoken.trace(model)))
    want = model(**small)
    torch.testing.assert_close(got.logits[:, -6:], want.logits[:, -6:], atol=2e-4, rtol=1e-4)
    assert got.logits.shape[:2] == batch["input_ids"].shape


@families
@pytest.mark.parametrize("options", [{"num_beams": 2, "num_return_sequences": 2}, {"cache_implementation": "static"}])
def test_a_resized_prompt_under_other_calls(family: str, options: dict[str, Any]) -> None:
    model = tiny.make(family)
    batch = tiny.build(model, [[3, ("img", (1, 8, 12)), 5], [1, ("img", (1, 8, 8)), 2]], seed=3)
    smaller.compare(model, batch, [RESIZE], **options)


@families
def test_a_second_turn_goes_on_behind_the_smaller_picture(family: str) -> None:
    """Text on the returned cache, which the model numbers by what it counted before the picture was resized."""
    model = tiny.make(family)
    first, text = tiny.build(model, [[3, ("img", (1, 8, 12)), 5]], seed=3), tiny.build(model, [[6]], seed=4)

    def run(batch: dict[str, Any]) -> torch.Tensor:
        out = model.generate(**batch, max_new_tokens=3, do_sample=False, **LOGITS)
        ids = torch.cat([out.sequences, text["input_ids"]], 1)
        whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **tiny.types(model, ids)}
        again = greedy(model, whole, n=4, past_key_values=out.past_key_values, **LOGITS)
        return torch.stack(again.logits)

    with vtoken.wrapped(model, [RESIZE]), torch.no_grad():
        got = run(first)
        model(**first)
        small = smaller.smaller(model, first, smaller.of_trace(model, first, vtoken.trace(model)))
    torch.testing.assert_close(got, run(small), atol=2e-4, rtol=1e-4)


@families
@pytest.mark.parametrize(
    "stage", [{"resize": {"keep": "100%"}}, {"pixelprune": {}}, {"pixelprune": {"max_kept": 0.01}}]
)
def test_keeping_everything_is_the_identity(family: str, stage: dict[str, Any]) -> None:
    model = tiny.make(family)
    batch = tiny.build(model, suited(family, WITH_VIDEOS), seed=3)
    batch = page(model, batch) if "pixel_values" in batch and "max_kept" in str(stage) else batch
    want = greedy(model, batch, **LOGITS)
    with vtoken.wrapped(model, [stage]):
        got = greedy(model, batch, **LOGITS)
        assert vtoken.trace(model).tokens_out == vtoken.trace(model).visual_tokens
    assert torch.equal(torch.stack(got.logits), torch.stack(want.logits)), "bit for bit"


PRUNED: dict[str, list[Any]] = {
    "pixelprune": [PixelPrune()],
    "twice": [PixelPrune(), Bright()],
    "then frames": [Bright(), {"frames_uniform": {"keep": 1}}],
    "then everywhere": [Bright(), Inside(at=(1,)), Ragged(), Deep()],
}


@families
@pytest.mark.parametrize("rows", [PICTURES, WITH_VIDEOS], ids=["pictures", "videos"])
@pytest.mark.parametrize("stages", PRUNED)
def test_equals_recomputation(family: str, rows: list[Any], stages: str) -> None:
    model = tiny.make(family)
    batch = tiny.build(model, suited(family, rows), seed=3)
    batch = page(model, batch) if "pixel_values" in batch else batch
    trace = compare(model, batch, {"stages": inside(family, PRUNED[stages])})
    first = trace.stages[0]
    assert first.site == "pixels" and first.tokens_in == trace.visual_tokens
    still = [parts[0][0] == 1 for parts in trace.parts]
    left = list(zip(still, first.tokens_in, first.tokens_out, strict=True))
    assert all(after == before for picture, before, after in left if not picture), "videos keep all"
    assert not any(still) or sum(k for p, _, k in left if p) < sum(n for p, n, _ in left if p)
    for before, after in pairwise(trace.stages):
        assert after.tokens_in == before.tokens_out


@families
def test_what_stays_are_the_features_of_a_tower_on_these_patches(family: str) -> None:
    """Of the patches' own numbers in the tower, whose layers are run one by one on what stays, at its own places."""
    model = tiny.make(family)
    batch = page(model, tiny.build(model, [[3, ("img", (1, 8, 12)), 5, ("img", (1, 4, 8)), 1]], seed=3))
    tower, entered, left, bounds = tiny.adapter(model).tower, [], [], []
    encoder = tiny.adapter(model).encoder

    def hooks() -> list[Any]:
        first, last = encoder.layers[0], encoder.layers[-1]
        return [
            first.register_forward_pre_hook(lambda m, a, k: entered.append((a, k)), with_kwargs=True),
            last.register_forward_hook(lambda m, a, out: left.append(out)),
            *(
                layer.register_forward_pre_hook(
                    lambda m, a, k: bounds.append(k["cu_seqlens"].tolist()), with_kwargs=True
                )
                for layer in encoder.layers
            ),
        ]

    with torch.no_grad():
        stock = hooks()
        tower(batch["pixel_values"], grid_thw=batch["image_grid_thw"], return_dict=True)
        for hook in stock:
            hook.remove()
        ((args, kwargs), *_), whole = entered, bounds[: len(encoder.layers)]
        with vtoken.wrapped(model, [PixelPrune()]):
            again = hooks()  # behind vtoken's own
            model(**batch)
            for hook in again:
                hook.remove()
            (trace,) = vtoken.trace(model).stages
    kept = torch.cat([k + n for k, n in zip(trace.kept, (0, 24), strict=True)])
    order = tiny.adapter(model).order(batch["image_grid_thw"], {})
    order = torch.arange(32) if order is None else order
    slots = torch.isin(order, kept).nonzero()[:, 0]
    rows = (slots[:, None] * 4 + torch.arange(4)).flatten()
    hidden = (args[0] if args else kwargs["hidden_states"])[rows]
    cos, sin = kwargs["position_embeddings"]
    with torch.no_grad():
        for layer, cuts in zip(encoder.layers, whole, strict=True):
            lengths = [int(((rows >= a) & (rows < b)).sum()) for a, b in pairwise(cuts)]
            own = torch.tensor([0, *(n for n in lengths if n)]).cumsum(0).int()
            hidden = layer(
                hidden, cu_seqlens=own, max_seqlen=int(own.diff().max()), position_embeddings=(cos[rows], sin[rows])
            )
    assert 0 < len(kept) < 32 and left[-1].shape == hidden.shape
    torch.testing.assert_close(left[-1], hidden, atol=1e-5, rtol=1e-5)


@families
@pytest.mark.parametrize("stages", [[RESIZE], [PixelPrune()], [RESIZE, Bright()]], ids=str)
def test_a_row_of_a_batch_is_what_it_is_alone(family: str, stages: list[Any]) -> None:
    model = tiny.make(family)
    batch = tiny.build(model, suited(family, WITH_VIDEOS), seed=3)
    batch = page(model, batch) if "pixel_values" in batch else batch
    with vtoken.wrapped(model, stages):
        together = torch.stack(greedy(model, batch, n=3, **LOGITS).logits, 1)
        whole = vtoken.trace(model)
        for row in range(len(together)):
            single = torch.stack(greedy(model, alone(model, batch, row), n=3, **LOGITS).logits, 1)
            torch.testing.assert_close(together[row : row + 1], single, atol=2e-4, rtol=1e-4)
            mine = [k.tolist() for k, r in zip(whole.kept, whole.row, strict=True) if r == row]
            assert mine == [k.tolist() for k in vtoken.trace(model).kept]


@families
def test_rows_below_the_least_run_dense(family: str) -> None:
    model = tiny.make(family)
    batch = page(model, tiny.build(model, [[3, ("img", (1, 8, 12)), 5], [1, ("img", (1, 4, 4)), 2]], seed=3))
    for stage in (RESIZE, PixelPrune()):
        with vtoken.wrapped(model, {"min_visual_tokens": 10, "stages": [stage]}):
            got = torch.stack(greedy(model, batch, **LOGITS).logits, 1)
            trace = vtoken.trace(model)
        assert trace.dense_rows == [1] and trace.tokens_out[0] < 24 and trace.tokens_out[1] == 4
        want = torch.stack(greedy(model, alone(model, batch, 1), **LOGITS).logits, 1)
        torch.testing.assert_close(got[1:], want, atol=2e-4, rtol=1e-4)


@families
def test_a_failing_stage_leaves_the_model_usable(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.make(family)
    batch = tiny.build(model, PICTURES, seed=3)
    want = greedy(model, batch, **LOGITS)
    with vtoken.wrapped(model, [RESIZE, Bright()]):
        first = greedy(model, batch, **LOGITS)
        monkeypatch.setattr(Bright, "fails", True)
        with pytest.raises(ZeroDivisionError):
            greedy(model, batch)
        monkeypatch.setattr(Bright, "fails", False)
        assert torch.equal(torch.stack(greedy(model, batch, **LOGITS).logits), torch.stack(first.logits))
    assert torch.equal(torch.stack(greedy(model, batch, **LOGITS).logits), torch.stack(want.logits))
    with (
        vtoken.wrapped(model, [Bright(merges=True)]),
        pytest.raises(ValueError, match="merged tokens: a stage of site pixels"),
    ):
        greedy(model, batch)


@pytest.mark.parametrize("family", tiny.each("varlen", "by_rows", "by_grids", "crops_sized", "unit"))
def test_towers_that_cannot_are_refused(family: str) -> None:
    if family in FAMILIES:
        with pytest.raises(UnsupportedError, match="must come first, and once; pixelprune stands before it"):
            vtoken.wrap(tiny.make(family), [PixelPrune(), RESIZE])
        return
    with pytest.raises(UnsupportedError, match="stage resize acts on pixels") as told:
        vtoken.wrap(tiny.make(family), [RESIZE])
    kind = tiny.family(family)
    assert kind.by_rows or kind.by_grids or kind.crops_sized or "pool averages" in str(told.value)
    with pytest.raises(UnsupportedError, match="stage pixelprune acts on pixels"):
        vtoken.wrap(tiny.make(family), [PixelPrune()])


@families
@pytest.mark.parametrize("stage", [{"resize": {"keep": "30%"}}, {"pixelprune": {"left": 0.25}}], ids=str)
def test_flops(family: str, stage: dict[str, Any]) -> None:
    """What the account says of the tower is what it runs; the prompt is as long as it says."""
    model = tiny.make(family)
    batch = tiny.build(model, [[2, ("img", (1, 8, 12)), 3]], seed=3)
    if "pixelprune" in stage:  # five columns of the first row stay, and the first token of what is below
        shade = torch.tensor([1.0, 2, 3, 4, 5, *[5] * 19])
        batch["pixel_values"] = shade[:, None].expand(-1, 4 * 1176).reshape(-1, 1176)
    text = int((batch["input_ids"] < tiny.IMG).sum() + (batch["input_ids"] > tiny.VID).sum())
    with vtoken.wrapped(model, [stage]), torch.no_grad():
        stages = vtoken.pipeline(model).stages
        with FlopCounterMode(display=False, custom_mapping=SDPA) as counter:
            greedy(model, batch, n=1)
        trace = vtoken.trace(model)
    options = {"image_size": (8 * 14, 12 * 14), "text_tokens": text, "new_tokens": 1}
    claimed, dense = account(model.config, Pipe(stages), **options), account(model.config, **options)
    others = (model.get_decoder(), "language_model"), (model.lm_head, "lm_head")
    behind = sum(sum(part(counter, module, name).values()) for module, name in others)
    assert claimed.visual_entry == 6 and trace.prompt_tokens == [text + 6]
    assert claimed.tower < 0.6 * dense.tower and claimed.prefill_linear < dense.prefill_linear
    windows = tiny.family(family).full_attention
    if "resize" in stage or windows is None:
        assert claimed.tower + claimed.projector == counter.get_total_flops() - behind
    assert claimed.inexact == (("pixelprune",) if "pixelprune" in stage else ())


@families
def test_smaller_pictures_are_those_of_the_processor(family: str) -> None:
    """Of a picture of 8 x 8 tokens, which it does not resize, and told to make at most 4 x 4 of it: within a level of
    256, to which it rounds twice."""
    from PIL import Image

    model = tiny.make(family)
    images = processor(family).image_processor
    counted = images.size["longest_edge"] // 112**2  # some count a picture for each frame that a patch spans
    draw = torch.randint(0, 256, (8 * 28, 8 * 28, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    picture = Image.fromarray(draw.numpy())

    def processed(side: int) -> Any:
        images.size = {"shortest_edge": 28 * 28, "longest_edge": side**2 * counted}
        return images(images=[picture], return_tensors="pt")

    whole, want = processed(8 * 28), processed(4 * 28)
    assert whole["image_grid_thw"].tolist() == [[1, 16, 16]] and want["image_grid_thw"].tolist() == [[1, 8, 8]]
    seen: list[Any] = []
    with vtoken.wrapped(model, [{"resize": {"keep": "25%"}}]), torch.no_grad():
        hook = model.model.visual.register_forward_pre_hook(
            lambda m, a, k: seen.append(k["hidden_states"]), with_kwargs=True
        )
        model.model.get_image_features(**whole)
        hook.remove()
    level = 1 / 255 / min(images.image_std)
    assert float((seen[0] - want["pixel_values"]).abs().max()) <= 1.05 * level
