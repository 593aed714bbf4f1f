"""The search: spaces, samples, the three qualities, early stops, resuming, and pipelines that come out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from PIL import Image
from tiny_processors import save

pytest.importorskip("optuna")

import optuna
from optuna.trial import TrialState

from vtoken import config, wrapped
from vtoken.cli import main
from vtoken.commands import tune as command
from vtoken.errors import ConfigError, VtokenError
from vtoken.evals import processors
from vtoken.evals.cost.flops import account
from vtoken.evals.lmms.generation import TextGenerator
from vtoken.evals.lmms.prompts import encode
from vtoken.evals.shared import bars, models
from vtoken.evals.shared.options import Workload
from vtoken.evals.tune import samples
from vtoken.evals.tune import search as searching
from vtoken.evals.tune.cost import shape, share
from vtoken.evals.tune.quality import Judge
from vtoken.evals.tune.search import Search
from vtoken.evals.tune.space import Space

FOLDERS = tiny.each("varlen", by_rows=False)
LIKE = Workload(text_tokens=8, new_tokens=1)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, pictures and a JSONL file about them."""
    folder = tmp_path_factory.mktemp("tune")
    rng = torch.Generator().manual_seed(0)
    lines = []
    for k in range(6):
        pixels = torch.randint(256, (64, 64, 3), generator=rng, dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(folder / f"{k}.png")
        lines.append({"image": f"{k}.png", "question": f"w{20 + k} w{40 + k}", "answer": f"w{k}"})
    (folder / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for family in FOLDERS:
        save(family, folder / family)
    return folder


@pytest.fixture(scope="module")
def generators(place: Path) -> dict[str, TextGenerator]:
    return {
        family: TextGenerator(models.load(str(place / family), device="cpu"), processors.load(place / family))
        for family in FOLDERS
    }


@pytest.fixture(scope="module")
def asked(place: Path) -> list[samples.Sample]:
    return samples.load(str(place / "own.jsonl"), None)


@pytest.mark.parametrize("family", tiny.each("anyres", "by_rows", "crops_sized", "split", "varlen"))
def test_the_prefill_of_a_sample_is_as_long_as_its_prompt(
    family: str, place: Path, asked: list[samples.Sample]
) -> None:
    """Newlines and breaks count once, and pictures are as large as the processor makes them."""
    save(family, place / "own" / family)
    source = str(place / "own" / family)
    generator = TextGenerator(models.load(source, device="cpu"), processors.load(source))
    like = shape(generator, asked[0])
    seen = account(generator.model.config, **vars(like))
    ids = encode(generator.processor, [asked[0].prompt], generator.model)["input_ids"]
    assert seen.text_tokens + seen.visual_entry + seen.newline_entry == ids.shape[1]


def space(**alternatives: Any) -> Space:
    return Space(alternatives=alternatives)


ONE = space(random=[{"random": {"keep": {"low": 1, "high": 8}}}])


def search(judge: Judge, folder: Path, given: Space = ONE, **changed: Any) -> Search:
    options = {"objective": "flops", "keep": 0.9, "first": 2, "seed": 0, "about": {"model": "tiny"}, "like": LIKE}
    return Search(judge=judge, space=given, folder=folder, **{**options, **changed})


class Scripted(Judge):
    """A judge whose scores are given: pipeline's budget -> scores."""

    def __init__(self, generator: TextGenerator, scores: dict[int, list[float]]) -> None:
        self.generator, self.by_keep, self.measure, self.dense = generator, scores, "agreement", 1.0
        self.samples = [None] * len(next(iter(scores.values())))
        self.asked: list[tuple[int, int]] = []

    def scores(self, pipeline: Any) -> Any:
        keep = pipeline.stages[0].keep.plain()
        for k, score in enumerate(self.by_keep[keep], start=1):
            self.asked.append((keep, k))
            yield [score]


def test_a_draw_fills_every_range() -> None:
    text = """
alternatives:
  both:
    - random: {keep: {values: [64, 25%, {total: 640}]}, seed: {low: 1, high: 5, step: 2}}
    - pool
positions: {values: [original, compact]}
"""
    given = Space(**yaml.safe_load(text))
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = [given.suggest(study.ask()) for _ in range(60)]
    assert set(study.trials[0].params) == {"both/positions", "both/0.random.keep", "both/0.random.seed"}
    seen = {(str(p.stages[0].keep.plain()), p.stages[0].seed, p.positions) for p in drawn}
    assert {keep for keep, _, _ in seen} == {"64", "25%", "{'total': 640}"}
    assert {seed for _, seed, _ in seen} == {1, 3, 5}
    assert {positions for *_, positions in seen} == {"original", "compact"}
    assert all([stage.name for stage in p.stages] == ["random", "pool"] for p in drawn)


WRONG = [
    ("alternative: {}\n", "unknown key 'alternative', did you mean 'alternatives'"),
    ("alternatives: {}\n", "name at least one list of stages"),
    ("alternatives: {a: [rnadom: {keep: 4}]}\n", "alternative 'a': unknown stage 'rnadom', did you mean 'random'"),
    ("alternatives: {a: [random: {keep: {low: 9, high: 1}}]}\n", "a/0.random.keep: a range is"),
    ("alternatives: {a: [random: {keep: {low: 0, high: 8}}]}\n", "alternative 'a': stage 'random': option 'keep'"),
    ("alternatives: {a: [random: {keep: {low: 1, high: 8, log: true, step: 2}}]}\n", "a/0.random.keep: a range is"),
    ("alternatives: {a: [random: {keep: {values: []}}]}\n", "a/0.random.keep: a range is"),
]


@pytest.mark.parametrize(("text", "message"), WRONG)
def test_a_space_that_cannot_be_used(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "space.yaml").write_text(text)
    assert main(["tune", "tiny-llava", "--space", str(tmp_path / "space.yaml"), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


LINES = [
    ('{"image": "a.png"}', "own.jsonl, line 1: write"),
    ('{"image": "a.png", "question": "q", "anwser": "a"}', "did you mean 'answer'"),
    ('{"image": "a.png", "question": 3}', "own.jsonl, line 1: write"),
    ("{", "own.jsonl, line 1: not valid JSON"),
    ("", "is empty"),
]


@pytest.mark.parametrize(("line", "message"), LINES)
def test_lines_that_cannot_be_used(line: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").write_text(line + "\n")
    with pytest.raises(ConfigError, match=message):
        samples.load(str(tmp_path / "own.jsonl"), None)


def test_samples(place: Path, asked: list[samples.Sample]) -> None:
    assert [s.answer for s in asked] == [f"w{k}" for k in range(6)]
    assert samples.fingerprint(asked) == samples.fingerprint(samples.load(str(place / "own.jsonl"), None))
    assert samples.fingerprint(asked) != samples.fingerprint(asked[::-1])
    few = samples.load("reference", 3)
    assert len(few) == 3 and all(s.answer and s.prompt.images for s in few)


def test_data_are_what_other_commands_take(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder with questions.jsonl, or a file of any name; tasks have no path."""
    for name in ("questions.jsonl", "mine.txt"):
        (place / name).write_text((place / "own.jsonl").read_text())
    want = samples.fingerprint(samples.load(str(place / "own.jsonl"), None))
    for given in (place, place / "questions.jsonl", place / "mine.txt"):
        assert samples.tasks(str(given), None) is None
        assert samples.fingerprint(samples.load(str(given), None)) == want
    monkeypatch.chdir(tmp_path)
    (tmp_path / "space.yaml").write_text("alternatives: {a: [random: {keep: 4}]}\n")
    for given in ("no/such", "none.jsonl", "./"):
        assert main(["tune", "tiny-llava", "--space", "space.yaml", "--data", given]) == 2
        assert f"no data '{given}'; give `reference`" in capsys.readouterr().err


def test_prompts_of_tasks_are_those_the_model_is_asked() -> None:
    pytest.importorskip("lmms_eval")
    heard = samples.tasks("vtoken_glyph_qa", 3).samples
    known = samples.load("reference", 3)
    for ours, theirs in zip(heard, known, strict=True):
        assert ours.answer is None and ours.options["max_new_tokens"] == 8
        texts = [
            [part["text"] for part in s.prompt.messages[-1]["content"] if part["type"] == "text"]
            for s in (ours, theirs)
        ]
        assert texts[0] == texts[1]
        assert ours.prompt.images[0].tobytes() == theirs.prompt.images[0].tobytes()


@pytest.mark.parametrize("family", FOLDERS)
@pytest.mark.parametrize("measure", ["agreement", "cosine"])
def test_what_drops_nothing_keeps_everything(
    family: str, measure: Any, generators: dict[str, TextGenerator], asked: list[samples.Sample]
) -> None:
    judge = Judge(generators[family], asked, measure, batch_size=4)
    found = [score for batch in judge.scores(config.load("random:100%")) for score in batch]
    assert judge.dense == 1 and found == pytest.approx([1.0] * 6, abs=1e-5)
    assert generators[family].pipeline is None


@pytest.mark.parametrize("family", FOLDERS)
def test_cosine_is_of_the_last_hidden_state(
    family: str, generators: dict[str, TextGenerator], asked: list[samples.Sample]
) -> None:
    generator, pipeline = generators[family], config.load("random:3")

    def last(batch: list[samples.Sample]) -> torch.Tensor:
        inputs = encode(generator.processor, [s.prompt for s in batch], generator.model)
        with torch.inference_mode():
            return generator.model.model(**inputs).last_hidden_state[:, -1].double()

    dense = torch.cat([last([sample]) for sample in asked])
    with wrapped(generator.model, pipeline):
        pruned = torch.cat([last([sample]) for sample in asked])
    want = (dense * pruned).sum(1) / (dense.norm(dim=1) * pruned.norm(dim=1))
    for size in (1, 4):
        judge = Judge(generator, asked, "cosine", size)
        found = [score for batch in judge.scores(pipeline) for score in batch]
        assert found == pytest.approx(want.tolist(), abs=1e-5)
    assert want.max() < 0.99999


def test_accuracy_is_against_the_answers(generators: dict[str, TextGenerator], asked: list[samples.Sample]) -> None:
    said = Judge(generators["llava"], asked, "agreement")._reference
    known = [
        samples.Sample(s.prompt, f" {text.upper()}" if k else "no", s.options)
        for k, (s, text) in enumerate(zip(asked, said, strict=True))
    ]
    judge = Judge(generators["llava"], known, "accuracy")
    assert judge.dense == pytest.approx(5 / 6)
    assert [s for batch in judge.scores(config.load("random:100%")) for s in batch] == [0, 1, 1, 1, 1, 1]
    with pytest.raises(ConfigError, match="answers nothing right"):
        assert Judge(generators["llava"], [samples.Sample(asked[0].prompt, "none of this", {})], "accuracy").dense


def test_cost_is_a_share_of_dense(generators: dict[str, TextGenerator]) -> None:
    generator, pipeline = generators["llava"], config.load("random:2")
    options = {"text_tokens": 8, "new_tokens": 1}
    own, dense = (account(generator.model.config, p, **options).total for p in (pipeline, None))
    assert share(generator, pipeline, "flops", LIKE) == pytest.approx(own / dense) and own < dense
    assert share(generator, pipeline, "ttft", LIKE) > 0


def test_trials_are_stopped_by_what_they_show_first(generators: dict[str, TextGenerator], tmp_path: Path) -> None:
    good, late, bad = [1.0] * 6, [1.0] * 4 + [0.0] * 2, [0.0] * 6
    judge = Scripted(generators["llava"], {1: bad, 2: late, 4: good})
    values = space(random=[{"random": {"keep": {"values": [1, 2, 4]}}}])
    found = search(judge, tmp_path, values, keep=0.5)
    for text in ("4", "2", "1"):
        found.study.enqueue_trial({"random/0.random.keep": text + "\n...\n"})
    found.run(3)
    assert [t.state for t in found.study.trials] == [TrialState.COMPLETE, TrialState.COMPLETE, TrialState.PRUNED]
    assert [t.values[0] for t in found.study.trials[:2]] == pytest.approx([1, 4 / 6])
    assert judge.asked.count((1, 2)) == 1 and (1, 3) not in judge.asked
    assert found.study.trials[2].user_attrs["stopped"] == "0.000 after 2 samples, below the median"
    strict = search(judge, tmp_path / "strict", values, keep=0.9)  # type: ignore[arg-type]
    strict.study.enqueue_trial({"random/0.random.keep": "2\n...\n"})
    judge.asked.clear()
    strict.run(1)
    # One wrong of six is below 90 %: the sixth need not be asked.
    assert judge.asked == [(2, k) for k in range(1, 6)]
    assert "cannot reach the floor" in strict.study.trials[0].user_attrs["stopped"]


def test_a_study_goes_on(generators: dict[str, TextGenerator], asked: list[samples.Sample], tmp_path: Path) -> None:
    judge = Judge(generators["llava"], asked, "cosine", 6)
    first = search(judge, tmp_path, keep=0.1)
    first.run(3)
    before = first.to_dict()["trials"]
    abandoned = first.study.ask()  # A process that was killed leaves it so.
    again = search(judge, tmp_path, keep=0.1)
    again.run(5)
    assert again.study.trials[abandoned.number].state == TrialState.FAIL
    tried = again.to_dict()["trials"]
    assert [t["number"] for t in tried] == [0, 1, 2, 4, 5]
    assert tried[:3] == before
    again.run(5)
    assert len(again.study.trials) == 6
    for change in ({"objective": "ttft"}, {"keep": 0.2}, {"about": {"model": "other"}}):
        with pytest.raises(ConfigError, match=f"a study with another {next(iter(change)).replace('about', 'model')}"):
            search(judge, tmp_path, **{"keep": 0.1, **change})


def test_another_study_is_refused_before_anything_is_asked(
    generators: dict[str, TextGenerator], asked: list[samples.Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One in which nothing was tried yet is no other study."""
    wrong = samples.Sample(asked[0].prompt, "none of this", {})
    with pytest.raises(ConfigError, match="answers nothing right"):
        search(Judge(generators["llava"], [wrong], "accuracy"), tmp_path).run(1)
    search(Judge(generators["llava"], asked, "cosine"), tmp_path, keep=0.1).run(1)
    monkeypatch.setattr(Judge, "_hidden", lambda *_: pytest.fail("the dense model was asked"))
    with pytest.raises(ConfigError, match="a study with another keep; give another folder"):
        search(Judge(generators["llava"], asked, "cosine"), tmp_path, keep=0.2)


def test_seeds_decide(generators: dict[str, TextGenerator], asked: list[samples.Sample], tmp_path: Path) -> None:
    judge = Judge(generators["llava"], asked[:2], "cosine", 2)
    found = [search(judge, tmp_path / str(k), seed=seed, keep=0.1) for k, seed in enumerate((3, 3, 4))]
    for each in found:
        each.run(4)
    a, b, c = ([t["pipeline"] for t in each.to_dict()["trials"]] for each in found)
    assert a == b != c


def test_the_front_is_written(generators: dict[str, TextGenerator], tmp_path: Path) -> None:
    judge = Scripted(generators["llava"], {1: [0.0] * 3 + [1.0], 2: [1.0] * 4, 4: [1.0] * 4, 6: [0.0] + [1.0] * 3})
    values = space(random=[{"random": {"keep": {"values": [1, 2, 4, 6]}}}])
    found = search(judge, tmp_path, values, keep=0.25, first=4)  # type: ignore[arg-type]
    for keep in (1, 2, 4, 6):
        found.study.enqueue_trial({"random/0.random.keep": f"{keep}\n...\n"})
    found.run(4)
    files = found.write()
    # 4 and 6 are dearer than 2 and no better; all reach the floor, so the cheapest comes first.
    assert [config.load(file).stages[0].keep.plain() for file in files] == [1, 2]
    assert "at or above the floor 0.2500" in files[0].read_text().splitlines()[0]
    kept = json.loads((tmp_path / "tune.json").read_text())
    assert kept["best"] == [0, 1] and len(kept["trials"]) == 4
    found.keep = 0.5
    assert [config.load(file).stages[0].keep.plain() for file in found.write()] == [2, 1]


@pytest.mark.parametrize("objective", ["flops", "ttft"])
def test_what_is_no_cheaper_than_dense_is_not_recommended(
    objective: Any, generators: dict[str, TextGenerator], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """However good it is; a tie is no gain either."""
    costs = {1: 0.5, 2: 1.0, 4: 1.2}
    monkeypatch.setattr(searching, "share", lambda generator, pipeline, *_: costs[pipeline.stages[0].keep.plain()])
    judge = Scripted(generators["llava"], {1: [1.0, 0.0], 2: [1.0, 1.0], 4: [1.0, 1.0]})
    values = space(random=[{"random": {"keep": {"values": [1, 2, 4]}}}])
    for tried, kept in (((1, 2, 4), [1]), ((2, 4), [])):
        found = search(judge, tmp_path / str(len(tried)), values, keep=0.3, objective=objective)  # type: ignore[arg-type]
        for keep in tried:
            found.study.enqueue_trial({"random/0.random.keep": f"{keep}\n...\n"})
        found.run(len(tried))
        files = found.write()
        assert [config.load(file).stages[0].keep.plain() for file in files] == kept
        assert [found.study.trials[k].values[1] for k in found.to_dict()["no_gain"]] == [1.0, 1.2]
        command._print(found, files)
        printed = capsys.readouterr().out
        word = "faster" if objective == "ttft" else "cheaper"
        assert f"2 trials were not {word} than dense" in printed
        assert (f"no trial was {word} than dense: take the stock model" in printed) == (not kept)
        assert ("no time was taken" in printed) == (objective == "flops" and bool(kept))


def test_a_model_that_can_serve_nothing(
    generators: dict[str, TextGenerator], asked: list[samples.Sample], tmp_path: Path
) -> None:
    judge = Judge(generators[FOLDERS[-1]], asked[:1], "agreement")
    refused = space(zip=[{"fastervlm": {"keep": 2}}], far=[{"fastv": {"layer": 99, "keep": 2}}])
    found = search(judge, tmp_path, Space(alternatives={"far": refused.alternatives["far"]}))
    with pytest.raises(VtokenError, match="serve none of the pipelines tried"):
        found.run(2)
    assert judge.generator.pipeline is None


def test_the_command(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bars, "EVERY", 0)
    (tmp_path / "space.yaml").write_text("alternatives: {a: [random: {keep: {low: 1, high: 8}}]}\n")
    words = ["tune", str(place / "llava"), "--data", str(place / "own.jsonl"), "--space", str(tmp_path / "space.yaml")]
    assert main([*words, "--trials", "2", "--keep-accuracy", "10%", "--out", str(tmp_path / "o"), "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    lines = {line.split("s ", 1)[1] for line in err.splitlines()}
    assert {"   0%  dense: 5 of 6", "  50%  1 of 2 trials, random", "  50%  random: 5 of 6"} <= lines
    assert "it/s" not in err and "\r" not in err
    assert found["schema"] == "vtoken-tune/1" and len(found["trials"]) == 2 and found["floor"] == pytest.approx(0.1)
