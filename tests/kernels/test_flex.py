"""Sparse attention by torch's flex_attention: equal to the definition where it serves, and one error where it
cannot."""

from __future__ import annotations

import pytest
import tiny
import torch
from batches import LONG
from kernel_examples import OPS
from modes import LOGITS, greedy
from sparse_probes import Everything, Ladder

import vtoken
from vtoken import kernels
from vtoken.kernels import _flex, block_sparse_attention

EXAMPLES = list(OPS["block_sparse_attention"].examples())
BLOCKS = [e for e in EXAMPLES if "columns" not in e and "rows" not in e]


def test_equals_the_definition():
    assert len(BLOCKS) > 5 and {e["size"] for e in BLOCKS} >= {16, 64, 128}
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(h, 600, 16, generator=g) for h in (4, 2, 2))
    large = {"q": q, "k": k, "v": v, "read": torch.rand(4, 3, 3, generator=g) < 0.5, "scale": 0.25, "size": 256}
    for example in (*BLOCKS, large):
        with kernels.use("torch"):
            want = block_sparse_attention(**example)
        with kernels.use("flex"):
            got = block_sparse_attention(**example)
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
            assert x.dtype == y.dtype


@pytest.mark.parametrize(
    ("size", "queries", "keys"), [(16, 700, 700), (64, 130, 600), (128, 500, 500), (256, 513, 700)]
)
def test_block_masks_skip_nothing_that_is_read(size, queries, keys):
    """Tile by tile of 128: listed at all if a key of it is read, as whole only if every query reads all of it."""
    g = torch.Generator().manual_seed(size)
    read = torch.rand(2, -(-queries // size), -(-keys // size), generator=g) < 0.02
    near = torch.arange(read.shape[1])[:, None] - torch.arange(read.shape[2])
    read |= (near + 128 // size) % (512 // size) < 256 // size
    i, j = torch.arange(queries)[:, None], torch.arange(keys)
    asked = read[:, i // size, j // size]
    seen = asked & (j <= i + keys - queries)
    mask = _flex.block_mask(read, queries, keys, size)
    listed = [
        {(h, t, c) for h in range(2) for t in range(n.shape[2]) for c in at[0, h, t, : n[0, h, t]].tolist()}
        for n, at in ((mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices))
    ]
    part, whole = listed
    assert not part & whole and part and whole
    for h in range(2):
        for t in range(-(-queries // 128)):
            for c in range(-(-keys // 128)):
                at = (h, slice(t * 128, t * 128 + 128), slice(c * 128, c * 128 + 128))
                assert (h, t, c) in part | whole or not seen[at].any()
                assert (h, t, c) not in part | whole or (asked[at].any() and c * 128 <= t * 128 + 127 + keys - queries)
                assert (h, t, c) not in whole or seen[at].all()
                assert (h, t, c) in whole or not seen[at].all() or seen[at].numel() < 128 * 128


def test_what_flex_cannot_serve():
    single = next(e for e in EXAMPLES if "columns" in e and "rows" not in e)
    chosen = next(e for e in EXAMPLES if "rows" in e and "columns" not in e)
    with kernels.use("flex"):
        for example, words in ((single, "single keys"), (chosen, "single queries")):
            with pytest.raises(RuntimeError, match=f"{words}.*use torch or triton"):
                block_sparse_attention(**example)
        assert kernels.backend("cpu") == "torch", "other ops run as by default"
        q = torch.randn(2, 40, 8, requires_grad=True)
        read = torch.ones(2, 3, 3, dtype=torch.bool)
        block_sparse_attention(q, q, q, read, 1.0, 16)[0].sum().backward()
    assert q.grad is not None and q.grad.abs().sum() > 0


@torch.no_grad()
def test_the_trace_names_what_computed():
    """A wrapped model gives the same logits by flex; a method that lists keys is refused, and the model goes on."""
    model = tiny.make("llava")
    batch = tiny.build(model, [*LONG, [2, "img", 5]], seed=3)
    plain = torch.stack(greedy(model, batch, **LOGITS).logits)
    with vtoken.wrapped(model, [Everything()]):
        for choice in ("torch", "flex"):
            with kernels.use(choice):
                got = torch.stack(greedy(model, batch, **LOGITS).logits)
            torch.testing.assert_close(got, plain, atol=1e-4, rtol=1e-4)
            stages = vtoken.trace(model).stages
            assert [s.backend for s in stages] == [choice] * 4
            assert stages[0].to_dict()["backend"] == choice
    with vtoken.wrapped(model, [Ladder(), {"fastervlm": {"keep": 12}}][::-1]):
        with kernels.use("flex"), pytest.raises(RuntimeError, match="single keys"):
            greedy(model, batch, 1)
        greedy(model, batch, 1)
        assert {s.backend for s in vtoken.trace(model).stages} == {None, "torch"}
    assert torch.equal(torch.stack(greedy(model, batch, **LOGITS).logits), plain)
