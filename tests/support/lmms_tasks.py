"""Tasks of lmms-eval made on the spot: a folder with YAML, rows and the functions that score them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

UTILS = """
import os
from PIL import Image
seen = []

def pictures(doc):
    return [Image.new("RGB", (64, 64), tuple(doc["colour"]))]

def score(doc, results):
    return {"hit": float(doc["question"] in results[0] or bool(results[0]))}

def spelled(doc, results):
    return {"hit": worth(results[0])}

def worth(text):
    return sum(map(ord, text)) % 10 / 10

def best(values):
    return max(values)

def broken(doc, results):
    raise ZeroDivisionError("a bug in a scorer")

def piling_up(values):
    seen.extend(values)
    return sum(seen)

def third_time_fatal(values):
    if "VTOKEN_TEST_CALLS" in os.environ:
        with open(os.environ["VTOKEN_TEST_CALLS"], "a") as calls:
            calls.write("x")
        if os.path.getsize(os.environ["VTOKEN_TEST_CALLS"]) == 3:
            os.kill(os.getpid(), 9)
    return sum(values)

def writing(values):
    print("a scorer that prints")
    open("scores.txt", "w").write("here")
    return sum(values) / len(values)
"""


def write(folder: Path, name: str, rows: int, **fields: Any) -> str:
    """A task about plain pictures; `fields` go over its own. Functions are named as in YAML: `!function
    utils.score`."""
    folder.mkdir(parents=True, exist_ok=True)
    docs = [{"question": f"w{20 + k} w{40 + rows}", "answer": "w1", "colour": [20 * k, 99, 9]} for k in range(rows)]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    (folder / "utils.py").write_text(UTILS)
    own = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": f"{{data_files: {{test: {name}.jsonl}}}}",
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_visual": "!function utils.pictures",
        "doc_to_text": '"{{question}}"',
        "doc_to_target": '"{{answer}}"',
        "generation_kwargs": "{max_new_tokens: 3, temperature: 0, do_sample: false}",
        "process_results": "!function utils.score",
        "metric_list": "[{metric: hit, aggregation: mean, higher_is_better: true}]",
    }
    (folder / f"{name}.yaml").write_text("".join(f"{key}: {value}\n" for key, value in {**own, **fields}.items()))
    return name


def synthetic(folder: Path, name: str, yaml: Path, split: str, rows: Sequence[dict[str, Any]], features: Any) -> str:
    """One of lmms-eval's own tasks, prompts and scorer as they are, on rows of a parquet file."""
    import datasets

    folder.mkdir(parents=True, exist_ok=True)
    made = datasets.Dataset.from_list(list(rows), features=datasets.Features(features))
    made.to_parquet(str(folder / f"{name}.parquet"))
    text = f"include: {yaml}\ntask: {name}\ndataset_path: parquet\ndataset_name: null\n"
    data = f"dataset_kwargs: {{data_files: {{{split}: {name}.parquet}}}}\n"
    (folder / f"{name}.yaml").write_text(text + data)
    return name


PICTURE = Image.new("RGB", (64, 48), (200, 30, 30))
