"""Merging inside towers: whole runs against a naive tower that repeats merged tokens instead of weighting them."""

from __future__ import annotations

import pytest
import tiny
import torch
import usual
from known_merge import step
from modes import alone, families
from plain_runs import run
from probes import Recorder

import vtoken
from vtoken import registry
from vtoken.errors import UnsupportedError
from vtoken.evals.cost.flops import account
from vtoken.hooks.state.run import FeatureCall
from vtoken.stages import Fact

ToMe, DToMe = registry.stage("tome"), registry.stage("dtome")
ROWS = [["img", 3], [1, "img", 2, "img", 7], [4]]
SOME = (0.75, 0.6, 0.7, 0.7)  # thresholds that random towers exceed here and there
STAGES = {"tome": ToMe(r=(3, 0, 5, 1)), "dtome": DToMe(thresholds=SOME)}
LAST = {"clip": 2, "siglip": 3}  # the layer that features are read from
TOWERS = pytest.mark.parametrize("tower", ["clip", "siglip"])


def limit(stage, layer):
    if stage.name == "tome":
        return lambda similarities: stage.schedule(4)[layer]
    return lambda similarities: sum(s > stage.thresholds[layer] for s in similarities)


def copies(groups, cls):
    """Rows of a sequence in which every group stands as often as it has members, and where its first copy is."""
    sizes = [1] * cls + [len(g) for g in groups]
    rows = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return rows, torch.tensor([0, *torch.tensor(sizes).cumsum(0)[:-1].tolist()])


@torch.no_grad()
def by_hand(model, pixels, stage, tower):
    """One crop [1, 3, H, W] in float64: its groups by their first member's place, what the projector makes of them, and
    the attention that each receives from the first row in the last layer."""
    nested, cls = getattr(model.model.vision_tower, "vision_model", model.model.vision_tower), int(tower == "clip")
    h = nested.embeddings(pixels)
    h = nested.pre_layrnorm(h) if cls else h
    groups = [[k] for k in range(tiny.TOKENS)]
    for index, layer in enumerate(nested.encoder.layers[: LAST[tower] + 1]):
        rows, first = copies(sorted(groups), cls)
        x = layer.layer_norm1(h)
        out, weights = layer.self_attn(hidden_states=x[:, rows], attention_mask=None)
        h = h + out[:, first]
        received = torch.zeros(len(first), dtype=h.dtype).index_add_(0, rows, weights[0].mean(0)[0])
        key = layer.self_attn.k_proj(x).unflatten(-1, (4, -1)).mean(2)[0, cls:]
        before = sorted(groups)
        keys = {g[0]: k for g, k in zip(before, key, strict=True)}
        groups = step(groups, keys, limit(stage, index), cls)
        mean = []
        for g in sorted(groups):
            inside = [i for i, old in enumerate(before) if old[0] in g]
            share = torch.tensor([len(before[i]) for i in inside], dtype=h.dtype)
            mean.append((h[0, cls:][inside] * share[:, None]).sum(0) / share.sum())
        h = torch.cat([h[:, :cls], torch.stack(mean)[None]], 1)
        h = h + layer.mlp(layer.layer_norm2(h))
    return sorted(groups), model.model.multi_modal_projector(h[:, cls:])[0], received[cls:], [g[0] for g in before]


def entering(model, batch):
    """What the wrapped model hands its decoder, and the trace."""
    seen = {}
    hook = model.get_decoder().register_forward_pre_hook(lambda m, a, k: seen.update(k), with_kwargs=True)
    with torch.no_grad():
        model(**batch)
    hook.remove()
    return seen["inputs_embeds"], vtoken.trace(model)


@TOWERS
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("ran", [False, True], ids=["fresh", "ran before"])
def test_equals_a_naive_tower(tower, attn, name, ran):
    """Groups and embeddings of every picture of a ragged batch; also where transformers installed its own hooks
    first."""
    model, exact = tiny.llava(attn, tower=tower), tiny.llava("eager", tower=tower).double()
    batch = tiny.build(model, ROWS, seed=3)
    if ran:
        model.generate(**batch, max_new_tokens=1)
    with vtoken.wrapped(model, [STAGES[name]]):
        embeds, trace = entering(model, batch)
    last = trace.stages[-1]
    for i, pixels in enumerate(batch["pixel_values"].double()):
        groups, features, *_ = by_hand(exact, pixels[None], STAGES[name], tower)
        assert last.kept[i].tolist() == [g[0] for g in groups]
        assert [(last.into[i] == g[0]).nonzero()[:, 0].tolist() for g in groups] == [sorted(g) for g in groups]
        padding = embeds.shape[1] - trace.prompt_tokens[trace.row[i]]
        start = padding + (0, 1, 1 + len(trace.kept[1]) + 2)[i]
        torch.testing.assert_close(
            embeds[trace.row[i], start : start + len(groups)].double(), features, atol=2e-4, rtol=1e-4
        )
    assert trace.tokens_out == last.tokens_out and max(trace.tokens_out) < tiny.TOKENS
    assert name == "tome" or len(set(trace.tokens_out)) > 1, "pictures lose different numbers"


@TOWERS
def test_attention_facts_count_members(tower):
    """What a later stage is told of the last layer's attention: merged keys weigh as much as all their members."""
    name = "cls_attention" if tower == "clip" else "keys"
    model, exact = tiny.llava(tower=tower), tiny.llava("eager", tower=tower).double()
    batch, seen = tiny.build(model, [["img", 3]], seed=3), []
    with vtoken.wrapped(model, [STAGES["tome"], Recorder(asks=((name, None),), seen=seen)]), torch.no_grad():
        model(**batch)
        kept = vtoken.trace(model).kept[0].tolist()
    _, _, received, places = by_hand(exact, batch["pixel_values"].double(), STAGES["tome"], tower)
    want = received[[places.index(k) for k in kept]]
    fact = seen[0].fact(name)
    if tower == "clip":
        torch.testing.assert_close(fact.double(), want, atol=1e-6, rtol=1e-4)
    assert len(fact) == len(kept) and not fact.isnan().any()
    assert seen[0].size.sum() == tiny.TOKENS and seen[0].size.max() > 1


def test_later_layers_run_on_less():
    model, seen = tiny.llava(), {"attention": [], "mlp": [], "layer": []}
    batch = tiny.build(model, ROWS, seed=3)
    with vtoken.wrapped(model, [ToMe(r=(3, 0, 5, 1))]), torch.no_grad():
        for layer in model.model.vision_tower.encoder.layers:
            layer.self_attn.k_proj.register_forward_hook(lambda m, a, o: seen["attention"].append(o.shape[1]))
            layer.mlp.fc1.register_forward_hook(lambda m, a, o: seen["mlp"].append(o.shape[1]))
            layer.register_forward_hook(lambda m, a, o: seen["layer"].append(o.shape[1]))
        model(**batch)
        trace = vtoken.trace(model)
    assert seen == {"attention": [17, 14, 14, 9], "mlp": [14, 14, 9, 9], "layer": [14, 14, 9, 9]}
    assert [(s.layer, s.tokens_in, s.tokens_out) for s in trace.stages] == [
        (0, [16] * 3, [13] * 3),
        (2, [13] * 3, [8] * 3),
    ]
    assert trace.layers == [[8] * 3] * 4


@pytest.mark.parametrize("family", tiny.families(unit=1))
@pytest.mark.parametrize("name", STAGES)
def test_a_batch_equals_its_rows(family, name):
    model = tiny.make(family)
    rows = ROWS if not tiny.family(family).anyres else [[3, "img", 5], [1, ("img", (50, 100)), 7], [4]]
    batch = tiny.build(model, rows, seed=3)
    with vtoken.wrapped(model, [STAGES[name]]):
        out, trace = run(model, batch), vtoken.trace(model)
        for row in range(2):
            single = run(model, alone(model, batch, row))
            assert torch.equal(out.sequences[row, -8:], single.sequences[0, -8:])
            mine = [k.tolist() for k, r in zip(trace.kept, trace.row, strict=True) if r == row]
            assert [k.tolist() for k in vtoken.trace(model).kept] == mine


@pytest.mark.parametrize("size", [(100, 60), (30, 100)])
@pytest.mark.parametrize("name", STAGES)
def test_nothing_vanishes_with_the_padding_of_crops(size, name):
    """Every visual token finds, where its home stands, what the naive tower makes of its group; groups of padding alone
    are gone."""
    model, exact = tiny.make("llava_next"), tiny.make("llava_next").double()
    exact.set_attn_implementation("eager")
    batch = tiny.build(model, [[3, ("img", size), 5]], seed=3)
    with vtoken.wrapped(model, [STAGES[name]]):
        embeds, trace = entering(model, batch)
    adapter = registry.adapter("llava_next")(model)
    inputs = {key: batch[key] for key in ("pixel_values", "image_sizes")}
    crops = batch["pixel_values"][0][: adapter.crops(inputs)[0]]
    ids = torch.arange(len(crops) * tiny.TOKENS).float().view(len(crops), -1, 1)
    where = adapter.pack(FeatureCall("image", inputs, adapter.layouts("image", inputs)), ids)[:, 0].long().tolist()
    want = {}
    for c, pixels in enumerate(crops.double()):
        groups, features, *_ = by_hand(exact, pixels[None], STAGES[name], "clip")
        want |= {c * tiny.TOKENS + k: (c, g, x) for g, x in zip(groups, features, strict=True) for k in g}
    into, kept = trace.stages[-1].into[0].tolist(), trace.kept[0].tolist()
    assert sorted(set(into)) == kept
    groups = {(want[w][0], want[w][1][0]) for w in where}
    assert len(kept) == len(groups) < len({(c, g[0]) for c, g, _ in want.values()})
    at = dict(zip(kept, seen_values(trace, embeds, kept), strict=True))
    for token, patch in enumerate(where):
        assert want[patch][0] == want[where[into[token]]][0], "crops merge apart"
        torch.testing.assert_close(at[into[token]].double(), want[patch][2], atol=2e-4, rtol=1e-4)


def seen_values(trace, embeds, kept):
    """Embeddings of the kept tokens of one picture behind three tokens of text, newlines skipped: a newline is the
    model's, not a patch's."""
    (whole,), (_, _, columns) = trace.parts[0][:1], trace.parts[0][1]
    out, column = [], 3
    row = None
    for k in kept:
        inside = k - whole[1] * whole[2]
        if inside >= 0:
            if row is not None and inside // columns != row:
                column += 1
            row = inside // columns
        out.append(embeds[0, column])
        column += 1
    return out


def test_without_proportional_attention():
    """An option that changes what later layers see, not what the first merges."""
    model = tiny.llava()
    batch = tiny.build(model, ROWS, seed=3)
    outs = []
    for flag in (True, False):
        with vtoken.wrapped(model, [ToMe(r=4, proportional=flag)]):
            outs.append(entering(model, batch))
    (weighted, first), (plain, second) = outs
    assert all(torch.equal(a, b) for a, b in zip(first.stages[0].kept, second.stages[0].kept, strict=True))
    assert not torch.allclose(weighted[0], plain[0])


@TOWERS
def test_merging_nothing_is_the_identity(tower):
    model = tiny.llava(tower=tower)
    batch = tiny.build(model, ROWS, seed=3)
    want = run(model, batch)
    with vtoken.wrapped(model, [DToMe(thresholds=(1.01,) * 4)]):
        got = run(model, batch)
    assert torch.equal(torch.stack(got.logits), torch.stack(want.logits)), "bit for bit"


def test_stages_that_drop_may_act_in_between():
    model = tiny.llava()
    batch = tiny.build(model, ROWS, seed=3)
    with vtoken.wrapped(model, [{"flowcut": {"keep": 9, "at": [0, 1]}}, ToMe(r=3), {"fastervlm": {"keep": 2}}]):
        out, trace = run(model, batch), vtoken.trace(model)
    assert [s.name for s in trace.stages][:4] == ["tome", "flowcut", "tome", "flowcut"]
    assert [s.tokens_out[0] for s in trace.stages[-2:]] == [6, 2] and out.sequences.shape[0] == 3
    assert trace.stages[-2].tokens_in == [9] * 3


@TOWERS
def test_flops_of_a_tower_that_merges(tower):
    from flop_counts import CLOSE, SDPA, Pipe, part
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny.llava(tower=tower)
    batch = tiny.build(model, [[7, "img", 4]])
    with (
        vtoken.wrapped(model, [STAGES["tome"]]),
        torch.no_grad(),
        FlopCounterMode(display=False, custom_mapping=SDPA) as counter,
    ):
        model.generate(**batch, max_new_tokens=1, do_sample=False)
    found = account(model.config, Pipe((STAGES["tome"],)), text_tokens=11, new_tokens=1)
    inner = model.model
    counts = part(counter, inner.vision_tower, "vision_tower")
    # The similarities run inside the tower; the account books them under stages.
    similarities = sum(2 * 8 * a * b for a, b in ((8, 8), (7, 6)) + (((4, 4),) if tower == "siglip" else ()))
    assert found.tower == pytest.approx(sum(counts.values()) - similarities, rel=CLOSE)
    projector = sum(part(counter, inner.multi_modal_projector, "multi_modal_projector").values())
    assert found.projector == pytest.approx(projector, rel=CLOSE)
    assert found.visual_entry == (8 if tower == "clip" else 7)


REFUSED = {
    "qwen": (lambda: (tiny.make("qwen2_5_vl"), ToMe(r=2)), "neighbouring patches"),
    "too few thresholds": (lambda: (tiny.llava(), DToMe(thresholds=(0.9,) * 3)), "encoder of 3 layers, this one has 4"),
    "no layer": (lambda: (tiny.llava(), ToMe(r=0)), r"encoder layers \[\]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_wrap_refuses(case):
    build, message = REFUSED[case]
    model, stage = build()
    with pytest.raises(UnsupportedError, match=message):
        vtoken.wrap(model, stage)
    vtoken.unwrap(vtoken.wrap(model, "none"))


def test_flash_attention_cannot_weigh_keys():
    model = tiny.llava()
    model.model.vision_tower.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UnsupportedError, match="sdpa"):
        vtoken.wrap(model, ToMe(r=2))
    vtoken.unwrap(vtoken.wrap(model, ToMe(r=2, proportional=False)))


def test_interpolated_videos_are_refused_when_they_come():
    model = tiny.make("llava_onevision")
    still, video = tiny.build(model, [[3, "img", 5]], seed=3), tiny.build(model, [[3, "video", 5]], seed=3)
    with vtoken.wrapped(model, ToMe(r=2)):
        with pytest.raises(UnsupportedError, match="interpolation"):
            run(model, video)
        want = run(model, still).sequences
        assert torch.equal(run(model, still).sequences, want)


def test_training_through_merged_tokens():
    """Gradients reach the tower; gradient checkpointing is refused, as it would merge nothing the second time."""
    model = tiny.llava().train()
    batch = tiny.build(model, [["img", 3]], seed=3)
    with vtoken.wrapped(model, ToMe(r=2)):
        model(**batch).logits[:, -1].sum().backward()
        grad = model.model.vision_tower.encoder.layers[0].mlp.fc1.weight.grad
        assert grad is not None and float(grad.abs().sum()) > 0
        model.gradient_checkpointing_enable()
        with pytest.raises(UnsupportedError, match="gradient_checkpointing_disable"):
            model(**batch)


@families
def test_index_map_covers_every_token(family):
    """For every unpruned token the trace names a live one, as whatever comes later needs it."""
    model = tiny.make(family)
    batch = tiny.build(model, [[3, "img", 5], [2, "img", 3]], seed=3)
    name = "dtome" if tiny.family(family).unit == 1 else "dtome_post"
    with vtoken.wrapped(model, usual.stage(name)):
        run(model, batch)
        trace = vtoken.trace(model)
    last = trace.stages[-1]
    for into, kept, n in zip(last.into, last.kept, trace.visual_tokens, strict=True):
        assert len(into) == n and sorted(set(into.tolist())) == kept.tolist() and len(kept) < n
    assert trace.tokens_out == trace.layers[0]


def test_keys_of_packed_towers_are_means_over_heads():
    from hooked_tower import IMAGES, Hooked, pictures

    hooked = Hooked("qwen2_vl", wanted=[("mean_key", 2), ("keys", 2)])
    hooked(*pictures(IMAGES))
    facts = hooked.run.tower.facts
    want = facts[Fact("keys", 2)].unflatten(1, (4, -1)).mean(1)
    torch.testing.assert_close(facts[Fact("mean_key", 2)], want, atol=1e-5, rtol=1e-5)
