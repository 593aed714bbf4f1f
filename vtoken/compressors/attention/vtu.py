"""VTU: merged tokens attend, and are attended to, at every place of their members."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from vtoken.stages import Compressor, Site, Unmerging


class VTU(Compressor):
    """Virtual token unmerging, the second half of DyMU: a decoder that was trained on all visual tokens gets back the
    attention statistics of all of them, while projections, norms and MLPs work on the merged ones only. In every
    decoder layer each merged token's query, key and value stand at the places of all its members (of an earlier stage
    of site encoder or tokens that merges), rotated by the members' positions, under the causal mask of the unmerged
    prompt; the outputs of the group are averaged before o_proj. Tokens that were dropped, not merged, stay dropped.
    With groups of one nothing changes.

    It saves nothing in attention. With `cache: expanded` the KV cache is that of the unmerged prompt and decoding runs
    the stock code; with `cache: merged` it holds one key, without RoPE, and value per merged token, and a table of
    cosines and sines of all places (once, not per layer); every step then copies and rotates them for each layer. Both
    give the same numbers.

    Paper: https://arxiv.org/abs/2504.17040
    """

    site: ClassVar[Site] = "attention"
    paper: ClassVar[str] = "https://arxiv.org/abs/2504.17040"
    deviations: ClassVar[str] = (
        "Newline tokens of LLaVA-NeXT and OneVision follow the pipeline's newline policy; the authors drop them. "
        "Batches, several images and left padding are served; the authors take one image and one row."
    )

    cache: Unmerging = Field(
        default="expanded",
        description="what the KV cache holds: keys and values of every place (as published), or one of each merged "
        "token",
    )

    def unmerge_mode(self) -> Unmerging:
        return self.cache
