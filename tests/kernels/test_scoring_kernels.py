"""The definitions of the ops that score, choose and merge, against known_kernels and arithmetic done by hand."""

from __future__ import annotations

from typing import Any

import known_kernels as known
import pytest
import torch
from kernel_examples import OPS

from vtoken import kernels

NAN, INF = float("nan"), float("inf")
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


@pytest.fixture
def in_torch() -> Any:
    with kernels.use("torch"):
        yield


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(got: torch.Tensor, want: Any, rtol: float = 1e-4) -> None:
    torch.testing.assert_close(got.double(), torch.as_tensor(want, dtype=torch.float64), rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chunk", [1 << 24, 40])
@pytest.mark.parametrize("causal", [False, True])
def test_received_attention(
    dtype: torch.dtype, chunk: int, causal: bool, monkeypatch: pytest.MonkeyPatch, in_torch: None
) -> None:
    monkeypatch.setattr(OPS["received_attention"], "CHUNK", chunk)
    q_lengths, k_lengths = [1, 0, 9, 4], [1, 3, 9, 11]
    q, k = draw(14, 4, 5, dtype=dtype), draw(24, 2, 5, dtype=dtype, seed=1)
    got = kernels.received_attention(q, k, known.ends(q_lengths), known.ends(k_lengths).int(), 0.7, causal)
    close(got, known.received_attention(q, k, q_lengths, k_lengths, 0.7, causal))


def test_received_attention_agrees_with_query_attention(in_torch: None) -> None:
    q, k = draw(12, 4, 6), draw(20, 2, 6)
    ends = known.ends([4, 8]), known.ends([15, 5])
    sums = kernels.received_attention(q, k, *ends, 0.5)
    means = sums.mean(1) / torch.tensor([4, 8]).repeat_interleave(torch.tensor([15, 5]))
    close(kernels.query_attention(q, k, *ends, 0.5), means)


def test_flow_scores(in_torch: None) -> None:
    """By hand: shares 1/4 and 3/4 of one image, of the other's nothing."""
    attention, relevance = torch.tensor([1.0, 3.0, 0.0]), torch.tensor([2.0, 2.0, 5.0])
    value = torch.tensor([[1.0, -1.0], [2.0, 0.0], [-3.0, 1.0]])
    ends = torch.tensor([0, 2, 2, 3])
    assert kernels.flow_scores(attention, None, value, ends).tolist() == [0.5, 1.5, 0.0]
    assert kernels.flow_scores(attention, relevance, value, ends).tolist() == [1.5, 2.5, 4.0]
    many, lengths = draw(3, 30).abs(), [7, 0, 1, 22]
    for both in (many[1], None):
        got = kernels.flow_scores(many[0], both, draw(30, 9), known.ends(lengths).int())
        close(got, known.flow_scores(many[0], both, draw(30, 9), lengths))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1024, 3])
@pytest.mark.parametrize("among", ["all", "others", "later"])
def test_nearest_tokens(
    among: Any, rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, in_torch: None
) -> None:
    """Ragged, with an empty segment, one of a single token, equal tokens, and one without length."""
    monkeypatch.setattr(OPS["nearest_tokens"], "ROWS", rows)
    lengths = [1, 0, 8, 5]
    x = draw(14, 6, dtype=dtype)
    x[[5, 7]], x[11] = x[3].clone(), 0
    x[7] *= 2
    y, y_lengths = (x, lengths) if among != "all" else (draw(9, 6, dtype=dtype, seed=1), [4, 2, 3, 0])
    similarity, partner = kernels.nearest_tokens(x, y, known.ends(lengths).int(), known.ends(y_lengths), among)
    want = known.nearest_tokens(x, y, lengths, y_lengths, among)
    close(similarity, [cosine for cosine, _ in want])
    assert partner.tolist() == [position for _, position in want]


def test_nearest_tokens_refuses_what_does_not_fit() -> None:
    x, ends = torch.zeros(4, 3), torch.tensor([0, 4])
    for y, y_ends, among in ((x[:, :2], ends, "all"), (x, torch.tensor([0, 2, 4]), "all"), (x[:3], ends, "later")):
        with pytest.raises(ValueError, match="x is y"):
            kernels.nearest_tokens(x, y, ends, y_ends, among)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strategy", ["max_min", "max_sum"])
def test_farthest_tokens(strategy: Any, dtype: torch.dtype, in_torch: None) -> None:
    lengths, counts, first = [6, 0, 1, 15], [6, 0, 1, 7], [4, 0, 6, 9]
    x = draw(22, 5, dtype=dtype)
    x[11] = 0
    for start in (first, None):
        got = kernels.farthest_tokens(x, lengths, counts, None if start is None else torch.tensor(start), strategy)
        assert got.tolist() == known.farthest_tokens(x, lengths, counts, start, strategy)


@pytest.mark.parametrize(("strategy", "taken"), [("max_min", [0, 2, 3, 1]), ("max_sum", [0, 2, 1, 3])])
def test_farthest_tokens_by_hand(strategy: Any, taken: list[int], in_torch: None) -> None:
    """After 0 and 2 there are a copy of 0, with cosines 1 and 0, and one with 0.6 to both."""
    x = torch.tensor([[1.0, 0.0, 0.0], [2.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.6, 0.6, 0.28**0.5]])
    assert kernels.farthest_tokens(x, [4], [4], torch.tensor([0]), strategy).tolist() == taken


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_farthest_tokens_of_different_worth(dtype: torch.dtype, in_torch: None) -> None:
    lengths, counts, first = [6, 0, 1, 15], [6, 0, 1, 7], [4, 0, 6, 9]
    x, worth = draw(22, 5, dtype=dtype), draw(22, seed=1).abs() + 0.1
    for start in (first, None):
        given = None if start is None else torch.tensor(start)
        got = kernels.farthest_tokens(x, lengths, counts, given, worth=worth)
        want = known.farthest_tokens(x, lengths, counts, start, "max_min", worth.tolist())
        assert got.tolist() == want != kernels.farthest_tokens(x, lengths, counts, given).tolist()
    with pytest.raises(ValueError, match="one each, for max_min only"):
        kernels.farthest_tokens(x, lengths, counts, None, "max_sum", worth)
    with pytest.raises(ValueError, match="worth of 21 tokens for 22"):
        kernels.farthest_tokens(x, lengths, counts, worth=worth[1:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_diverse_tokens(dtype: torch.dtype, in_torch: None) -> None:
    lengths, counts = [6, 0, 1, 14], [5, 0, 1, 6]
    x, relevance = draw(21, 8, dtype=dtype), draw(21, seed=1).abs() + 0.1
    got = kernels.diverse_tokens(x, relevance, lengths, counts)
    assert got.tolist() == known.diverse_tokens(x, relevance, lengths, counts)


def test_diverse_tokens_of_low_rank(in_torch: None) -> None:
    """Two directions: the two most relevant of different ones, then by position; nothing is taken twice."""
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    relevance = torch.tensor([0.5, 1.0, 0.25, 0.75])
    assert kernels.diverse_tokens(x, relevance, [4], [4]).tolist() == [1, 3, 0, 2]


@pytest.mark.parametrize("counts", [[3, 0], [-1, 1], [1], [1, 1, 1]])
def test_greedy_choice_refuses_wrong_counts(counts: list[int]) -> None:
    x, first = torch.rand(5, 2), torch.tensor([0, 2])
    with pytest.raises(ValueError, match=r"image \d: cannot keep|2 images"):
        kernels.farthest_tokens(x, [2, 3], counts, first)
    with pytest.raises(ValueError, match=r"image \d: cannot keep|2 images"):
        kernels.diverse_tokens(x, x[:, 0], [2, 3], counts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)
def test_merge_tokens(dtype: torch.dtype, in_torch: None) -> None:
    x, into = (draw(9, 2, 3) * 4).to(dtype), torch.tensor([2, 0, -1, 2, 1, 0, 0, -1, 2])
    for weight in (None, draw(9).abs()):
        got, want = kernels.merge_tokens(x, into, 3, weight), known.merge_tokens(x, into, 3, weight)
        assert got.dtype == dtype
        close(got, want.to(dtype), 1e-2 if dtype == torch.bfloat16 else 1e-5)


def test_merge_tokens_by_hand(in_torch: None) -> None:
    x, into = torch.tensor([[1.0], [NAN], [3.0], [5.0]]), torch.tensor([1, -1, 1, 0])
    assert kernels.merge_tokens(x, into, 2).tolist() == [[5.0], [2.0]]
    assert kernels.merge_tokens(x, into, 2, torch.tensor([3.0, 1.0, 1.0, 7.0])).tolist() == [[5.0], [1.5]]
    assert kernels.merge_tokens(x, into, 3)[2].isnan().all()


def test_gather_cache(in_torch: None) -> None:
    k, v = draw(2, 3, 7, 4), draw(2, 3, 7, 2)
    index = torch.randint(7, (2, 3, 5), generator=torch.Generator().manual_seed(1))
    for which in (index, index[:, :1]):
        pair = kernels.gather_cache((k, v), which)
        assert isinstance(pair, tuple) and isinstance(kernels.gather_cache([k], which), list)
        for cache, got in zip((k, v), pair, strict=True):
            for b, h, slot in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(5)).tolist():
                position = which[b, h if which.shape[1] == 3 else 0, slot]
                assert torch.equal(got[b, h, slot], cache[b, h, position])
    for wrong in (index[:1], index[:, :2]):
        with pytest.raises(ValueError, match=r"\[B, 1, K\]"):
            kernels.gather_cache((k, v), wrong)
    with pytest.raises(ValueError, match="same B and Hk"):
        kernels.gather_cache((k, v[:, :2]), index[:, :1])


@pytest.mark.parametrize("recent", [0, 1, 4, 5])
@pytest.mark.parametrize("chunk", [1 << 24, 50, 30])
def test_probe_sums(chunk: int, recent: int, monkeypatch: pytest.MonkeyPatch, in_torch: None) -> None:
    """The second row's padding reaches past its first queries."""
    monkeypatch.setattr(OPS["probe_sums"], "CHUNK", chunk)
    q, k, padding = draw(2, 4, 5, 6), draw(2, 2, 11, 6, seed=1), [0, 8]
    vertical, slash, late = kernels.probe_sums(q, k, 0.8, torch.tensor(padding), recent)
    want = known.probe_sums(q, k, 0.8, padding)
    close(vertical, want[0])
    close(slash, want[1])
    close(late, known.probe_sums(q[:, :, -recent:], k, 0.8, padding)[0] if recent else torch.empty(2, 4, 0))
    close(vertical.sum(-1), torch.tensor([5.0, 3.0])[:, None].expand(2, 4))


def test_probe_sums_by_hand(in_torch: None) -> None:
    """All scores equal: query 1 of 3 keys gives halves, query 2 thirds."""
    vertical, slash, _ = kernels.probe_sums(torch.zeros(1, 1, 2, 4), torch.ones(1, 1, 3, 4), 1.0)
    close(vertical, [[[5 / 6, 5 / 6, 1 / 3]]])
    close(slash, [[[5 / 6, 5 / 6, 1 / 3]]])
    vertical, slash, _ = kernels.probe_sums(torch.zeros(1, 1, 1, 4), torch.ones(1, 1, 3, 4), 1.0, torch.tensor([1]))
    close(vertical, [[[0, 0.5, 0.5]]])
    close(slash, [[[0.5, 0.5, 0]]])


@pytest.mark.parametrize(
    ("tokens", "block", "padding"), [((11, 11), 4, [0, 5]), ((6, 11), 3, [2, 9]), ((5, 9), 16, [8, 0])]
)
def test_pooled_scores(tokens: tuple[int, int], block: int, padding: list[int], in_torch: None) -> None:
    q, k = draw(2, 4, tokens[0], 6), draw(2, 2, tokens[1], 6, seed=1)
    got = kernels.pooled_scores(q, k, block, 0.8, torch.tensor(padding))
    close(got, known.pooled_scores(q, k, block, 0.8, padding))


@pytest.mark.parametrize("name", ["probe_sums", "pooled_scores"])
def test_prompt_ops_refuse_shapes_that_do_not_fit(name: str) -> None:
    q, more = torch.zeros(1, 3, 4, 8), () if name == "probe_sums" else (2,)
    for k in (torch.zeros(1, 2, 4, 8), torch.zeros(1, 3, 4, 7), torch.zeros(2, 3, 4, 8), torch.zeros(1, 3, 3, 8)):
        with pytest.raises(ValueError, match="need"):
            getattr(kernels, name)(q, k, *more, 1.0)


def test_no_more_recent_queries_than_there_are() -> None:
    q = torch.zeros(1, 1, 4, 8)
    for recent in (-1, 5):
        with pytest.raises(ValueError, match=f"recent {recent}: there are 4 queries"):
            kernels.probe_sums(q, q, 1.0, recent=recent)
