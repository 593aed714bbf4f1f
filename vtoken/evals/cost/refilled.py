"""What a tower computes where a stage runs it on a part of its patches and estimates the others after it."""

from __future__ import annotations

from vtoken.evals.cost.token_flow import TokenFlow

Units = list[tuple[float, ...]]


def refilled(flow: TokenFlow) -> tuple[Units, Units, int]:
    """Units (see Tower) of every crop that attention and MLP compute, by tower layer, and the FLOPs of choosing."""
    attention, mlps = ([tuple(map(float, row)) for row in rows] for rows in (flow.tower, flow.mlps))
    layers, unit, cost = flow.shape.tower.layers, flow.shape.tower.unit, 0
    for stage in flow.stages:
        if (refills := stage.refills()) is None:
            continue
        first = stage.layers(layers.depth)[0] + 1
        patches = tuple(int(n * unit) for n in attention[first])
        one = (((1, 1, n),) for n in patches)
        left = stage.expected_counts(patches, tuple(one), range(len(patches)))
        cost += stage.flops(patches, layers.width)
        short = tuple(n / unit for n in left)
        for layer in range(first, layers.depth):
            mlps[layer] = short
            if layer >= first + refills[1]:
                attention[layer] = short
    return attention, mlps, cost
