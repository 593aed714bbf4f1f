"""GLM-4.1V: 2 x 2 patches joined by a convolution, a part of each head rotated in the decoder."""

from __future__ import annotations

from families._glm import Glm


class Tiny(Glm):
    classes = "Glm4v"
    rotates_neighbours = True
    checkpoints = {"zai-org/GLM-4.1V-9B-Thinking": 10293}
