"""The bridge to lmms-eval: registration, runs, and each trap of the harness."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageStat
from probes import Failing
from tiny import TOKENS
from tiny_processors import save

pytest.importorskip("lmms_eval")

import gates
import lmms_tasks
from lmms_eval.api.task import ConfigurableTask
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models.registry_v2 import ModelRegistryV2

import vtoken
from vtoken import config
from vtoken.errors import ConfigError, UnsupportedError, VtokenError
from vtoken.evals.cost.flops import account
from vtoken.evals.lmms import manifest, suites
from vtoken.evals.lmms.harness import Harness, numbers
from vtoken.evals.lmms.model import VtokenModel
from vtoken.evals.lmms.prompts import Prompt
from vtoken.evals.quality import regressions, run
from vtoken.evals.quality.analysis import analyse, read
from vtoken.evals.shared import identity
from vtoken.evals.shared.dense import DENSE

ROOT = Path(__file__).parents[3]
TWO = ["random:5", "uniform:4"]


@pytest.fixture(autouse=True)
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data caches of its own for every test, no waiting before a retry, and the working folder is a fresh one."""
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(ConfigurableTask.process_results.retry, "sleep", lambda seconds: None)
    monkeypatch.setattr(ConfigurableTask.download.retry, "sleep", lambda seconds: None)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("llava", tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def model(folder: Path) -> VtokenModel:
    return VtokenModel(str(folder), device="cpu", batch_size=4)


def evaluated(model: VtokenModel, tasks: list[str], where: Path, pipelines: Any = TWO, **options: Any) -> run.Results:
    harness = Harness(tasks, [where])
    return run.evaluate(model, [config.load(p) for p in pipelines], harness, where / "out", **options)


def lines(results: run.Results, k: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (results.folder / results.runs[k]["requests"]).read_text().splitlines()]


def test_the_entry_point_is_the_model() -> None:
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["lmms_eval.models"]
    assert points == {"vtoken": f"{manifest.__name__}:{manifest.manifests.__name__}"}
    registry = ModelRegistryV2()
    registry.register_manifest(manifest.manifests())
    assert registry.get_model_class("vtoken") is VtokenModel
    code = "import sys, vtoken.evals.lmms.manifest; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_arguments_as_lmms_eval_writes_them(folder: Path, tmp_path: Path) -> None:
    line = (
        f"pretrained={folder},pipeline=random:5,device=cpu,system_prompt=w9 w8,max_new_tokens=2,records=answers.jsonl"
    )
    made = VtokenModel.create_from_arg_string(line, {"batch_size": 2, "max_batch_size": None, "device": None})
    task = lmms_tasks.write(tmp_path / "tasks", "plain", 3)
    Harness([task], [tmp_path / "tasks"]).run(made, task, None, tmp_path / "scorers")
    rows = [json.loads(line) for line in Path("answers.jsonl").read_text().splitlines()]
    assert [(row["doc"], row["visual_tokens_entry"], row["new_tokens"]) for row in rows] == [
        (k, 5, 2) for k in range(3)
    ]
    assert all(row["pipeline"] == "random:5" and row["task"] == "plain" for row in rows)
    bare = VtokenModel.create_from_arg_string(f"pretrained={folder},device=cpu,pipeline=none")
    assert bare.generator.pipeline is None
    Harness([task], [tmp_path / "tasks"]).run(bare, task, None, tmp_path / "scorers")
    # The text, and the words of the system prompt.
    assert rows[0]["prompt_tokens"] == bare.requests[0].reply.cost.prompt_tokens + 2
    for wrong, words in (
        ("pipline=random:5", "unknown model_args: pipline"),
        ("batch_size=auto", "batch_size must be a whole number, not 'auto'"),
        ("frames=0", "must be at least 1"),
        ("pipeline=random-5", "did you mean 'random:5'"),
        ("min_pixels=9", "does not resize pictures by their area"),
        ("dtype=float12", "unknown dtype"),
    ):
        with pytest.raises(VtokenError, match=words):
            VtokenModel.create_from_arg_string(f"pretrained={folder},device=cpu,{wrong}")


def test_pixels_as_lmms_eval_has_them(tmp_path: Path) -> None:
    """256 to 2,048 squares of 28 pixels, which is what its Qwen classes pass to their processors."""
    line = f"pretrained={save('qwen2_5_vl', tmp_path)},device=cpu,"
    made = VtokenModel.create_from_arg_string(line + "lmms_eval_pixels=True")
    assert made.about()["pixels"]["size"] == {"shortest_edge": 256 * 784, "longest_edge": 2048 * 784}
    with pytest.raises(ConfigError, match="give one or the others"):
        VtokenModel.create_from_arg_string(line + "lmms_eval_pixels=True,max_pixels=9000")


def test_a_run_and_its_files(model: VtokenModel, tmp_path: Path) -> None:
    weights = {name: value.clone() for name, value in model.generator.model.state_dict().items()}
    first, second = (lmms_tasks.write(tmp_path, name, rows) for name, rows in (("few", 2), ("many", 5)))
    results = evaluated(model, [first, second], tmp_path, limit=4, command="as called")
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert written == results.to_dict() and written["complete"] and written["schema"] == "vtoken-eval/1"
    assert [each["name"] for each in written["runs"]] == ["dense", *TWO, "dense"]
    # A whole limit is each task's own: lmms-eval would turn a share into the first task's count.
    assert {name: about["docs"] for name, about in written["tasks"].items()} == {"few": 2, "many": 4}
    text = lines(results, 0)[0]["prompt_tokens"] - TOKENS  # every question has two words
    for k, (each, kept) in enumerate(zip(results.runs, (TOKENS, 5, 4, TOKENS), strict=True)):
        rows = lines(results, k)
        assert [(row["task"], row["doc"]) for row in rows] == [("few", 0), ("few", 1), *(("many", d) for d in range(4))]
        assert {row["visual_tokens"] for row in rows} == {TOKENS}
        assert {row["visual_tokens_entry"] for row in rows} == {row["visual_tokens_mean"] for row in rows} == {kept}
        for row, base in zip(rows, lines(results, 0), strict=True):
            assert row["same_as_dense"] == (row["answer"] == base["answer"]) and row["doc_hash"] == base["doc_hash"]
            assert row["score"] == row["scores"]["hit"] == 1.0 and row["target"] == "w1" and row["answer"]
            assert row["question"].startswith(f"w{20 + row['doc']} w4")
            assert list(row["stages"]) == ([] if k in (0, 3) else [each["name"].partition(":")[0]])
            assert row["media"] == base["media"] != rows[1 - row["doc"] % 2]["media"]
        for name, found in each["tasks"].items():
            own = [row for row in rows if row["task"] == name]
            assert found["value"] == found["metrics"][name]["hit"] == found["of_dense"] == 1.0
            assert found["same_as_dense"] == sum(row["same_as_dense"] for row in own) / len(own)
            assert found["visual_tokens_entry"] == kept and found["ttft_s"] > 0
            plan = account(
                model.generator.model.config,
                config.load(each["name"]) if 0 < k < 3 else None,
                text_tokens=text,
                new_tokens=1,
            )
            assert found["flops"]["total"] == plan.total and found["flops"]["doc"] == len(own) // 2
            assert list(found["stages"]) == list(own[0]["stages"])
    assert results.drift is not None and results.drift["answers_changed"] == 0
    assert not all(row["same_as_dense"] for row in lines(results, 2))
    about = results.conditions
    # lmms-eval says "unknown" of itself.
    assert about["lmms_eval"] == version("lmms-eval") and about["limit"] == 4 and about["batch_size"] == 4
    assert about["pixels"]["crop_size"] == {"height": 56, "width": 56} and about["commit"] == identity.commit()
    assert written["tasks"]["few"]["leaves"]["few"]["generation_kwargs"]["max_new_tokens"] == 3
    # Nothing is left behind: hooks, weights (lmms-eval deletes those it finds after a run), empty folders.
    assert model.generator.pipeline is None and not (tmp_path / "out" / "scorers").exists()
    assert all(torch.equal(value, weights[name]) for name, value in model.generator.model.state_dict().items())
    with pytest.raises(ConfigError, match="holds results already"):
        evaluated(model, [first], tmp_path)


def test_lost_documents_are_drawn_as_the_pipeline_sees_them(model: VtokenModel, tmp_path: Path) -> None:
    task = lmms_tasks.write(tmp_path, "plain", 3)
    Harness([task], [tmp_path]).run(model, task, None, tmp_path / "scorers")
    chosen = [{"task": task, "doc": 2, "shown": ["random:5"]}, {"task": task, "doc": 0, "shown": []}]
    cases = regressions.draw(model, [DENSE, *map(config.load, TWO)], chosen, tmp_path)
    assert [(case["doc"], list(case["panels"])) for case in cases] == [(2, ["dense", "random:5"]), (0, ["dense"])]
    whole, kept = (Image.open(tmp_path / cases[0]["panels"][name]) for name in ("dense", "random:5"))
    # The third picture is plain (40, 99, 9); dropped cells are grey.
    assert all(abs(a - b) < 6 for a, b in zip(ImageStat.Stat(whole).mean, (40, 99, 9), strict=True))
    red, green = np.asarray(kept, dtype=int)[..., :2].transpose(2, 0, 1)
    assert 0.5 * 5 / TOKENS < (green - red > 30).mean() < 1.1 * 5 / TOKENS
    assert regressions.kept(model, Prompt(({"role": "user", "content": []},))) is None


def test_a_picture_that_cannot_be_drawn_leaves_the_stock_model(
    model: VtokenModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = lmms_tasks.write(tmp_path, "plain", 1)
    Harness([task], [tmp_path]).run(model, task, None, tmp_path / "scorers")
    monkeypatch.setattr(regressions, "encoded", lambda picture, kind: 1 / (model.generator.pipeline is None))
    monkeypatch.setattr(regressions.whole, "write", lambda file, what: None)
    with pytest.raises(ZeroDivisionError):
        regressions.draw(
            model, [DENSE, config.load("random:5")], [{"task": task, "doc": 0, "shown": ["random:5"]}], tmp_path
        )
    assert model.generator.pipeline is None


def test_a_contrast_without_stages_is_no_stock_model(model: VtokenModel, tmp_path: Path) -> None:
    """It is asked, and what it lost is shown with all tokens."""
    task, file = lmms_tasks.write(tmp_path, "plain", 3), tmp_path / "contrast.yaml"
    gated = f"random: {{keep: 1}}, dyvte: {{gates: {gates.file()}}}"
    file.write_text(f"stages: []\ncontrast: {{alpha: 9, beta: 0, stages: [{gated}]}}\n")
    pipeline = config.load(file)
    assert len(identity.named_files(pipeline)) == 1
    results = evaluated(model, [task], tmp_path, [pipeline])
    assert [row["name"] for row in results.runs] == ["dense", "contrast", "dense"]
    assert results.runs[1]["tasks"][task]["same_as_dense"] < 1
    model.use(pipeline)
    (case,) = regressions.draw(model, [DENSE, pipeline], [{"task": task, "doc": 0, "shown": ["contrast"]}], tmp_path)
    assert list(case["panels"]) == ["dense", "contrast"]
    assert [row["method"] for row in analyse(read(results.folder))["pipelines"]] == ["dense", "contrast"]


def test_a_batch_mixes_tasks_and_equals_single_prompts(model: VtokenModel, tmp_path: Path) -> None:
    tasks = [lmms_tasks.write(tmp_path, name, rows) for name, rows in (("few", 3), ("many", 5))]
    harness = Harness(tasks, [tmp_path])
    answers = []
    for size in (4, 1):
        model.batch_size_per_gpu = size
        model.use(config.load("random:5"))
        simple_evaluate(model=model, tasks=list(tasks), task_manager=harness.manager, bootstrap_iters=0)
        answers.append({(r.task, r.doc): r.reply.text for r in model.requests})
        assert {r.reply.cost.batch for r in model.requests} == ({4} if size == 4 else {1})
    model.batch_size_per_gpu = 4
    assert answers[0] == answers[1] and len(set(answers[0].values())) > 4


def test_the_response_cache_knows_the_pipeline(model: VtokenModel, tmp_path: Path) -> None:
    """lmms-eval's own key is `str(model)` and model_args: another pipeline on the same object must not be given old
    answers."""
    task = lmms_tasks.write(tmp_path, "plain", 3)
    manager = Harness([task], [tmp_path]).manager
    asked = []
    for pipeline in ("random:5", "uniform:5", "random:5"):
        model.use(config.load(pipeline))
        simple_evaluate(
            model=model, tasks=[task], task_manager=manager, bootstrap_iters=0, use_cache=str(tmp_path / "kept")
        )
        asked.append(len(model.requests))
    assert asked == [3, 3, 0]  # the third is a hit: so the cache was on
    model.use(config.load("none"))
    assert model.about()["pipeline"] is None


def test_the_response_cache_knows_what_was_edited(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on the command line, where the words stay: another pipeline in the file, other gates, another version are
    other answers."""
    task = lmms_tasks.write(tmp_path, "plain", 3)
    manager, asked = Harness([task], [tmp_path]).manager, list[int]()
    monkeypatch.setattr(VtokenModel, "_note", lambda self, answered: asked.append(len(answered)))
    pipeline, gated = tmp_path / "p.yaml", tmp_path / "gates.safetensors"
    words = f"pretrained={folder},device=cpu,pipeline={pipeline},batch_size=4"

    def answers() -> int:
        asked.clear()
        simple_evaluate(
            model="vtoken", model_args=words, tasks=[task], task_manager=manager, bootstrap_iters=0,
            use_cache=str(tmp_path / "kept"),
        )  # fmt: skip
        return sum(asked)

    pipeline.write_text("stages: [random: {keep: 5}]")
    assert (answers(), answers()) == (3, 0)
    pipeline.write_text("stages: [random: {keep: 6}]")
    assert (answers(), answers()) == (3, 0)
    gated.write_bytes(Path(gates.file()).read_bytes())
    pipeline.write_text(f"stages: [dyvte: {{gates: {gated}}}]")
    assert (answers(), answers()) == (3, 0)
    gated.write_bytes(Path(gates.file(2)).read_bytes())
    assert (answers(), answers()) == (3, 0)
    monkeypatch.setattr(vtoken, "__version__", "0.0.0")
    assert (answers(), answers()) == (3, 0)


def test_an_exception_ends_the_run(model: VtokenModel, tmp_path: Path) -> None:
    task = lmms_tasks.write(tmp_path, "plain", 3)
    with pytest.raises(ZeroDivisionError, match="a bug in a stage") as raised:
        evaluated(model, [task], tmp_path, [[{"random": {"keep": 5}}, Failing(keep=4)]])
    assert raised.value.__notes__ == ["while random+probes answered plain 0, plain 1, plain 2"]
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert not written["complete"] and [each["name"] for each in written["runs"]] == ["dense"]
    assert model.generator.pipeline is None
    with pytest.raises(UnsupportedError, match="anyres"):
        run.evaluate(
            model, [config.load({"anyres": "2x2", "stages": ["pool"]})], Harness([task], [tmp_path]), tmp_path / "new"
        )
    assert not (tmp_path / "new").exists()


def test_a_scorer_that_fails_says_why_at_once(model: VtokenModel, tmp_path: Path) -> None:
    task = lmms_tasks.write(tmp_path, "plain", 2, process_results="!function utils.broken")
    with pytest.raises(VtokenError, match="task plain cannot be scored: ZeroDivisionError: a bug in a scorer"):
        evaluated(model, [task], tmp_path)


def test_tasks_that_cannot_run_are_refused_before_anything_is_asked(tmp_path: Path) -> None:
    lmms_tasks.write(tmp_path, "gone", 2)
    (tmp_path / "gone.jsonl").unlink()
    lmms_tasks.write(tmp_path, "choices", 2, output_type="multiple_choice", doc_to_choice='["a", "b"]')
    lmms_tasks.write(tmp_path, "nowhere", 2, process_results="!function missing_package.score")
    for name, error, words in (
        ("gone", VtokenError, "task gone cannot be loaded: FileNotFoundError"),
        ("choices", UnsupportedError, "task choices is of type multiple_choice; only tasks that are answered"),
        ("nowhere", VtokenError, "task nowhere cannot be loaded: ImportError"),
    ):
        with pytest.raises(error, match=words):
            Harness([name], [tmp_path])
    with pytest.raises(VtokenError, match="no folder"):
        Harness(["gone"], [tmp_path / "absent"])


def test_scorers_that_count_in_their_module_start_anew(model: VtokenModel, tmp_path: Path) -> None:
    """As OCRBench does: the second run of a task object would be added to the first."""
    piling = "[{metric: hit, aggregation: !function utils.piling_up, higher_is_better: true}]"
    task = lmms_tasks.write(tmp_path, "plain", 3, metric_list=piling)
    results = evaluated(model, [task], tmp_path)
    assert [each["tasks"]["plain"]["value"] for each in results.runs] == [3.0] * 4


def test_what_scorers_write_and_print_stays_apart(
    model: VtokenModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    writing = "[{metric: hit, aggregation: !function utils.writing, higher_is_better: true}]"
    task = lmms_tasks.write(tmp_path, "plain", 2, metric_list=writing)
    evaluated(model, [task], tmp_path, [])
    assert (tmp_path / "out" / "scorers" / "0-dense" / "plain" / "scores.txt").read_text() == "here"
    assert Path.cwd() == tmp_path and not Path("scores.txt").exists()
    assert "a scorer that prints" not in capsys.readouterr().out


def test_groups_count_their_parts_alike(model: VtokenModel, tmp_path: Path) -> None:
    for name, rows in (("few", 2), ("many", 4)):
        lmms_tasks.write(
            tmp_path,
            name,
            rows,
            metric_list="[{metric: hit, aggregation: !function utils.piling_up, higher_is_better: true}]",
        )
    (tmp_path / "both.yaml").write_text("group: both\ntask: [few, many]\n")
    results = evaluated(model, ["both"], tmp_path, ["random:5"])
    assert results.runs[0]["tasks"]["both"]["value"] == (2 + 4) / 2 and results.tasks["both"]["docs"] == 6
    assert sorted(results.tasks["both"]["leaves"]) == ["few", "many"] and len(lines(results, 1)) == 6


def test_dense_runs_first_and_last() -> None:
    loaded = [config.load(p) for p in ("none", "random:5", [], "random:5")]
    assert [p.name for p in run.with_dense(loaded)] == ["dense", "random:5", "dense"]
    assert run.with_dense([]) == run.with_dense(loaded[:1]) == [DENSE]
    contrast = config.load({"stages": [], "contrast": {"stages": [{"random": {"keep": 1}}]}})
    assert run.with_dense([contrast]) == [DENSE, contrast, DENSE], "other answers, though no token leaves"
    with pytest.raises(ConfigError, match="two pipelines are called 'random'"):
        run.with_dense([config.load([{"random": {"keep": k}}]) for k in (4, 5)])


def test_numbers_are_what_is_a_number() -> None:
    given = {"alias": "x", "a,none": 1, "a_stderr,none": 0.1, "b,strict": 0.5, "c,none": [], "d,none": "N/A"}
    assert numbers({**given, "e,none": float("nan"), "f,none": True, "g": torch.tensor(2.0).numpy()[()]}) == {
        "a": 1.0,
        "b,strict": 0.5,
        "g": 2.0,
    }


def test_loglikelihood_and_rounds_are_refused(model: VtokenModel) -> None:
    for method in (model.loglikelihood, model.generate_until_multi_round):
        with pytest.raises(UnsupportedError):
            method([])


def test_suites_and_names(monkeypatch: pytest.MonkeyPatch) -> None:
    assert suites.expand(["smoke", " pope ", "", "vtoken_glyph_qa"]) == ["vtoken_glyph_qa", "pope"]
    with pytest.raises(ConfigError, match="no task is given"):
        suites.expand([""])
    with pytest.raises(ConfigError, match=r"unknown task 'popo'; did you mean pope\?"):
        suites.known_to(["pope", "gqa"], ["gqa", "popo"])
    for name in ("OPENAI_API_KEY", "AZURE_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="mmvet is scored by a model behind an API"):
        suites.expand(["mmvet"])
    monkeypatch.setattr(suites, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="videomme needs a package that is not installed: pip install opencv-python"):
        suites.expand(["pruning-suite-video"])
