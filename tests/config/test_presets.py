"""Presets act: each is a paper's whole recipe, and what a command runs is the pipeline as it was written."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny
from caught import catch, ends, lmms_model

import vtoken
from vtoken import config, registry
from vtoken.cli import main
from vtoken.errors import UnsupportedError
from vtoken.evals import reference
from vtoken.evals.cost.flops import account
from vtoken.evals.quality import paper
from vtoken.evals.shared.configs import resolve_config
from vtoken.evals.tune.space import Space
from vtoken.session import session_of

# Of one picture they shorten nothing in the decoder: long prompts, the KV cache and what is read of it, videos.
ELSEWHERE = {"attention", "cache", "decode"}
VIDEO = ("dycoke", "evs", "fastvid", "flashvid", "holitom", "prunevid", "vidcom2")
EXITS = ("todre_exit", "dyvte", "pixelprune")  # of this picture nobody need leave


def model_of(name: str) -> str:
    """The model that a preset was written for."""
    for part, model in (
        ("tiny-llava", "tiny-llava"),
        ("next", "llava-hf/llava-v1.6-vicuna-7b-hf"),
        ("hired-20pct", "llava-hf/llava-v1.6-vicuna-7b-hf"),
        ("textmonkey", "llava-hf/llava-v1.6-vicuna-7b-hf"),
        ("qwen", "Qwen/Qwen2-VL-7B-Instruct"),
        ("resize", "Qwen/Qwen2-VL-7B-Instruct"),
        ("pixelprune", "Qwen/Qwen2-VL-7B-Instruct"),
    ):
        if part in name:
            return model
    return "llava-hf/llava-1.5-7b-hf"


@pytest.mark.parametrize("name", registry.presets())
def test_no_preset_leaves_a_prompt_to_the_stock_model(name: str) -> None:
    pipeline = config.load(name)
    assert pipeline.min_visual_tokens == 0
    if name.startswith((*VIDEO, *EXITS, "none")) or {stage.site for stage in pipeline.stages} <= ELSEWHERE:
        return
    size = (672, 1008) if "next" in name or name.startswith(("hired", "textmonkey")) else None
    found = account(resolve_config(model_of(name)), pipeline, image_size=size)
    dense = account(resolve_config(model_of(name)), image_size=size)
    if any(stage.refills() for stage in pipeline.stages):
        assert found.tower < dense.tower, "all tokens stay, of which the tower sees fewer"
        return
    assert found.visual_average < dense.visual_average, "one picture of the model it was written for"


@pytest.fixture(scope="module")
def shipped() -> dict[str, tuple[Any, Any]]:
    return {name: reference.load(name) for name in reference.names()}


def kinds() -> list[str]:
    """One preset per list of stages."""
    found: dict[tuple[str, ...], str] = {}
    for name in registry.presets():
        found.setdefault(tuple(stage.name for stage in config.load(name).stages), name)
    return list(found.values())


@pytest.mark.parametrize("name", kinds())
def test_one_picture_is_enough(name: str, shipped: Any) -> None:
    """On the first shipped model that takes the preset."""
    pipeline, acts = config.load(name), {stage.site for stage in config.load(name).stages} - ELSEWHERE
    refused = []
    for model, processor in shipped.values():
        try:
            vtoken.wrap(model, name)
        except UnsupportedError as error:
            refused.append(str(error))
            continue
        with running(model, processor, cut=pipeline.anyres != "model"):
            reference.answers(model, processor, reference.questions(1), max_new_tokens=1)
            if pipeline.stages:
                trace = vtoken.trace(model)
                assert not trace.dense_rows
                assert name.startswith((*VIDEO, *EXITS)) or not acts or sum(trace.layers[-1]) < sum(trace.visual_tokens)
        return
    assert len(refused) == len(shipped) and all(refused)


@contextmanager
def running(model: Any, processor: Any, *, cut: bool) -> Iterator[None]:
    if cut:
        vtoken.match_processor(processor, model)
    try:
        yield
    finally:
        vtoken.unwrap(model)
        if cut:
            vtoken.unmatch_processor(processor)


GUARDED = "fastervlm-64,min_visual_tokens=600"
FILE = "min_visual_tokens: 600\nstages: [{uniform: {keep: 64}}]\n"


@pytest.fixture
def written(tmp_path: Path) -> list[str]:
    """A preset, one with a policy, a file, and a file on top of a preset."""
    (tmp_path / "mine.yaml").write_text(FILE)
    (tmp_path / "over.yaml").write_text("preset: flowcut-64\nmin_visual_tokens: 600\n")
    return ["flowcut-64", GUARDED, str(tmp_path / "mine.yaml"), str(tmp_path / "over.yaml")]


def test_wrap_runs_what_is_written(written: list[str]) -> None:
    model = tiny.llava()
    for each in written:
        with vtoken.wrapped(model, each):
            session = session_of(model)
            assert session is not None and session.pipeline == config.load(each)


def test_bench_runs_what_is_written(written: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []
    monkeypatch.setattr("vtoken.evals.speed.latency.bench", catch(found, 1))
    ends(["bench", "tiny-llava", *written])
    assert found == [[config.load(each) for each in written]]


def test_flops_counts_what_is_written(written: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The shipped model's picture has 576 tokens."""
    assert main(["flops", "tiny-llava", *written, "--json"]) == 0
    dense, *rest = json.loads(capsys.readouterr().out)["accounts"]
    assert [each["visual_average"] == dense["visual_average"] for each in rest] == [False, True, True, True]


def test_show_draws_what_is_written(written: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []
    monkeypatch.setattr(sys.modules["vtoken.session"], "watched", catch(found, 1))
    for each in written:
        ends(["show", "tiny-llava", each, str(reference.questions(1)[0].image)])
    assert found == [config.load(each) for each in written]


def test_sweep_scores_what_is_written(written: list[str]) -> None:
    from vtoken.evals.quality.options import Sweep

    asked = Sweep(model="tiny-llava", tasks=("a",), pipelines=tuple(written), methods=("uniform",), budgets=(64,))
    assert asked.all_pipelines() == [config.load(each) for each in (*written, "uniform:64")]


def test_tune_searches_among_what_is_written() -> None:
    for least in (0, 600):
        space = Space(alternatives={"one": [{"uniform": {"keep": 64}}]}, min_visual_tokens=least, newline="drop")
        assert {(each.min_visual_tokens, each.newline) for each in space.check()} == {(least, "drop")}


def without_lmms_eval(monkeypatch: pytest.MonkeyPatch, **functions: Any) -> None:
    """Parts of vtoken.evals.lmms that import lmms-eval, as modules of a few functions."""
    monkeypatch.setattr("vtoken.evals.lmms.prepare.prepare", lambda what: None)
    for name in ("lmms.harness", "lmms.model", "quality.printed", "quality.run"):
        module = ModuleType(name)
        vars(module).update(Harness=Stub, VtokenModel=Stub, publish=Stub, planned=Stub, **functions)
        monkeypatch.setitem(sys.modules, f"vtoken.evals.{name}", module)


class Stub:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass


def test_eval_scores_what_is_written(written: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []
    without_lmms_eval(monkeypatch, evaluate=catch(found, 1))
    ends(["eval", "tiny-llava", "--tasks", "pope", "--pipelines", *written])
    ends(["eval", "llava-hf/llava-1.5-7b-hf", "--paper", "flowcut", "--tasks", "pope", "--pipelines", *written])
    own, with_paper = found
    assert own == [config.load(each) for each in written]
    names = paper.pipelines(paper.of("flowcut", "llava-hf/llava-1.5-7b-hf"))
    assert with_paper == [config.load(each) for each in dict.fromkeys([*names, *written])]


def test_lmms_evals_model_runs_what_is_written(written: list[str]) -> None:
    cls = lmms_model()
    for each in written:
        assert cls("tiny-llava", each, device="cpu").generator.pipeline == config.load(each)
