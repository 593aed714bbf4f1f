"""Ops on packed visual tokens, one per file.

A file holds, in this order: shapes and bytes, tolerance, definition in torch, Triton kernel, choice between them,
examples. A new op is a new file here with ``definition``, ``launch``, ``examples``, ``tolerance`` and a function with
the name of the file; the tests find it.
"""

from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType

from vtoken.kernels._dispatch import backend as backend
from vtoken.kernels._dispatch import use as use
from vtoken.kernels.attend_slots import attend_slots as attend_slots
from vtoken.kernels.block_sparse_attention import block_sparse_attention as block_sparse_attention
from vtoken.kernels.diverse_tokens import diverse_tokens as diverse_tokens
from vtoken.kernels.farthest_tokens import farthest_tokens as farthest_tokens
from vtoken.kernels.flow_scores import flow_scores as flow_scores
from vtoken.kernels.gather_cache import gather_cache as gather_cache
from vtoken.kernels.gather_tokens import gather_tokens as gather_tokens
from vtoken.kernels.merge_tokens import merge_tokens as merge_tokens
from vtoken.kernels.nearest_tokens import nearest_tokens as nearest_tokens
from vtoken.kernels.pooled_scores import pooled_scores as pooled_scores
from vtoken.kernels.probe_sums import probe_sums as probe_sums
from vtoken.kernels.query_attention import query_attention as query_attention
from vtoken.kernels.received_attention import received_attention as received_attention
from vtoken.kernels.row_maxima import row_maxima as row_maxima
from vtoken.kernels.topk_tokens import topk_tokens as topk_tokens


def ops() -> dict[str, ModuleType]:
    """Name -> module of every op, read from the file names; names with a leading underscore are not ops."""
    names = sorted(module.name for module in iter_modules(__path__) if not module.name.startswith("_"))
    return {name: import_module(f"{__name__}.{name}") for name in names}
