"""Drafts with ViSpec's weights: answers are the target's, and what cannot be had is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
import vispec_weights
from model_state import changed, state
from modes import LOGITS, greedy
from probes import Deep, Ragged
from torch import Tensor

import vtoken
from vtoken.drafters.vispec import Sizes, ViSpecChain
from vtoken.errors import ConfigError, UnsupportedError
from vtoken.hooks.state.layer_kinds import windows_go_back

NEW = 12
ENTERS: dict[str, Any] = {"states": (), "deepstack": 0}
FAMILIES = tiny.families(**ENTERS) if windows_go_back() else tiny.families(**ENTERS, window=None)
some = pytest.mark.parametrize("family", tiny.each("mrope", **ENTERS, window=None))


def prompt(model: Any, *row: Any) -> dict[str, Tensor]:
    return tiny.build(model, [list(row or (3, "img", 5))], seed=5)


def made(model: Any, folder: Any, tensors: dict[str, Tensor] | None = None) -> Any:
    return vtoken.draft(model, vispec_weights.written(tensors or vispec_weights.random(model), folder))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("wrapped", [None, [Ragged(), Deep()]], ids=["stock", "wrapped"])
def test_answers_are_the_targets(family, wrapped, tmp_path):
    model = tiny.make(family, **tiny.family(family).steady)
    batch = prompt(model, 3, "img", 2, "img", 4)
    if wrapped:
        vtoken.wrap(model, wrapped)
    want = greedy(model, batch, NEW, **LOGITS)
    draft = made(model, tmp_path)
    got = greedy(model, batch, NEW, assistant_model=draft, **LOGITS)
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), atol=2e-3, rtol=1e-3)
    found = vtoken.acceptance(draft)
    assert found.drafted >= found.steps > 0 and found.tokens == found.accepted + found.steps
    assert vtoken.trace(draft) is vtoken.trace(model)


def walking(steps: int) -> Any:
    """A model that says the word behind the last one of a prompt, and so on for `steps` words, then the same for
    ever: its layers add nothing, and its head knows every word by its embedding."""
    model = tiny.family("llava").make()
    words = model.get_input_embeddings().weight
    with torch.no_grad():
        words.copy_(words / words.norm(dim=-1, keepdim=True))
        for layer in model.model.language_model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.language_model.norm.weight.fill_(1)
        model.lm_head.weight.copy_(words)
        last = 30 + steps
        model.lm_head.weight[31 : last + 1] = words[30:last]
        model.lm_head.weight[30] = 0
        model.lm_head.weight[last] += words[last]
    return model


def from_word_30(model: Any) -> dict[str, Tensor]:
    batch = prompt(model)
    batch["input_ids"][0, -1] = 30
    return batch


def test_a_draft_that_repeats_is_right_where_the_target_does(tmp_path):
    """From the hidden state of the token before a word follows that word: 31, 32 and 33 are guessed where 32, 33 and 33
    come. Of 12 tokens the prefill gives 31; one step each 32 and 33; then 4 guesses are right, with one token more, and
    of the 4 tokens left 3 are guessed."""
    model = walking(3)
    batch = from_word_30(model)
    draft = made(model, tmp_path, vispec_weights.copying(model))
    said = greedy(model, batch, NEW, assistant_model=draft)[0, -NEW:].tolist()
    assert said == [31, 32, 33] + [33] * 9
    found = vtoken.acceptance(draft)
    assert (found.drafted, found.accepted, found.steps, found.tokens) == (4 + 4 + 4 + 3, 4 + 3, 4, 11)


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_a_draft_that_knows_the_word_is_right_every_time(depth, tmp_path):
    """All that this target says follows from the last word's embedding, which the draft is given."""
    model = walking(20)
    batch = from_word_30(model)
    tensors = vispec_weights.copying(model)
    tensors["fc.weight"] = tensors["fc.weight"].roll(len(tensors["fc.weight"]), dims=1)
    draft = made(model, tmp_path, tensors)
    assert draft.generation_config.num_assistant_tokens == 4
    draft.generation_config.num_assistant_tokens = depth
    said = greedy(model, batch, 1 + 2 * (depth + 1), assistant_model=draft)[0, batch["input_ids"].shape[1] :].tolist()
    assert said == list(range(31, 31 + len(said)))
    found = vtoken.acceptance(draft)
    assert (found.drafted, found.accepted, found.steps) == (2 * depth, 2 * depth, 2)


def test_guesses_end_with_the_answer(tmp_path):
    model = walking(20)
    tensors = vispec_weights.copying(model)
    tensors["fc.weight"] = tensors["fc.weight"].roll(len(tensors["fc.weight"]), dims=1)
    draft = made(model, tmp_path, tensors)
    said = greedy(model, from_word_30(model), NEW, assistant_model=draft, eos_token_id=33)
    assert said[0, -4:].tolist() == [30, 31, 32, 33]
    assert vtoken.acceptance(draft).drafted == 2


def test_sampling_has_the_targets_distribution(tmp_path):
    """Two words, of two that are likely each, against what the target says of both by itself."""
    model = tiny.make("llava")
    batch, options = prompt(model), {"do_sample": True, "top_k": 2, "temperature": 2.0}
    draft = made(model, tmp_path)
    length, runs = batch["input_ids"].shape[1], 150
    torch.manual_seed(0)
    said: Counter[tuple[int, ...]] = Counter()
    for _ in range(runs):
        said[
            tuple(model.generate(**batch, **options, max_new_tokens=3, assistant_model=draft)[0, length:][:2].tolist())
        ] += 1
    assert vtoken.acceptance(draft).drafted
    vtoken.unwrap(draft)

    def likely(*before: int) -> list[tuple[int, float]]:
        ids = torch.cat([batch["input_ids"], torch.tensor([before], dtype=torch.long)], 1)
        with torch.no_grad():
            top = model(**{**batch, "input_ids": ids, "attention_mask": torch.ones_like(ids)}).logits[0, -1].topk(2)
        return list(zip(top.indices.tolist(), (top.values / 2).softmax(0).tolist(), strict=True))

    want = {(a, b): p * q for a, p in likely() for b, q in likely(a)}
    assert said.keys() <= want.keys()
    for words, share in want.items():
        assert abs(said[words] / runs - share) < 4 * (share * (1 - share) / runs) ** 0.5


@some
def test_a_later_call_begins_anew(family, tmp_path):
    """Another prompt, and the same again: guesses are those of a fresh draft."""
    model = tiny.make(family)
    first, second = prompt(model, 3, "img", 5), prompt(model, 2, "img", 1, "img", 4)
    draft = made(model, tmp_path)
    found = []
    for batch in (first, second, first):
        greedy(model, batch, NEW, assistant_model=draft)
        found.append(vtoken.acceptance(draft))
    assert found[0] == found[2]
    with torch.no_grad():
        assert torch.equal(model(**first).logits, tiny.make(family)(**first).logits), "without it nothing is kept"


@some
@pytest.mark.parametrize("method", ["read", "ahead", "verified"])
def test_a_failure_inside_leaves_the_model_usable(family, method, tmp_path, monkeypatch):
    model = tiny.make(family)
    batch = prompt(model)
    want = greedy(model, batch, NEW)
    draft = made(model, tmp_path)

    def fail(*args: Any) -> Tensor:
        raise ZeroDivisionError("a bug in a draft")

    with monkeypatch.context() as patch:
        patch.setattr(ViSpecChain, method, fail)
        with pytest.raises(ZeroDivisionError):
            greedy(model, batch, NEW, assistant_model=draft)
    assert torch.equal(greedy(model, batch, NEW), want)
    assert torch.equal(greedy(model, batch, NEW, assistant_model=draft), want)
    assert vtoken.acceptance(draft).drafted


@some
@pytest.mark.parametrize("wrapped", [None, [Ragged()]], ids=["stock", "wrapped"])
@pytest.mark.parametrize("by", ["draft", "target"])
def test_unwrap_takes_all_back(family, wrapped, by, tmp_path):
    model = tiny.make(family)
    batch = prompt(model)
    greedy(model, batch)  # transformers puts hooks of its own on what runs first
    before = state(model)
    if wrapped:
        vtoken.wrap(model, wrapped)
    want = greedy(model, batch)
    draft = made(model, tmp_path)
    greedy(model, batch, assistant_model=draft)
    vtoken.unwrap(draft if by == "draft" else model)
    assert vtoken.pipeline(draft) is None
    assert (vtoken.pipeline(model) is not None) == bool(wrapped and by == "draft")
    if vtoken.pipeline(model) is not None:
        assert torch.equal(greedy(model, batch), want)
        vtoken.unwrap(model)
    assert changed(before, state(model)) <= {("model", "rope_deltas")}
    with pytest.raises(UnsupportedError, match="was unwrapped since"):
        greedy(model, batch, assistant_model=draft)
    with pytest.raises(UnsupportedError, match="whole VLM"):
        vtoken.wrap(draft, "uniform:4")


def test_calls_that_a_draft_cannot_follow_are_refused(tmp_path):
    model = tiny.make("llava")
    batch = prompt(model)
    draft = made(model, tmp_path)
    with pytest.raises(ValueError, match="batch"):
        greedy(model, tiny.build(model, [[3, "img", 5]] * 2, seed=5), assistant_model=draft)
    first = greedy(model, batch, 3, return_dict_in_generate=True, assistant_model=draft)
    with pytest.raises(UnsupportedError, match="earlier turn"):
        model.generate(
            input_ids=first.sequences, past_key_values=first.past_key_values, assistant_model=draft, max_new_tokens=2
        )
    with pytest.raises(UnsupportedError, match="pass input_ids"):
        embeds = model.get_input_embeddings()(batch["input_ids"])
        model.generate(inputs_embeds=embeds, assistant_model=draft, max_new_tokens=2)
    with pytest.raises(UnsupportedError, match="another one or was unwrapped"):
        greedy(tiny.make("llava", seed=2), batch, assistant_model=draft)
    with pytest.raises(UnsupportedError, match="has a draft, or is one"):
        vtoken.draft(model, tmp_path)
    assert torch.equal(greedy(model, batch, assistant_model=draft), greedy(tiny.make("llava"), batch))


@pytest.mark.parametrize("family", sorted({*tiny.each("deepstack", "states")} - {*tiny.families(**ENTERS)}))
def test_models_that_are_refused(family, tmp_path):
    """Layers that keep a state; embeddings that are not all there is to see."""
    model = tiny.make(family)
    weights = vispec_weights.written(vispec_weights.random(model), tmp_path)
    before = state(model)
    with pytest.raises(UnsupportedError, match="keep a state" if tiny.family(family).states else "DeepStack"):
        vtoken.draft(model, weights)
    assert changed(before, state(model)) == set()


@pytest.mark.parametrize("part", ["lm_head", "embed_tokens"])
def test_offloaded_models_are_refused(part, tmp_path):
    model = tiny.family("llava").make()
    weights = vispec_weights.written(vispec_weights.random(model), tmp_path)
    (model if part == "lm_head" else model.model.language_model).get_submodule(part).to("meta")
    with pytest.raises(UnsupportedError, match="are offloaded"):
        vtoken.draft(model, weights)


def without(name: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.pop(name)


def put(name: str, *shape: int) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.update({name: torch.zeros(shape)})


D = 32
WRONG = [
    (without("fc.bias"), ConfigError, r"no tensor 'fc.bias', expected one of shape \[32\]"),
    (without("imadpt.q"), ConfigError, "no tensor 'imadpt.q'"),
    (without("embed_tokens.weight"), ConfigError, "no tensor 'embed_tokens.weight'"),
    (
        put("layers.0.input_layernorm.weight", D),
        ConfigError,
        "holds a tensor 'layers.0.*norm.weight', expected 17 others",
    ),
    (put("layers.0.self_attn.k_proj.weight", D // 2, D), ConfigError, r"k_proj.weight' is of shape \[16, 32\]"),
    (put("layers.0.self_attn.q_proj.bias", D), ConfigError, "no tensor 'layers.0.self_attn.k_proj.bias'"),
    (put("img_fc.weight", D, D), ConfigError, r"img_fc.weight' is of shape \[32, 32\], expected \[32, 64\]"),
    (put("embed_tokens.weight", tiny.VOCAB + 8, D), UnsupportedError, "32 channels, 4 heads and 208 words"),
    (
        put("embed_tokens.weight", tiny.VOCAB, 48),
        UnsupportedError,
        r"48 channels, 4 heads and 200 words, and this llava",
    ),
    (put("imadpt.q", 2, 8, 4), UnsupportedError, "8 heads and 200 words, and this llava has 32 channels, 4 heads"),
]


@pytest.mark.parametrize(("change", "error", "says"), WRONG, ids=[says for *_, says in WRONG])
def test_weights_are_strict(change, error, says, tmp_path):
    model = tiny.make("llava")
    vtoken.wrap(model, "uniform:4")
    tensors = vispec_weights.random(model)
    change(tensors)
    with pytest.raises(error, match=says):
        made(model, tmp_path, tensors)
    assert vtoken.pipeline(model).stages[0].name == "uniform", "the target is as it was"
    vtoken.unwrap(model)


def test_weights_that_are_not_there(tmp_path, monkeypatch):
    model = tiny.make("llava")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    for name, says in (
        (tmp_path, "no file .*model.safetensors"),
        (str(tmp_path / "pytorch_model.bin"), "no safetensors file that can be read"),
        ("nowhere/at/all.safetensors", "no file 'nowhere/at/all.safetensors'"),
    ):
        with pytest.raises(ConfigError, match=says):
            vtoken.draft(model, name)

    def unreachable(*args: Any, **kwargs: Any) -> str:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    with pytest.raises(ConfigError, match="of 'owner/name@main' from the Hub: OSError: no network; check its name"):
        vtoken.draft(model, "owner/name@main")
    with pytest.raises(UnsupportedError, match="has no pipeline"):
        vtoken.draft(model, vispec_weights.written(vispec_weights.random(model), tmp_path), "uniform:4")
    assert vtoken.pipeline(model) is None


def test_weights_by_file_and_from_the_hub(tmp_path, monkeypatch):
    model = tiny.make("llava")
    file = vispec_weights.written(vispec_weights.random(model), tmp_path) / "model.safetensors"
    vtoken.unwrap(vtoken.draft(model, str(file)))
    asked = []

    def download(*args: Any, **kwargs: Any) -> str:
        asked.append((args, kwargs))
        return str(file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    vtoken.unwrap(vtoken.draft(model, "owner/name@main"))
    assert asked == [(("owner/name", "model.safetensors"), {"revision": "main"})]


def test_weights_of_another_checkpoint_are_told(tmp_path, recwarn):
    model = tiny.make("llava")
    halves = vispec_weights.random(model)
    halves["embed_tokens.weight"] = halves["embed_tokens.weight"].to(torch.bfloat16)
    vtoken.unwrap(made(model, tmp_path, halves))
    assert not recwarn
    with pytest.warns(UserWarning, match="trained for another checkpoint"):
        vtoken.unwrap(made(model, tmp_path, vispec_weights.random(tiny.make("llava", seed=1))))


@pytest.mark.parametrize(
    ("words", "d", "heads", "inner", "bias"),
    [
        (32064, 4096, 32, 11008, False),  # LLaVA-1.5 and LLaVA-1.6 of Vicuna 7B
        (32064, 5120, 40, 13824, False),  # LLaVA-1.6 of Vicuna 13B
        (151936, 2048, 16, 11008, True),  # Qwen2.5-VL 3B
        (152064, 3584, 28, 18944, True),  # Qwen2.5-VL 7B
    ],
)
def test_the_published_shapes(words, d, heads, inner, bias):
    """By the sizes in the authors' training configs: as many tensors and parameters as their module has."""
    shapes = dict(Sizes(d, heads, words, inner, 2, bias).shapes())
    squares = 4 + 3 + 2 + 2  # attention, adaptor, fc, img_fc
    rows = 2 + 3 + 5 * bias  # queries; the norm and biases of fc and img_fc; those of q, k and v
    assert len(shapes) == 17 + 5 * bias
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == (words + squares * d + 3 * inner + rows) * d
