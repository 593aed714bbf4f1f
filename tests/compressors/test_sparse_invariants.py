"""What holds of every method of site attention: first key and own key are read, nothing ahead is, and reading all is plain attention."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from typing import Any

import gates
import pytest
import tiny
import torch
from known_sparse import NO_IMAGES, rope, video
from known_sparse import prompt as random_prompt
from modes import LOGITS, alone, greedy, whole

import vtoken
from vtoken import kernels, registry
from vtoken.evals.calibrate.mminference import visible
from vtoken.stages.attention import PrefillQK, SparseAttention

# Options under which short prompts are thinned, and those under which everything is read; block size of MMInference is
# 64.
THIN: dict[str, list[dict[str, Any]]] = {
    "anchorattention": [
        {"size": 16, "step": 2, "theta": 1.5, "released": released, "dense_tail": False} for released in (False, True)
    ],
    "chunk_prefill": [{"size": 16, "frames": 5, "previous": previous} for previous in (2, 0)],
    "composite_attention": [{}],
    "flexprefill": [{"size": 16, "gamma": 0.5, "tau": tau, "min_budget": 1} for tau in (0.0, 0.4)],
    "mminference": [
        {"pattern": name, "sink": 20, "window": 64, "local": 64, "vertical": 40, "slash": 110}
        for name in ("grid_frame_columns", "grid_frame", "a_shape", "query_boundary", "2d_boundary")
    ],
    "proxyattn": [
        {"size": 16, "proxies": proxies, "gamma": 0.6, "min_budget": 16, "by_row": proxies == 4}
        for proxies in (1, 2, 4)
    ],
    "seerattention": [
        {"gates": gates.seer(width=16), "threshold": 0.02, "last": 0},
        {"gates": gates.seer(width=16), "share": 0.3},
    ],
    "static_sparse": [{"size": 16, "sink": 16, "window": 20, "last": last} for last in (0, 5)],
    "xattention": [{"size": 16, "stride": 8, "threshold": 0.4}],
}
WHOLE: dict[str, dict[str, Any]] = {
    "anchorattention": {"size": 16, "step": 2, "theta": 1e9},
    "chunk_prefill": {"size": 16, "previous": 10_000},
    "flexprefill": {"size": 16, "gamma": 1.0, "tau": 0.0, "min_budget": 10_000},
    "mminference": {"pattern": "2d_boundary", "vertical": 10_000, "slash": 10_000},
    "proxyattn": {"size": 16, "min_budget": 10_000},
    "seerattention": {"gates": gates.seer(width=16), "threshold": 0.0},
    "static_sparse": {"size": 16, "window": 10_000},
    "xattention": {"size": 16, "stride": 8, "threshold": 1.0},
}
# Options that thin the shorter prompts of whole models.
SHORT: dict[str, dict[str, Any]] = {
    "anchorattention": {"theta": 0.0},
    "mminference": {"vertical": 30, "slash": 100},
    "seerattention": {"gates": gates.seer()},
}
CASES = [(name, options) for name, several in THIN.items() for options in several]


def words(x: str | dict[str, Any]) -> str:
    """The id of a case; of a file only its name, since its folder is another one in every worker."""
    return x if isinstance(x, str) else "-".join(str(value).rpartition("/")[2] for value in x.values())


each = pytest.mark.parametrize(("name", "options"), CASES, ids=words)


def thinned(name: str, options: dict[str, Any], n: int = 900) -> tuple[PrefillQK, Any]:
    """A video of 80 frames between texts, and what the method reads of it."""
    clip = video(n, 80, 2, 4, 2, 5, seed=n)
    return clip, registry.stage(name)(min_len=0, **options).reads(clip)


def test_every_method_is_here():
    sparse = {name for name in registry.stages() if issubclass(registry.stage(name), SparseAttention)}
    # zipvl lists no keys (test_zipvl.py); visual tokens of composite_attention never read each other
    missing = sparse - set(THIN) - {"zipvl"}
    assert not missing and set(THIN) - {"composite_attention"} == set(WHOLE), (
        f"give {missing} options that thin, and options that read everything"
    )


@each
def test_first_and_own_key_are_read(name, options):
    clip, reads = thinned(name, options)
    n, size = clip.length, reads.size
    tiles = -(-n // size)
    rows = torch.arange(n)
    seen = torch.nn.functional.pad(visible(reads, rows), (0, max(0, n - reads.blocks.shape[2] * size)))[..., :n]
    assert bool(seen[:, rows, rows].all()), "a query that does not read its own token"
    # Lists of single keys have the first one too; all others read the first block whole.
    first = (
        seen[:, :, 0]
        if name in ("mminference", "composite_attention", "chunk_prefill")
        else (reads.blocks | ~torch.ones(tiles, tiles).tril().bool())[..., 0]
    )
    assert bool(first.all()), "a query that does not read the first token"
    assert 0.05 < float(reads.density()) < 0.99, "these options thin"
    ahead = torch.ones(n, n, dtype=torch.bool).triu(1)
    assert not bool((seen & ahead).any())
    if reads.columns is not None:
        listed = reads.columns.sort(-1).values
        again = (listed[..., 1:] == listed[..., :-1]) & (listed[..., 1:] >= 0)
        assert not bool(again.any()) and int(listed.max()) < n, "the kernel adds up what a list holds"


@each
def test_given_its_lists_nothing_ahead_counts(name, options):
    """Other keys and values from a token on change nothing in front of it, wherever it stands."""
    clip, reads = thinned(name, options)
    g = torch.Generator().manual_seed(5)
    v = torch.randn(clip.k.shape, generator=g)
    before = reads.apply(clip.q, clip.k, v, clip.scale)
    for token in (1, 64, *torch.randint(900, (3,), generator=g).tolist(), 899):
        k, w = clip.k.clone(), v.clone()
        k[:, token:], w[:, token:] = (torch.randn(k[:, token:].shape, generator=g) for _ in range(2))
        after = reads.apply(clip.q, k, w, clip.scale)
        assert torch.equal(after[:, :token], before[:, :token])
        assert not torch.equal(after[:, token], before[:, token]), "and it changes the token itself"


@each
def test_the_lists_say_what_is_computed(name, options):
    """`visible`, which calibration goes by, against the attention itself: as a mask it gives the same."""
    clip, reads = thinned(name, options)
    v = torch.randn(clip.k.shape, generator=torch.Generator().manual_seed(6))
    got = reads.apply(clip.q, clip.k, v, clip.scale)
    seen = visible(reads, torch.arange(clip.length))[..., : clip.length]
    k, v = (x.double().repeat_interleave(2, 0) for x in (clip.k, v))
    scores = (clip.q.double() @ k.transpose(1, 2) * clip.scale).masked_fill(~seen, -torch.inf)
    torch.testing.assert_close(got.double(), scores.softmax(-1) @ v, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("n", [1, 31, 200])
def test_reading_everything_is_plain_attention(name, n):
    p = random_prompt(max(n, 2), seed=n) if n > 100 else None
    if p is None:
        g = torch.Generator().manual_seed(n)
        q, k = torch.randn(4, n, 16, generator=g), torch.randn(2, n, 16, generator=g)
        p = PrefillQK(q, k, 0.25, 0, NO_IMAGES[:n], NO_IMAGES[:n], rope=rope(n, 16))
    v = torch.randn(p.k.shape, generator=torch.Generator().manual_seed(7))
    reads = registry.stage(name)(min_len=0, **WHOLE[name]).reads(p)
    with kernels.use("torch"):
        got = reads.apply(p.q, p.k, v, p.scale)
    k, v = (x.repeat_interleave(2, 0) for x in (p.k, v))
    want = torch.nn.functional.scaled_dot_product_attention(p.q[None], k[None], v[None], is_causal=True, scale=p.scale)
    torch.testing.assert_close(got, want[0], atol=1e-6, rtol=1e-5)


# Of 400 tokens in blocks of 16, too many to be read whole because they are few.
COVERING: list[tuple[str, dict[str, Any]]] = [
    ("flexprefill", {"tau": 0.0}),
    ("flexprefill", {"tau": 9.0}),
    ("proxyattn", {"proxies": 2}),
    ("proxyattn", {"proxies": 2, "by_row": True}),
]
covering = pytest.mark.parametrize(("name", "options"), COVERING, ids=words)


def covered(name: str, options: dict[str, Any], p: PrefillQK, gamma: float) -> Any:
    return registry.stage(name)(min_len=0, size=16, min_budget=1, gamma=gamma, **options).reads(p)


@covering
def test_a_larger_gamma_reads_what_a_smaller_one_does_and_more(name, options):
    p = random_prompt(400, seed=8)
    found = [covered(name, options, p, gamma) for gamma in (0.2, 0.4, 0.6, 0.8, 0.95, 1.0)]
    for less, more in pairwise(found):
        assert not bool((less.blocks & ~more.blocks).any())
    densities = [float(reads.density()) for reads in found]
    assert densities == sorted(densities) and len(set(densities)) > 4 and densities[0] < 0.5


@covering
def test_all_of_the_attention_is_in_all_blocks(name, options):
    """Where no key gets next to nothing, a gamma of 1 leaves no block out."""
    p = random_prompt(400, seed=9)
    even = replace(p, q=p.q * 0.1)
    assert float(covered(name, options, even, 1.0).density()) == 1 > float(covered(name, options, even, 0.5).density())


@pytest.mark.parametrize("tau", [0.0, 9.0])
def test_what_gamma_1_leaves_out_weighs_nothing(tau):
    """Peaked attention: of that of the last block, which vertical-slash heads go by, and of the pooled map
    otherwise."""
    p = random_prompt(400, seed=10)
    p = replace(p, q=p.q * 4)
    blocks = covered("flexprefill", {"tau": tau}, p, 1.0).blocks
    q, k = p.q.double(), p.k.double().repeat_interleave(2, 0)
    if tau:
        q, k = (x.unflatten(1, (-1, 16)).mean(2) for x in (q, k))
    scores = (q @ k.mT * p.scale).masked_fill(torch.ones(k.shape[1], k.shape[1]).triu(1).bool(), -torch.inf)
    shares = scores.softmax(-1)
    unread = shares * ~blocks if tau else shares[:, -16:] * ~blocks[:, -1:].repeat_interleave(16, 2)
    assert float(unread.sum(-1).max()) < 1e-4


@whole
@pytest.mark.parametrize("name", ["anchorattention", "mminference", "proxyattn", "seerattention"])
def test_a_batch_says_what_its_rows_say_alone(family, name):
    model = tiny.make(family)
    batch = tiny.build(model, [[150, "img", 60, "img", 160], [1, "img", 260], [90]], seed=3)
    options = {**THIN[name][-1], **SHORT.get(name, {})}
    stages = [{"fastervlm": {"keep": "80%"}}, {name: {"min_len": 0, **options}}]
    with vtoken.wrapped(model, stages):
        got = torch.stack(greedy(model, batch, **LOGITS).logits)
        whole = [s for s in vtoken.trace(model).stages if s.site == "attention"]
        assert (
            len(whole) == len(tiny.family(family).attending) and whole[0].density[0] < 1 and whole[0].backend == "torch"
        )
        for row in (0, 1):
            one = torch.stack(greedy(model, alone(model, batch, row), **LOGITS).logits)
            torch.testing.assert_close(one[:, 0], got[:, row], atol=1e-4, rtol=1e-4)
            single = [s for s in vtoken.trace(model).stages if s.site == "attention"]
            assert [s.density[0] for s in single] == [s.density[row] for s in whole]


@pytest.mark.parametrize("name", [*THIN, "zipvl"])
def test_the_trace_is_valid_json_and_no_share_exceeds_one(name):
    """A row of much text and one picture, and one that is padding alone."""
    model = tiny.make("llava")
    batch = tiny.build(model, [[150, "img", 40], [9]], seed=3)
    batch["attention_mask"][1] = 0
    options = {**THIN.get(name, [{}])[0], **SHORT.get(name, {}), "min_len": 0}
    with vtoken.wrapped(model, [{name: options}]), torch.no_grad():
        model(**batch)
        seen = vtoken.trace(model)
    shares = [share for stage in seen.stages for share in stage.density]
    assert shares and all(0 < share <= 1 for share in shares) and 0 < seen.density[name] <= 1
    json.dumps(seen.to_dict(), allow_nan=False)
