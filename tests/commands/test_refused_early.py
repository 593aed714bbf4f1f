"""What cannot be used is refused before a model is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vtoken.cli import main
from vtoken.evals import reference
from vtoken.evals.shared import models

TUNE = ["tune", "tiny-llava", "--space", "space.yaml", "--data", "own.jsonl"]
EVAL = ["eval", "tiny-llava", "--tasks", "vtoken_glyph_qa"]
EXIT = ["calibrate", "attention_exit", "tiny-llava"]
WRONG: list[tuple[list[str], str]] = [
    ([*TUNE, "--keep-accuracy", "0"], "--keep-accuracy must be above 0"),
    ([*TUNE, "--keep-accuracy", "120%"], "--keep-accuracy must be at most 1"),
    ([*TUNE, "--first", "0"], "--first must be at least 1"),
    ([*TUNE, "--trials", "0"], "--trials must be at least 1"),
    ([*TUNE, "--limit", "0"], "--limit must be at least 1"),
    ([*TUNE, "--quality", "accuracy"], "accuracy needs an answer to every question"),
    ([*TUNE, "--out", "taken/tune"], "taken is a file"),
    ([*EVAL, "--out", "done"], "done holds results already"),
    ([*EVAL, "--out", "taken"], "taken is a file"),
    ([*EVAL, "--pipelines", "mine.yaml", "other/mine.yaml"], "two pipelines are called 'mine'"),
    (["sweep", "sweep.yaml", "--workers", "0"], "--workers must be at least 1"),
    (["sweep", "sweep.yaml", "--out", "taken"], "taken is a file"),
    (["demo", "--budgets", "64,0"], "--budgets"),
    (["demo", "--out", "taken"], "taken is a file"),
    (["show", "tiny-llava", "random:4", "0.png", "--frames", "0"], "--frames must be at least 1"),
    (["show", "tiny-llava", "random:4", "0.png", "--out", "other"], "other is a folder"),
    (["train-exit", "tiny-llava", "--data", "reference", "-o", "other"], "other is a folder"),
    ([*EXIT, "--window", "0"], "--window must be at least 1"),
    ([*EXIT, "--patience", "0"], "--patience must be at least 1"),
    ([*EXIT, "--sinks", "51"], "--sinks must be at most 50"),
    ([*EXIT, "--first", "0"], "--first must be at least 1"),
    ([*EXIT, "--mean-layer", "-1"], "--mean-layer must be at least 0"),
    ([*EXIT, "--data", "own.jsonl", "--accuracy", "0.9"], "accuracy needs an answer to every question"),
    (["calibrate", "vtw", "tiny-llava", "--first", "0"], "--first must be at least 1"),
    (["calibrate", "mminference", "tiny-llava", "--inputs", "taken"], "--inputs taken: "),
    (["calibrate", "mminference", "tiny-llava", "--text-tokens", "0"], "--text-tokens must be at least 1"),
    (
        ["calibrate", "seerattention", "tiny-llava", "--data", "reference", "--threshold", "2", "-o", "new"],
        "--threshold must be below 1",
    ),
    (["bench", "tiny-llava", "random:4", "--drafts", "--batch", "2"], "drafts are verified one prompt at a time"),
    (["flops", "nowhere/at-all", "rnadom:4"], "did you mean"),
]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files that the commands name; whoever loads a model fails."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("0.png")
    (tmp_path / "own.jsonl").write_text('{"image": "0.png", "question": "What?"}\n')
    (tmp_path / "space.yaml").write_text("alternatives: {a: [random: {keep: {low: 1, high: 8}}]}\n")
    (tmp_path / "taken").write_text("a file")
    for folder, keep in ((".", 4), ("other", 5)):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "mine.yaml").write_text(f"stages: [random: {{keep: {keep}}}]\n")
    sweep: dict[str, Any] = {"model": "tiny-llava", "pipelines": ["random:4"], "tasks": ["vtoken_glyph_qa"]}
    (tmp_path / "sweep.yaml").write_text(json.dumps(sweep))
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "results.json").write_text("{}")

    def load(*_: Any, **__: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(models, "load", load)
    monkeypatch.setattr(reference, "load", load)
    return tmp_path


@pytest.mark.parametrize(("words", "message"), WRONG, ids=lambda value: " ".join(value[-2:]) if value else "")
@pytest.mark.usefixtures("place")
def test_what_cannot_be_used(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    if words[0] in ("eval", "sweep"):
        pytest.importorskip("lmms_eval")
    if words[0] == "tune":
        pytest.importorskip("optuna")
    try:
        assert main(words) == 2
    except SystemExit as ended:  # said by argparse
        assert ended.code == 2
    assert message in capsys.readouterr().err
