"""Known answer of virtual unmerging, worked out by hand."""

from __future__ import annotations

from functools import partial
from math import e

import pytest
import torch
from pydantic import ValidationError
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from vtoken import registry
from vtoken.hooks.attention.unmerged_attention import UnmergedAttention, UnmergeTable


def causal(q, k, v, padding=0):
    """Without scale; the last row begins with so much padding."""
    hidden = torch.ones(len(q), 1, q.shape[2], k.shape[2], dtype=torch.bool).triu(k.shape[2] - q.shape[2] + 1)
    hidden[-1, :, :, :padding] = True
    scores = (q @ k.transpose(2, 3)).masked_fill(hidden, -1e9)
    return (scores.softmax(-1) @ v).transpose(1, 2), None


def rope(*quarters):
    """Angles in quarters of a circle, exactly: [1, n, 2] each."""
    cos, sin = [1.0, 0, -1, 0], [0.0, 1, 0, -1]
    return tuple(torch.tensor([[[x[i % 4]] * 2 for i in quarters]]) for x in (cos, sin))


def vtu():
    """Places 0 and 2 are members of token 0, place 1 is token 1; neighbours stand a quarter circle apart. All queries
    and keys are (1, 0), so logits are the cosines between places: 1, 0 and -1. Place 0 reads itself; place 1 reads 1
    and 3 with weights 1 and e; place 2 reads 1, 3 and 1 with weights 1/e, 1 and e. A second row holds padding and two
    tokens of one place each."""
    x = torch.tensor([1.0, 0]).expand(2, 1, 3, 2)
    v = torch.tensor([[1.0, 3, 99], [99, 1, 3]])[:, None, :, None].expand(2, 1, 3, 2)
    home = torch.tensor([[0, 1, 0], [3, 1, 2]])
    angles = tuple(torch.cat(each) for each in zip(rope(0, 1, 2), rope(0, 0, 1), strict=True))
    one, two = (1 + 3 * e) / (1 + e), (1 / e + 3 + e) / (1 / e + 1 + e)
    padded = partial(causal, padding=1)
    got, _ = UnmergedAttention(None, 3, angles, home).attention(apply_rotary_pos_emb, x, x, v, None, padded)
    torch.testing.assert_close(got[0, :, 0, 0], torch.tensor([(1 + two) / 2, one, 0]))
    torch.testing.assert_close(got[1, 1:, 0, 0], torch.tensor([1, one]))
    the_written()
    the_table()
    made = registry.stage("vtu")()
    assert (
        made.unmerge_mode() == "expanded"
        and made.layers(32) == ()
        and made.expected_counts((4, 2), (), (0, 0)) == (4, 2)
    )
    assert registry.stage("vtu")(cache="merged").unmerge_mode() == "merged"
    with pytest.raises(ValidationError):
        registry.stage("vtu")(cache="un-rotated")


def the_written():
    """Into an expanded cache goes every place: keys turned to where they stand, values as they are."""
    x = torch.tensor([[[[1.0, 0], [2, 0]]]])
    seen = []

    def write(k, v):
        seen.extend((k, v))
        return k, v

    UnmergedAttention(None, 2, rope(0, 1, 2, 3), torch.tensor([[0, 1, 0, 1]])).attention(
        apply_rotary_pos_emb, x, x, x, write, causal
    )
    assert seen[0][0, 0].tolist() == [[1, 0], [0, 2], [-1, 0], [0, -2]]
    assert seen[1][0, 0].tolist() == [[1, 0], [2, 0], [1, 0], [2, 0]]


def the_table():
    """A merged cache: two stock slots of an earlier turn keep their rotation, token 2 stands at two places, then a
    draft is rejected."""
    old = UnmergeTable.rotated(torch.tensor([[0, 1]]), True, rope(0))
    table = old.extend(torch.tensor([[2, 3, 4]]), torch.tensor([[2, 3, 2]]), rope(1, 2, 3), 5, True)
    longer = table.extend(torch.tensor([[5, 6]]), torch.tensor([[4, 5]]), rope(0, 1), 7, True)
    assert longer.slot.tolist() == [[0, 1, 2, 3, 2, 4, 5]] and longer.cut(9).logical.shape == (1, 7)
    cut = longer.cut(5)
    assert torch.equal(cut.slot, table.slot) and torch.equal(cut.rope[1], table.rope[1]) and cut.end == 5
    assert table.rope[0][0, :, 0].tolist() == [1, 1, 0, -1, 0] and table.rope[1][0, :, 0].tolist() == [0, 0, 1, 0, -1]
    picked = table.rows(torch.tensor([0, 0]))
    assert picked.slot.tolist() == [[0, 1, 2, 3, 2]] * 2 and len(picked.rope[0]) == 2
