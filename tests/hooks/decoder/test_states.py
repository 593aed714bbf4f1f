"""Decoders in which some layers keep a state instead of attending (linear attention, convolutions over time)."""

from __future__ import annotations

from typing import Any, ClassVar

import modes
import pytest
import tiny
import torch
from against_oracle import compare
from modes import LOGITS, alone, greedy
from probes import Deep, Ragged
from turns import IMAGE_TURNS, conversation, second
from usual import SPARSE

import vtoken
from vtoken import registry
from vtoken.compressors.cache import _presses
from vtoken.errors import UnsupportedError
from vtoken.hooks.decoder.state_rows import StateRows
from vtoken.stages import Fact, Keep, Pruner, Site
from vtoken.stages.cache import Native

NEW = 4
FAMILIES = [family for family in tiny.FAMILIES if tiny.family(family).states]
hybrids = pytest.mark.parametrize("family", FAMILIES)


class Blind(Pruner):
    """Cuts before a decoder layer by the place in the picture, whatever layers there are. No paper."""

    site: ClassVar[Site] = "decoder"
    layer: int = 1

    def layers(self, depth: int) -> tuple[int, ...]:
        return (self.layer,)

    def score(self, tokens: Any) -> torch.Tensor:
        return tokens.raster_index.float() % 3


@hybrids
@pytest.mark.parametrize("layer", [1, 2, 3])
def test_cuts_around_layers_with_a_state(family: str, layer: int) -> None:
    """Also where all layers before the cut keep a state, so that no slot of theirs is in the cache."""
    model = tiny.make(family)
    batch = tiny.build(model, modes.ROWS, seed=3)
    stages = [Ragged(), Blind(keep=2, layer=layer)]
    trace = compare(model, batch, {"stages": stages})
    assert sum(trace.layers[layer]) < sum(trace.layers[layer - 1])
    with vtoken.wrapped(model, stages):
        want = greedy(model, batch)
        assert torch.equal(greedy(model, batch, cache_implementation="static"), want)
        length = batch["input_ids"].shape[1]
        assert model(**batch).past_key_values.get_seq_length() == length


def turns(model: Any, rows: Any) -> tuple[dict, dict]:
    first, turn = tiny.build(model, rows[0], seed=3), tiny.build(model, rows[1], seed=9)
    return first, turn


def talk(model: Any, first: dict, turn: dict, hidden: torch.Tensor | None = None) -> tuple[Any, Any]:
    """The logits of the second turn, and the state of every layer afterwards. `hidden` columns of the turn are
    padding."""
    a = greedy(model, first, NEW, return_dict_in_generate=True)
    whole, _ = conversation(model, first, turn, a.sequences)
    more = second(model, whole, turn)
    if hidden is not None:
        more["attention_mask"][:, -hidden.shape[1] :] = (~hidden).long()
    b = greedy(model, more, NEW, past_key_values=a.past_key_values, **LOGITS)
    return torch.stack(b.logits), b.past_key_values


def states(cache: Any, row: int) -> list[torch.Tensor]:
    found = [s for layer in cache.layers for name in ("conv_states", "recurrent_states") for s in of(layer, name)]
    return [s[row] for s in found]


def of(layer: Any, name: str) -> list[torch.Tensor]:
    return [s for s in getattr(layer, name, {}).values() if s is not None]


PADDED = {"text": [[[3, "img", 5], [1, "img", 7]], [[5], [2]]]}
if IMAGE_TURNS:
    PADDED["image"] = [[[3, "img", 5], [1, "img", 7]], [[3, "img", 2], [3, "img", 2]]]


@hybrids
@pytest.mark.parametrize("pipeline", ["tokens", "deep"])
@pytest.mark.parametrize("rows", PADDED.values(), ids=PADDED)
def test_a_padded_later_turn_is_that_of_its_rows(family: str, rows: Any, pipeline: str) -> None:
    """Padding between two turns, the caller's or where rows kept different numbers of tokens, neither enters the
    convolution nor makes the state decay."""
    model, stages = tiny.make(family), modes.STAGES[pipeline]
    first, turn = turns(model, rows)
    padding = ~turn["attention_mask"].bool()
    with vtoken.wrapped(model, stages):
        got, padded = talk(model, first, turn, padding)
        for row in range(2):
            single = alone(model, first, row)
            own = alone(model, turn, row)
            want, cache = talk(model, single, own)
            torch.testing.assert_close(got[:, row : row + 1], want, atol=3e-4, rtol=1e-4)
            for s, t in zip(states(padded, row), states(cache, 0), strict=True):
                torch.testing.assert_close(s, t, atol=3e-4, rtol=1e-3)


@hybrids
def test_without_that_it_would_not_be(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StateRows, "__init__", lambda *_: None)
    with pytest.raises(AssertionError, match="not close"):
        test_a_padded_later_turn_is_that_of_its_rows(family, PADDED["text"], "tokens")


@hybrids
def test_attention_weights_and_hidden_states_have_the_length_of_the_prompt(family: str) -> None:
    """Weights come of the layers that attend."""
    model = tiny.make(family, "eager")
    batch = tiny.build(model, modes.ROWS, seed=3)
    more = {"output_attentions": True, "output_hidden_states": True}
    want = model(**batch, **more)
    with vtoken.wrapped(model, [Ragged(), Blind(keep=2, layer=2)]):
        got = model(**batch, **more)
        last = vtoken.trace(model).kept
    assert [x.shape for x in got.attentions] == [x.shape for x in want.attentions]
    assert [x.shape for x in got.hidden_states] == [x.shape for x in want.hidden_states]
    assert len(got.attentions) == 4 - len(tiny.family(family).states)
    image = tiny.segments(model, batch)[0]
    seen = [weights[image.row, 0, -1, image.columns] > 0 for weights in got.attentions]
    assert int(seen[-1].sum()) == len(last[0]) == 2 and int(seen[0].sum()) > 2, "each as its layer group saw it"


@hybrids
@pytest.mark.parametrize("method", [{"snapkv": {"keep": 2, "window": 2}}, {"lookm": {"keep": 2, "recent": 2}}], ids=str)
def test_a_cache_stage_shrinks_what_attends(family: str, method: Any) -> None:
    model = tiny.make(family)
    batch, kept = tiny.build(model, [[3, "img", "img", 5]], seed=3), {}
    for name, stages in (("dense", [{"uniform": {"keep": "100%"}}]), ("small", [method])):
        with vtoken.wrapped(model, stages):
            out = greedy(model, batch, 3, return_dict_in_generate=True)
            trace = vtoken.trace(model)
            kept[name] = trace.cache_bytes, [layer for layer in out.past_key_values.layers if hasattr(layer, "keys")]
            layers = [s.layer for s in trace.stages if s.site == "cache"]
    attending = [k for k in range(4) if k not in tiny.family(family).states]
    assert layers == attending and len(trace.cached) == len(attending)
    assert kept["small"][0] < kept["dense"][0]
    assert all(a.keys.shape[2] < b.keys.shape[2] for a, b in zip(kept["small"][1], kept["dense"][1], strict=True))


@hybrids
def test_sparse_attention_acts_where_there_is_attention(family: str) -> None:
    model = tiny.make(family)
    with vtoken.wrapped(model, [SPARSE]):
        greedy(model, tiny.build(model, [[3, "img", 40]], seed=3), 1)
        acted = [s.layer for s in vtoken.trace(model).stages]
    assert acted == [k for k in range(4) if k not in tiny.family(family).states]
    dense = tuple(acted)
    with pytest.raises(UnsupportedError, match="one with attention must be left"):
        vtoken.wrap(model, [{"static_sparse": {"dense_layers": dense}}])


@hybrids
@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"fastv": {"keep": 4, "layer": 1}}, r"last_query_attention of decoder layers \[0\].*let it act at \[2\]"),
        ({"pyramiddrop": {}}, "next_query_attention of decoder layers"),
        ("vtu", "takes a token in once"),
        ("composite_attention", "keep a state that mixes all of them"),
    ],
    ids=str,
)
def test_what_a_state_cannot_do_is_refused(family: str, stage: Any, message: str) -> None:
    model = tiny.make(family)
    with pytest.raises(UnsupportedError, match=message):
        vtoken.wrap(model, [stage])


@hybrids
def test_the_next_layers_queries_are_parted_from_their_gate(family: str) -> None:
    """What the stage is told before a layer runs is what that layer then does."""
    model, seen = tiny.make(family, "eager"), {}

    class Next(Deep):
        def needs(self) -> Any:
            return (Fact("next_query_attention"),)

        def select(self, tokens: Any) -> Any:
            seen["ahead"] = tokens.fact("next_query_attention")
            return Keep(torch.arange(len(tokens.x)), tokens.lengths)

    batch = tiny.build(model, [[3, "img", 5]], seed=3)
    (image,) = tiny.segments(model, batch)
    with vtoken.wrapped(model, [Next(at=(3,))]), torch.no_grad():
        out = model(**batch, output_attentions=True)
    torch.testing.assert_close(seen["ahead"], out.attentions[-1][0, :, -1, image.columns].mean(0), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", [name for name in FAMILIES if registry.adapter(name).gated_queries])
def test_presses_that_compute_queries_are_refused(family: str) -> None:
    model = tiny.make(family)
    layer = model.get_decoder().layers[tiny.family(family).attending[0]]
    hidden = torch.zeros(1, 2, 32)
    module = _presses._Attention(Native(layer.self_attn, hidden, (hidden, hidden), None))
    assert module.k_proj(hidden).shape == (1, 2, 16)
    with pytest.raises(ValueError, match="gives a gate with them"):
        assert module.q_proj


@pytest.mark.parametrize("family", [name for name in FAMILIES if not registry.adapter(name).gated_queries])
def test_presses_are_given_normed_queries_and_keys(family: str) -> None:
    """Whatever the attention calls the norms."""
    model = tiny.make(family)
    layer = model.get_decoder().layers[tiny.family(family).attending[0]]
    hidden, rope, seen = torch.randn(1, 3, 32), torch.zeros(1, 3, 8), {}
    for letter, norm in layer.self_attn.named_children():
        norm.register_forward_hook(lambda m, args, out, letter=letter: seen.update({letter: out}))
    layer.self_attn(hidden, (rope + 1, rope), None)
    want = {name[0]: out for name, out in seen.items() if "norm" in name}
    assert set(want) == {"q", "k"}
    module = _presses._Attention(Native(layer.self_attn, hidden, (rope + 1, rope), None))
    for letter, out in want.items():
        assert torch.equal(getattr(module, f"{letter}_proj")(hidden), out.flatten(-2))
