"""What a draft's choice of tokens is worth, on the shipped model that reads digits."""

from __future__ import annotations

import copy
from itertools import islice

import pytest
import torch
from stock_drafts import counted

import vtoken
from vtoken.evals import reference
from vtoken.evals.shared.media import still

NEW, ASKED = 12, 12


@pytest.fixture(scope="module")
def asked():
    """The model, and prompts whose answers have several tokens."""
    model, processor = reference.load("tiny-llava")
    questions = islice((q for q in reference.questions() if q.kind == "read"), ASKED)
    return model, [
        processor(images=[still(q.image)], text=[reference.prompt(processor, q)], return_tensors="pt")
        for q in questions
    ]


def said(model, inputs, **options):
    return [model.generate(**each, do_sample=False, max_new_tokens=NEW, **options) for each in inputs]


def share(asked, pipeline):
    """Of the drafted tokens, how many were accepted; the answers are the target's."""
    model, inputs = asked
    want, drafted, accepted = said(model, inputs), 0, 0
    draft = vtoken.draft(model, None, pipeline)
    for each, answer in zip(inputs, want, strict=True):
        assert torch.equal(said(model, [each], assistant_model=draft)[0], answer)
        found = vtoken.acceptance(draft)
        drafted, accepted = drafted + found.drafted, accepted + found.accepted
    vtoken.unwrap(draft)
    return accepted / drafted


def test_the_more_is_cut_the_less_is_accepted(asked):
    found = [share(asked, f"random:{keep}") for keep in ("100%", "50%", "10%", 1)]
    assert found[0] == 1 and found == sorted(found, reverse=True) and found[1] > found[2]


def test_what_the_target_looks_at_is_what_a_draft_needs(asked):
    """specvlm, then tokens by chance, then stock transformers, whose draft sees nothing."""
    model, inputs = asked
    with counted() as stock:
        said(model, inputs, assistant_model=copy.deepcopy(model))
    found = {name: share(asked, name) for name in ("none", "specvlm:50%", "specvlm-90", "random:10%", "uniform:10%")}
    assert found["none"] == 1 >= found["specvlm:50%"] >= found["specvlm-90"]
    assert found["specvlm-90"] > max(found["random:10%"], found["uniform:10%"])
    assert min(found.values()) > stock[1] / stock[0]
