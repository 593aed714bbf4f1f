"""Every kernel against its definition, and every definition against arithmetic done by hand.

Kernels run natively where there is a GPU. Where there is none they run in triton's interpreter, in a child process: the
interpreter must be chosen before triton is first imported, and must not be chosen for the tests of other files.
"""

import os
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_examples import DEVICE, OPS, needs_cuda, needs_triton, prepared

from vtoken import kernels
from vtoken.kernels import _dispatch, block_sparse_attention, gather_tokens, query_attention, topk_tokens

ROOT = Path(__file__).parents[2]
NAN, INF = float("nan"), float("inf")


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is NaN, or a number no result contains, so that what a kernel forgets to write shows."""
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        memory = empty(*args, **kwargs)
        if memory.dtype == torch.bool:
            return memory.fill_(True)
        inexact = memory.is_floating_point() or memory.is_complex()
        return memory.fill_(NAN if inexact else torch.iinfo(memory.dtype).min // 3)

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.mark.parametrize("name", OPS)
def test_op_file_is_complete(name: str) -> None:
    op = OPS[name]
    for part in (name, "definition", "launch", "examples", "tolerance"):
        assert callable(getattr(op, part)), part
    assert "Bytes moved" in (op.__doc__ or "")
    assert getattr(kernels, name) is getattr(op, name)


@pytest.mark.skipif(not _dispatch.INSTALLED, reason="triton is not installed")
@pytest.mark.skipif(_dispatch.INTERPRETED, reason="this is the interpreter")
def test_kernels_in_the_interpreter() -> None:
    files = [__file__, str(Path(__file__).with_name("test_kernel_choice.py"))]
    arguments = ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-o", "addopts=", "-k", "triton_", *files)
    child = python(*arguments, TRITON_INTERPRET="1", VTOKEN_KERNELS="", CUDA_VISIBLE_DEVICES="")
    assert child.returncode == 0 and " passed" in child.stdout and "skipped" not in child.stdout, child.stdout


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_triton_equals_definition(name: str, dtype: torch.dtype, poison: None) -> None:
    op = OPS[name]
    rtol, atol = op.tolerance(dtype)
    for number, example in enumerate(op.examples()):
        arguments = {key: prepared(value, dtype, str(DEVICE)) for key, value in example.items()}
        want = op.definition(**arguments)
        got = op.launch(**arguments)
        assert type(got) is type(want)
        close = {"rtol": rtol, "atol": atol, "equal_nan": True}
        torch.testing.assert_close(got, want, **close, msg=f"{name}, example {number}: {got} instead of {want}")


@needs_triton
def test_triton_is_chosen_and_steps_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Public functions launch where they can; gradients, other dtypes and use("torch") get the definition."""
    launched: list[str] = []

    def spy(name: str, launch: Any) -> Any:
        def spied(*arguments: Any) -> Any:
            launched.append(name)
            return launch(*arguments)

        return spied

    for name, op in OPS.items():
        monkeypatch.setattr(op, "launch", spy(name, op.launch))
    scores, ends = torch.rand(6, device=DEVICE), torch.tensor([0, 6], device=DEVICE)
    x = torch.randn(6, 2, 16, device=DEVICE)
    leaf = x.clone().requires_grad_()

    def all_ops(dtype: torch.dtype, x: torch.Tensor) -> torch.Tensor:
        kept = topk_tokens(scores.to(dtype), ends, [3])
        heads = x.to(dtype).transpose(0, 1)
        everything = torch.ones(2, 1, 1, dtype=torch.bool, device=DEVICE)
        seen = block_sparse_attention(heads, heads, heads, everything, 1.0)[0][0, :, 0]
        return gather_tokens(seen + query_attention(x.to(dtype), x.to(dtype), ends, ends, 1.0), kept).sum()

    with kernels.use("triton"):
        all_ops(torch.float32, x)
        assert launched == ["topk_tokens", "block_sparse_attention", "query_attention", "gather_tokens"]
        all_ops(torch.float64, x)
        assert launched[4:] == ["gather_tokens"]
        launched.clear()
        all_ops(torch.float32, leaf).backward()
        assert launched == ["topk_tokens"]
        with torch.no_grad():
            all_ops(torch.float32, leaf)
        assert len(launched) == 5
    assert leaf.grad is not None and leaf.grad.abs().sum() > 0
    launched.clear()
    with kernels.use("torch"):
        all_ops(torch.float32, x)
    assert not launched


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("choice", ["torch", "triton"])
def test_topk_does_not_synchronise(choice: str) -> None:
    scores, offsets = torch.rand(9, device="cuda"), torch.tensor([0, 4, 9], device="cuda")
    with kernels.use(choice):
        topk_tokens(scores, offsets, [2, 3])
        torch.cuda.set_sync_debug_mode("error")
        try:
            topk_tokens(scores, offsets, [2, 3])
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_definitions_need_no_values_on_the_host() -> None:
    """Meta tensors have no values, so a hidden .item() or nonzero would raise."""
    scores, offsets = torch.rand(9, device="meta"), torch.tensor([0, 4, 9], device="meta")
    index = OPS["topk_tokens"].definition(scores, offsets, torch.tensor([2, 3]))
    assert index.shape == (5,)
    assert OPS["gather_tokens"].definition((scores,), index)[0].shape == (5,)
    x, into = torch.rand(9, 4, device="meta"), torch.zeros(9, dtype=torch.int64, device="meta")
    assert OPS["merge_tokens"].definition(x, into, 2, scores).shape == (2, 4)
    assert OPS["farthest_tokens"].definition(x, [4, 5], [2, 1], into[:2], "max_sum").shape == (3,)
    assert OPS["diverse_tokens"].definition(x, scores, [4, 5], [2, 1]).shape == (3,)
    q = torch.rand(1, 2, 9, 4, device="meta")
    assert OPS["gather_cache"].definition(q, into.expand(1, 2, 9)[..., :3]).shape == (1, 2, 3, 4)
    assert OPS["probe_sums"].definition(q, q, 1.0, into[:1])[1].shape == (1, 2, 9)
    assert OPS["pooled_scores"].definition(q, q, 4, 1.0, into[:1]).shape == (1, 2, 3, 3)


def test_gather() -> None:
    x = torch.arange(12).view(4, 3)
    index = torch.tensor([3, 0])
    with kernels.use("torch"):
        assert gather_tokens(x, index).tolist() == [[9, 10, 11], [0, 1, 2]]
        pair = gather_tokens((x.t().contiguous().t(), x[:, 0] > 5), index)
        assert isinstance(pair, tuple)
        assert [part.tolist() for part in pair] == [[[9, 10, 11], [0, 1, 2]], [True, False]]
        leaf = torch.zeros(4, 2, requires_grad=True)
        gather_tokens([leaf], torch.tensor([1, 1]))[0].sum().backward()
    assert leaf.grad is not None and leaf.grad.tolist() == [[0, 0], [2, 2], [0, 0], [0, 0]]


@pytest.mark.parametrize(
    ("scores", "lengths", "counts", "kept"),
    [
        ([1, 3, 2, 3], [4], [2], [1, 3]),
        ([5, 5, 5, 5], [4], [2], [0, 1]),
        ([1, 2, 2, 9, 2], [5], [3], [1, 2, 3]),
        ([0.0, -0.0, 0.0], [3], [2], [0, 1]),
        ([NAN, -INF, NAN, 1], [4], [2], [1, 3]),
        ([NAN, -INF, NAN, 1], [4], [3], [0, 1, 3]),
        ([NAN, INF, -NAN], [3], [2], [0, 1]),
        ([1, 2, 9, 8, 7], [2, 0, 3], [1, 0, 2], [1, 2, 3]),
        ([1, 2, 9], [2, 1], [0, 1], [2]),
        ([], [0, 0], [0, 0], []),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_topk(scores: list[float], lengths: list[int], counts: list[int], kept: list[int], dtype: torch.dtype) -> None:
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    with kernels.use("torch"):
        for form in (counts, torch.tensor(counts)):
            assert topk_tokens(torch.tensor(scores, dtype=dtype), offsets.int(), form).tolist() == kept


@pytest.mark.parametrize("counts", [[3, 0], [-1, 1], [1], [1, 1, 1]])
def test_topk_refuses_wrong_counts(counts: list[int]) -> None:
    with pytest.raises(ValueError, match=r"image \d: cannot keep|counts for 2 images"):
        topk_tokens(torch.rand(5), torch.tensor([0, 2, 5]), counts)


def plain_attention(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """Map [H, queries, keys] in float64, key heads repeated."""
    keys = k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    return (torch.einsum("qhd,nhd->hqn", q.double(), keys) * scale).softmax(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("chunk", [1 << 24, 50])
def test_query_attention(dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ragged segments, one without queries, one without keys, received attention (all tokens ask) and grouped heads."""
    monkeypatch.setattr(OPS["query_attention"], "CHUNK", chunk)
    torch.manual_seed(0)
    q, k = torch.randn(12, 6, 5, dtype=dtype), torch.randn(23, 2, 5, dtype=dtype)
    q_ends, k_ends = [0, 1, 1, 3, 12], [0, 10, 14, 14, 23]
    with kernels.use("torch"):
        got = query_attention(q, k, torch.tensor(q_ends), torch.tensor(k_ends, dtype=torch.int32), 0.7)
    want = torch.zeros(23, dtype=torch.float64)
    want[:10] = plain_attention(q[:1], k[:10], 0.7).mean((0, 1))
    want[14:] = plain_attention(q[3:], k[14:], 0.7).mean((0, 1))
    torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=1e-7)


def test_query_attention_by_hand() -> None:
    """Head 0 sees scores 0 and ln 3, so 1/4 and 3/4; head 1 sees equal ones."""
    q = torch.tensor([[[1.0], [0.0]]])
    k = torch.tensor([[[0.0], [1.0]], [[3.0], [1.0]]]).log1p()[:, :1] * 0.5
    ends = torch.tensor([0, 1]), torch.tensor([0, 2])
    got = query_attention(q, k, *ends, 2 * torch.tensor(3.0).log().item() / torch.tensor(4.0).log().item())
    torch.testing.assert_close(got, torch.tensor([0.375, 0.625]))


def test_query_attention_refuses_shapes_that_do_not_fit() -> None:
    q, ends = torch.zeros(1, 3, 4), torch.tensor([0, 1])
    for k, k_ends in ((torch.zeros(1, 2, 4), ends), (torch.zeros(1, 3, 5), ends), (q, torch.tensor([0, 1, 1]))):
        with pytest.raises(ValueError, match=r"need|segments"):
            query_attention(q, k, ends, k_ends, 1.0)


def test_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "_forced", None)
    monkeypatch.setattr(_dispatch, "INTERPRETED", False)
    monkeypatch.setattr(_dispatch, "INSTALLED", True)
    assert (kernels.backend("cpu"), kernels.backend("cuda:1")) == ("torch", "triton")
    with pytest.raises(ValueError, match=r"'cuda'.*torch, triton, flex"), kernels.use("cuda"):
        pass
    with kernels.use("torch"):
        assert kernels.backend("cuda") == "torch"
    with kernels.use("triton"), pytest.raises(RuntimeError, match=r"on cpu.*TRITON_INTERPRET"):
        kernels.backend("cpu")
    monkeypatch.setattr(_dispatch, "INSTALLED", False)
    assert kernels.backend("cuda") == "torch"
    with kernels.use("triton"), pytest.raises(RuntimeError, match="cannot be imported"):
        kernels.backend("cuda")
    assert _dispatch._forced is None


def test_environment_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_from_file_location("fresh", str(_dispatch.__file__))
    assert spec is not None
    assert spec.loader is not None
    fresh = module_from_spec(spec)
    monkeypatch.setenv("VTOKEN_KERNELS", "torch")
    spec.loader.exec_module(fresh)
    assert fresh.backend("cuda") == "torch"
    monkeypatch.setenv("VTOKEN_KERNELS", "cuda")
    with pytest.raises(ValueError, match=r"VTOKEN_KERNELS.*torch, triton, flex"):
        spec.loader.exec_module(fresh)


def test_works_without_triton() -> None:
    code = """
import sys
sys.modules["triton"] = None
import torch
from vtoken.kernels import backend, topk_tokens, use
with use("torch"):
    assert topk_tokens(torch.tensor([1.0, 2.0]), torch.tensor([0, 2]), [1]).tolist() == [1]
backend("cpu")
"""
    child = python("-c", code, VTOKEN_KERNELS="triton")
    assert child.returncode == 1, child.stdout
    assert "cannot be imported: install triton" in child.stderr, child.stderr
