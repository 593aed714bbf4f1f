"""VTU: merged tokens attend, and are attended to, at the positions of all their members."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from vtoken.stages import Compressor, Site, Unmerging


class VTU(Compressor):
    """Virtual token unmerging, the second half of DyMU: a decoder that was trained on all visual tokens gets back their
    attention statistics, while projections, norms and MLPs run on the merged tokens only. In every decoder layer, the
    query, key and value of each merged token are copied to the places of all its members (merged by an earlier stage of
    site encoder or tokens) and rotated by the members' positions, under the causal mask of the unmerged prompt; the
    outputs of a group are averaged before o_proj. Tokens that were dropped instead of merged stay dropped. With groups
    of one, nothing changes.

    It saves nothing in attention. With `cache: expanded`, the KV cache is that of the unmerged prompt, and decoding
    runs the stock code. With `cache: merged`, the cache holds one value and one key, without RoPE, per merged token,
    and a table of cosines and sines of all places (once, not per layer); every decode step copies and rotates them for
    each layer. Both give the same numbers.

    Paper: https://arxiv.org/abs/2504.17040
    """

    site: ClassVar[Site] = "attention"
    paper: ClassVar[str] = "https://arxiv.org/abs/2504.17040"
    deviations: ClassVar[str] = (
        "Newline tokens of LLaVA-NeXT and OneVision follow the pipeline's newline policy; the authors drop them. "
        "Batches, several images and left padding are supported; the authors take one image and one row."
    )

    cache: Unmerging = Field(
        default="expanded",
        description="what the KV cache holds: keys and values of every place (as published), or one per merged token",
    )

    def unmerge_mode(self) -> Unmerging:
        return self.cache
