"""Which of definition and kernel runs, and kernels in the sizes that only large inputs take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_examples import DEVICE, OPS, needs_cuda, needs_triton, prepared

from vtoken import kernels
from vtoken.kernels import _gram, _tiles


def spy(op: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    launched, launch = [], op.launch
    monkeypatch.setattr(op, "launch", lambda *given: launched.append(op.__name__) or launch(*given))
    return launched


@needs_triton
@pytest.mark.parametrize("name", OPS)
def test_triton_runs_where_it_can(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """float64 is for the definition, but a copy takes any dtype."""
    op = OPS[name]
    launched, example = spy(op, monkeypatch), list(op.examples())[-1]
    for dtype, choice, expected in (
        (torch.float32, "triton", 1),
        (torch.float32, "torch", 1),
        (torch.float64, "triton", 1 + name.startswith("gather_")),
    ):
        with kernels.use(choice):
            getattr(kernels, name)(**{key: prepared(value, dtype, str(DEVICE)) for key, value in example.items()})
        assert len(launched) == expected, (dtype, choice)


@needs_triton
@pytest.mark.parametrize(
    ("name", "leaf"),
    [
        ("flow_scores", "value"),
        ("gather_cache", "caches"),
        ("merge_tokens", "x"),
        ("nearest_tokens", "x"),
        ("pooled_scores", "k"),
        ("received_attention", "q"),
    ],
)
def test_triton_steps_aside_for_gradients(name: str, leaf: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op = OPS[name]
    launched, example = spy(op, monkeypatch), list(op.examples())[3]
    given = {key: prepared(value, torch.float32, str(DEVICE)) for key, value in example.items()}
    asked = given[leaf][0] if isinstance(given[leaf], (tuple, list)) else given[leaf]
    asked.requires_grad_()
    with kernels.use("triton"):
        result = getattr(kernels, name)(**given)
    (result[0] if isinstance(result, (tuple, list)) else result).nan_to_num(neginf=0.0).square().sum().backward()
    assert not launched and asked.grad is not None and asked.grad.abs().sum() > 0


@needs_triton
@pytest.mark.parametrize(
    ("name", "module", "constant", "value"),
    [
        ("nearest_tokens", _tiles, "MANY", 0),
        ("farthest_tokens", _tiles, "MANY", 0),
        ("nearest_tokens", OPS["nearest_tokens"], "PROGRAMS", 1),
        ("probe_sums", OPS["probe_sums"], "SPLIT", 64),
        ("farthest_tokens", OPS["farthest_tokens"], "ROW", 16),
        ("farthest_tokens", _gram, "CELLS", 70 * 70),
        ("diverse_tokens", _gram, "CELLS", 70 * 70),
    ],
)
def test_triton_equals_definition_in_other_sizes(
    name: str, module: Any, constant: str, value: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large tiles, one share of the columns, several splits of the keys, images in groups: what the examples alone do
    not reach."""
    monkeypatch.setattr(module, constant, value)
    op = OPS[name]
    relative, absolute = op.tolerance(torch.float16)
    for example in op.examples():
        given = {key: prepared(value, torch.float16, str(DEVICE)) for key, value in example.items()}
        torch.testing.assert_close(op.launch(**given), op.definition(**given), rtol=relative, atol=absolute)


@needs_triton
@pytest.mark.parametrize("name", ["farthest_tokens", "diverse_tokens"])
def test_triton_steps_aside_for_too_many_tokens(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op = OPS[name]
    launched, example = spy(op, monkeypatch), list(op.examples())[-1]
    monkeypatch.setattr(_gram, "CELLS", 40 * 40 - 1)
    with kernels.use("triton"):
        getattr(kernels, name)(**{key: prepared(value, torch.float32, str(DEVICE)) for key, value in example.items()})
    assert not launched


def test_how_many_cosines_fit() -> None:
    assert _gram.fits([]) and _gram.fits([2880] * 8) and _gram.fits([11585])
    assert not _gram.fits([11586]) and not _gram.fits([2880, _gram.LONGEST + 1])


def test_images_whose_cosines_do_not_fit_together_are_taken_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(_gram.groups([])) == [(slice(0, 0), slice(0, 0))]
    assert [g for g, _ in _gram.groups([2880] * 17)] == [slice(0, 16), slice(16, 17)]
    monkeypatch.setattr(_gram, "CELLS", 36)
    found = list(_gram.groups([2, 0, 4, 6, 1, 1, 3, 3, 0]))
    assert found == [
        (slice(0, 3), slice(0, 6)),  # 6 tokens, 4 at most
        (slice(3, 4), slice(6, 12)),  # 6, which fills it
        (slice(4, 9), slice(12, 20)),  # 8, 3 at most
    ]


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("name", OPS)
def test_launches_do_not_synchronise(name: str) -> None:
    op = OPS[name]
    example = list(op.examples())[-1]
    given = {key: prepared(value, torch.float32, "cuda") for key, value in example.items()}
    op.launch(**given)
    torch.cuda.set_sync_debug_mode("error")
    try:
        op.launch(**given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
