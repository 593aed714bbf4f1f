"""VAR: part of what attention sinks get goes to the visual tokens that are none."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from vtoken.stages.sinks import DIMS, massive, other_dims
from vtoken.stages.steering import SteeredAttention, SteeredLayer


class VAR(SteeredAttention):
    """Visual attention redistribution. A sink is a token of the prompt, of text or of a picture, whose hidden state on
    its way into a layer, divided by its root mean square, exceeds `tau` in one of the channels `dims`. A text
    query after the picture, generated ones included, is changed in the heads where visual tokens get at least `summ` of
    its attention, and visual sinks some of that, but at most the share `rho`. There the weights of all sinks are
    multiplied by `p`, and what that frees goes to the visual tokens that are no sinks, in proportion to their weights.

    The model's own attention runs unchanged; to its output, (1 - p) m (o_V - o_S) is added, where m is the weight of
    the sinks, and o_S and o_V are attention over the sinks alone and over the other visual tokens alone. For that,
    weights of text queries are computed a second time, a chunk at a time.

    The paper's rho is one minus this one, and its p is the share that is taken away.

    Paper: https://arxiv.org/abs/2503.03321
    """

    read_hidden: ClassVar[bool] = True
    paper: ClassVar[str] = "https://arxiv.org/abs/2503.03321"
    deviations: ClassVar[str] = (
        "Without `dims` every channel counts. With several pictures, text after the first one is steered; the authors "
        "take one picture, one row. The share of sinks is taken of the visual weight itself; the authors add 1e-6 per "
        "visual token to that. A later turn adds its own sinks only if it brings a picture."
    )

    tau: float = Field(default=20.0, gt=0, description="how many times the root mean square a channel of a sink is")
    rho: float = Field(default=0.5, ge=0, le=1, description="most of the visual attention that visual sinks may get")
    summ: float = Field(default=0.2, ge=0, le=1, description="least attention that visual tokens must get")
    p: float = Field(default=0.6, ge=0, le=1, description="share of their attention that sinks are left")
    first: int = Field(
        default=2, ge=0, description="first decoder layer in which it acts; the authors see no sinks before 2"
    )
    dims: tuple[int, ...] | None = Field(default=None, description=DIMS)

    def incompatibility(self, depth: int, width: int) -> str:
        return other_dims(self.dims, depth, width)

    def marked_by(self, layer: int) -> int | None:
        return layer

    def mark(self, layer: SteeredLayer) -> Tensor:
        assert layer.hidden is not None
        return (massive(layer.hidden, self.dims) > self.tau).to(layer.behind.device)

    def steer(self, layer: SteeredLayer) -> Tensor | None:
        if self.p == 1 or layer.marked is None:
            return None
        out = layer.attend(layer.q, layer.k, layer.v)
        moved, behind = torch.zeros_like(out), layer.behind[:, :, None]
        for rows, at in layer.text_rows():
            sinks, visual, v = layer.marked[rows], layer.visual[rows], layer.v[rows].float()
            for part, weights in layer.attention(rows, at):
                taken = self._taken(weights, sinks[:, None, None], visual[:, None, None])
                grouped = taken.unflatten(1, (v.shape[1], -1))
                each = torch.einsum("bhgrs,bhsd->brhgd", grouped, v).flatten(2, 3)
                moved[rows, part] = (each * behind[rows, part, :, None]).to(moved.dtype)
        return out + moved

    def _taken(self, weights: Tensor, sinks: Tensor, visual: Tensor) -> Tensor:
        """[B, H, R, S] by how much weights [B, H, R, S] change; sinks, visual: [B, 1, 1, S] bool."""
        seen, lost = (weights * visual).sum(-1, keepdim=True), (weights * (visual & sinks)).sum(-1, keepdim=True)
        chosen = (lost > 0) & (lost <= self.rho * seen) & (seen >= self.summ) & (seen > lost)
        freed = (1 - self.p) * (weights * sinks).sum(-1, keepdim=True) * chosen
        given = torch.where(visual & ~sinks, weights, 0) * (freed / (seen - lost).clamp(min=1e-20))
        return given - torch.where(sinks & chosen, (1 - self.p) * weights, 0)
