"""FlowCut inside towers: its facts against dense attention, whole runs against a naive tower, and what its options change."""

from __future__ import annotations

from math import log

import pytest
import tiny
import tiny_models
import torch
from hooked_tower import IMAGES, VIDEOS, Hooked, pictures
from known_flowcut import one, with_facts
from naive_tower import group, naive, rotate, stock
from packing import tokens
from pydantic import ValidationError

import vtoken
from vtoken import registry
from vtoken.stages import Fact

FlowCut = registry.stage("flowcut")
GLOBAL = ("global_attention", "value_attention", "mean_value")
ROWS = [["img", 3], [1, "img", 2, "img", 7]]


def deep(tower="clip", attn="sdpa", seed=0):
    """A LLaVA whose tower has eight layers, with attention sharp enough for early cuts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny_models.TOWERS[tower]["vision_config"], "num_hidden_layers", 8)
        model = tiny.family("llava").make(attn, seed, tower=tower)  # not `tiny.make`, which keeps what it made
    for layer in registry.adapter("llava")(model).encoder.layers:
        layer.self_attn.q_proj.weight.data *= 4
    return model


def dense(q, k, v, cls):
    """The three facts from q, k, v [n, H, d] of one picture, in float64 with whole maps; CLS in front if there is
    one."""
    q, k, v = q.double(), k.double(), v.double()
    query, value = (q[0], v[0]) if cls else (q.mean(0), v.mean(0))
    attention = (torch.einsum("hd,nhd->hn", query, k) * q.shape[-1] ** -0.5).softmax(-1).mean(0)
    relevance = torch.einsum("hd,nhd->hn", value, v).softmax(-1).mean(0)
    return [x[int(cls) :] for x in (attention, relevance, v.mean(1))]


@torch.no_grad()
def run_by_hand(model, pixels, stage):
    """One picture through the tower in float64, cut as the definition says: kept patches after every layer."""
    tower = model.model.vision_tower
    nested, clip = getattr(tower, "vision_model", tower), model.config.vision_config.model_type == "clip_vision_model"
    h, cls = nested.embeddings(pixels), int(clip)
    h = nested.pre_layrnorm(h) if clip else h
    live, past, out = list(range(tiny.TOKENS)), {}, []
    for index, layer in enumerate(nested.encoder.layers[:6]):
        x, attention = layer.layer_norm1(h)[0], layer.self_attn
        q, k, v = (p(x).unflatten(-1, (4, -1)) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
        h = layer(h, None)
        facts = []
        for fact in dense(q, k, v, clip):
            facts.append(fact.new_zeros(tiny.TOKENS, *fact.shape[1:]))
            facts[-1][live] = fact
        facts[2] = facts[2] if facts[2].ndim == 2 else facts[2][:, None]
        left = one(stage, live, past, stage.keep.tokens, 5 - index, *facts)
        h = torch.cat([h[:, :cls], h[:, cls:][:, [live.index(j) for j in left]]], 1)
        live = left
        out.append(live)
    return out


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("options", [{}, {"relevance": False}], ids=str)
def test_equals_a_naive_tower(tower, attn, options):
    """Every layer of every picture; pictures of one batch are cut to different lengths on the way."""
    stage = FlowCut(keep=3, **options)
    model, exact = deep(tower, attn), deep(tower, "eager").double()
    batch = tiny.build(model, ROWS, seed=3)
    with vtoken.wrapped(model, [stage]), torch.no_grad():
        model(**batch)
        trace = vtoken.trace(model)
    assert [s.layer for s in trace.stages] == list(range(6))
    for i, pixels in enumerate(batch["pixel_values"].double()):
        assert [s.kept[i].tolist() for s in trace.stages] == run_by_hand(exact, pixels[None], stage)
    assert any(len(set(s.tokens_out)) > 1 for s in trace.stages) and trace.tokens_out == [3, 3, 3]


def test_later_layers_run_on_less():
    model = deep()
    batch, widths = tiny.build(model, ROWS, seed=3), []
    with vtoken.wrapped(model, [FlowCut(keep=3)]), torch.no_grad():
        for layer in model.model.vision_tower.encoder.layers:
            layer.register_forward_hook(lambda m, a, o: widths.append(o.shape[1]))
        model(**batch)
        outs = [max(s.tokens_out) for s in vtoken.trace(model).stages]
    assert widths[:7] == [17, *(1 + n for n in outs)] and widths[6] == 4 < widths[4] < 17


def test_the_batch_counts_only_with_the_authors_quirk():
    model = deep()
    batch = tiny.build(model, ROWS, seed=3)

    def counts(pixels, **options):
        with vtoken.wrapped(model, [FlowCut(keep=3, **options)]), torch.no_grad():
            model(**tiny.build(model, ROWS, seed=3) | {"pixel_values": pixels})
            return [s.tokens_out for s in vtoken.trace(model).stages]

    pixels = batch["pixel_values"]
    own, shared = counts(pixels), counts(pixels, reference_quirks=True)
    assert [c[::-1] for c in own] == counts(pixels.flip(0))
    assert any(len(set(c)) > 1 for c in own) and all(len(set(c)) == 1 for c in shared)
    assert shared[1] == [min(own[1])] * 3


@pytest.mark.parametrize("family", tiny.families(grouped=True))
@pytest.mark.parametrize("grids", [IMAGES, VIDEOS], ids=["images", "videos"])
def test_global_facts_of_packed_towers(family, grids):
    """Over the whole picture or video, in window blocks too, then means over the merge group."""
    hooked, (pixels, grid) = Hooked(family, wanted=[(name, 2) for name in GLOBAL]), pictures(grids)
    hooked(pixels, grid, "video" if grids is VIDEOS else "image")
    visual, start = stock(family).model.visual, 0
    for part, size in zip(pixels.split(grid.prod(-1).tolist()), grid, strict=True):
        seen = {}
        rotary = visual.rotary_pos_emb.register_forward_hook(lambda m, a, out, s=seen: s.update(rope=out))
        qkv = visual.blocks[2].attn.qkv.register_forward_hook(lambda m, a, out, s=seen: s.update(qkv=out))
        try:
            naive(stock(family), part, size)
        finally:
            rotary.remove()
            qkv.remove()
        q, k, v = seen["qkv"].unflatten(1, (3, 4, -1)).unbind(1)
        n = len(part) // 4
        for name, fact in zip(GLOBAL, dense(rotate(q, *seen["rope"]), rotate(k, *seen["rope"]), v, False), strict=True):
            got = hooked.run.tower.facts[Fact(name, 2)][start : start + n]
            torch.testing.assert_close(got, group(fact).float(), atol=1e-5, rtol=1e-4)
        start += n


def test_other_stages_may_drop_in_between():
    """What it remembers of earlier layers is found by place: removing rows must not shift it."""
    stage = FlowCut(keep=2, at=(0, 1))
    memory, ones, values = {}, torch.ones(4), torch.tensor([[9.0], [1], [5], [7]])
    assert stage.select(with_facts(ones, ones, values, 0, memory=memory, side=2)).lengths == (4,)
    left = torch.tensor([1, 2, 3])
    flat = with_facts(ones[:3], ones[:3], torch.ones(3, 1), 1, left, memory, side=2)
    assert flat.raster_index[stage.select(flat).index].tolist() == [2, 3], (
        "the newest layer alone cannot tell them apart"
    )


def test_frames_have_their_own_budget():
    """Also where their tokens take turns in reading order."""
    attention = torch.tensor([4.0, 60, 2, 90, 3, 70, 1, 80])
    facts = {"global_attention": attention, "value_attention": torch.ones(8), "mean_value": torch.ones(8, 1)}
    video = {"lengths": (8,), "grid": ((2, 2, 2),), "segment": torch.tensor([0, 1] * 4)}
    keep = FlowCut(keep={"per_frame": 2}).select(tokens(**video, **facts))
    assert keep.index.tolist() == [0, 3, 4, 7] and keep.lengths == (4,)
    assert FlowCut(keep=4).select(tokens(**video, **facts)).index.tolist() == [1, 3, 5, 7]


def test_plan_bounds_what_runs():
    model, parts = deep(), (((1, 4, 4),),) * 3
    with vtoken.wrapped(model, [FlowCut(keep=3)]), torch.no_grad():
        model(**tiny.build(model, ROWS, seed=3))
        found = [tuple(s.tokens_out) for s in vtoken.trace(model).stages]
    stage, lengths = FlowCut(keep=3).for_depth(8), (16, 16, 16)
    for layer in range(6):
        lengths = stage.expected_counts(lengths, parts, range(3), layer)
        assert all(most >= n for most, n in zip(lengths, found[layer], strict=True))
    assert lengths == found[-1] == (3, 3, 3)
    half = FlowCut(keep="50%").for_depth(8)
    assert half.expected_counts((12,), (((1, 4, 4),),), (0,), 5) == (8,), "of all 16, whatever is left of them"


def test_zero_attention_and_relevance():
    """Underflown weights: 0 log 0 is 0, and a picture whose relevance is all zero is scored by its attention."""
    attention = torch.tensor([1.0, 0, 0, 0.5])
    given = with_facts(attention, torch.zeros(4), torch.ones(4, 1), 1, side=2)
    p, q = 2 / 3, 1 / 3
    h = -(p * log(p) + q * log(q)) / log(4)
    keep = FlowCut(keep=1, at=(1, 3)).select(given)
    assert len(keep.index) == 4 - round(3 / 2**0.5 * (1 - h**2)) and {0, 3} & set(keep.index.tolist())
    assert FlowCut(keep=2, at=(1,)).select(given).index.tolist() == [0, 3]


def test_what_it_refuses():
    with pytest.raises(ValidationError, match="does not know what belongs to one prompt"):
        FlowCut(keep={"total": 64})
    with pytest.raises(ValidationError, match="at least 1"):
        FlowCut(keep=4, at=())
    with pytest.raises(ValueError, match="how deep the encoder is"):
        FlowCut(keep=4).expected_counts((16,), (((1, 4, 4),),), (0,), 1)
    model = tiny.llava()
    with pytest.raises(vtoken.errors.UnsupportedError, match=r"acts at encoder layers .* 0 to 1"):
        vtoken.wrap(model, [FlowCut(keep=4, at=(1, 2))])
