"""Known answers of IPCV; tests/hooks/vision/test_refill.py holds the tower against a literal loop."""

from __future__ import annotations

import pytest
import torch
from packing import tokens
from pydantic import ValidationError

from vtoken import config, registry
from vtoken.hooks.vision.refill import Estimates, nearest


def ipcv():
    stage = registry.stage("ipcv")
    change = torch.tensor([0.1, 0.9, 0.3, 0.8, 0.2, 0.7, 5.0, 6.0, 4.0])
    kept = stage(keep="34%").select(tokens(lengths=(6, 3), grid=((1, 1, 6), (1, 1, 3)), change=change))
    assert kept.index.tolist() == [1, 3, 7] and kept.lengths == (2, 1), "every picture has patches of its own"
    assert stage().layers(32) == (2,) and stage(layer=7).layers(24) == (6,) and stage().layers(4) == (0,)
    assert stage().select(tokens(torch.zeros(100, 1), (100,), ((1, 10, 10),), change=torch.rand(100))).lengths == (35,)
    for keep in ({"total": 40}, {"per_frame": 4}):
        with pytest.raises(ValidationError, match="patches per picture"):
            stage(keep=keep)
    assert [s.name for s in config.load("ipcv-qwen2-vl-35-fastv").stages] == ["ipcv", "fastv"]
    the_estimate()


def the_estimate():
    kept, dropped = torch.tensor([[0.0, 0], [4, 0], [9, 9]]), torch.tensor([[1.0, 0], [8, 9]])
    near = nearest(dropped, kept, 2)
    assert near.tolist() == [[0, 1], [2, 1]]
    assert nearest(dropped, kept, 9).shape == (2, 3)
    held = Estimates(torch.tensor([0, 2, 4]), torch.tensor([1, 3]), near, kept, dropped)
    # The first moves by (2, 0), the second by (0, 4), the third not: means (1, 2) and (0, 2).
    moved = kept + torch.tensor([[2.0, 0], [0, 4], [0, 0]])
    want = torch.tensor([[2.0, 0], [2, 2], [4, 4], [8, 11], [9, 9]])
    assert torch.equal(held.fill(moved), want)
    # If all move alike, so do the estimates.
    assert torch.equal(held.fill(kept + 3), torch.tensor([[0.0, 0], [1, 0], [4, 0], [8, 9], [9, 9]]) + 3)
    # A picture that kept one patch: 3 stands for no second neighbour.
    few = Estimates(held.kept, held.dropped, torch.tensor([[0, 3], [2, 1]]), kept, dropped)
    assert torch.equal(few.fill(moved)[1], dropped[0] + torch.tensor([2.0, 0]))
