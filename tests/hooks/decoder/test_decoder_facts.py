"""What stages inside the LLM are told, held against the stock model's attention maps, hidden states and keys."""

from __future__ import annotations

import pytest
import tiny
import torch
from batches import rows_for
from modes import attending, families, greedy
from turns import IMAGE_TURNS, TURNS, conversation, second
from watchers import LAYERS, First, Watcher, dense, every_other, expected, held_against

import vtoken
from vtoken.errors import UnsupportedError
from vtoken.stages import Fact, Keep, VisualTokens
from vtoken.stages.facts import read_of


@attending
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_facts_equal_the_stock_models(family, attn):
    model = tiny.make(family)
    batch = tiny.build(model, rows_for(family, "ragged"), seed=3)
    out, watcher = dense(model, batch), Watcher(seen={})
    model.set_attn_implementation(attn)
    with vtoken.wrapped(model, [watcher]), torch.no_grad():
        model(**batch)
    assert set(watcher.seen) == set(LAYERS)
    for k, tokens in watcher.seen.items():
        held_against(tokens, expected(model, batch, out, k))


@attending
def test_facts_are_those_of_the_last_prompt_token(family):
    """With an answer behind the prompt whose logits are asked for, stages are told what generate tells them."""
    model = tiny.make(family)
    batch = tiny.build(model, rows_for(family, "ragged"), seed=3)
    out, watcher = dense(model, batch), Watcher(seen={})
    with vtoken.wrapped(model, [watcher]), torch.no_grad():
        model(**batch, logits_to_keep=4)
    for k, tokens in watcher.seen.items():
        held_against(tokens, expected(model, batch, out, k, tail=3))


class EverySecond(First):
    """Before layer `at`, drops every second token of every image. No paper."""

    def select(self, tokens: VisualTokens) -> Keep:
        rows = torch.arange(len(tokens.x)).split(list(tokens.lengths))
        return Keep(torch.cat([r[::2] for r in rows]), tuple(len(r[::2]) for r in rows))


class Earlier(Watcher):
    """Is told facts of layer 1, wherever it acts. No paper."""

    def needs(self) -> tuple[Fact, ...]:
        return tuple(Fact(name, 1) for name in self.asks)

    def query_tokens(self, tokens: VisualTokens) -> list[torch.Tensor]:
        return [every_other(len(text)) for text in tokens.facts[Fact("later_text")]]


OF_A_LAYER = sorted(spec.name for spec in read_of("decoder layer").values() if spec.per == "token")


@families
def test_facts_of_an_earlier_layer_follow_the_token(family):
    """Behind a cut, what layer 1 said of a token is what it says without the cut, whatever slot the token has moved
    to."""
    model = tiny.make(family)
    batch = tiny.build(model, rows_for(family, "ragged"), seed=3)
    facts = {}
    for name, stages in (("dense", []), ("cut", [EverySecond(at=2)])):
        watcher = Earlier(at=(3,), asks=(*OF_A_LAYER, "later_keys"), seen={})
        with vtoken.wrapped(model, [*stages, watcher]), torch.no_grad():
            model(**batch)
        facts[name] = watcher.seen[3]
    dense, cut = facts["dense"], facts["cut"]
    start, chosen = 0, []
    for n in dense.lengths:
        chosen.append(torch.arange(start, start + n, 2))
        start += n
    assert cut.lengths == tuple(map(len, chosen))
    for name in OF_A_LAYER:
        want = dense.fact(name, 1)[torch.cat(chosen)]
        torch.testing.assert_close(cut.fact(name, 1), want, msg=lambda m, name=name: f"{name}: {m}")
    for got, want in zip(cut.fact("later_keys", 1), dense.fact("later_keys", 1), strict=True):
        torch.testing.assert_close(got, want)


@families
@pytest.mark.parametrize("name", OF_A_LAYER)
@pytest.mark.parametrize("layer", [2, 3, -1])
def test_facts_of_a_later_layer_are_refused(family, name, layer):
    class Ahead(Watcher):
        def needs(self) -> tuple[Fact, ...]:
            return (Fact(name, layer),)

    with pytest.raises(UnsupportedError, match=rf"before decoder layer 2.*{name} of layer {layer % 4}"):
        vtoken.wrap(tiny.make(family), [Ahead(at=(2, 3))])


MODES = ["plain", "eager", "compact", "static", "turn"]


@attending
@pytest.mark.parametrize("mode", MODES)
def test_the_next_layer_is_foretold(family, mode):
    """What a stage is told of the layer to come is what that layer then does, behind a cut at the same layer, and on a
    cache in which an earlier turn was cut there."""
    if mode == "compact" and tiny.family(family).mrope:
        pytest.skip("M-RoPE positions cannot be renumbered")
    if mode == "turn" and tiny.family(family).mrope and not IMAGE_TURNS:
        pytest.skip("transformers gives a new image in a cached turn the positions of text")
    model = tiny.make(family, "eager" if mode == "eager" else "sdpa")
    before = Watcher(at=(2,), asks=("next_query_attention",), seen={})
    after = Watcher(at=(3,), asks=("last_query_attention",), seen={})
    pipeline = {"positions": "compact" if mode == "compact" else "original", "stages": [First(at=2), before, after]}
    rows = TURNS["image"] if mode == "turn" else (rows_for(family, "ragged"),)
    first = tiny.build(model, rows[0], seed=3)
    with vtoken.wrapped(model, pipeline):
        said = greedy(
            model, first, 2, cache_implementation="static" if mode == "static" else None, return_dict_in_generate=True
        )
        if mode == "turn":
            turn = tiny.build(model, rows[1], seed=9)
            whole, _ = conversation(model, first, turn, said.sequences)
            greedy(model, second(model, whole, turn), 2, past_key_values=said.past_key_values)
    foreseen, done = before.seen[2], after.seen[3]
    assert foreseen.lengths == done.lengths and sum(foreseen.lengths) > 0
    torch.testing.assert_close(
        foreseen.fact("next_query_attention"), done.fact("last_query_attention"), atol=1e-6, rtol=1e-4
    )
