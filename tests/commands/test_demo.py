"""`vtoken demo` and `vtoken show` on the shipped model, end to end."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image
from tiny import make
from tiny_processors import processor

from vtoken import registry
from vtoken.commands import demo as demo_command
from vtoken.commands import show as show_command
from vtoken.config import load
from vtoken.errors import VtokenError
from vtoken.evals import reference
from vtoken.evals.pictures import demo, demo_pipelines
from vtoken.evals.shared.dense import DENSE
from vtoken.evals.shared.options import declare

PICTURE = str(reference.path().parent / "glyph-qa" / "000.jpg")


def run(command, *words: str) -> None:
    parser = argparse.ArgumentParser()
    declare(parser, command)
    command.run(command.Settings.of(parser.parse_args(words)))


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch):
    monkeypatch.setattr(demo, "ROUNDS", 2)
    monkeypatch.setattr(demo, "WARMUP", 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_default_budgets_fit_the_model():
    assert demo.default_budgets(576) == (64, 32, 16)
    assert demo.default_budgets(324) == (32, 16, 8)
    assert demo.default_budgets(16) == (4, 2, 1)


def test_demo_writes_the_report_and_prints_one_object(tmp_path, capsys):
    run(demo_command, "--limit", "12", "--budgets", "64,16,32", "--out", str(tmp_path / "out"), "--json")
    out = json.loads(capsys.readouterr().out)
    page = Path(out["report"])
    assert page == tmp_path / "out" / "report.html"
    text = page.read_text(encoding="utf-8")
    methods = ["fastervlm", "uniform", "random"]
    names = ["dense", *(f"{method}:{k}" for method in methods for k in (64, 32, 16))]
    assert [row["pipeline"] for row in out["pipelines"]] == names
    assert all(f"<th>{name}</th>" in text for name in names)
    dense, *pruned = out["pipelines"]
    assert [row["tokens"] for row in pruned] == [64, 32, 16] * 3
    assert dense["tokens"] == reference.load()[0].config.image_seq_length
    assert all(row["accuracy"]["total"] == 12 for row in out["pipelines"])
    assert all(row["flops"] < dense["flops"] and row["cache_bytes"] < dense["cache_bytes"] for row in pruned)
    assert [set(example["answers"]) for example in out["examples"]] == [{"dense", *(f"{m}:32" for m in methods)}] * 2
    assert text.count("data:image/jpeg") == 2 * 4
    assert "--limit 12 --budgets 64,16,32" in out["conditions"]["command"]


@pytest.mark.parametrize("family", tiny.each("anyres", "crops_one_only", "varlen", by_rows=False, window=None))
def test_demo_takes_models_of_every_family(family, tmp_path, capsys, monkeypatch):
    """Tiny random models stand for the shipped ones: their answers are wrong, the account must hold all the same."""
    monkeypatch.setattr(reference, "names", lambda: (family,))
    monkeypatch.setattr(reference, "load", lambda name: (make(name), padded_left(processor(name))))
    run(demo_command, "--model", family, "--limit", "3", "--budgets", "8,4", "--out", str(tmp_path), "--json")
    out = json.loads(capsys.readouterr().out)
    found = [row["tokens"] for row in out["pipelines"]]
    assert found[:7] == [tiny.family(family).shipped_picture, *([8, 4] * 3)]
    # The largest smaller pictures of so few tokens, where pictures have any size.
    grouped = tiny.family(family).grouped
    assert len(found) == 7 + 2 * grouped and all(n <= k for n, k in zip(found[7:], (8, 4), strict=False))
    said = out["conditions"].get("facts", "")
    assert ("fastervlm: received_attention for cls_attention" in said) == bool(
        tiny.adapter(tiny.family(family).stock).substitutes
    )
    assert (tmp_path / "report.html").read_text(encoding="utf-8").count("data:image/jpeg") == 4 + grouped


def test_all_compares_every_method_that_changes_a_picture(tmp_path, capsys, monkeypatch):
    """A handful stands for all: the floors, one with a budget, a filter, one for videos, one that wants a deeper
    tower."""
    names = ("evs", "fastervlm", "pool", "random", "uniform", "vscan")
    found = {name: registry.stage(name) for name in names}, {"gone": "cannot be imported"}
    monkeypatch.setattr(demo_pipelines, "catalogue", lambda: found)
    words = ("--all", "--limit", "6", "--budgets", "32,16", "--out", str(tmp_path), "--json")
    run(demo_command, *words)
    out = json.loads(capsys.readouterr().out)
    budgeted = [f"{method}:{k}" for method in ("random", "uniform", "fastervlm", "vscan") for k in (32, 16)]
    assert [row["pipeline"] for row in out["pipelines"]] == ["dense", *budgeted, "pool"]
    assert [row["tokens"] for row in out["pipelines"]] == [576, *[32, 16] * 4, 144]
    shown = {"dense", "pool", *(f"{method}:16" for method in ("random", "uniform", "fastervlm", "vscan"))}
    assert [set(example["answers"]) for example in out["examples"]] == [shown]
    about = out["conditions"]
    assert about["left out"] == "gone: cannot be imported; evs: leaves a single picture whole"
    assert about["options"] == "vscan: local_layer=1" and "--limit 6 --all" in about["command"]
    assert (tmp_path / "report.html").read_text(encoding="utf-8").count("data:image/jpeg") == 6


def test_all_tells_what_leaves_a_picture_whole_from_what_acts_elsewhere(monkeypatch):
    """Stages of videos are left out, with a budget or without; those of the cache and inside the tower are not."""
    model, processor = reference.load()
    prompt = demo.inputs_of(processor, reference.questions(1)[0])
    names = ("dycoke", "flashvid", "ipcv", "prunevid", "snapkv", "vtw", "xattention")
    monkeypatch.setattr(demo_pipelines, "catalogue", lambda: ({name: registry.stage(name) for name in names}, {}))
    found = demo_pipelines.choose(model, prompt, (16,), everything=True)
    assert list(found.pipelines) == ["dense", "ipcv:16", "snapkv:16", "vtw", "xattention"]
    assert found.left_out == dict.fromkeys(("dycoke", "flashvid", "prunevid"), "leaves a single picture whole")
    dense, *rest = (demo.cost(model, pipeline, prompt) for pipeline in found.pipelines.values())
    tower, cache = rest[:2]
    assert tower["flops"] < dense["flops"] and cache["cache_bytes"] < dense["cache_bytes"]


def test_a_method_the_model_cannot_run_is_left_out_with_the_reason(monkeypatch):
    model, processor = reference.load()
    prompt = demo.inputs_of(processor, reference.questions(1)[0])
    monkeypatch.setattr(demo_pipelines, "catalogue", lambda: ({"vscan": registry.stage("vscan")}, {}))
    fitted = demo_pipelines.choose(model, prompt, (32, 16), everything=True)
    assert fitted.options == {"vscan": {"local_layer": 1}} and "vscan:16" in fitted.pipelines
    monkeypatch.setattr(demo_pipelines, "_fitted", lambda *_: {})
    found = demo_pipelines.choose(model, prompt, (32, 16), everything=True)
    assert found.pipelines == {"dense": DENSE} and "cls_attention of layer 5" in found.left_out["vscan"]


def test_tokens_are_the_mean_over_the_decoder(monkeypatch):
    model, processor = reference.load()
    prompt = demo.inputs_of(processor, reference.questions(1)[0])
    deep, before = model.config.text_config.num_hidden_layers, 1
    pipeline = load([{"fastv": {"keep": 16, "layer": before}}])
    assert demo.cost(model, pipeline, prompt)["tokens"] == round((576 * before + 16 * (deep - before)) / deep)


def padded_left(processor):
    processor.tokenizer.padding_side = "left"
    return processor


def test_a_demo_whose_account_is_wrong_stops(monkeypatch):
    model, stock = make("llava_next"), padded_left(processor("llava_next"))
    prompt = demo.inputs_of(stock, reference.questions(1)[0])
    assert demo.cost(model, load("uniform:8"), prompt)["tokens"] == 8
    monkeypatch.setattr(demo, "picture_size", lambda config, prompt: (56, 112))
    with torch.no_grad(), pytest.raises(VtokenError, match=r"dense: planned .* visual tokens per layer"):
        demo.cost(model, DENSE, prompt)


def test_demo_leaves_the_model_as_it_was():
    """The pruned runs share one model with the dense one; a leftover would show in its answers."""
    questions = reference.questions(6)
    model, processor = reference.load()
    before = reference.answers(model, processor, questions)
    demo.prefill(model, load("fastervlm:32"), demo.inputs_of(processor, questions[0]))
    assert reference.answers(model, processor, questions) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--model", "tiny-lava"), "tiny-llava"),
        (("--limit", "0"), "at least 1"),
        (("--limit", "6", "--budgets", "64,600"), "between 1 and"),
    ],
)
def test_demo_refuses_in_one_line(words, message, tmp_path):
    with pytest.raises(VtokenError, match=message) as raised:
        run(demo_command, *words, "--out", str(tmp_path))
    assert "\n" not in str(raised.value)


def test_demo_without_the_extra_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(demo_command, "find_spec", lambda name: None if name == "matplotlib" else object())
    with pytest.raises(VtokenError, match=r"needs matplotlib: pip install matplotlib$"):
        run(demo_command)


def test_show_writes_an_overlay_without_the_extra(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out = tmp_path / "kept.png"
    run(show_command, "tiny-llava", "fastervlm:32", PICTURE, "--out", str(out), "--json")
    trace = json.loads(capsys.readouterr().out)
    assert trace["file"] == str(out) and trace["stages"][-1]["tokens_out"] == [32]
    with Image.open(out) as picture:
        assert picture.format == "PNG" and picture.width >= 480


def test_show_loads_a_folder_as_any_hub_model(tmp_path, capsys):
    out = tmp_path / "kept.png"
    words = (
        str(reference.path()),
        "uniform:64",
        PICTURE,
        "--question",
        "how many digits are there?",
        "--out",
        str(out),
    )
    run(show_command, *words)
    assert capsys.readouterr().out == f"wrote {out}: 64 of 576 visual tokens kept\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("tiny-llava", "fastervlm:32", "no-such.jpg"), "cannot read picture no-such.jpg"),
        (("./no-such-model", "fastervlm:32", PICTURE), "no model folder './no-such-model'"),
        (("tiny-llava", "fastervm:32", PICTURE), "fastervlm"),
    ],
)
def test_show_refuses_in_one_line(words, message):
    with pytest.raises(VtokenError, match=message) as raised:
        run(show_command, *words)
    assert "\n" not in str(raised.value)
