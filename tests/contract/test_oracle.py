"""The oracle itself: with everything kept it is the stock model, and what it drops is what upstream computes without
it."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import tiny
import torch
from batches import suited

NEW = 6
CASES: dict[str, list[list[tiny.Item]]] = {
    "image": [[3, "img", 5]],
    "other image": [[3, "other", 5]],
    "two images": [[2, "img", 3, "other", 4]],
    "ragged": [[3, "img", 5], [1, "other", 2, "img", 7], [4], ["other", 1]],
    "video": [[3, "video", 2]],
    "long video": [[3, ("video", 6), 2]],
    "image and video": [[3, "video", 2, "img", 4], [2, "other", 1, "video", 3]],
}
FAMILY_CASES = [(f, c) for f in tiny.FAMILIES for c in CASES if f in tiny.VIDEO or "video" not in c]
# A layer that keeps a state takes in what is hidden from attention, and a window counts it.
HIDDEN_CASES = [
    (f, c)
    for f in tiny.families(states=(), window=None)
    for c in ("ragged", "image and video")
    if (f, c) in FAMILY_CASES
]


def batch_of(model: Any, case: str) -> dict[str, torch.Tensor]:
    one = tiny.family(model)
    odd = "img" if one.odd == one.image else ("img", one.odd)
    rows = [[odd if item == "other" else item for item in row] for row in CASES[case]]
    return tiny.build(model, suited(one.name, rows), seed=3)


def everything(p: oracle.PrefillQK) -> list[torch.Tensor]:
    return [torch.arange(int(p.visual[i.row, i.columns].sum())) for i in p.images]


def some(p: oracle.PrefillQK) -> list[torch.Tensor]:
    return [index[(index * 7) % 5 < 2] for index in everything(p)]


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize(("family", "case"), FAMILY_CASES)
def test_all_kept_is_the_stock_model(family, case, attn):
    model = tiny.make(family, attn)
    batch = batch_of(model, case)
    p = oracle.prompt(model, batch)
    keep = oracle.keep_mask(p, everything(p))
    assert torch.equal(keep, p.mask)
    tokens, logits = oracle.generate(model, p, keep, NEW)
    stock = model.generate(
        **batch, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    assert torch.equal(stock.sequences[:, -NEW:], tokens)
    torch.testing.assert_close(torch.stack(stock.logits), logits, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("layer", [0, 1, 3])
@pytest.mark.parametrize(("family", "case"), HIDDEN_CASES)
def test_dropped_is_the_same_as_hidden(family, case, layer):
    """Dropping tokens before a layer equals hiding their keys from that layer on in the stock decoder, positions
    unchanged."""
    model = tiny.make(family)
    batch = batch_of(model, case)
    p = oracle.prompt(model, batch)
    keep = oracle.keep_mask(p, some(p))
    dropped = p.mask & ~keep
    assert all(dropped[i.row, i.columns].any() for i in p.images)
    causal = torch.ones(2 * keep.shape[1:], dtype=torch.bool).tril()

    def hide(_: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        visible = causal & keep[:, None, None]
        return args, {**kwargs, "attention_mask": visible | torch.eye(len(causal), dtype=torch.bool)}

    hooks = [b.register_forward_pre_hook(hide, with_kwargs=True) for b in model.get_decoder().layers[layer:]]
    # generate gives left-padded rows the positions that the oracle recorded; a bare forward does not.
    hidden = model.generate(
        **batch, max_new_tokens=1, do_sample=False, use_cache=False, return_dict_in_generate=True, output_logits=True
    )
    for hook in hooks:
        hook.remove()
    _, logits = oracle.generate(model, p, p.mask, 1, layer_keep={layer: keep})
    torch.testing.assert_close(torch.stack(hidden.logits), logits, atol=2e-4, rtol=1e-4)
    assert not torch.allclose(logits, oracle.generate(model, p, p.mask, 1)[1], atol=1e-2)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_pictures_matter(family):
    model = tiny.make(family)
    batch = batch_of(model, "image")
    name = tiny.family(family).pixels
    other = {**batch, name: batch[name].flip(-1)}
    assert (model(**batch).logits - model(**other).logits)[:, -1].abs().max() > 0.1


def stays(family: str, rows: list[list[tiny.Item]], kept: list[list[int]], newlines: Any) -> list[list[int]]:
    """Per image, which of its placeholders stay."""
    model = tiny.make(family)
    p = oracle.prompt(model, tiny.build(model, rows))
    keep = oracle.keep_mask(p, [torch.tensor(k, dtype=torch.long) for k in kept], newlines=newlines)
    return [keep[i.row, i.columns].nonzero()[:, 0].tolist() for i in p.images]


@pytest.mark.parametrize("family", tiny.families(anyres=True))
@pytest.mark.parametrize(
    ("newlines", "second"),
    # 16 tokens of the base crop, then 8 rows of 4 with a newline each, at 20, 25, ...: token 21 is the second of row 1
    [
        ("keep_if_row_has_token", [3, 22, 25]),
        ("keep", [3, 20, 22, 25, 30, 35, 40, 45, 50, 55]),
        ("drop", [3, 22]),
    ],
)
def test_newlines_of_a_picture(family, newlines, second):
    every = list(range(48))
    rows = [["img", 2], [1, ("img", (100, 60)), 1]]
    first = [n for n in range(56) if n < 16 or n % 5 or newlines != "drop"]
    assert stays(family, rows, [every, [3, 21]], newlines) == [first, second]


@pytest.mark.parametrize(
    ("newlines", "ends"),
    [("keep_if_row_has_token", [[16], [], [12]]), ("keep", [[16], [16], [12]]), ("drop", [[], [], []])],
)
def test_one_newline_closes_a_crop_or_a_video(newlines, ends):
    got = stays("llava_onevision", [["img", 1, "img", 2, "video", 1]], [[2, 9], [], [11]], newlines)
    assert got == [[2, 9, *ends[0]], ends[1], [11, *ends[2]]]


def test_tokens_of_the_tiny_pictures():
    def tokens(family: str, item: tiny.Item) -> int:
        model = tiny.make(family)
        (segment,) = tiny.segments(model, tiny.build(model, [[2, item, 1]]))
        return len(segment.columns)

    # 2 x 2 crops of which 8 x 8 tokens hold the picture; more than 2 crops' worth, so OneVision resizes them to 5 x 5
    assert tokens("llava_next", ("img", (100, 90))) == 16 + 8 * (8 + 1)
    assert tokens("llava_onevision", ("img", (100, 90))) == 16 + 5 * (5 + 1)
    # 1 x 2 crops, less 2 rows of padding
    assert tokens("llava_next", ("img", (30, 100))) == 16 + 2 * (8 + 1)
    assert tokens("qwen3_vl", ("video", 3, 4, 8)) == 3 * 2 * 4


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_items_that_a_family_cannot_take(family):
    one = tiny.family(family)
    wrong = ["picture", ("img", (*one.image, 1)), ("img", one.image[:1]), ("video", *(1,) * (1 + len(one.video or ())))]
    for item in wrong if one.takes_video else [*wrong, "video"]:
        with pytest.raises(ValueError, match="in rows"):
            tiny.build(one.stock, [[1, item]])
