"""ZipVL, attention: in every layer only the important tokens attend, and only to each other."""

from __future__ import annotations

from typing import ClassVar

from vtoken.compressors._zipvl import Important
from vtoken.stages.attention import DenseSubset, PrefillQK, SparseAttention
from vtoken.stages.query_attention import shared


class ZipVL(Important, SparseAttention):
    """In every layer the `recent` newest and `drawn` random older tokens probe. *How many* tokens are important: as few
    as hold `tau` of the attention that the probe pays (head mean), so the number depends on layer and prompt. *Which*:
    those that receive most per probing query that sees them; the newest, the first and all text always, and counted in.
    Important tokens attend causally to each other, in plain dense attention on what was gathered. All others get zeros
    from attention in this layer, and go on by residual and MLP.

    No paper figure is claimed for time: attention of a share p of the tokens costs p^2, all else what it did. One
    number per layer and row comes from the device. `zipvl_cache` behind it, with the same options, is the method's
    other half and takes the same tokens.

    Paper: https://arxiv.org/abs/2410.08584
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2410.08584"
    deviations: ClassVar[str] = (
        "No code of the authors was at hand: heads are averaged, the random queries are drawn once per length from a "
        "fixed seed, and the newest tokens, the first and all text count as important (text: true lets text compete) "
        "by decision of this project. Where the cache holds earlier turns, and below min_len, attention is dense."
    )

    def reads(self, prompt: PrefillQK) -> DenseSubset:
        probe = shared(prompt.query_attention, prompt.q, prompt.k, prompt.scale)
        return DenseSubset(self.important(probe, prompt.image < 0), prompt.length)
