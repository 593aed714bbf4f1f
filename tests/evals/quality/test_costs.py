"""The document that FLOPs of a task are counted on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from PIL import Image
from tiny_processors import save

from vtoken.evals import processors
from vtoken.evals.cost.flops import account
from vtoken.evals.lmms.generation import TextGenerator
from vtoken.evals.lmms.prompts import encode
from vtoken.evals.quality.costs import Typical, typical
from vtoken.evals.shared import models
from vtoken.evals.tune import samples


@pytest.mark.parametrize("family", tiny.each("anyres", "by_rows", "crops_sized", "split", "varlen"))
def test_the_account_takes_a_prompt_as_long_as_the_document_s(family: str, tmp_path: Path) -> None:
    """Newlines and breaks count once, and pictures are as large as the processor makes them."""
    save(family, tmp_path / family)
    Image.fromarray(torch.randint(256, (64, 64, 3), dtype=torch.uint8).numpy()).save(tmp_path / "0.png")
    (tmp_path / "own.jsonl").write_text('{"image": "0.png", "question": "w20 w40", "answer": "w0"}\n')
    source = str(tmp_path / family)
    generator = TextGenerator(models.load(source, device="cpu"), processors.load(source))
    (sample,) = samples.load(str(tmp_path / "own.jsonl"), None)
    model: Any = SimpleNamespace(prompt=lambda task, doc: sample.prompt, generator=generator)
    found = typical(model, {("own", 0): 1})
    assert isinstance(found, Typical)
    seen = account(generator.model.config, **vars(found.work))
    ids = encode(generator.processor, [sample.prompt], generator.model)["input_ids"]
    assert seen.text_tokens + seen.visual_entry + seen.newline_entry == ids.shape[1]
