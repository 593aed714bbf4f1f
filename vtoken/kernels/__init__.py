"""Ops on packed visual tokens, one per file.

A file holds, in this order: shapes and bytes, definition in torch, Triton kernel, choice, examples, tolerance. A new
op is a new file here with ``definition``, ``launch``, ``examples``, ``tolerance`` and a function of the file's own
name; the tests find it.
"""

from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType

from vtoken.kernels._dispatch import backend, use
from vtoken.kernels.block_sparse_attention import block_sparse_attention
from vtoken.kernels.gather_tokens import gather_tokens
from vtoken.kernels.query_attention import query_attention
from vtoken.kernels.topk_tokens import topk_tokens

__all__ = ["backend", "block_sparse_attention", "gather_tokens", "ops", "query_attention", "topk_tokens", "use"]


def ops() -> dict[str, ModuleType]:
    """Name -> module of every op, read off the file names; names with a leading underscore are not ops."""
    names = sorted(module.name for module in iter_modules(__path__) if not module.name.startswith("_"))
    return {name: import_module(f"{__name__}.{name}") for name in names}
