"""The table of facts: every row can be computed, and says the same as the function behind it."""

from __future__ import annotations

import pytest
import torch

from vtoken.hooks.decoder import attention_facts
from vtoken.hooks.vision import encoder_facts
from vtoken.hooks.vision.encoder_facts import EncoderLayer, compute
from vtoken.stages import FACTS, SITES, Fact, FactSpec, spec_of
from vtoken.stages.facts import read_of


def test_a_name_means_one_fact_at_a_site() -> None:
    asked = [(spec.name, site) for spec in FACTS for site in spec.sites]
    assert len(asked) == len(set(asked)) and {site for _, site in asked} <= set(SITES)
    assert all(spec_of(spec.name, site) is spec for spec in FACTS for site in spec.sites)
    assert spec_of("keys", "tokens") is not spec_of("keys", "decoder") and spec_of("keys", "cache") is None


def test_every_row_has_its_function() -> None:
    assert {*encoder_facts.FUNCTIONS} == {*read_of("encoder layer")}
    whole = {spec.part_of or spec.name for spec in read_of("decoder layer").values() if spec.queries != "chosen"}
    assert {*attention_facts.FUNCTIONS} == whole


def test_rows_name_rows() -> None:
    for spec in FACTS:
        assert spec.instead == "" or all(spec_of(spec.instead, site) for site in spec.sites)
        whole = spec_of(spec.part_of, spec.sites[0]) if spec.part_of else None
        assert not spec.part_of or (whole and (whole.read, whole.holds) == (spec.read, spec.holds))
        assert (spec.per != "token") <= (spec.holds != "one"), "text is told by more than a number"


HEADS, WIDTH, LENGTHS = 3, 4, (5, 2)


@pytest.mark.parametrize("cls", [False, True])
@pytest.mark.parametrize("spec", read_of("encoder layer").values(), ids=lambda spec: spec.name)
def test_facts_of_the_encoder_hold_and_read_what_the_row_says(spec: FactSpec, cls: bool) -> None:
    lengths = [n + cls for n in LENGTHS]
    projected = {letter: torch.randn(sum(lengths), HEADS, WIDTH) for letter in spec.projections}
    found = compute(Fact(spec.name), EncoderLayer(projected, lengths, 0.5, cls))
    shape = {"one": (), "head": (WIDTH,), "heads": (HEADS * WIDTH,)}[spec.holds]
    assert found.shape == (sum(lengths), *shape)
    assert spec.queries is None or torch.allclose(torch.stack([f.sum() for f in found.split(lengths)]), torch.ones(2))
