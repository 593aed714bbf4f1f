"""Known answer of the adaptive choice: by hand, and as the two methods it takes from."""

from __future__ import annotations

import math

import torch
from packing import tokens

from vtoken import registry
from vtoken.pruners.tokens.adaptive import relative_entropy


def adaptive():
    # One token has it all, two have the same, four are equal but for one of no weight; one token alone.
    weights = torch.tensor([1.0, 0, 0, 0, 3, 3, 0, 0, 2, 2, 2, 0, 5])
    want = [0, math.log(2) / math.log(4), math.log(3) / math.log(4), 0]
    torch.testing.assert_close(relative_entropy(weights, [4, 4, 4, 1]), torch.tensor(want))

    stage, g = registry.stage("adaptive"), torch.Generator().manual_seed(0)
    x, lengths = torch.randn(60, 8, generator=g), (24, 24, 12)
    # The first picture is plain, the second complex, the third kept whole.
    attention = torch.cat([torch.rand(24, generator=g) ** 20, 1 + 0.1 * torch.rand(36, generator=g)])
    batch = tokens(x, lengths, ((1, 4, 6), (1, 4, 6), (1, 3, 4)), cls_attention=attention)
    by_attention, apart = (registry.stage(name)(keep=12).select(batch).index for name in ("fastervlm", "divprune"))
    kept = stage(keep=12).select(batch)
    assert kept.index.tolist() == [*by_attention[:12].tolist(), *apart[12:24].tolist(), *range(48, 60)]
    assert by_attention.tolist() != apart.tolist()
    assert torch.equal(stage(keep=12, entropy=1.0).select(batch).index, by_attention)
    assert torch.equal(stage(keep=12, entropy=0.0).select(batch).index, apart)
