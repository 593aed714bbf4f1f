"""MMInference: a sparse pattern per head, chosen offline: grid, A-shape or vertical-slash, per modality or not."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch.nn.functional import pad

from vtoken.compressors.attention._blocks import per_head
from vtoken.compressors.attention._mminference import SIZE, Lists, bands, by_modality, grid, index, list_of_each, window
from vtoken.compressors.attention._singles import listed
from vtoken.stages import uploaded
from vtoken.stages.attention import PrefillQK, SparseAttention, SparseMask, everything

Pattern = Literal[
    "grid_frame_columns", "grid_frame", "a_shape", "grid_row_columns", "grid_row",
    "vertical_slash_1024", "vertical_slash_2048", "query_boundary", "2d_boundary",
]  # fmt: skip

SEARCH = "search a table for it: vtoken calibrate mminference MODEL -o FILE"


class MMInference(SparseAttention):
    """`heads` gives every query head of every layer its pattern; `vtoken calibrate mminference` searches for it.
    Without it, all heads use `pattern`.

    grid_frame, grid_row: a window, what comes before the images, and a grid whose stride is a frame (a picture) or a
    row of patches, separators included. All queries read the keys on the grid; queries on the grid read everything (not
    with _columns). The phase of the grid is the offset within a stride to which the last 64 queries attend most.
    a_shape: the first and the latest tokens. As with grids, the text after the images reads everything.
    vertical_slash: the keys and distances that the last 64 queries attend to most, 1000 keys and 1024 (2048) distances.
    query_boundary: the same (1000, 2048), computed once from the last text tokens for all text queries and once from
    the last image tokens for all image queries.
    2d_boundary: the same for each pair of modalities, so that for image queries, text keys do not compete with image
    keys. Distances are counted in keys of one modality, as if the tokens of the other were not there.

    Heads with a boundary along the keys only (K-boundary) need no pattern: one index serves all queries.

    Grid heads read everything if frames (rows) differ in length (mixed sizes, dropped tokens), or fewer than 64 follow
    the first `local` image tokens. At 20-66k tokens the authors report 32-47 % of the FLOPs.

    Paper: https://arxiv.org/abs/2504.16083
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2504.16083"
    deviations: ClassVar[str] = (
        "2d_boundary is experimental: the paper leaves open how text and images index each other, its code has it "
        "commented out; here both ways are vertical-slash, and the attention that ranks the keys is over all of them. "
        "Windows and slashes are read in whole aligned blocks of 64, never less than the authors read. Lists of rows "
        "and columns take the place of the authors' permutation of queries and keys; what is read is the same. The "
        "grid's phase is found at run time, as in the paper; their code fixes it offline. Modalities are distinguished "
        "by their tokens, not by the order of spans. No searched table is shipped: the authors' tables are for models "
        "that are not supported here."
    )

    pattern: Pattern = Field(default="query_boundary", description="pattern of all heads, if `heads` is not given")
    heads: tuple[tuple[Pattern, ...], ...] | None = Field(
        default=None, description="per decoder layer, the pattern of every query head"
    )
    sink: int = Field(default=128, ge=0, description="first tokens that a_shape reads")
    window: int = Field(default=4096, ge=1, description="latest tokens that a_shape reads")
    local: int = Field(default=1024, ge=1, description="latest tokens that a grid reads")
    vertical: int = Field(default=1000, ge=1, description="single keys that vertical-slash heads read")
    slash: int = Field(default=2048, ge=1, description="distances that heads with a boundary read")

    def incompatibility(self, depth: int, width: int) -> str:
        if self.heads is None or len(self.heads) == depth:
            return ""
        return f"heads has patterns for {len(self.heads)} decoder layers, this model has {depth}; {SEARCH}"

    def heads_incompatibility(self, heads: int, key_heads: int, width: int) -> str:
        odd = {len(row) for row in self.heads or ()} - {heads}
        return f"heads has patterns for {odd.pop()} heads in a layer, this model has {heads}; {SEARCH}" if odd else ""

    def reads(self, prompt: PrefillQK) -> SparseMask:
        names = [self.pattern] * prompt.heads if self.heads is None else self.heads[prompt.layer]
        groups, order, found = prompt.heads // len(prompt.k), list[int](), list[Lists]()
        for key in range(len(prompt.k)):
            mine = range(key * groups, (key + 1) * groups)
            for name in dict.fromkeys(names[h] for h in mine):
                some = tuple(h for h in mine if names[h] == name)
                order += some
                q = prompt.q[mine.start : mine.stop]
                if len(some) < groups:
                    q = prompt.q[prompt.once(("heads", some), partial(uploaded, some, q.device))]
                found.append(self.lists(name, replace(prompt, q=q, k=prompt.k[key][None])))
        tiles, width = found[0][0].shape[1], max(columns.shape[2] for _, columns, _ in found)
        lists = max(columns.shape[1] for _, columns, _ in found)
        columns = [pad(c, (0, width - c.shape[2]), value=-1).expand(-1, lists, -1) for _, c, _ in found]
        back = prompt.once(("back", tuple(names)), lambda: uploaded(order, prompt.q.device).argsort())
        blocks, single = (torch.cat(x)[back] for x in ([f[0] for f in found], columns))
        dense = None
        if any(f[2] is not None for f in found):
            none = torch.zeros(1, prompt.length, dtype=torch.bool, device=prompt.q.device)
            dense = torch.cat([none.expand(len(f[0]), -1) if f[2] is None else f[2] for f in found])[back]
        of = None if lists == 1 else prompt.once("lists", lambda: list_of_each(prompt))
        return SparseMask(SIZE, blocks, single, tiles, dense, of=of)

    def lists(self, name: str, prompt: PrefillQK) -> Lists:
        """What the heads of `prompt` read if all have this pattern."""
        n, device = prompt.length, prompt.q.device
        tiles = -(-n // SIZE)
        nothing = torch.full((prompt.heads, 1, 1), -1, dtype=torch.int32, device=device)
        if name == "a_shape":
            blocks = window(tiles, self.sink, self.window, device).expand(prompt.heads, -1, -1)
            seen = prompt.image >= 0
            behind = (seen.flip(0).cumsum(0).flip(0) == 0) & seen.any()
            return blocks, nothing, behind.expand(prompt.heads, -1)
        if name.startswith("grid"):
            found = grid(prompt, name.split("_")[1], not name.endswith("columns"), self.local)
            return found or (everything(prompt.heads, n, n, SIZE, device), nothing, None)
        if name.endswith("boundary"):
            return *by_modality(prompt, self.vertical, self.slash, keys_too=name == "2d_boundary"), None
        k = per_head(prompt.k, prompt.heads)
        columns, distances = index(prompt.q, k, prompt.scale, self.vertical, int(name.rpartition("_")[2]))
        return bands(distances, tiles), listed(columns, max(self.vertical, 30))[:, None], None
