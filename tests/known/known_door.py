"""Known answers of methods that bring weights of their own."""

from __future__ import annotations

import token_modules
import torch
from safetensors.torch import load_file
from usual import stage

from vtoken.stages import Fact, VisualTokens


def learned_compressor():
    """Two pictures, of 5 and 1 tokens: the second stays; the first becomes 3 tokens, worked out in float64."""
    options = token_modules.options(width=4)
    acting = type(stage("learned_compressor"))(**options)
    held = load_file(options["weights"])
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    parts = (((1, 2, 3),), ((1, 1, 1),))
    now = VisualTokens.pack(x, (5, 1), parts, (0, 0), torch.tensor([0, 1, 2, 4, 5, 0]))
    keep = acting.select(now)
    assert keep.index.tolist() == [0, 2, 4, 5] and keep.lengths == (3, 1)
    assert keep.into.tolist() == [0, 0, 1, 1, 2, 3]
    a, b, given = held["mix.weight"].double(), held["mix.bias"].double(), x.double()
    want = torch.stack([a @ given[k] + b + given[:5].mean(0) for k in (0, 2, 4)] + [given[5]])
    torch.testing.assert_close(keep.embed(x).double(), want, atol=1e-6, rtol=1e-5)
    # What is no embedding follows the members.
    torch.testing.assert_close(keep.apply(x)[0], x[:2].mean(0))
    assert acting.expected_counts((5, 1), parts, (0, 0)) == (3, 1) and acting.counts_are_exact()
    skipped = keep.skipping((5, 1), (True, False))
    assert torch.equal(skipped.embed(x), x), "a picture that is skipped keeps its own"

    reader = type(acting)(**token_modules.options(token_modules.Queries, width=7, out=4))
    features = torch.randn(6, 7, generator=torch.Generator().manual_seed(1))
    keep = reader.select(
        VisualTokens.pack(x, (5, 1), parts, (0, 0), now.raster_index, facts={Fact("features"): features})
    )
    held = load_file(reader.weights)
    shares = (held["queries"].double() @ features[:5].double().T).softmax(-1) @ features[:5].double()
    want = torch.cat([shares @ held["out.weight"].double().T + held["out.bias"].double(), x[5:].double()])
    assert keep.index.tolist() == [0, 2, 4, 5]
    torch.testing.assert_close(keep.embed(x).double(), want, atol=1e-5, rtol=1e-5)
