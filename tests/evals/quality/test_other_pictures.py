"""FLOPs of pipelines under which pictures have other crops, or another size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_processors import save

pytest.importorskip("lmms_eval")

import lmms_tasks

from vtoken import config
from vtoken.evals.lmms.harness import Harness
from vtoken.evals.lmms.model import VtokenModel
from vtoken.evals.quality import run, sweep
from vtoken.evals.quality.options import Sweep

UTILS = """
from PIL import Image

def pictures(doc):
    return [Image.new("RGB", tuple(doc["size"]))]

def score(doc, results):
    return {"hit": 1.0}
"""
SIZES = [(56, 28), (28, 56), (56, 56), (28, 28), (80, 20)]


CROPPED = ("llava_next", "{anyres: 2x2, stages: [random: {keep: 5}]}")
RESIZED = ("qwen2_vl", "stages: [resize: {keep: 2}]")


@pytest.mark.parametrize("by", ["eval", "sweep"])
@pytest.mark.parametrize(("family", "pipeline"), [CROPPED, RESIZED], ids=["crops", "sizes"])
def test_the_same_document_is_counted_whatever_the_model_is_shown(
    family: str, pipeline: str, by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path / "cache"))
    tasks = tmp_path / "tasks"
    name = lmms_tasks.write(tasks, "sized", len(SIZES))
    docs = [{"question": "w20", "answer": "w1", "size": size} for size in SIZES]
    (tasks / "sized.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    (tasks / "utils.py").write_text(UTILS)
    source = str(save(family, tmp_path / "model"))
    file = tmp_path / "forced.yaml"
    file.write_text(pipeline)
    if by == "eval":
        model = VtokenModel(source, device="cpu")
        found = run.evaluate(model, [config.load(file)], Harness([name], [tasks]), tmp_path / "out")
    else:
        options = {"model": source, "tasks": (name,), "pipelines": (str(file),), "include": (tasks,), "device": "cpu"}
        done = sweep.run(Sweep.given(**options), tmp_path / "out")
        assert done is not None
        found = done
    costs = [each["tasks"][name]["flops"] for each in found.runs]
    assert all("total" in cost for cost in costs), costs
    assert len({cost["doc"] for cost in costs}) == 1
