"""Drafts that see: answers are the target's, and a copy of it is right every time."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import torch
from batches import suited
from model_state import changed, state
from modes import LOGITS, greedy
from probes import Deep, Ragged, Recorder
from stock_drafts import counted
from transformers import LogitsProcessorList
from usual import runs, stage

import vtoken
from vtoken import registry
from vtoken.errors import UnsupportedError
from vtoken.hooks.decoder import target_attention
from vtoken.hooks.decoder.target_attention import received
from vtoken.hooks.state.layer_kinds import windows_go_back
from vtoken.hooks.state.twin import twin
from vtoken.session import session_of
from vtoken.stages import Keep, VisualTokens

FAMILIES = tiny.families(states=()) if windows_go_back() else tiny.families(states=(), window=None)
families = pytest.mark.parametrize("family", FAMILIES)
NEW = 12
PROMPTS: dict[str, list[tiny.Item]] = {
    "image": [3, "img", 5],
    "two images": [2, "img", 3, "img", 4],
    "picture last": [4, "img"],
    "text": [6],
    "video": [3, "video", 4],
}
PROMPT_CASES = [(f, name) for f in FAMILIES for name in PROMPTS if name != "video" or f in tiny.VIDEO]


def make(family: str, **options: Any) -> Any:
    """One whose answers do not hang on a rounding error, as those of a mixture of experts do."""
    return tiny.make(family, **options, **tiny.family(family).steady)


def prompt(model: Any, name: str) -> dict[str, torch.Tensor]:
    return tiny.build(model, suited(model.config.model_type, [PROMPTS[name]]), seed=5)


@pytest.mark.parametrize(("family", "name"), PROMPT_CASES)
def test_a_copy_is_right_every_time(family, name):
    """The model itself on the same weights, and another model with equal ones."""
    model = make(family)
    batch = prompt(model, name)
    want = greedy(model, batch, NEW)
    for other in (None, make(family)):
        draft = vtoken.draft(model, other, "none")
        assert torch.equal(greedy(model, batch, NEW, assistant_model=draft), want)
        found = vtoken.acceptance(draft)
        assert found.drafted == found.accepted > 0 and found.share == 1
        assert found.tokens == NEW - 1, "the prefill gives the first"
        assert found.steps < found.tokens and found.per_step > 1
        vtoken.unwrap(draft)


DRAFTS: dict[str, list[Any]] = {
    "specvlm": [stage("specvlm")],
    "its late layers": [stage("specvlm", first=-2)],
    "merged": [Ragged(), stage("specvlm", keep=2)],
    "in the decoder": [Deep()],
    "in the tower": [stage("flowcut")],
    "in the cache": [stage("snapkv", keep=3)],
}
DRAFT_CASES = [(f, name, "stock") for f in FAMILIES for name, each in DRAFTS.items() if runs(f, each)]


@pytest.mark.parametrize(("family", "name", "target"), [*DRAFT_CASES, *((f, "specvlm", "wrapped") for f in FAMILIES)])
def test_answers_are_the_targets(family, name, target):
    """Whatever a draft drops, from the model itself and from one that knows nothing."""
    model = make(family)
    if target == "wrapped":
        vtoken.wrap(model, [Ragged(), Deep()])
    batch = prompt(model, "two images" if name == "specvlm" else "image")
    want = greedy(model, batch, NEW, **LOGITS)
    for other in (None, make(family, seed=1)):
        try:
            draft = vtoken.draft(model, other, DRAFTS[name])
        except UnsupportedError as error:
            pytest.skip(str(error))
        got = greedy(model, batch, NEW, assistant_model=draft, **LOGITS)
        assert torch.equal(got.sequences, want.sequences)
        torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), atol=2e-3, rtol=1e-3)
        trace = vtoken.trace(draft)
        assert trace.stages[-1].name == DRAFTS[name][-1].name and trace.visual_tokens
        if name != "in the cache":
            assert sum(trace.tokens_out) < sum(trace.visual_tokens)
        vtoken.unwrap(draft)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_padding_id_that_the_target_says_is_no_padding(family):
    model, seen = make(family), list[Any]()
    batch = prompt(model, "image")
    length = batch["input_ids"].shape[1]

    def padding_first(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if ids.shape[1] > length:
            return scores
        return torch.full_like(scores, -1e4).index_fill(1, torch.tensor([tiny.PAD]), 0.0)

    options = {"logits_processor": LogitsProcessorList([padding_first])}
    want = greedy(model, batch, NEW, **options)
    draft = vtoken.draft(model, make(family, seed=1), [Ragged()])
    draft.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("attention_mask")), with_kwargs=True
    )
    assert torch.equal(greedy(model, batch, NEW, **options, assistant_model=draft), want)
    assert want[0, length] == tiny.PAD and all(bool(mask.all()) for mask in seen if mask is not None)
    assert vtoken.acceptance(draft).drafted


def definition(model: Any, batch: dict[str, torch.Tensor], first: int) -> torch.Tensor:
    """[L] what columns receive from the text behind the last image, of the stock model's own attention maps."""
    with torch.no_grad():
        maps = model(**batch, output_attentions=True).attentions
    last = max(int(each.columns.max()) for each in tiny.segments(model, batch))
    return torch.stack([layer[0, :, last + 1 :].float().mean((0, 1)) for layer in maps[first:]]).mean(0)


# Newline tokens are none of a picture's.
@pytest.mark.parametrize("family", sorted({*FAMILIES} & {*tiny.families(anyres=False, rows_parted=False)}))
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_target_attention(family, attn):
    model = make(family, attn=attn)
    batch = prompt(model, "two images")
    seen: list[VisualTokens] = []
    draft = vtoken.draft(
        model, None, [Recorder(asks=(("target_attention", None), ("target_attention", -2)), seen=seen)]
    )
    greedy(model, batch, 3, assistant_model=draft)
    columns = torch.cat([each.columns for each in tiny.segments(model, batch)])
    columns = columns[batch["input_ids"][0, columns] == tiny.IMG] if tiny.family(family).split else columns
    stock = make(family, attn="eager")
    for first in (0, -2):
        got = seen[0].fact("target_attention", first or None)
        torch.testing.assert_close(got, definition(stock, batch, first)[columns], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("family", tiny.each("mrope", states=()))
def test_what_the_target_dropped_is_not_looked_at(family):
    model, seen = make(family), list[VisualTokens]()
    vtoken.wrap(model, [stage("uniform", keep=5)])
    draft = vtoken.draft(model, None, [Recorder(asks=(("target_attention", None),), seen=seen)])
    greedy(model, prompt(model, "image"), 3, assistant_model=draft)
    there = torch.zeros(len(seen[0].x), dtype=torch.bool)
    there[vtoken.trace(model).kept[0]] = True
    assert there.sum() == 5 and torch.equal(seen[0].fact("target_attention") > 0, there)


def test_a_target_is_listened_to_while_it_has_a_draft_at_work():
    model = tiny.llava()
    draft = vtoken.draft(model, None, "specvlm:3")
    target = session_of(model).context.recorded
    heard, batch = [], prompt(model, "image")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target_attention, "received", lambda *a: heard.append(1) or received(*a))
        greedy(model, batch)
        assert not heard
        greedy(model, batch, assistant_model=draft)
    assert len(heard) == 4, "one of each layer"
    assert target.recorded.flow is None and not target.recorded.sums


class Once(Ragged):
    """Raises when it is asked first. No paper."""

    asked: Any = None

    def select(self, tokens: VisualTokens) -> Keep:
        self.asked.append(1)
        if len(self.asked) == 1:
            raise ZeroDivisionError("a bug in a stage")
        return super().select(tokens)


@pytest.mark.parametrize("family", tiny.each("mrope", "deepstack", states=()))
def test_a_failure_inside_leaves_both_usable(family):
    model = make(family)
    batch = prompt(model, "image")
    want = greedy(model, batch, NEW)
    draft = vtoken.draft(model, None, [Once(asked=[])])
    with pytest.raises(ZeroDivisionError):
        greedy(model, batch, NEW, assistant_model=draft)
    assert torch.equal(greedy(model, batch, NEW), want)
    assert torch.equal(greedy(model, batch, NEW, assistant_model=draft), want)
    assert vtoken.acceptance(draft).drafted > 0


@pytest.mark.parametrize("family", tiny.each("mrope", "deepstack", states=()))
@pytest.mark.parametrize("wrapped", [None, [Ragged()]], ids=["stock", "wrapped"])
@pytest.mark.parametrize("by", ["draft", "target"])
def test_unwrap_restores_both(family, wrapped, by):
    model, other = make(family), make(family, seed=1)
    batch = prompt(model, "image")
    want, _ = greedy(model, batch), greedy(other, batch)  # transformers puts hooks of its own on what runs first
    before, others = state(model), state(other)
    if wrapped:
        vtoken.wrap(model, wrapped)
        want = greedy(model, batch)
    draft = vtoken.draft(model, other, "specvlm:3")
    assert draft is other
    greedy(model, batch, assistant_model=draft)
    vtoken.unwrap(draft if by == "draft" else model)
    assert vtoken.pipeline(draft) is None and changed(others, state(other)) <= {("model", "rope_deltas")}
    if by == "draft":
        assert (vtoken.pipeline(model) is None) == (wrapped is None)
        assert torch.equal(greedy(model, batch), want)
    if by == "target" or wrapped is None:
        assert changed(before, state(model)) <= {("model", "rope_deltas")}
    else:
        vtoken.unwrap(model)
        assert changed(before, state(model)) <= {("model", "rope_deltas")}


@families
def test_a_twin_shares_every_weight_and_no_memory(family):
    model = tiny.make(family)
    other = twin(model)
    names, others = dict(model.named_parameters()), dict(other.named_parameters())
    assert names.keys() == others.keys() and all(names[k] is others[k] for k in names)
    assert not {id(m) for m in model.modules()} & {id(m) for m in other.modules()}
    batch = prompt(model, "image")
    assert torch.equal(greedy(other, batch), greedy(model, batch))
    other.model.mine, other.generation_config.max_length = 1, 77
    assert not hasattr(model.model, "mine") and model.generation_config.max_length != 77


CLASSES = [name for name in registry.stages() if getattr(registry.stage(name), "in_classes", False)]


@pytest.mark.parametrize("family", tiny.each("anyres", "mrope", states=(), window=None))
@pytest.mark.parametrize("name", CLASSES)
def test_a_draft_whose_cache_holds_heads_in_classes(family, name):
    """Its drafts are taken back as those of any other, and are right where the target's cache is the same."""
    model = make(family)
    batch = prompt(model, "image")
    for own, right in ((None, False), ([stage(name)], True)):
        if own:
            vtoken.wrap(model, own)
        want = greedy(model, batch, NEW, **LOGITS)
        draft = vtoken.draft(model, None, [stage(name)])
        got = greedy(model, batch, NEW, assistant_model=draft, **LOGITS)
        assert torch.equal(got.sequences, want.sequences)
        assert vtoken.trace(draft).cached and (not right or vtoken.acceptance(draft).share == 1)
        vtoken.unwrap(draft)
    vtoken.unwrap(model)


def test_drafts_are_counted():
    """Where the target never agrees every step gives its own token alone."""
    model, batch = tiny.llava(), prompt(tiny.llava(), "image")
    draft = vtoken.draft(model, tiny.make("llava", seed=1), "none")
    with pytest.raises(UnsupportedError, match="nothing was drafted"):
        vtoken.acceptance(draft)
    greedy(model, batch, NEW, assistant_model=draft)
    found = vtoken.acceptance(draft)
    assert found.drafted > 0 and found.tokens == found.accepted + found.steps and found.share < 0.5
    with pytest.raises(UnsupportedError, match="is no draft"):
        vtoken.acceptance(model)


def test_what_cannot_draft_is_refused():
    model, other = tiny.llava(), tiny.make("llava", seed=1)
    with pytest.raises(UnsupportedError, match="drafts for none"):
        vtoken.wrap(model, "specvlm-90")
    with pytest.raises(UnsupportedError, match="from layer 30 of the target on; there are 4"):
        vtoken.draft(model, other, "specvlm:first=30")
    with pytest.raises(UnsupportedError, match="words"):
        vtoken.draft(model, tiny.make("llava", vocab_size=tiny.VOCAB + 512), "none")
    vtoken.wrap(other, "uniform:4")
    with pytest.raises(UnsupportedError, match="wrapped already"):
        vtoken.draft(model, other, "none")
    vtoken.unwrap(other)
    before = state(model)
    with pytest.raises(UnsupportedError, match=r"decoder layers \[9\]"):
        vtoken.draft(model, other, "fastv:4,layer=9")
    assert changed(before, state(model)) == set()
    draft = vtoken.draft(model, other, "none")
    for again in ((model, None), (draft, None)):
        with pytest.raises(UnsupportedError, match="has a draft, or is one"):
            vtoken.draft(*again, "none")
    with pytest.raises(UnsupportedError, match="already"):
        vtoken.wrap(model, "uniform:4")
    vtoken.unwrap(model)


def padded(model: Any, family: str, size: int) -> Any:
    """A model with the same weights and `size` words: its own, cut off or with rows of zeros behind them."""
    other = make(family, vocab_size=size)
    weights = {}
    for name, rows in other.state_dict().items():
        mine = model.state_dict()[name]
        n = min(len(rows), len(mine)) if rows.ndim else None
        weights[name] = mine if mine.shape == rows.shape else torch.cat([mine[:n], torch.zeros_like(rows[n:])])
    other.load_state_dict(weights)
    return other


@pytest.mark.parametrize("family", tiny.each("mrope", "deepstack", states=()))
@pytest.mark.parametrize(("size", "drafts"), [(208, 200), (200, 208)])
def test_vocabularies_that_differ_by_padding(family, size, drafts):
    """Greedy and sampled, with a processor of logits that remembers how many words there are."""
    model = make(family, vocab_size=size)
    other = padded(model, family, drafts)
    batch = prompt(model, "image")
    want, stock = greedy(model, batch, NEW), greedy(other, batch, NEW)
    assert want.max() < 200
    before, others = state(model), state(other)
    draft = vtoken.draft(model, other, "none")
    assert torch.equal(greedy(model, batch, NEW, assistant_model=draft), want)
    assert vtoken.acceptance(draft).share == 1
    options = {"do_sample": True, "max_new_tokens": NEW, "bad_words_ids": [[3], [4, 5]], "output_scores": True}
    said = model.generate(**batch, **options, assistant_model=draft, return_dict_in_generate=True)
    assert said.scores[0].shape[-1] == size and vtoken.acceptance(draft).drafted
    with pytest.raises(ValueError, match="different tokenizers"):
        greedy(model, batch, assistant_model=padded(model, family, drafts))  # stock drafts as ever
    vtoken.unwrap(draft)
    assert torch.equal(greedy(other, batch, NEW), stock)
    for each, old in ((model, before), (other, others)):
        assert changed(old, state(each)) <= {("model", "rope_deltas")}


def test_a_word_that_the_draft_does_not_have():
    """A target that says nothing but a word of its padding is right, though its draft can neither say nor read it."""
    model = tiny.make("llava", vocab_size=208)
    model.lm_head.weight.data[:200] = 0
    batch = prompt(model, "image")
    want = greedy(model, batch, NEW)
    assert (want[:, -NEW:] >= 200).any()
    draft = vtoken.draft(model, tiny.make("llava", seed=1), "none")
    assert torch.equal(greedy(model, batch, NEW, assistant_model=draft), want)
    assert vtoken.acceptance(draft).drafted


def test_calls_that_a_draft_cannot_follow_are_refused():
    model = tiny.llava()
    batch = prompt(model, "image")
    draft = vtoken.draft(model, None, "specvlm:3")
    with pytest.raises(UnsupportedError, match="runs by itself"):
        greedy(draft, batch)
    first = greedy(model, batch, 3, return_dict_in_generate=True, assistant_model=draft)
    with pytest.raises(UnsupportedError, match="earlier turn"):
        model.generate(
            input_ids=first.sequences, past_key_values=first.past_key_values, assistant_model=draft, max_new_tokens=2
        )
    embeds = model.get_input_embeddings()(batch["input_ids"])
    with pytest.raises(UnsupportedError, match="a tower of its own"):
        model.generate(inputs_embeds=embeds, assistant_model=draft, max_new_tokens=2)
    with pytest.raises(UnsupportedError, match="made for another target"):
        greedy(tiny.make("llava", seed=2), batch, assistant_model=draft)
    with pytest.raises(ValueError, match="batch"):
        greedy(model, tiny.build(model, [[3, "img", 5]] * 2, seed=5), assistant_model=draft)
    assert torch.equal(greedy(model, batch, assistant_model=draft), greedy(tiny.llava(), batch))


@pytest.mark.parametrize("family", [name for name in tiny.FAMILIES if tiny.family(name).states])
def test_states_can_neither_draft_nor_be_drafted_for(family):
    model = tiny.make(family)
    before = state(model)
    with pytest.raises(UnsupportedError, match="keep a state, from which no token can be taken back"):
        vtoken.draft(model, None, "none")
    assert changed(before, state(model)) == set()


@pytest.mark.skipif(windows_go_back(), reason="this transformers takes tokens back from windows")
@pytest.mark.parametrize("family", sorted({*tiny.FAMILIES} - {*tiny.families(window=None)}))
def test_windows_of_older_transformers_are_refused(family):
    with pytest.raises(UnsupportedError, match="sliding windows"):
        vtoken.draft(tiny.make(family), None, "none")


def test_a_model_with_a_forward_of_somebody_else_has_no_twin():
    model = tiny.llava()
    layer = model.model.language_model.layers[1]
    layer.forward = layer.forward
    with pytest.raises(UnsupportedError, match="accelerate"):
        vtoken.draft(model, None, "none")
    assert vtoken.pipeline(model) is None


def test_stock_drafts_see_nothing():
    """What this is for: a copy of a model, as stock transformers has it draft, is wrong most of the time."""
    model = tiny.llava()
    batch = prompt(model, "image")
    with counted() as found:
        greedy(model, batch, NEW, assistant_model=copy.deepcopy(model))
    assert found[1] < found[0] / 2
