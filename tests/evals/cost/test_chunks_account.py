"""What `vtoken flops` says of stages that go by the frames of a prompt, against wrapped models."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from modes import greedy

from vtoken import trace, wrapped
from vtoken.config import load
from vtoken.evals.cost.flops import account, picture_size

PICTURES, WORDS = 9, 13
CHUNKS = {"chunk_prefill": {"frames": 2, "previous": 0, "size": 16, "min_len": 0}}
BILEVEL = {"bilevel_kv": {"frames": 2, "top": 1, "pool": 3}}


def test_density_and_slots_are_those_of_the_model() -> None:
    model = tiny.make("llava")
    batch = tiny.build(model, [["img"] * PICTURES + [WORDS]], seed=3)
    options = {"images": PICTURES, "text_tokens": batch["input_ids"].shape[1] - 16 * PICTURES, "new_tokens": 1}
    dense = account(model.config, **options)
    for before in ([], [{"uniform": {"keep": 8}}]):
        pipeline = load([*before, CHUNKS, BILEVEL])
        with wrapped(model, pipeline):
            greedy(model, batch, 1)
            seen = trace(model)
        claimed = account(model.config, pipeline, **options)
        share = next(s.density[0] for s in seen.stages if s.site == "attention")
        whole = account(model.config, load([*before, BILEVEL]), **options)
        assert share < 0.9 and claimed.prefill_attention == pytest.approx(share * whole.prefill_attention)
        assert claimed.kv_bytes_prefill == seen.cache_bytes < dense.kv_bytes_prefill
        assert not any("chunk_prefill" in sentence for sentence in claimed.left_out)
        assert claimed.inexact == (("bilevel_kv",) if before else ()), "of uneven chunks some are pooled"


def test_what_stands_aside_costs_nothing() -> None:
    model = tiny.make("llava")
    short = load([{"chunk_prefill": {"min_len": 4096}}, "bilevel_kv"])
    found, dense = (account(model.config, p, images=2) for p in (short, None))
    assert found.prefill_attention == dense.prefill_attention and found.kv_bytes == dense.kv_bytes
    assert "stands aside" in found.left_out[-1]


def test_the_page_has_these_densities() -> None:
    page = (Path(__file__).parents[3] / "docs" / "sparse.md").read_text(encoding="utf-8")
    head, _, *rows = page.partition("<!-- chunks -->\n")[2].partition("\n<!-- /chunks -->")[0].splitlines()
    presets = [cell.strip() for cell in head.split("|")[3:-1]]
    want = []
    for frames in (64, 128, 256, 512):
        n, parts = frames * 196, (((frames, 14, 14),),)
        found = [load(name).stages[0].density_of(n + 64, 0, (n,), parts) for name in presets]
        want.append(f"| {frames} | {n + 64:,} | {' | '.join(f'{share:.1%}' for share in found)} |")
    assert rows == want and len(presets) == 3


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_tells_the_size_of_a_picture(family: str) -> None:
    """Or that it cannot: the account then takes the model's own."""
    model = tiny.make(family)
    size = picture_size(model.config, tiny.build(model, [[3, "img", 5]], seed=3))
    assert size is None or all(side > 0 for side in size)
