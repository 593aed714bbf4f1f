"""Tasks and suites: the shipped ones are answered right by hand, lmms-eval's own score true answers as true, `vtoken
eval` runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny_processors import save

pytest.importorskip("lmms_eval")

import datasets
import lmms_eval.tasks
import lmms_tasks
from lmms_eval.tasks import TaskManager, get_task_dict
from lmms_eval.utils import load_yaml_config

from reference_models.needle import DEPTHS, LENGTHS, needle
from vtoken import config
from vtoken.cli import main
from vtoken.evals import reference
from vtoken.evals.lmms.harness import TASKS, Harness
from vtoken.evals.lmms.model import VtokenModel
from vtoken.evals.lmms.suites import KNOWN, SUITES, document_score
from vtoken.evals.quality import run

NEEDLES = {f"vtoken_glyph_needle_{length}": length for length in LENGTHS}
OWN = ("vtoken_glyph_qa", "vtoken_glyph_pairs", "vtoken_glyph_video", *NEEDLES)
BUILT_IN = Path(lmms_eval.tasks.__file__).parent
TEXT, NUMBER, IMAGE = datasets.Value("string"), datasets.Value("int64"), datasets.Image()
SHOWN = lmms_tasks.PICTURE


@pytest.fixture(scope="module", autouse=True)
def apart(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def glyphs() -> Any:
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, model_name="vtoken")
    assert manager.all_tasks == sorted(OWN)
    return get_task_dict(list(OWN), manager, "chat")


def test_glyph_qa_is_the_held_out_set(glyphs: Any) -> None:
    task, asked = glyphs["vtoken_glyph_qa"], reference.questions()
    docs = task.test_docs()
    assert [(d["question"], d["answer"]) for d in docs] == [(q.question, q.answer) for q in asked]
    (message,) = task.doc_to_messages(docs[7])
    assert [part["type"] for part in message["content"]] == ["image", "text"]
    with Image.open(asked[7].image) as picture:
        assert message["content"][0]["url"].tobytes() == picture.convert("RGB").tobytes()
    assert message["content"][1]["text"] == task.doc_to_text(docs[7]) == asked[7].question
    for said, right in (("1 2", 1.0), (" 1  2 ", 1.0), ("12", 0.0), ("1 2 3", 0.0), ("", 0.0)):
        assert task.process_results({"answer": "1 2"}, [said]) == {"glyph_accuracy": right}


@pytest.mark.parametrize(("name", "count"), [("vtoken_glyph_pairs", 2), ("vtoken_glyph_video", 4)])
def test_one_of_several_pictures_answers(glyphs: Any, name: str, count: int) -> None:
    """What is asked about stands in exactly one picture, in every place equally often; the answer is that picture's."""
    digits = {q.image.name: q.answer.split() for q in reference.questions() if q.kind == "read"}
    truth = {(q.image.name, q.question): q.answer for q in reference.questions()}
    task = glyphs[name]
    docs = list(task.test_docs())
    assert len(docs) == 2 * len(digits)
    places = []
    for doc in docs:
        digit = doc["question"].rstrip("?").split()[-1]
        (place,) = [k for k, image in enumerate(doc["images"]) if digit in digits[image]]
        assert len(set(doc["images"])) == len(doc["images"]) == count
        assert truth[doc["images"][place], doc["question"]] == doc["answer"]
        places.append(place)
    assert {places.count(place) for place in range(count)} == {len(docs) // count}
    (message,) = task.doc_to_messages(docs[0])
    shown = [part["url"] for part in message["content"] if part["type"] != "text"]
    if name == "vtoken_glyph_video":
        (frames,) = shown
        shown = frames[::2]
        assert [a.tobytes() for a in shown] == [b.tobytes() for b in frames[1::2]]
    with Image.open(reference.questions(1)[0].image.parent / docs[0]["images"][1]) as picture:
        assert len(shown) == count and shown[1].tobytes() == picture.convert("RGB").tobytes()


@pytest.mark.parametrize("name", NEEDLES)
def test_needles_of_a_length(glyphs: Any, name: str) -> None:
    """As many questions at every depth; a message shows the frames that the generator draws for its question, twice."""
    task = glyphs[name]
    docs = list(task.test_docs())
    assert {doc["length"] for doc in docs} == {NEEDLES[name]}
    asked = [(doc["depth"], doc["number"]) for doc in docs]
    assert sorted(asked) == [(depth, number) for depth in DEPTHS for number in range(20)]
    doc = docs[6]
    drawn = needle(doc["length"], doc["depth"], doc["number"])
    assert (task.doc_to_text(doc), task.doc_to_target(doc)) == (drawn.question, drawn.answer)
    (message,) = task.doc_to_messages(doc)
    frames, text = message["content"]
    assert text["text"] == drawn.question
    assert [f.tobytes() for f in frames["url"]] == [f.tobytes() for frame in drawn.frames for f in (frame, frame)]


class Oracle(VtokenModel):
    """Asks the model, and says what is right instead."""

    def _batch(self, places: Any, batch: Any, seen: Any) -> Any:
        found = super()._batch(places, batch, seen)
        for place, request in zip(places, batch, strict=True):
            _, _, _, doc, task, split = request.args
            text = RIGHT[task](self.task_dict[task][split][doc])
            found[place] = replace(found[place], reply=replace(found[place].reply, text=text))
        return found


RIGHT: dict[str, Any] = {
    "pope": lambda doc: doc["answer"],
    "mme": lambda doc: doc["answer"],
    "scienceqa_img": lambda doc: "AB"[doc["answer"]],
    "vqav2_val": lambda doc: "red",
    "textvqa_val": lambda doc: "stop",
}
ASKS = {
    "pope": "Is there a dog?\nAnswer the question using a single word or phrase.",
    "mme": "Is there a dog?\nAnswer the question using a single word or phrase.",
    "scienceqa_img": "Answer with the option's letter from the given choices directly.",
    "vqav2_val": "What colour?\nAnswer the question using a single word or phrase.",
    "textvqa_val": "What text?\nAnswer the question using a single word or phrase.",
}


def rows(name: str) -> tuple[str, str, list[dict[str, Any]], dict[str, Any]]:
    """YAML, split, rows and columns."""
    if name == "pope":
        texts = ("id", "question_id", "question", "answer", "image_source", "category")
        made = [
            {**dict.fromkeys(texts, "x"), "question": "Is there a dog?", "answer": ("no", "yes")[k % 2], "image": SHOWN}
            for k in range(4)
        ]
        return "pope/pope.yaml", "test", made, {**dict.fromkeys(texts, TEXT), "image": IMAGE}
    if name == "mme":
        question = "Is there a dog? Please answer yes or no."
        made = [
            {"question_id": f"existence/{k // 2}.png", "image": SHOWN, "question": question, "category": "existence"}
            | {"answer": ("Yes", "No")[k % 2]}
            for k in range(4)
        ]
        texts = ("question_id", "question", "answer", "category")
        return "mme/mme.yaml", "test", made, {**dict.fromkeys(texts, TEXT), "image": IMAGE}
    if name == "scienceqa_img":
        texts = ("hint", "task", "grade", "subject", "topic", "category", "skill", "lecture", "solution", "question")
        made = [{**dict.fromkeys(texts, "x"), "choices": ["a", "b"], "answer": k % 2, "image": SHOWN} for k in range(4)]
        columns = {**dict.fromkeys(texts, TEXT), "choices": datasets.Sequence(TEXT), "answer": NUMBER, "image": IMAGE}
        return "scienceqa/scienceqa_img.yaml", "test", made, columns
    if name == "vqav2_val":
        texts = ("question_type", "multiple_choice_answer", "answer_type", "question")
        answers = [{"answer": "red", "answer_confidence": "yes", "answer_id": k} for k in range(10)]
        made = [
            {**dict.fromkeys(texts, "x"), "question": "What colour?", "image_id": 1, "question_id": k, "image": SHOWN}
            | {"answers": answers}
            for k in range(4)
        ]
        one = {"answer": TEXT, "answer_confidence": TEXT, "answer_id": NUMBER}
        numbers = dict.fromkeys(("image_id", "question_id"), NUMBER)
        return (
            "vqav2/vqav2_val.yaml",
            "validation",
            made,
            {**dict.fromkeys(texts, TEXT), **numbers, "image": IMAGE, "answers": [one]},
        )
    made = [
        {"image_id": "x", "question_id": k, "question": "What text?", "question_tokens": ["what"], "image": SHOWN}
        | {"ocr_tokens": ["stop"], "answers": ["stop"] * 10, "set_name": "val"}
        for k in range(4)
    ]
    several = dict.fromkeys(("question_tokens", "ocr_tokens", "answers"), datasets.Sequence(TEXT))
    texts = dict.fromkeys(("image_id", "question", "set_name"), TEXT)
    return "textvqa/textvqa_val.yaml", "validation", made, {**texts, **several, "question_id": NUMBER, "image": IMAGE}


def test_real_scorers_know_what_is_right(tmp_path: Path) -> None:
    """pope, mme, scienceqa, vqav2 and textvqa as lmms-eval has them, prompts and scorers, on rows made here."""
    source = tmp_path / "tasks"
    for name in RIGHT:
        yaml, split, made, columns = rows(name)
        lmms_tasks.synthetic(source, name, BUILT_IN / yaml, split, made, columns)
    harness = Harness(list(RIGHT), [source])
    folder = save("llava", tmp_path / "model")
    pipelines = [config.load("random:5")]
    for kind, right in ((Oracle, True), (VtokenModel, False)):
        model = kind(str(folder), device="cpu", batch_size=3, max_new_tokens=2)
        results = run.evaluate(model, pipelines, harness, tmp_path / kind.__name__)
        for each in results.runs:
            # MME adds, for each of its categories, the percentage of right answers to that of pictures with both right.
            best = dict.fromkeys(RIGHT, 1.0) | {"mme": 200.0}
            assert {name: found["value"] for name, found in each["tasks"].items()} == {
                name: value if right else 0.0 for name, value in best.items()
            }
            printed = (results.folder / each["requests"]).read_text().splitlines()
            for line in map(json.loads, printed):
                assert line["score"] == float(right) and line["question"].endswith(ASKS[line["task"]])
        assert {name: about["metric"] for name, about in results.tasks.items()} == {
            "pope": "pope_f1_score",
            "mme": "mme_perception_score",
            "scienceqa_img": "exact_match",
            "vqav2_val": "exact_match",
            "textvqa_val": "exact_match",
        }
        assert results.tasks["mme"]["scale"] == 2000 and results.tasks["vqav2_val"]["scale"] is None


def test_suites_are_tasks_of_lmms_eval() -> None:
    """Names and metrics, of the version that is installed."""
    manager = TaskManager(include_path=str(TASKS))
    for name, task in KNOWN.items():
        assert name in manager.all_tasks, name
        written = load_yaml_config(manager.task_index[name]["yaml_path"], mode="simple")
        while "metric_list" not in written:  # Of a group: its first part's.
            first = written["task"][0]
            written = load_yaml_config(manager.task_index[first]["yaml_path"], mode="simple")
        assert task.metric in {metric["metric"] for metric in written["metric_list"]}, name
    assert list(SUITES) == [
        "smoke",
        "pruning-suite",
        "pruning-suite-hires",
        "pruning-suite-video",
        "pruning-suite-judge",
    ]


def test_a_documents_own_number() -> None:
    assert document_score("pope", {"score": 1.0, "prediction": "yes"}) == 1.0
    assert document_score("gqa", 0.3) == 0.3 and document_score("gqa", True) == 1.0
    assert document_score("seedbench", {"pred": "a ", "answer": "A"}) == 1.0
    assert document_score("seedbench", {"pred": "B", "answer": "A"}) == 0.0
    assert document_score("hrbench4k", {"gpt_score": 0.5}) == 0.5
    assert document_score("docvqa_val", {"questionId": 1, "answer": "x"}) is None
    assert document_score("pope", None) is None and document_score("pope", {"score": "1"}) is None


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    common = ["eval", "tiny-llava", "--tasks", "smoke", "--limit", "6", "--batch-size", "6", "--device", "cpu"]
    assert main([*common, "--pipelines", "none", "fastervlm:64", "--out", "out"]) == 0
    printed = capsys.readouterr().out
    written = json.loads(Path("out/results.json").read_text())
    assert [each["name"] for each in written["runs"]] == ["dense", "fastervlm:64", "dense"]
    # On the first six questions the shipped model is right, as its own held-out figures have it.
    assert written["runs"][0]["tasks"]["vtoken_glyph_qa"]["value"] == 1.0
    for words in ("fastervlm:64", "64 of 576", "answers as dense", "drift", "wrote"):
        assert words in printed
    assert main([*common, "--json", "--out", "again"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"][0]["tasks"]["vtoken_glyph_qa"]["same_as_dense"] == 1.0
    for wrong, words in (
        (["--out", "out"], "holds results already"),
        (["--out", "new", "--limit", "0"], "limit must be at least 1"),
        (["--out", "new", "--pipelines", "fastervm:64"], "did you mean"),
        (["--out", "new", "--threads", "0"], "threads must be at least 1"),
    ):
        assert main([*common, *wrong]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("vtoken: error:") and words in error
    assert not Path("new").exists()
