"""`vtoken bench --break-even`: lengths, the number that follows from paired ratios, and what is said of it."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from batches import behind
from probes import Deep

from vtoken import config
from vtoken.cli import main
from vtoken.errors import ConfigError
from vtoken.evals.shared.configs import builtin, resolve_config
from vtoken.evals.speed import break_even
from vtoken.evals.speed.break_even import Length, Measured, Step, lengths, measure
from vtoken.evals.speed.latency import Bench, Row, Spread, bench

FEW = {"repeats": 2, "warmup": 0, "new_tokens": 2, "text_tokens": 40}


def steps(*highs: float, aside: str | None = None) -> tuple[Step, ...]:
    """One per 100 visual tokens; upper quartiles of the ratio, whose median is below 1."""
    return tuple(
        Step(100 * k, Spread(0.9, 0.8, high), Spread(0.9, 0.8, high), aside) for k, high in enumerate(highs, start=1)
    )


@pytest.mark.parametrize(
    ("highs", "least"),
    [
        ((0.9, 0.9, 0.9), 100),
        ((1.1, 0.9, 0.9), 200),
        ((0.9, 1.1, 0.9), 300),
        ((0.9, 0.9, 1.1), None),
        ((1.0, 1.0, 1.0), None),
        ((1.1, 1.1, 1.1), None),
        ((), None),
    ],
)
def test_it_is_faster_from_there_on(highs: tuple[float, ...], least: int | None) -> None:
    """Three quarters of the rounds at every length from that one on."""
    assert Measured({"a": steps(*highs)}, "", {}).least("a") == least


def test_what_did_nothing_is_not_faster() -> None:
    assert Measured({"a": steps(0.5, 0.5, aside="the prompt is short")}, "", {}).least("a") is None


@pytest.mark.parametrize("name", builtin())
def test_lengths_grow_up_to_the_longest(name: str) -> None:
    found = lengths(resolve_config(name), 4608)
    counts = [each.visual_tokens for each in found]
    # One picture may be so long that there is no second length.
    assert (len(found) > 2 or 2 * counts[0] > 4608) and max(counts) <= 4608 and found[0].images == 1
    assert all(b >= break_even.APART * a for a, b in pairwise(counts))
    with pytest.raises(ConfigError, match="more than the 3 to be tried"):
        lengths(resolve_config(name), 3)


def test_a_refusal_tells_the_shortest_picture() -> None:
    """16 tokens at 112 x 112 pixels, though one of the usual size has 256."""
    with pytest.raises(ConfigError, match="one picture has 16 visual tokens, more than the 9 to be tried"):
        lengths(resolve_config("Qwen/Qwen2.5-VL-7B-Instruct"), 9)


def test_a_given_size_is_the_only_one() -> None:
    found = lengths(resolve_config("Qwen/Qwen2.5-VL-7B-Instruct"), 1100, 448)
    assert found == [Length(256 * k, k, 448) for k in (1, 2, 3, 4)]
    videos = lengths(resolve_config("Qwen/Qwen2.5-VL-7B-Instruct"), 1100, 448, frames=4)
    assert videos == [Length(512 * k, k, 448) for k in (1, 2)]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_lengths_are_what_the_model_sees(family: str) -> None:
    model = tiny.make(family)
    tried = lengths(model.config, 300)[:2]
    with torch.no_grad():
        found = measure(
            model, [config.load("uniform:2"), config.load(Deep(at=behind(family, 1)))], tried, batch=2, **FEW
        )
    assert [[s.visual_tokens for s in each] for each in found.steps.values()] == [[t.visual_tokens for t in tried]] * 2
    assert not found.stopped and found.conditions["repeats"] == 2 and "prompt" not in found.conditions
    guarded = {"min_visual_tokens": tried[-1].visual_tokens, "stages": [{"uniform": {"keep": 2}}]}
    for length in tried:
        shape = {"images": length.images, "image_size": length.image_size}
        dense, own = bench(model, [guarded], oracles=False, **shape, **FEW).rows
        assert dense.visual_entry >= length.visual_tokens and own.oracle is own.no_oracle is None
        assert bool(own.stood_aside) == (length is not tried[-1]), (
            "the number is the one that pipelines are compared with"
        )


def scripted(monkeypatch: pytest.MonkeyPatch, ratios: dict[int, float], fails_at: int | None = None) -> None:
    """A bench of one pipeline whose ratio is given per number of pictures."""

    def measured(model: Any, pipelines: Any, *, images: int, oracles: bool, **_: Any) -> Bench:
        assert not oracles
        if images == fails_at:
            raise torch.OutOfMemoryError("too much")
        same = Spread(*[ratios[images]] * 3)
        about: dict[str, Any] = {"visual_tokens": 1, "visual_entry": 1, "visual_average": 1, "kv_bytes": 1}
        own = {"milliseconds": {}, "peak_bytes": None}
        to_dense = {"ttft": same, "decode": same, "end_to_end": same}
        rows = [Row(p.name, **about, **own, to_dense=to_dense) for p in pipelines]
        return Bench((Row("dense", **about, **own), *rows), None, {"device": "none", "prompt": "long"})

    monkeypatch.setattr(break_even, "bench", measured)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny.llava().save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("ratios", "message"),
    [
        ({1: 1.2, 2: 0.9, 3: 0.8}, "faster than dense from 32 visual tokens on (not at 16); for its "
                                   "file:\nmin_visual_tokens: 32\n"),
        ({1: 0.9, 2: 0.9, 3: 0.8}, "from 16 visual tokens on (the shortest measured); for its "
                                   "file:\nmin_visual_tokens: 16\n"),
        ({1: 1.2, 2: 1.1, 3: 1.0}, "not faster than dense at any length measured, up to 48 visual tokens, the longest "
                                   "measured\n"),
        ({1: 0.5, 2: 0.5, 3: 1.1}, "faster than dense at some lengths, but not at 48 visual tokens, the longest "
                                   "measured\n"),
    ],
)  # fmt: skip
def test_the_command_says_what_to_write(
    ratios: dict[int, float], message: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    scripted(monkeypatch, ratios)
    argv = ["bench", str(folder), "uniform:4", "--break-even", "--up-to", "48", "--device", "cpu"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert message in out and ("min_visual_tokens: " in out) == ("for its file" in message)
    if "for its file" in message:
        line = out.partition("for its file:\n")[2].splitlines()[0]
        file = tmp_path / "mine.yaml"
        file.write_text(f"{line}\nstages: [{{uniform: {{keep: 4}}}}]\n")
        assert f"min_visual_tokens: {config.load(file).min_visual_tokens}" == line
    assert main([*argv, "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    (row,) = plain["break_even"]
    assert row["pipeline"] == "uniform:4" and (row["min_visual_tokens"] is None) == ("for its file" not in message)
    assert [step["visual_tokens"] for step in row["steps"]] == [16, 32, 48]


def test_a_full_memory_ends_it(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    scripted(monkeypatch, {1: 1.2, 2: 0.9}, fails_at=3)
    assert main(["bench", str(folder), "uniform:4", "--break-even", "--up-to", "48", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "min_visual_tokens: 32" in out and "prompts of 48 visual tokens do not fit" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "name some, and leave --images and --media out"),
        (["uniform:4", "--images", "2"], "name some, and leave --images and --media out"),
        (["uniform:4", "--up-to", "0"], "--up-to must be at least 1"),
        (["uniform:4", "--up-to", "9"], "one picture has 16 visual tokens, more than the 9 to be tried"),
        (["uniform:4", "uniform:4"], "two pipelines have one name"),
    ],
)
def test_the_command_refuses(argv: list[str], message: str, folder: Path, capsys: Any) -> None:
    assert main(["bench", str(folder), "--break-even", "--device", "cpu", *argv]) == 2
    assert message in capsys.readouterr().err


def test_stages_that_stood_aside_are_told(folder: Path, capsys: Any) -> None:
    few = ["--repeats", "1", "--warmup", "0", "--new-tokens", "2", "--up-to", "16", "--device", "cpu"]
    assert main(["bench", str(folder), "flexprefill", "--break-even", *few]) == 0
    out = capsys.readouterr().out
    assert "did nothing" in out and "flexprefill: did nothing at any length measured, up to 16 visual tokens" in out
