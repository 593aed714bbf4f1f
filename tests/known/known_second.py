"""Known answers of second stages and other methods inside the LLM, by hand or by an independent definition in
float64."""

from __future__ import annotations

import gates
import pytest
import torch
from packing import tokens
from pydantic import ValidationError
from safetensors.torch import load_file
from torch.nn.functional import avg_pool2d

from vtoken import config, registry
from vtoken.stages import Fact, VisualTokens
from vtoken.stages.budget import Budget


def stage(name, **options):
    return registry.stage(name)(**options)


def walked(pipeline, count, depth):
    """Tokens of one image of `count` tokens in every decoder layer, by the plans of the stages."""
    counts, parts = (count,), (((1, 1, count),),)
    for each in pipeline.stages:
        counts = each.expected_counts(counts, parts, (0,)) if each.site != "decoder" else counts
    out = []
    for layer in range(depth):
        for each in pipeline.stages:
            if layer in each.layers(depth) and each.site == "decoder":
                counts = each.expected_counts(counts, parts, (0,), layer)
        out.append(counts[0])
    return out


def vscan_late():
    cut = stage("vscan_late")
    assert cut.layers(32) == (16,) and cut.layers(28) == (14,) and cut.layers(1) == (1,)
    assert stage("vscan_late", layer=9).layers(32) == (9,)
    scores = torch.tensor([5.0, 1, 4, 2, 3, 0])
    found = cut.select(tokens(next_query_attention=scores))
    assert found.index.tolist() == [0, 2] and found.lengths == (2,), "a third"
    for average in (64, 128, 192):
        entered = 3 * average // 2
        assert walked(config.load(f"vscan-{entered}"), 576, 32) == [entered] * 16 + [entered // 3] * 16
        assert 16 * (entered + entered // 3) == 32 * average, "the published average"


def flowcut_late():
    """Scores (1 + 0) * 1, (.5 + .25) * 4, (0 + .5) * 6 and (0 + .25) * 13, ties none."""
    facts = {
        "visual_attention": torch.tensor([1.0, 0.5, 0, 0]),
        "visual_value_attention": torch.tensor([0, 0.25, 0.5, 0.25]),
        "mean_value": torch.tensor([[1.0, 0], [-3, 1], [2, -4], [-6.5, 6.5]]),
    }
    four = tokens(torch.zeros(4, 2), (4,), ((1, 2, 2),), **facts)
    cut = stage("flowcut_late", keep=1)
    torch.testing.assert_close(cut.score(four), torch.tensor([1, 3, 3, 3.25]))
    assert cut.select(four).index.tolist() == [3] and cut.layers(32) == (2,)
    assert stage("flowcut_late", keep=3).select(four).index.tolist() == [1, 2, 3]
    # A total is shared out by size: of 3 and 1 tokens 2 and 1 stay.
    two = tokens(torch.zeros(4, 2), (3, 1), ((1, 1, 3), (1, 1, 1)), (0, 0), **facts)
    assert stage("flowcut_late", keep={"total": 3}).select(two).index.tolist() == [1, 2, 3]
    five_crops = ((1, 24, 24), (1, 48, 48))
    for total in (640, 320, 160):
        first, late = config.load(f"flowcut-next-{total}").stages
        entered = first.expected_counts((2880,), (five_crops,), (0,))
        assert entered == (5 * total // 2,) and late.expected_counts(entered, (five_crops,), (0,), 2) == (total,)


def vflowopt_late():
    score = torch.tensor([0.1, 0.3, 0.2, 0.3])
    given = tokens(torch.zeros(4, 2), (4,), ((1, 2, 2),))
    facts = {Fact("received_attention", above=5.0): score}
    four = VisualTokens(**{**vars(given), "facts": facts})
    cut = stage("vflowopt_late", keep="50%", threshold=5.0)
    assert cut.select(four).index.tolist() == [1, 3]
    assert cut.layers(28) == (9,) and cut.layers(32) == (10,) and cut.layers(2) == (1,)
    # The spec's averages of the three released rows; whole tokens are lost by rounding down.
    for share, average in ((50, 0.5007), (25, 0.2507), (10, 0.1000)):
        counts = walked(config.load(f"vflowopt-{share}"), 7290, 28)
        assert abs(sum(counts) / 28 / 7290 - average) < 3e-4
        early, second, third = config.load(f"vflowopt-{share}").stages
        assert second.layers(28) + third.layers(28) == (9, 18)
        assert early.threshold == second.threshold == third.threshold, "one importance"


def fitprune():
    """Products .2, .02, .06, .02 and .01: the lowest leave, of equals the later one."""
    facts = {
        "cross_attention": torch.tensor([0.2, 0.1, 0.2, 0.1, 0.1]),
        "self_attention": torch.tensor([1.0, 0.2, 0.3, 0.2, 0.1]),
    }
    five = tokens(torch.zeros(5, 2), (5,), ((1, 1, 5),), **facts)
    assert stage("fitprune", table=(1, 1), tokens=5).select(five).index.tolist() == [0, 1, 2]
    assert stage("fitprune", table=(0, 4, 0), tokens=5).layers(4) == (2,)
    assert stage("fitprune", table=(1, 0, 2, 1), tokens=5).layers(4) == (1, 3), "nothing leaves behind the last layer"
    assert stage("fitprune", table=(1, 0, 2, 1), tokens=5).layers(3) == (1, 4), "which wrap refuses"
    assert stage("fitprune", table=(1, 0, 0), tokens=5).layers(2) == (1, 3), "a table for three layers"
    table = stage("fitprune", table=(200, 100, 50), tokens=576)
    assert [table.expected_counts((576,), (), (), k) for k in (1,)] == [(376,)]
    assert table.expected_counts((376, 36, 35, 1, 0), (), (), 2) == (276, 26, 26, 1, 0), "26.4 and 25.7"
    assert stage("fitprune", table=(3, 2), tokens=5).expected_counts((5, 1), (), ()) == (0, 0)
    for bad in ({"table": (3, 3), "tokens": 5}, {"table": (-1, 2)}, {"table": ()}):
        with pytest.raises(ValidationError):
            stage("fitprune", **bad)
    # The authors' tables, at the authors' forecast: output projection and MLP of a layer are spared of those that leave
    # behind it.
    for share in (40, 60, 80):
        (one,) = config.load(f"fitprune-{share}").stages
        assert len(one.table) == 32 and one.tokens == 576
        counts, gone = [], 0
        for n in one.table:
            counts.append(576 - gone)
            gone += n
        assert walked(config.load(f"fitprune-{share}"), 576, 32) == counts
        assert abs(forecast(one.table) - (1 - share / 100) * forecast((0,) * 32)) < 0.015 * forecast((0,) * 32)


def forecast(table):
    """Multiply-adds of 576 visual tokens of LLaVA-1.5-7B as the authors count them."""
    width, inner, n, total = 4096, 11008, 576, 0
    for gone in table:
        total += 3 * n * width * width + 2 * n * n * width
        n -= gone
        total += n * width * width + 3 * n * width * inner
    return total


def cmai():
    scores = torch.tensor([0.1, 0.3, 0.2, 0.3, 0.0, 0.3])
    found = stage("cmai", keep=2).select(tokens(relayed_attention=scores))
    assert found.index.tolist() == [1, 3] and stage("cmai", keep=2).layers(32) == (2,)


def dpn():
    pyramid = stage("dpn", sizes=(2, 1, 2)).for_depth(32)
    assert pyramid.layers(32) == (8, 16, 24) and stage("dpn").layers(4) == (1, 2, 3)
    x = torch.randn(576 + 35, 3, generator=torch.Generator().manual_seed(0)).double()
    parts = (((1, 24, 24),), ((1, 5, 7),))
    grids = [x[:576].view(24, 24, 3), x[576:].view(5, 7, 3)]
    now = VisualTokens.pack(x, (576, 35), parts, (0, 1), torch.cat([torch.arange(576), torch.arange(35)]))
    for layer, k in ((8, 2), (16, 1), (24, 2)):
        keep = pyramid.select(VisualTokens(**{**vars(now), "layer": layer}))
        assert keep.lengths == pyramid.expected_counts(now.lengths, parts, (0, 1), layer)
        now = VisualTokens.pack(keep.apply(now.x), keep.lengths, parts, (0, 1), now.raster_index[keep.index])
        # 3 x 4 cells are fewer than 16 tokens: the second image is left alone from then on.
        grids = [pooled(g, k) if g.shape[0] * g.shape[1] >= 16 else g for g in grids]
        torch.testing.assert_close(now.x, torch.cat([g.flatten(0, 1) for g in grids]).double(), atol=1e-6, rtol=1e-5)
    assert now.lengths == (36, 12)
    assert (
        now.raster_index[:3].tolist() == [0, 4, 8]
        and now.raster_index[6] == 4 * 24
        and now.raster_index[36:39].tolist() == [0, 2, 4]
    )
    assert stage("dpn", sizes=(4,), at=(3,)).expected_counts((9,), (((1, 3, 3),),), (0,), 3) == (9,)
    big = stage("dpn", sizes=(4,), at=(3,), least=4)
    assert big.expected_counts((12,), (((1, 3, 4),),), (0,), 3) == (12,), "no room for 4 x 4"
    for bad in ({"sizes": (2,)}, {"sizes": (2, 2, 0)}, {"at": (3, 2), "sizes": (2, 2)}, {"at": (3,)}):
        with pytest.raises(ValidationError):
            stage("dpn", **bad)
    with pytest.raises(ValueError, match="for_depth"):
        stage("dpn").expected_counts((16,), (((1, 4, 4),),), (0,), 1)
    assert Budget(1)  # DPN has no budget: its sizes say it all
    assert "keep" not in type(pyramid).model_fields


def pooled(grid, k):
    """Means of k x k cells of [rows, columns, D]; at the edge of what is there."""
    rows = avg_pool2d(grid.permute(2, 0, 1)[None], k, ceil_mode=True, count_include_pad=False)
    return rows[0].permute(1, 2, 0)


def dpn_routed():
    """Two rows with one and two images, two routers with three and two sizes; maxima and probabilities by hand, cell by
    cell."""
    g = torch.Generator().manual_seed(4)
    file = gates.routers(seed=7, layers=(7, 15), width=8, sizes=3)
    pyramid = stage("dpn_routed", routers=file, read=2)
    assert (
        pyramid.layers(32) == (8, 16)
        and pyramid.incompatibility(32, 8) == ""
        and pyramid.incompatibility(15, 8)
        and pyramid.incompatibility(32, 9)
    )
    held = load_file(file)
    parts, row = (((1, 8, 8),), ((1, 4, 8),), ((1, 9, 7),)), (0, 0, 1)
    lengths = (64, 32, 63)
    grids = [torch.randn(h, w, 8, generator=g).double() for ((_, h, w),) in parts]
    sides, memory = [1, 1, 1], {}
    taken = set()
    for layer in (8, 16):
        texts = [torch.randn(5, 8, generator=g) for _ in row]
        raster_index = torch.cat(
            [torch.arange(h * w).view(h, w)[::s, ::s].flatten() for s, ((_, h, w),) in zip(sides, parts, strict=True)]
        )
        x = torch.cat([grid.flatten(0, 1) for grid in grids])
        facts = {Fact("later_text"): texts}
        now = VisualTokens.pack(
            x, [len(v.flatten(0, 1)) for v in grids], parts, row, raster_index, facts=facts, layer=layer, memory=memory
        )
        keep = pyramid.select(now)
        for images, last in (((0, 1), 1), ((2,), 2)):
            if any(len(grids[i].flatten(0, 1)) < 16 or min(grids[i].shape[:2]) < 4 for i in images):
                continue
            shown = texts[last][-2:].double().mean(0)
            name = str(layer - 1)
            shown = (shown - shown.mean()) / (shown.var(unbiased=False) + 1e-5).sqrt()
            shown = shown * held[f"{name}.norm.weight"].double() + held[f"{name}.norm.bias"].double()
            inner = held[f"{name}.in.weight"].double() @ shown
            inner = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
            p = ((held[f"{name}.out.weight"].double() @ inner) / 10).softmax(0)
            k = (1, 2, 4)[int(p.argmax())]
            taken.add(k)
            for i in images:
                sides[i] *= k
                rows, columns = (range(0, n, k) for n in grids[i].shape[:2])
                grids[i] = p.max() * torch.stack(
                    [torch.stack([grids[i][r : r + k, c : c + k].amax((0, 1)) for c in columns]) for r in rows]
                )
        assert keep.lengths == tuple(len(v.flatten(0, 1)) for v in grids)
        torch.testing.assert_close(keep.apply(x), torch.cat([v.flatten(0, 1) for v in grids]), atol=1e-6, rtol=1e-5)
    assert len(taken) > 1, "different sizes were seen"
    assert pyramid.expected_counts(lengths, parts, row, 8) == lengths
    for bad in ({"routers": "nowhere.safetensors"}, {"routers": __file__}, {"routers": file, "sizes": (0, 2)}):
        with pytest.raises(ValidationError):
            stage("dpn_routed", **bad)
