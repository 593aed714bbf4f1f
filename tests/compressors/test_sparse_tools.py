"""Around site attention: densities, the FLOPs account, and the search for MMInference's table."""

from __future__ import annotations

import pytest
import tiny
import torch

from vtoken.errors import UnsupportedError
from vtoken.stages.attention import PrefillQK, SparseMask


def test_density_of_reads():
    """By hand: 3 blocks of 16, 6 causal pairs; head 0 reads its own 3, head 1 the first besides; keys and dense queries
    come on top."""
    blocks = torch.eye(3, dtype=torch.bool).repeat(2, 1, 1)
    blocks[1, :, 0] = True
    assert float(SparseMask(16, blocks).density()) == pytest.approx((3 + 5) / 12)
    assert float(SparseMask(16, torch.ones_like(blocks)).density()) == 1
    columns = torch.tensor([[[0, 1, 20]], [[0, -1, -1]]], dtype=torch.int32)
    # Keys 0 and 1 are read by two more blocks each, key 20 by one; head 1 reads key 0 with its block.
    assert float(SparseMask(16, blocks, columns, 3).density()) == pytest.approx((8 + 5 / 16) / 12)
    dense = torch.zeros(2, 40, dtype=torch.bool)
    dense[0, [3, 37]] = True
    assert float(SparseMask(16, blocks, None, 1, dense).density()) == pytest.approx((8 + 3) / 12)


@pytest.mark.parametrize("share", [1, 3, 7, None])
@pytest.mark.parametrize("n", [96, 101])
def test_density_counts_one_by_one(n, share):
    """9 heads, 6 or 7 blocks of 16; lists in no order with -1 in between; heads with no dense query and with nothing
    else."""
    g, tiles = torch.Generator().manual_seed(n), -(-n // 16)
    of = torch.arange(tiles) // share if share else torch.randint(3, (tiles,), generator=g)
    blocks = torch.rand(9, tiles, tiles, generator=g) < 0.4
    columns = torch.rand(9, int(of.max()) + 1, n, generator=g).argsort(-1)[..., :23].int()
    columns[torch.rand(columns.shape, generator=g) < 0.3] = -1
    dense = torch.rand(9, n, generator=g) < torch.tensor([0.0, 0.1, 0.5, 1.0, 0.02, 0.3, 0.0, 0.9, 0.2])[:, None]
    total, lists = 0.0, [[[x for x in c if x >= 0] for c in of_head] for of_head in columns.tolist()]
    for h in range(9):
        before, total = total, 0.0
        for t in range(tiles):
            total += sum(bool(blocks[h, t, m]) for m in range(t + 1))
            total += sum(x // 16 <= t and not blocks[h, t, x // 16] for x in lists[h][of[t]]) / 16
        rows = dense[h].nonzero()[:, 0].tolist()
        total += sum(rows[i : i + 16][-1] // 16 + 1 for i in range(0, len(rows), 16))
        total = before + min(total, tiles * (tiles + 1) / 2)
    read = SparseMask(16, blocks, columns, share or 1, dense, of=None if share else of.int())
    got = float(read.density())
    assert got == pytest.approx(total / (9 * tiles * (tiles + 1) / 2), rel=1e-6)


def test_the_account_knows_fixed_patterns():
    """Two layers stream at 4 visited blocks a row, two are dense; what depends on the prompt is counted whole and
    named."""
    from vtoken.config import load
    from vtoken.evals.cost.flops import account

    config = tiny.make("llava").config
    thin = {"static_sparse": {"sink": 16, "window": 33, "size": 16, "min_len": 0, "dense_layers": [0, 3]}}
    whole, less = (account(config, load(p), text_tokens=144) for p in ("none", [thin]))
    # 160 tokens, 10 blocks: rows read 1, 2, 3 and then 4 blocks, the fourth row's first block being the oldest of its
    # window.
    share = (2 + 2 * (1 + 2 + 3 + 7 * 4) / 55) / 4
    assert less.prefill_attention == pytest.approx(whole.prefill_attention * share)
    assert less.prefill_attention_causal == pytest.approx(whole.prefill_attention_causal * share)
    assert less.prefill_linear == whole.prefill_linear and less.kv_bytes == whole.kv_bytes
    for stage, words in (
        ({"flexprefill": {"min_len": 0}}, "counted whole"),
        ({"flexprefill": {}}, "160 tokens are fewer than min_len 8192"),
    ):
        told = account(config, load([stage]), text_tokens=144)
        assert told.prefill_attention == whole.prefill_attention and any(words in s for s in told.left_out)
    with pytest.raises(UnsupportedError, match="3 proxies cannot share out"):
        account(config, load([{"proxyattn": {"proxies": 3}}]))


def test_calibration_of_mminference(tmp_path, capsys):
    """Recall against an independent sum; the table loads, has a name per head, and prefers the cheap pattern on a
    tie."""
    from vtoken import config, registry
    from vtoken.cli import main
    from vtoken.evals.calibrate import mminference

    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 150, 8, generator=g), torch.randn(1, 150, 8, generator=g)
    image = torch.where((torch.arange(150) > 9) & (torch.arange(150) < 130), 0, -1)
    prompt = PrefillQK(q, k, 0.5, 0, image, image, (((1, 10, 12),),))
    reads = SparseMask(16, torch.rand(2, 10, 10, generator=g) < 0.5, torch.tensor([[[3, 40]], [[60, -1]]]).int(), 10)
    got = mminference.recall(prompt, reads)
    for h in range(2):
        total = 0.0
        for i in range(10, 130):
            share = (k[0, : i + 1] @ q[h, i] * 0.5).softmax(0)
            listed = reads.columns[h, 0].tolist()
            total += sum(float(share[j]) for j in range(10, i + 1) if reads.blocks[h, i // 16, j // 16] or j in listed)
        assert float(got[h]) == pytest.approx(total / 120, rel=1e-4)
    cls, picked = registry.stage("mminference"), {}
    for window, names in ((64, ("a_shape", "vertical_slash_1024")), (4096, ("vertical_slash_1024", "a_shape"))):
        for candidates in (names, names[::-1]):
            tool = mminference.Search(candidates=candidates, method=cls(window=window, sink=0), found=picked)
            tool.reads(
                PrefillQK(
                    q.repeat(1, 3, 1), k.repeat(1, 3, 1), 0.5, 0, *[torch.zeros(450).long()] * 2, (((1, 10, 45),),)
                )
            )
            # A window of a block forgets, so slashes win; of patterns that recall all of it the first one stays.
            assert picked[0][0] == (("vertical_slash_1024",) if window == 64 else candidates[:1]) * 2
    out = tmp_path / "table.yaml"
    assert main(["calibrate", "mminference", "tiny-llava", "--device", "cpu", "--out", str(out)]) == 0
    assert "random pictures" in capsys.readouterr().out
    (stage,) = config.load(out).stages
    # A short prompt is read whole by every pattern, so the first one stays.
    assert {name for row in stage.heads for name in row} == {"grid_frame_columns"} and stage.min_len == 8192


@pytest.mark.parametrize(
    ("stage", "slots"),
    [
        # 144 + 16 tokens, three steps, four layers. Pages of 4: one of four is read in two layers, for the bounds of
        # four pages, 4 slots' worth.
        ({"quest": {"keep": 4, "size": 4, "min_len": 0}}, 4 * (161 + 162 + 163) + 2 * 3 * (4 - 12)),
        # Layer 2 reads everything, and all keys once more; layer 3 reads 12 fewer.
        ({"tidal": {"keep": 4, "min_len": 0}}, (4 + 0.5) * (161 + 162 + 163) - 3 * 12),
        # The first of two steps in all four layers, with all keys once more; 12 fewer at the second.
        ({"recycled": {"keep": 4, "every": 2, "min_len": 0}}, 4 * (1.5 * (161 + 163) + 162 - 12)),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_the_account_knows_what_generated_tokens_read(stage, slots):
    """Of the dense model 161, 162 and 163 slots in each of four layers; matrices are the same."""
    from vtoken.config import load
    from vtoken.evals.cost.flops import account

    config = tiny.make("llava").config
    text = config.text_config
    work = {"text_tokens": 144, "new_tokens": 4}
    whole, less = (account(config, load(p), **work) for p in ("none", [stage]))
    slot = 4 * text.hidden_size  # two products of 2 FLOPs a channel and head
    assert whole.decode - less.decode == slot * (4 * (161 + 162 + 163) - slots)
    assert less.kv_bytes_read == pytest.approx(slots / 3 * whole.kv_bytes_prefill / (4 * 160), abs=1), "per step"
    assert (less.kv_bytes, less.total - less.decode) == (whole.kv_bytes, whole.total - whole.decode)
    name = next(iter(stage))
    told = account(config, load([{name: {**stage[name], "min_len": 161}}]), **work)
    assert told.decode == whole.decode and any("160 tokens are fewer than min_len 161" in s for s in told.left_out)
    alike = account(config, load([{"recycled": {"keep": 4, "similarity": 0.8, "min_len": 0}}]), **work)
    assert any("recycled: which slots generated tokens read" in s for s in alike.left_out)
