"""Drafts with ViSpec's weights: what they guess is as defined, and answers are the target's."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
import vispec_weights
from modes import greedy
from naive_vispec import Naive
from probes import Deep, Ragged
from torch import Tensor
from torch.nn.functional import pad

import vtoken
from vtoken.drafters.vispec import ViSpecChain
from vtoken.hooks.state.read_prompt import ReadPicture, ReadPrompt

PROMPTS: dict[str, list[tiny.Item]] = {
    "apart": [3, "img", 2, "img", 4],
    "adjacent": [2, "img", "img", 3],
    "first and last": ["img", 2, "img"],
    "text": [6],
    "video": [3, "video", 2, "img", 4],
}


def prompt(model: Any, name: str) -> dict[str, Tensor]:
    return tiny.build(model, [PROMPTS[name]], seed=5)


class Listener:
    """A chain that notes what it is asked and what it answers."""

    def __init__(self, chain: Any, calls: list[tuple[str, list[int], Tensor]]) -> None:
        self.chain, self.calls = chain, calls

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> Tensor:
            answer: Tensor = getattr(self.chain, name)(*args)
            self.calls.append((name, args[-1].tolist(), answer))
            return answer

        return call


def read(model: Any, batch: dict[str, Tensor], said: list[int]) -> tuple[Tensor, Tensor]:
    """[L, D] what enters the language model, before anything is dropped, and what leaves it, of a prompt and the tokens
    behind it."""
    ids = torch.cat([batch["input_ids"], torch.tensor([said], dtype=torch.long)], dim=1)
    ones = torch.ones(1, len(said), dtype=torch.long)
    more = {k: torch.cat([v, 0 * ones], 1) for k, v in batch.items() if k in ("mm_token_type_ids", "token_type_ids")}
    given = {**batch, **more, "input_ids": ids, "attention_mask": torch.cat([batch["attention_mask"], ones], 1)}
    lm, seen = model.model.language_model, []
    hooks = [
        lm.register_forward_pre_hook(
            lambda m, a, k: seen.append(k["inputs_embeds"][0]), with_kwargs=True, prepend=True
        ),
        lm.register_forward_hook(lambda m, a, out: seen.append(out.last_hidden_state[0])),
    ]
    with torch.no_grad():
        model(**given, logits_to_keep=len(said) + 1)
    for hook in hooks:
        hook.remove()
    return seen[0].double(), seen[1].double()


STAGES: dict[str, list[Any]] = {"none": [], "tokens": [Ragged()], "decoder": [Deep()], "both": [Ragged(), Deep()]}
CASES = [
    (family, name, pipeline)
    for family in tiny.each("anyres", "mrope", states=(), deepstack=0, window=None)
    for name in PROMPTS
    for pipeline in STAGES
    if (name != "video" or family in tiny.VIDEO)
    and (pipeline == "none" or (name in ("apart", "video") and not tiny.family(family).anyres))
]


@pytest.mark.parametrize(("family", "name", "pipeline"), CASES)
@pytest.mark.parametrize("queries", [1, 2, 3])
def test_guesses_are_as_defined(family, name, pipeline, queries, tmp_path, monkeypatch):
    """In every round: of the prompt, of what the target said, and of the draft's own guesses."""
    model = tiny.make(family)
    batch, bias = prompt(model, name), tiny.family(family).mrope
    tensors = vispec_weights.random(model, queries=queries, bias=bias)
    if STAGES[pipeline]:
        vtoken.wrap(model, STAGES[pipeline])
    draft = vtoken.draft(model, vispec_weights.written(tensors, tmp_path))
    calls: list[tuple[str, list[int], Tensor]] = []
    monkeypatch.setattr(draft, "chain", lambda: Listener(ViSpecChain(draft), calls))
    said = greedy(model, batch, 6, assistant_model=draft)[0, batch["input_ids"].shape[1] :].tolist()
    assert [name for name, _, _ in calls].count("verified") > 1
    theta = model.config.get_text_config().rope_parameters["rope_theta"]
    naive, embed = Naive(model, tensors, theta), model.get_input_embeddings().weight.detach().double()
    pictures = [each.columns.tolist() for each in tiny.segments(model, batch)]
    entered, left = kept(model, pictures, pipeline)
    embeds, states = read(model, batch, said)
    length = batch["input_ids"].shape[1]
    gone = {place for places in pictures for place in places}
    text = [place for place in range(length) if place not in gone]
    rows, seen = naive.prompt(
        {p: embeds[p] for p in sorted({*text, *entered})},
        {p: states[p] for p in sorted({*text, *left})},
        pictures,
        embed[said[0]],
        length,
    )
    done, guesses, out = 1, [], naive.layer(rows)
    for kind, tokens, logits in calls:
        if kind == "verified":
            for token in tokens:
                rows.append((naive.row(embed[token], states[length + done - 1], seen), length + done - 1))
                done += 1
            guesses, out = [], naive.layer(rows)
        elif kind == "ahead":
            guesses.append((naive.row(embed[tokens[0]], out, seen), length + done - 1 + len(guesses)))
            out = naive.layer(rows + guesses)
        torch.testing.assert_close(logits.double(), naive.head @ out, atol=2e-4, rtol=2e-4)


def kept(model: Any, pictures: list[list[int]], pipeline: str) -> tuple[list[int], list[int]]:
    """Places of the pictures that entered the decoder, and those that its last layer had."""
    found = [[place for places in pictures for place in places]]
    for each in vtoken.trace(model).stages:
        found.append([places[k] for places, index in zip(pictures, each.kept, strict=True) for k in index.tolist()])
        assert len(found[-1]) < len(found[-2])
    return found[pipeline in ("tokens", "both")], found[-1]


def test_tokens_that_are_accepted_together(tmp_path):
    """What is verified at once is as if it came one by one, and guesses in between leave nothing behind."""
    model = tiny.make("llava")
    draft = vtoken.draft(model, vispec_weights.written(vispec_weights.random(model), tmp_path))
    draw = torch.Generator().manual_seed(1)
    hidden, later = (torch.randn(n, 32, generator=draw) for n in (6, 3))
    places, visual = torch.arange(6), torch.tensor([False, True, True, False, False, False])
    prompt = ReadPrompt(hidden, hidden + 1, places, visual, (ReadPicture(hidden[1:3], 2),), 6)
    tokens, chains = torch.tensor([11, 12, 13, 14]), (draft.chain(), draft.chain())
    for chain in chains:
        chain.read(prompt, tokens[:1])
        for guess in tokens:
            chain.ahead(guess[None])
    together = chains[0].verified(later, tokens[1:])
    single = [chains[1].verified(later[i : i + 1], tokens[i + 1 : i + 2]) for i in range(3)]
    torch.testing.assert_close(together, single[-1])
    torch.testing.assert_close(*(chain.ahead(tokens[:1]) for chain in chains))


@pytest.mark.parametrize("row", [[3, "img", 2], [5]], ids=["image", "text"])
@pytest.mark.parametrize("family", tiny.each("mrope", states=(), deepstack=0, window=None))
def test_padding_changes_no_guess(family, row, tmp_path, monkeypatch):
    model = tiny.make(family)
    draft = vtoken.draft(model, vispec_weights.written(vispec_weights.random(model), tmp_path))
    batch = tiny.build(model, [row], seed=5)
    length, found = batch["input_ids"].shape[1], []
    padded = {k: pad(v, (3, 0)) if v.shape[:2] == (1, length) else v for k, v in batch.items()}
    for given in (batch, padded):
        calls: list[tuple[str, list[int], Tensor]] = []
        monkeypatch.setattr(draft, "chain", lambda calls=calls: Listener(ViSpecChain(draft), calls))
        greedy(model, given, 6, assistant_model=draft)
        found.append(calls)
    assert len(found[0]) == len(found[1]) > 3
    for (*one, logits), (*other, same) in zip(*found, strict=True):
        assert one == other
        torch.testing.assert_close(logits, same, atol=1e-4, rtol=1e-4)
