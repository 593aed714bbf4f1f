"""The vocabulary between models and methods: everything that a method imports. A method never sees a model, an adapter
never sees a method."""

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
from vtoken.stages.base import NAMES_FILE, Compressor, OtherModel, Pruner, Stage, Unmerging, keep_all, keep_where
from vtoken.stages.budget import Budget
from vtoken.stages.cache import (
    CachedLayer,
    CacheStage,
    Decision,
    GeneratedBlock,
    HeadClasses,
    HeadSlots,
    KeepSlots,
    Native,
    ReplacedKV,
)
from vtoken.stages.decode import Choice, DecodeStage, DecodeStep
from vtoken.stages.facts import FACTS, SITES, Fact, FactSpec, Site, spec_of
from vtoken.stages.layer_size import LayerSize
from vtoken.stages.quantized import QuantizedKV, QuantizedTensor
from vtoken.stages.query_attention import QueryAttention, shared
from vtoken.stages.steering import SteeredAttention, SteeredLayer
from vtoken.stages.token_module import Layout, TokenModule
from vtoken.stages.tokens import (
    Fused,
    Grid,
    Keep,
    Parts,
    VisualTokens,
    image_of,
    offsets_of,
    place_in_image,
    positions,
    segments_of,
    size_of,
    uploaded,
)
