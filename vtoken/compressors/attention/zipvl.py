"""ZipVL, attention: in every layer only the important tokens attend, and only to each other."""

from __future__ import annotations

from typing import ClassVar

from vtoken.compressors._zipvl import Important
from vtoken.stages.attention import DenseSubset, PrefillQK, SparseAttention
from vtoken.stages.query_attention import shared


class ZipVL(Important, SparseAttention):
    """In every layer, the queries of the `recent` newest and of `drawn` random older tokens are sampled. How many
    tokens are important: as few as hold `tau` of the sampled queries' attention (averaged over heads), so the number
    depends on layer and prompt. Which tokens: those with the highest mean attention over the sampled queries that see
    them; the newest, the first and all text are always among them. Important tokens attend causally to each other, in
    dense attention over the gathered tokens. The attention output of all other tokens is zero in this layer; they
    continue through the residual and the MLP.

    No speed-up from the paper is claimed: attention among a share p of the tokens costs p^2, everything else costs the
    same. One number per layer and row is fetched from the device. `zipvl_cache` after it, with the same options, is the
    method's other half and takes the same tokens.

    Paper: https://arxiv.org/abs/2410.08584
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2410.08584"
    deviations: ClassVar[str] = (
        "The authors' code was not available: heads are averaged, the random queries are drawn once per length from a "
        "fixed seed, and the newest tokens, the first and all text count as important (text: true lets text compete) "
        "by decision of this project. Where the cache holds earlier turns, and below min_len, attention is dense."
    )

    def reads(self, prompt: PrefillQK) -> DenseSubset:
        attention = shared(prompt.query_attention, prompt.q, prompt.k, prompt.scale)
        return DenseSubset(self.important(attention, prompt.image < 0), prompt.length)
