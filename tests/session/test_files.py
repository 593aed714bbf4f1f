"""Files that options name are read when a model is wrapped: what is done to them later does not reach it."""

from __future__ import annotations

import json
from pathlib import Path

import gates
import pytest
import tiny
import token_modules
import torch

import vtoken

# Stage -> option, a file, another one that would decide otherwise or does not fit, and further options.
NAMED = {
    "dpn_routed": (
        "routers",
        gates.routers(seed=1, loud=9.0),
        gates.routers(layers=(1,)),
        {"sizes": (1, 2), "least": 4},
    ),
    "dyvte": ("gates", gates.file(3), gates.file(depth=3), {}),
    "learned_compressor": (
        "weights",
        token_modules.options()["weights"],
        token_modules.options(seed=1)["weights"],
        {"module": token_modules.options()["module"]},
    ),
    "seerattention": ("gates", gates.seer(), gates.seer(depth=3), {"threshold": 0.1, "min_len": 0}),
    "static_sparse": ("gates", [[0.9, 0.1]] * 4, [[0.1, 0.9]] * 4, {"sink": 0, "window": 1, "size": 16, "min_len": 0}),
}


def contents(given):
    return Path(given).read_bytes() if isinstance(given, str) else json.dumps(given).encode()


@pytest.mark.parametrize("name", NAMED)
def test_a_wrapped_model_keeps_what_it_read(name, tmp_path):
    option, given, other, more = NAMED[name]
    model = tiny.make("llava")
    batch, file = tiny.build(model, [[150, "img", 40]], seed=3), tmp_path / "weights.json"
    file.write_bytes(contents(given))

    def wrapped():
        return vtoken.wrapped(model, [{name: {option: str(file), **more}}])

    with torch.no_grad():
        dense = model(**batch).logits
        with wrapped():
            want = model(**batch).logits
        assert not torch.equal(want, dense), "the stage acts"
        with wrapped():
            file.unlink()
            assert torch.equal(model(**batch).logits, want)
            file.write_bytes(contents(other))
            assert torch.equal(model(**batch).logits, want)
