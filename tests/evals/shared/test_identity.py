"""Fingerprints follow what decides an answer: every file of a model's folder, every file that options name."""

from __future__ import annotations

from pathlib import Path

import pytest

from vtoken.config import Contrast, Pipeline
from vtoken.evals.shared.identity import named_files, weights
from vtoken.stages import Pruner
from vtoken.stages.budget import Budget


class Tabled(Pruner):
    """Has a file. No paper."""

    table: str


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "pytorch_model.bin", "tokenizer.model", "merges.txt"]
)
def test_weights_are_other_ones_when_a_file_of_the_folder_is_edited(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_text("before")
    before = weights(str(tmp_path), None)
    (tmp_path / name).write_text("behind")
    assert before != weights(str(tmp_path), None)


@pytest.mark.parametrize("place", ["stages", "draft", "contrast"])
def test_files_that_stages_name_count_wherever_the_stages_stand(place: str, tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    file.write_text("[1]")
    inner = Pipeline("inner", "original", (Tabled(keep=Budget(4), table=str(file)),))
    pipeline = {
        "stages": inner,
        "draft": Pipeline("outer", "original", (), draft=inner),
        "contrast": Pipeline("outer", "original", (), contrast=Contrast(inner)),
    }[place]
    before = named_files(pipeline)
    file.write_text("[2]")
    assert len(before) == 1 and named_files(pipeline) != before
