"""`vtoken calibrate streaming`: its scores against their definition, the ranking, and the table it writes."""

from __future__ import annotations

import json
from functools import partial
from types import SimpleNamespace

import pytest
import tiny
import torch

import vtoken
from vtoken import config, registry
from vtoken.cli import main
from vtoken.errors import ConfigError, UnsupportedError
from vtoken.evals import reference
from vtoken.evals.calibrate._echoes import copies, layers_of, ranked, shown, table, watch
from vtoken.evals.calibrate.streaming import Settings, ordinary, repeated, run, visual

PERIOD, REPEATS = 7, 4
SEEN = tiny.families(both_ways=False)


class Words(SimpleNamespace):
    """What the command asks a tokenizer."""

    def __len__(self):
        return 190

    def get_added_vocab(self):
        return {"<extra>": 20}


WORDS = Words(bos_token_id=1, eos_token_id=2, pad_token_id=0, all_special_ids=[0, 1, 2])


def by_hand(period=5, repeats=3):
    """q, k [3, N, d]: a head that looks at what it is itself, one that looks at its own predecessor's word, and one
    that looks at the word it follows wherever that came before."""
    word = torch.tensor([period, *(list(range(period)) * repeats)])
    n = len(word)
    now = torch.eye(n)[word]
    before = torch.eye(n)[torch.cat([torch.tensor([n - 1]), word[:-1]])]
    near = torch.eye(n)
    return 60 * torch.stack([near, now, now]), torch.stack([near, now, before]), period, repeats


def test_three_heads_made_by_hand():
    q, k, period, repeats = by_hand()
    echo, induction = copies(q, k, 1.0, period)
    # A token in its second copy shares its attention among itself and one more, in its third among itself and two.
    want = sum(m / (m + 1) for m in range(1, repeats)) / (repeats - 1)
    assert torch.allclose(echo, torch.tensor([0, want, 0]), atol=1e-4)
    assert torch.allclose(induction, torch.tensor([0, 0, 1.0]), atol=1e-4)
    order, count = ranked([echo[None].double(), induction[None].double()], (1 / 3, 1 / 3))
    assert order.tolist() == [1, 2, 0] and count == 2


def maps(model, inputs):
    """Layer -> [H, N, N], as the stock model gives them."""
    adapter = tiny.adapter(model)
    with torch.no_grad():
        found = [x for x in model(**inputs, output_attentions=True, use_cache=False).attentions if x is not None]
    layers = range(len(adapter.lm.layers)) if len(found) == len(adapter.lm.layers) else adapter.attending
    by_layer = dict(zip(layers, found, strict=True))
    return [by_layer[k][0].double() for k in layers_of(adapter)]


def of_key_heads(scores, key_heads=2):
    return torch.stack([torch.stack(x).unflatten(0, (key_heads, -1)).amax(1) for x in scores])


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_probe_is_its_definition(family):
    model = tiny.make(family, "eager")
    adapter = tiny.adapter(model)
    inputs, period = repeated(adapter, WORDS, PERIOD, REPEATS, seed=0)
    (ids,) = inputs["input_ids"].tolist()
    assert period == PERIOD and ids[0] == 1 and ids[1:] == ids[1 : 1 + PERIOD] * REPEATS
    assert not {0, 1, 2, 20, *adapter.placeholders.values()} & set(ids[1:])
    echo, induction = watch(adapter, inputs, partial(copies, period=PERIOD))
    wanted: tuple[list, list] = ([], [])
    for share in maps(model, inputs):
        for found, step in zip(wanted, (0, 1), strict=True):
            found.append([0.0] * len(share))
            for head, rows in enumerate(share):
                pairs = [(i, j) for i in range(1, len(ids)) for j in range(1, i) if (i - j) % PERIOD == 0]
                found[-1][head] = sum(rows[i, j + step] for i, j in pairs) / (PERIOD * (REPEATS - 1))
    for got, want in zip((echo, induction), wanted, strict=True):
        assert torch.allclose(got, of_key_heads(want), atol=1e-5)
    assert len(echo) < len(adapter.lm.layers) or not (tiny.family(family).states or tiny.family(family).window)
    assert not any(hasattr(layer, "vtoken_tap") for layer in model.modules()), "the model is as it was"


@pytest.mark.parametrize("family", SEEN)
def test_a_picture_is_looked_back_at(family):
    model = tiny.make(family, "eager")
    adapter = tiny.adapter(model)
    given = tiny.build(model, [[3, "img", 2, "img", 2, "img", 4]])
    pixels = {k: v for k, v in given.items() if k not in ("input_ids", "attention_mask") and "token_type" not in k}
    seen = {}
    real = adapter.model.forward

    def spy(**inputs):
        seen.update(inputs)
        return real(**inputs)

    adapter.model.forward = spy
    got = visual(adapter, pixels, 3, seed=0)
    adapter.model.forward = real
    inputs = {k: v for k, v in seen.items() if k not in ("logits_to_keep", "use_cache")}
    (ids,) = inputs["input_ids"].tolist()
    at = [i for i, x in enumerate(ids) if x in adapter.placeholders.values()]
    each = len(at) // 3
    wanted = []
    for share in maps(model, inputs):
        pairs = [(a, b) for a in range(len(at)) for b in range(a) if (a - b) % each == 0]
        wanted.append([sum(rows[at[a], at[b]] for a, b in pairs) / (2 * each) for rows in share])
    assert torch.allclose(got, of_key_heads(wanted), atol=1e-5)


def test_rows_are_taken_a_part_at_a_time(monkeypatch):
    g = torch.Generator().manual_seed(0)
    q, k, places = torch.randn(4, 30, 8, generator=g), torch.randn(2, 30, 8, generator=g), torch.arange(27).view(3, 9)
    whole = shown(q, k, 0.3, places)
    monkeypatch.setattr("vtoken.evals.calibrate._echoes.QUERIES", 4)
    assert torch.allclose(shown(q, k, 0.3, places), whole) and len(set(whole.tolist())) == 4


def test_shares_are_exact_and_ties_go_to_the_earlier_head():
    echo = torch.tensor([[0.1, 0.9], [0.9, 0.9], [0.0, 0.1]])
    induction = torch.tensor([[0.2, 0.0], [0.2, 0.2], [0.2, 0.2]])
    order, count = ranked([echo, induction], (2 / 6, 1 / 6))
    assert count == 3 and sorted(order[:3].tolist()) == [0, 1, 2], "two of three equal ones by echo, one of five"
    assert ranked([echo, induction], (0.0, 2 / 6))[0].tolist()[:2] == [0, 2], "layer 0, then head 0 of layer 1"
    assert ranked([echo], (0.25,))[1] == 2 == round(1.5) and ranked([echo], (1.0,))[1] == 6
    with pytest.raises(ConfigError, match=r"of 6 key heads no head is left at shares of 0\.01, 0\.02; raise one"):
        ranked([echo, induction], (0.01, 0.02))


@pytest.mark.parametrize("shares", [(0.01, 0.14), (0.1, 0.3), (0.5, 0.2)])
def test_the_table_gives_back_the_heads_of_the_shares(shares, tmp_path):
    g = torch.Generator().manual_seed(1)
    scores, layers, depth, heads = [torch.rand(20, 8, generator=g) for _ in shares], range(1, 41, 2), 40, 8
    order, count = ranked(scores, shares)
    wanted = set()
    for score, share in zip(scores, shares, strict=True):
        wanted |= set(sorted(range(160), key=lambda i: -score.flatten()[i])[: round(share * 160)])
    assert set(order[:count].tolist()) == wanted
    file = tmp_path / "heads.json"
    file.write_text(json.dumps(table(order, layers, depth, heads)))
    stage = registry.stage("static_sparse")(gates=str(file), sparsity=round(1 - count / 320, 6))
    full = {(k, h) for k in range(depth) for h, streams in enumerate(stage.streams(k)) if not streams}
    assert full == {(layers[i // heads], i % heads) for i in wanted}
    more = registry.stage("static_sparse")(gates=str(file), sparsity=0.6)
    assert full < {(k, h) for k in range(depth) for h, streams in enumerate(more.streams(k)) if not streams}


def test_the_command_writes_what_static_sparse_reads(tmp_path, capsys):
    file = tmp_path / "heads.json"
    main(["calibrate", "streaming", "tiny-llava", "--induction", "0.25", "--period", "20", "-o", str(file), "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert (printed["tokens"], printed["period"], printed["repeats"], printed["layers"]) == (81, 20, 4, [0, 1, 2, 3])
    flat = torch.tensor(printed["induction"]).flatten()
    best = sorted(range(8), key=lambda i: -flat[i])[:2]
    assert sorted(map(tuple, printed["full"])) == sorted((i // 2, i % 2) for i in best) and printed["sparsity"] == 0.75
    model, (stage,) = reference.load("tiny-llava")[0], config.load(printed["pipeline"]).stages
    assert [[k, h] for k in range(4) for h, s in enumerate(stage.streams(k)) if not s] == printed["full"]
    with vtoken.wrapped(model, printed["pipeline"]):
        pass
    main(["calibrate", "streaming", "tiny-llava", "--induction", "0.25", "-o", str(file)])
    shown = capsys.readouterr().out
    assert "2 of 8 key heads read everything at sparsity 0.75; 42 tokens, 4 times" in " ".join(shown.split())


def test_pictures_take_part(tmp_path, capsys):
    picture, file = str(reference.questions(1)[0].image), tmp_path / "heads.json"
    asked = [
        "tiny-qwen2.5-vl",
        "--images",
        picture,
        "--repeats",
        "2",
        "--echo",
        "0",
        "--induction",
        "0",
        "-o",
        str(file),
    ]
    main(["calibrate", "streaming", *asked, "--json"])
    printed = json.loads(capsys.readouterr().out)
    flat = torch.tensor(printed["visual"]).flatten()
    assert len(printed["full"]) == 2 == round(0.14 * len(flat))
    assert [k * 2 + h for k, h in printed["full"]] == sorted(flat.argsort(descending=True)[:2].tolist())


def test_what_cannot_be_probed_is_said(tmp_path):
    def refused(words, **more):
        with pytest.raises(ConfigError, match=words):
            run(Settings.given(**{"model": "tiny-llava", "out": tmp_path / "a.json", **more}))
        assert not (tmp_path / "a.json").exists()

    refused(r"4 times 300 tokens are more than the 1024 .*lower --period \(to 255\)", period=300)
    refused("of 8 key heads no head is left", induction=0)
    refused("no folder", out=tmp_path / "gone" / "a.json")
    refused("a.tsv: the file is JSON.*name it .json", out=tmp_path / "a.tsv")
    refused("gone.jpg", images=tmp_path / "gone.jpg")
    picture = reference.questions(1)[0].image
    refused("4 times this picture are .* more than the 1024 that this model takes", images=picture)


@pytest.mark.parametrize("family", tiny.families(both_ways=True))
def test_pictures_that_are_seen_both_ways_are_refused(family):
    with pytest.raises(UnsupportedError, match="--images: tokens of a picture see each other both ways"):
        visual(tiny.adapter(tiny.make(family)), {}, 2, seed=0)


def test_a_small_vocabulary_repeats_itself():
    adapter = tiny.adapter(tiny.llava())
    plain = ordinary(adapter, WORDS)
    assert 20 not in plain and len(plain) == 186
    inputs, _ = repeated(adapter, WORDS, 300, 2, seed=0)
    assert set(inputs["input_ids"][0, 1:].tolist()) <= set(plain)
