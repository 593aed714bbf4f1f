"""`vtoken bench`: the oracle is the pipeline's own computation, ratios are paired, and nothing stays on the model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from probes import Deep, Failing, Inside, Ragged
from torch import nn
from transformers import GenerationConfig

from vtoken import registry, wrap
from vtoken.cli import main
from vtoken.commands.bench import cells, markdown, notes
from vtoken.config import load
from vtoken.errors import ConfigError, UnsupportedError
from vtoken.evals.shared import models
from vtoken.evals.speed.inputs import random_prompt
from vtoken.evals.speed.latency import COMPARED, PARTS, Bench, Spread, bench, break_even, ratios, row, spread
from vtoken.evals.speed.timing import Runner, Sample, Subject
from vtoken.hooks.state.run import Clock
from vtoken.hooks.state.trace import StageTrace, Trace

SHARES = (("a", 0.25), ("b", 0.125), ("a", 0.5))  # of a stage, layer by layer
SHORT = {"text_tokens": 5, "new_tokens": 3, "repeats": 2, "warmup": 0}


def hooks(model: nn.Module) -> list[tuple[str, int]]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    return [(name, len(getattr(m, k))) for name, m in model.named_modules() for k in kinds if getattr(m, k)]


def used() -> Any:
    """A model that ran once: transformers puts hooks of its own on it then."""
    model = tiny.llava()
    model(**tiny.build(model, [["img", 1]]))
    return model


@pytest.fixture(scope="module")
def found() -> Bench:
    model = used()
    before, config, names = hooks(model), model.generation_config, set(vars(model))
    measured = bench(model, ["fastervlm:4", Deep(), Inside()], batch=2, **SHORT)
    assert hooks(model) == before and model.generation_config is config and set(vars(model)) == names
    return measured


def test_every_part_is_there(found: Bench) -> None:
    assert [each.name for each in found.rows] == ["dense", "fastervlm:4", Deep.name, Inside.name]
    for each in found.rows:
        parts = each.milliseconds
        assert list(parts) == list(PARTS)
        for part, value in parts.items():
            if (part, each.name) != ("stages", "dense"):
                assert value is not None and 0 < value.low <= value.median <= value.high
        assert parts["vision"].median < parts["ttft"].median < parts["end_to_end"].median
        assert each.peak_bytes is None
    dense, pruned, *others = found.rows
    assert dense.milliseconds["stages"] is dense.to_dense is dense.oracle is dense.no_oracle is None
    assert (dense.visual_tokens, pruned.visual_tokens) == (32, 8)
    assert (pruned.visual_entry, pruned.visual_average) == (8, 8)
    deep = others[0]
    assert deep.visual_entry == 32 > deep.visual_tokens > 0, "it cuts before layer 2 of 4"
    assert deep.visual_average == (2 * 32 + 2 * deep.visual_tokens) / 4
    inside = others[1]
    assert inside.visual_entry == inside.visual_average == inside.visual_tokens < 32
    assert dense.kv_bytes * (5 + 4) == pruned.kv_bytes * (5 + 16)
    for each, slots in ((dense, 5 + 16), (pruned, 5 + 4)):
        assert each.kv_bytes_end * slots == each.kv_bytes * (slots + 2), "two steps"
        assert each.kv_bytes_read * 2 * slots == each.kv_bytes * (slots + 1.5), "of one row, the mean over both"
    assert pruned.oracle["stages"] is None and all(pruned.oracle[p] for p in PARTS if p != "stages")
    assert set(pruned.to_oracle) == set(pruned.to_dense) == set(COMPARED)
    for each, site in zip(others, ("decoder", "encoder"), strict=True):
        assert each.oracle is each.to_oracle is each.overhead is each.break_even is None
        assert f"{each.name} acts at site {site}" in each.no_oracle
    assert found.drift > 0


def test_the_result_is_plain_data_and_prints(found: Bench) -> None:
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["rows"][1]["to_oracle"]["ttft"]["median"] == found.rows[1].to_oracle["ttft"].median
    assert plain["conditions"]["prompt"] == "ids [2, 21], pixel_values [2, 3, 56, 56]"
    head, *lines = cells(found)
    assert "peak memory" not in head and len(lines) == 4 and {len(line) for line in lines} == {len(head)}
    text = markdown(found)
    assert "| fastervlm:4 | 8 |" in text and "not measured on a CPU" in text and "no short prompt" in text


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("stage", [{"fastervlm": {"keep": 5}}, {"pool": {"size": 2}}, Ragged()], ids=str)
@pytest.mark.parametrize("text_tokens", [1, 9])
def test_the_oracle_is_the_same_computation(positions: str, stage: Any, text_tokens: int) -> None:
    """On the short prompt the unwrapped model says what the wrapped one says: text, merged features and positions
    agree."""
    model, pipeline = used(), load({"positions": positions, "stages": [stage]})
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=8)
    before, adapter = hooks(model), registry.adapter("llava")(model)
    runner = Runner(adapter, random_prompt(adapter, batch=3, images=2, text_tokens=text_tokens, seed=3))
    with torch.inference_mode():
        subject = runner.prepare(pipeline)
        kept, oracle = subject.layers[-1], subject.oracle
        assert 0 < kept < 3 * 2 * tiny.TOKENS and len(oracle.values) == int((oracle.ids == tiny.IMG).sum()) == kept
        ours = runner.sample(pipeline)[1][:, -8:]
        ideal = runner.sample(None, oracle)[1][:, -8:]
        dense = runner.sample()[1][:, -8:]
    assert torch.equal(ours, ideal)
    assert not torch.equal(ours, dense)
    assert hooks(model) == before


KINDS = [(family, 1) for family in tiny.FAMILIES] + [(family, 5) for family in tiny.VIDEO]


@pytest.mark.parametrize("stage", [{"fastervlm": {"keep": 5}}, {"pool": {"size": 2}}, Ragged()], ids=str)
@pytest.mark.parametrize(("family", "frames"), KINDS)
def test_the_oracle_of_every_family(family: str, frames: int, stage: Any) -> None:
    """Newlines, crops, M-RoPE, videos and DeepStack: the tokens are the same as with the wrapped model."""
    model, pipeline = tiny.make(family), load({"stages": [stage]})
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=8)
    model.generate(**tiny.build(model, [["video" if frames > 1 else "img", 1]]))
    before, adapter = hooks(model), registry.adapter(family)(model)
    prompt = random_prompt(adapter, batch=3, images=2, frames=frames, image_size=(84, 140), text_tokens=32, seed=3)
    runner = Runner(adapter, prompt)
    with torch.inference_mode():
        subject = runner.prepare(pipeline)
        if subject.oracle is None:
            old = tiny.family(family).pooled_videos and frames == 5 and transformers.__version__ < "5.18"
            assert old or adapter.masks_outside or adapter.encoder.by_rows
            assert ("before transformers 5.18" if old else "makes masks or row breaks") in subject.no_oracle
            return
        assert (
            subject.layers[-1]
            <= len(subject.oracle.values)
            < int(placeholders(adapter, prompt.inputs["input_ids"]).sum())
        )
        assert int(placeholders(adapter, subject.oracle.ids).sum()) == len(subject.oracle.values)
        assert len(subject.oracle.deep) == tiny.family(family).deepstack
        ours = runner.sample(pipeline)[1][:, -8:]
        ideal = runner.sample(None, subject.oracle)[1][:, -8:]
        dense = runner.sample()[1][:, -8:]
    assert torch.equal(ours, ideal)
    # What a state forgets may not show in eight tokens.
    assert not torch.equal(ours, dense) or tiny.family(family).states
    assert hooks(model) == before and adapter.features["image"] not in vars(adapter.outer)


def placeholders(adapter: Any, ids: torch.Tensor) -> torch.Tensor:
    return torch.isin(ids, torch.tensor(list(adapter.placeholders.values())))


def test_pictures_of_a_bench() -> None:
    model = tiny.make("qwen3_vl")
    measured = bench(model, ["uniform:3"], batch=2, images=2, frames=4, image_size=(56, 84), **SHORT)
    assert [each.visual_tokens for each in measured.rows] == [2 * 2 * 2 * 6, 2 * 2 * 3]
    assert measured.rows[1].no_oracle is None and measured.conditions["image_size"] == (56, 84)
    assert measured.conditions["prompt"] == f"ids [2, {24 + 5}], pixel_values_videos [{2 * 2 * 2 * 24}, 1176]"
    with pytest.raises(
        ConfigError, match=r"text_tokens must be at least 4, not 3: .* of the 4 images, crops or frames"
    ):
        bench(model, [], images=2, frames=4, image_size=56, text_tokens=3)
    with pytest.raises(UnsupportedError, match="anyres: 2x2, but all pipelines are measured on the same prompt"):
        bench(tiny.make("llava_next"), [{"anyres": "2x2", "stages": []}])
    with pytest.raises(UnsupportedError, match="llava takes no video"):
        bench(tiny.llava(), [], frames=2)


def samples(*ttft: float) -> list[Sample]:
    return [Sample(vision=1, stages=0.5, ttft=t, decode=2, end_to_end=t + 10, peak_bytes=100 * int(t)) for t in ttft]


def test_ratios_are_paired() -> None:
    """Rounds get slower tenfold; ratios of medians would be the same, their spread would not."""
    dense = Subject(None, (100,), (800,), None, None, samples=samples(20, 200, 2000))
    own = Subject(
        load("none"),
        (40,),
        (400,),
        object(),
        None,
        samples=samples(11, 110, 1100),
        ideal=samples(10, 100, 1000),  # type: ignore[arg-type]
    )
    found = row(own, dense)
    assert found.to_dense["ttft"] == Spread(0.55, 0.55, 0.55)
    assert found.to_oracle["ttft"].median == found.to_oracle["ttft"].high == pytest.approx(1.1)
    assert found.overhead == Spread(10, 5.5, 55)
    # 60 tokens gain 100 ms, so 10 ms are 6 tokens.
    assert found.break_even == 6
    assert found.peak_bytes == 110_000
    assert found.milliseconds["ttft"] == Spread(110, 60.5, 605)


def test_a_part_that_is_missing() -> None:
    once = [replace(sample, decode=None) for sample in samples(1, 2)]
    assert ratios(once, once)["decode"] is None
    assert ratios(once, once)["ttft"] == Spread(1, 1, 1)


@pytest.mark.parametrize(
    ("overhead", "gain", "dropped", "tokens"),
    [(1.0, 10.0, 100, 10), (1.01, 10.0, 100, 11), (-1.0, 10.0, 100, 1), (1.0, 0.0, 100, None), (1.0, -1.0, 100, None), (1.0, 1.0, 0, None)],
)  # fmt: skip
def test_break_even(overhead: float, gain: float, dropped: int, tokens: int | None) -> None:
    assert break_even(overhead, gain, dropped) == tokens


def test_spread() -> None:
    assert spread([4, 1, 2, 3, 5]) == Spread(3, 2, 4)
    assert spread([7]) == Spread(7, 7, 7)


def test_one_new_token_has_no_decode() -> None:
    found = bench(tiny.llava(), [], text_tokens=1, new_tokens=1, repeats=1, warmup=0)
    assert found.rows[0].milliseconds["decode"] is None and found.drift is None


def test_stages_that_stood_aside_are_named() -> None:
    row = bench(tiny.llava(), ["flexprefill"], **SHORT).rows[1]
    assert "fewer than min_len 8192" in row.stood_aside["flexprefill"]
    assert any(
        note.startswith("flexprefill: flexprefill stood aside, the prompt has")
        for note in notes(Bench((row,), None, {}))
    )


@pytest.mark.parametrize("stages", [[], [{"random": {"keep": 5}}]], ids=["alone", "behind a stage"])
def test_a_contrast_is_timed_with_its_tower(stages: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Clock, "between", lambda self, start, end: 1.0)
    pipeline = {"stages": stages, "contrast": {"stages": [{"random": {"keep": 1}}]}}
    dense, found = bench(tiny.llava(), [pipeline], **SHORT).rows
    assert (dense.milliseconds["vision"].median, found.milliseconds["vision"].median) == (1, 2)
    assert "contrast runs the model once more" in str(found.no_oracle)


def test_the_share_of_attention_that_sparse_stages_computed_is_told() -> None:
    row = bench(tiny.llava(), [[{"static_sparse": {"min_len": 0, "dense_layers": [1]}}]], **SHORT).rows[1]
    assert row.density == {"static_sparse": 1.0} and not row.stood_aside, "one block"
    said = "static_sparse: static_sparse computed 100.0% of its layers' attention at prefill"
    assert said in notes(Bench((row,), None, {}))
    stages = [StageTrace(name, "attention", [], [], [], densities=[torch.tensor(x)]) for name, x in SHARES]
    assert Trace(stages).density == pytest.approx({"a": 0.375, "b": 0.125})


def test_a_failing_stage_leaves_no_hooks() -> None:
    model = used()
    before, config = hooks(model), model.generation_config
    with pytest.raises(ZeroDivisionError):
        bench(model, [Failing(keep=4)], **SHORT)
    assert hooks(model) == before and model.generation_config is config


def test_bad_input() -> None:
    model = tiny.llava()
    with pytest.raises(ConfigError, match="new_tokens must be at least 1, not 0"):
        bench(model, [], new_tokens=0)
    with pytest.raises(ConfigError, match="warmup must be at least 0"):
        bench(model, [], warmup=-1)
    with pytest.raises(UnsupportedError, match="wrapped already"):
        bench(wrap(model, "fastervlm:4"), [])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny.llava().save_pretrained(path)
    return path


def test_models(folder: Path, tmp_path: Path) -> None:
    assert torch.equal(models.load(str(folder)).lm_head.weight, tiny.llava().lm_head.weight)
    tiny.llava().config.save_pretrained(tmp_path)
    state = torch.random.get_rng_state()
    one, two = (models.load(str(tmp_path), dtype="bfloat16", random_weights=True, seed=1) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert one.dtype == torch.bfloat16 and not one.training
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b) and a.isfinite().all()
    with pytest.raises(ConfigError, match="--random-weights builds"):
        models.load("nobody/nothing")


def test_command_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--repeats", "1", "--warmup", "0", "--new-tokens", "2", "--text-tokens", "3"]
    argv = ["bench", str(folder), "fastervlm:4", "--device", "cpu", "--threads", "1", "--random-weights", *few]
    assert main([*argv, "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert [each["visual_tokens"] for each in plain["rows"]] == [16, 4]
    assert plain["weights"] == "random" and plain["conditions"]["threads"].startswith("1 of")
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "TTFT / oracle" in out and "fastervlm:4" in out and "over" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--device", "toaster"], "'toaster' is not a device"),
        (["--device", "meta"], "device 'meta' is not supported"),
        (["--device", "cuda:99"], "device 'cuda:99' is not here"),
        (["--dtype", "float31"], "unknown dtype 'float31', did you mean 'float32'?"),
        (["--threads", "0"], "threads must be at least 1"),
        (["--repeats", "0"], "repeats must be at least 1"),
        (["--batch", "0"], "batch must be at least 1"),
        (["fastervm:4"], "fastervm"),
    ],
)
def test_command_refuses(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "./nowhere", *argv]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error


def test_command_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    assert capsys.readouterr().out.count("vtoken bench ") >= 4
