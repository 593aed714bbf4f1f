"""`vtoken calibrate mminference`: what it refuses. The search itself: tests/compressors/test_sparse_tools.py."""

from __future__ import annotations

import torch

from vtoken.cli import main
from vtoken.evals import reference


def test_a_prompt_without_a_picture_is_refused(tmp_path, capsys):
    _, processor = reference.load()
    torch.save(dict(processor(text="what digit is red?", return_tensors="pt")), tmp_path / "text.pt")
    assert main(["calibrate", "mminference", "tiny-llava", "--inputs", str(tmp_path / "text.pt")]) == 2
    assert "the prompt shows no picture" in capsys.readouterr().err
