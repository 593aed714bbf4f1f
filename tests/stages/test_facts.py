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
        assert (spec.per != "token") <= (spec.holds != "one"), "text is given by more than a number"


HEADS, WIDTH, LENGTHS, SCALE = 3, 4, (5, 2), 0.5


def rows(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """[queries, N] attention, head mean; q [queries, H, d], k [N, H, d]."""
    return (torch.einsum("qhd,nhd->hqn", q, k) * scale).softmax(-1).mean(0)


def one(x: torch.Tensor, cls: bool) -> torch.Tensor:
    return x[:1] if cls else x.mean(0, keepdim=True)


# Of one image: its q, k and v [N, H, d], the CLS token first if there is one.
DEFINITIONS = {
    "cls_attention": lambda q, k, v, cls: rows(one(q, cls), k, SCALE)[0],
    "global_attention": lambda q, k, v, cls: rows(one(q, cls), k, SCALE)[0],
    "value_attention": lambda q, k, v, cls: rows(one(v, cls), v, 1.0)[0],
    "received_attention": lambda q, k, v, cls: rows(q, k, SCALE).mean(0),
    "keys": lambda q, k, v, cls: k.flatten(1),
    "values": lambda q, k, v, cls: v.flatten(1),
    "mean_key": lambda q, k, v, cls: k.mean(1),
    "mean_value": lambda q, k, v, cls: v.mean(1),
}


@pytest.mark.parametrize("cls", [False, True])
@pytest.mark.parametrize("spec", read_of("encoder layer").values(), ids=lambda spec: spec.name)
def test_facts_of_the_encoder(spec: FactSpec, cls: bool) -> None:
    """Each is what its definition says image by image, reads no other projection and holds what its row says."""
    lengths = [n + cls for n in LENGTHS]
    whole = {letter: torch.randn(sum(lengths), HEADS, WIDTH) for letter in "qkv"}
    read = {letter: whole[letter] for letter in spec.projections}
    found = compute(Fact(spec.name), EncoderLayer(read, lengths, SCALE, cls))
    images = zip(*(whole[letter].split(lengths) for letter in "qkv"), strict=True)
    torch.testing.assert_close(found, torch.cat([DEFINITIONS[spec.name](*image, cls) for image in images]))
    assert found.shape[1:] == {"one": (), "head": (WIDTH,), "heads": (HEADS * WIDTH,)}[spec.holds]
