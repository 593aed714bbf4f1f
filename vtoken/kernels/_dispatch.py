"""Which implementation of an op runs: its definition in torch, or its Triton kernel.

The default is Triton for tensors on a CUDA (or ROCm) device where triton can be imported, and torch everywhere else.
The environment variable ``VTOKEN_KERNELS=torch|triton|flex`` forces one; it is read once, when this module is imported.
``flex`` affects sparse attention only, which then runs on torch's flex_attention; all other ops run as by default.
``use`` overrides it inside a with block, for tests.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor


class _Absent:
    """Stands for triton where it cannot be imported, so that files with kernels still can be: all its names, and what
    its decorators return, are the same."""

    def __getattr__(self, name: str) -> "_Absent":
        return self

    def __call__(self, *arguments: object, **options: object) -> "_Absent":
        return self


try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = _Absent()

INSTALLED = not isinstance(triton, _Absent)
BACKENDS = ("torch", "triton", "flex")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # of all kernels but those that copy

# triton.jit chooses between compiler and interpreter when it decorates, so this is read before the first kernel.
INTERPRETED = INSTALLED and bool(triton.knobs.runtime.interpret)


def _known(choice: str) -> str:
    if choice not in BACKENDS:
        raise ValueError(f"kernel backend {choice!r} (VTOKEN_KERNELS or use()): allowed are {', '.join(BACKENDS)}")
    return choice


_forced: str | None = _known(os.environ["VTOKEN_KERNELS"]) if os.environ.get("VTOKEN_KERNELS") else None


@contextmanager
def use(choice: str) -> Iterator[None]:
    """Force ``"torch"``, ``"triton"`` or ``"flex"`` inside a with block, for the whole process; ValueError for other
    names."""
    global _forced
    before, _forced = _forced, _known(choice)
    try:
        yield
    finally:
        _forced = before


def backend(device: torch.device | str) -> str:
    """``"torch"`` or ``"triton"`` for tensors on ``device``.

    Raises RuntimeError if triton is forced but cannot run: it cannot be imported, or runs neither on CUDA nor
    interpreted.
    """
    on_cuda = torch.device(device).type == "cuda"
    forced = "triton kernels are forced (VTOKEN_KERNELS=triton or use('triton')) but"
    if _forced == "triton" and not INSTALLED:
        raise RuntimeError(f"{forced} triton cannot be imported: install triton, or unset VTOKEN_KERNELS")
    if _forced == "triton" and not on_cuda and not INTERPRETED:
        raise RuntimeError(
            f"{forced} the tensors are on {device}: move them to a CUDA device, set TRITON_INTERPRET=1 before triton "
            "is imported, or unset VTOKEN_KERNELS"
        )
    if _forced in ("torch", "triton"):
        return _forced
    return "triton" if INSTALLED and on_cuda else "torch"


def flex_is_forced() -> bool:
    """Whether sparse attention runs on torch's flex_attention."""
    return _forced == "flex"


def interpretable(tensor: Tensor) -> Tensor:
    """The tensor, but bf16 as fp32 under the interpreter, which gets bf16 wrong (triton-lang/triton#4972)."""
    return tensor.float() if INTERPRETED and tensor.dtype == torch.bfloat16 else tensor


def runs_triton(*tensors: Tensor) -> bool:
    """Whether a kernel may take these tensors: the backend is Triton, they share one device, and no gradient is needed.

    Kernels have no backward. Raises what ``backend`` raises.
    """
    if backend(tensors[0].device) == "torch" or len({t.device for t in tensors}) > 1:
        return False
    return not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))


def heads_fit(*heads: Tensor, beside: Sequence[Tensor] = ()) -> bool:
    """Whether an attention kernel may take these queries, keys and values: one dtype of DTYPES, heads up to 256 wide,
    and what `runs_triton` asks of them and of the tensors `beside`."""
    alike = all(x.dtype == heads[0].dtype for x in heads) and heads[0].dtype in DTYPES
    return alike and heads[0].shape[-1] <= 256 and runs_triton(*heads, *beside)


def equal_steps(offsets: Sequence[int]) -> bool:
    """Whether all segments with these offsets have one length, at least 1."""
    step = offsets[1] - offsets[0] if len(offsets) > 1 else 0
    return step > 0 and all(end - begin == step for begin, end in pairwise(offsets))
