"""The vocabulary between models and methods: all that a method imports. A method never sees a model, an adapter never sees a method."""

from vtoken.stages.attention import (
    DenseSubset,
    PrefillQK,
    Rope,
    SparseAttention,
    SparseMask,
    causal,
    everything,
    with_own,
)
from vtoken.stages.base import SITES, Compressor, OtherModel, Pruner, Site, Stage, Unmerging, keep_all
from vtoken.stages.budget import Budget
from vtoken.stages.cache import (
    CachedLayer,
    CacheStage,
    Decision,
    GeneratedBlock,
    KeepSlots,
    Native,
    ReplacedKV,
    ascending,
    best,
    hold_text,
)
from vtoken.stages.quantized import QuantizedKV, QuantizedTensor
from vtoken.stages.query_attention import QueryAttention, last_rows, rows_at, shared
from vtoken.stages.tokens import (
    FACTS,
    Fact,
    Fused,
    Grid,
    Keep,
    Parts,
    VisualTokens,
    image_of,
    offsets_of,
    segments_of,
    size_of,
    uploaded,
)
