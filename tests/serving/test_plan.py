"""What of a pipeline vLLM can serve, and how many tokens it leaves: no vLLM is needed to know."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from vtoken import config, registry
from vtoken.errors import ConfigError, UnsupportedError
from vtoken.hooks.state.run import ImageLayout
from vtoken.serving import plan
from vtoken.serving.decide import decide
from vtoken.stages import Fact, spec_of

WIDTH = 12
CUT = torch.tensor([0] * 16 + [1, 1, 1, 1, 2, 2] * 4)  # crops of 4 x 4, the second half padding
LAYOUTS = {
    "a square": ImageLayout(((1, 6, 6),)),
    "a line": ImageLayout(((1, 1, 7),)),
    "a token": ImageLayout(((1, 1, 1),)),
    "crops": ImageLayout(((1, 4, 4), (1, 4, 6)), CUT),
    "a video": ImageLayout(((3, 2, 4),), torch.arange(3).repeat_interleave(8)),
}
KEEPS = (1, 5, "25%", {"per_crop": 3}, {"per_frame": 3}, {"per_frame": 3, "key_weight": 2}, 999)
OPTIONS = {
    "pool": [{"size": 2}, {"size": 3}],
    "damro_filter": [{"outliers": 3, "each_segment": each} for each in (False, True)],
}


def config_with(pipeline):
    return SimpleNamespace(vtoken=pipeline)


def stages():
    """Every stage of site tokens at several budgets."""
    for name in registry.stages():
        cls = registry.stage(name)
        if cls.site != "tokens":
            continue
        for options in OPTIONS.get(name, [{"keep": keep} for keep in KEEPS]):
            try:
                yield cls(**options)
            except ValueError:
                continue


def pipelines(family):
    """What is served of them, alone and behind another."""
    positions = plan.FAMILIES[family].positions
    first = config.load("uniform:50%").stages
    second = config.load([{"uniform": {"keep": {"per_crop": 9}}}]).stages
    for each in stages():
        for before in ((), first, second):
            pipeline = config.Pipeline("x", positions, (*before, each), newline="drop")
            if not plan.refusal(each, family, before):
                yield pipeline


def facts(layouts, seed):
    """What a stage reads, as `decide` asks for it."""
    g, total = torch.Generator().manual_seed(seed), sum(layout.tokens for layout in layouts)

    def read(need: Fact):
        if need.name == "text":
            return [torch.randn(5, WIDTH, generator=g) for _ in layouts]
        one = spec_of(need.name, "tokens").holds == "one"
        return torch.rand(total, generator=g) if one else torch.randn(total, WIDTH, generator=g)

    return read


@pytest.mark.parametrize("family", plan.FAMILIES)
def test_what_is_served_leaves_what_was_planned(family):
    """`decide` compares, stage by stage; so does this, with pictures that show little too."""
    crops = plan.FAMILIES[family].crops
    layouts = [layout for name, layout in LAYOUTS.items() if (name == "crops") == crops]
    seen = set()
    for pipeline in pipelines(family):
        for seed in range(2):
            x = torch.randn(sum(each.tokens for each in layouts), WIDTH, generator=torch.Generator().manual_seed(seed))
            x = x[torch.arange(len(x)) % 3] + 0.01 * x if seed else x
            left, history = decide(pipeline, x, layouts, facts(layouts, seed))
            assert history.counts == tuple(plan.kept(pipeline, layout) for layout in layouts)
            assert len(left) == sum(history.counts)
        seen |= {stage.name for stage in pipeline.stages}
    assert {"fastervlm", "visionzip", "divprune", "hired"} <= seen


def test_a_stage_that_leaves_another_number_is_named(monkeypatch):
    stage = registry.stage("fastervlm")
    monkeypatch.setattr(stage, "expected_counts", lambda self, lengths, *rest: tuple(n - 1 for n in lengths))
    layout = LAYOUTS["a square"]
    with pytest.raises(RuntimeError, match="stage fastervlm left"):
        decide(config.load("fastervlm:5"), torch.randn(36, WIDTH), [layout], facts([layout], 0))


def test_small_pictures_are_left_alone():
    pipeline = config.load({"stages": ["fastervlm:5"], "min_visual_tokens": 20})
    layouts = [LAYOUTS["a line"], LAYOUTS["a square"]]
    _, history = decide(pipeline, torch.randn(43, WIDTH), layouts, facts(layouts, 0))
    assert history.counts == (7, 5) == tuple(plan.kept(pipeline, layout) for layout in layouts)


REFUSED = {
    "fastv-64": ("site decoder", "vtoken serve"),
    "flexprefill-90": ("site attention", "vtoken serve"),
    "snapkv-64": ("site cache", "vtoken serve"),
    "frames_uniform:8": ("site frames", "--media-io-kwargs"),
    "tome-93": ("merges inside layers", "vtoken serve"),
    "ipcv-qwen2-vl-35": ("estimates patches", "vtoken serve"),
    "prumerge-adaptive": ("token count is not known before", "give it a budget"),
    "dcode:64": ("token count is not known before", "leave the stage out"),
    "random-64": ("positions: original", "random-64,positions=compact"),
    "fastervlm:64": ("positions: original", '{"vtoken": "fastervlm:64,positions=compact"}'),
    "fastervlm-next-160": ("anyres: 2x2", "leave it out"),
}


@pytest.mark.parametrize("written", REFUSED)
def test_refusals_give_reason_and_mend(written):
    with pytest.raises(UnsupportedError) as caught:
        plan.check(config.load(written), "llava")
    assert all(part in str(caught.value) for part in REFUSED[written])


def test_budgets_shared_by_pictures_are_refused():
    pipeline = config.load({"positions": "compact", "stages": [{"fastervlm": {"keep": {"total": 64}}}]})
    with pytest.raises(UnsupportedError, match=r"shared out among the pictures .* write a count"):
        plan.check(pipeline, "llava")


def some(**traits):
    """A family with these traits."""
    return next(n for n, held in plan.FAMILIES.items() if all(getattr(held, k) == v for k, v in traits.items()))


@pytest.mark.parametrize(
    ("traits", "written", "words"),
    [
        ({"newlines": True}, {"positions": "compact", "stages": ["fastervlm:64"]}, "newline: keep or newline: drop"),
        ({"crops": True}, {"positions": "compact", "newline": "drop", "stages": ["flowcut:64"]}, "unpadding"),
        ({"positions": "original"}, "fastervlm-64", "fastervlm-64,positions=original"),
        ({"positions": "original"}, "flowcut:64", "inside the vision tower"),
        ({"text": False}, "cdpruner:64", "reads the prompt"),
        ({"crops": True}, {"anyres": "2x2", "stages": []}, 'a stage that keeps everything ("uniform:100%")'),
    ],
    ids=repr,
)
def test_refusals_of_a_family(traits, written, words):
    with pytest.raises(UnsupportedError) as caught:
        plan.check(config.load(written), some(**traits))
    assert words in str(caught.value)


def test_other_families_are_refused():
    with pytest.raises(UnsupportedError, match="unknown family 'idefics3'"):
        plan.check(config.load("fastervlm-64"), "idefics3")


def test_what_the_refusal_writes_is_served():
    tried = 0
    policies = {"positions": "original", "min_visual_tokens": 3, "stages": [{"visionzip": {"keep": 64, "heads": 4}}]}
    for written in (*registry.presets(), "fastervlm:64", "random:25%,seed=3", policies):
        pipeline = config.load(written)
        try:
            plan.check(pipeline, "llava")
        except UnsupportedError as error:
            found = str(error).partition("write --hf-overrides '")[2].removesuffix("'")
            if found:
                mended = plan.pipeline_of(config_with(json.loads(found)["vtoken"]))
                plan.check(mended, "llava")
                assert mended.stages == pipeline.stages and mended.min_visual_tokens == pipeline.min_visual_tokens
                tried += 1
    assert tried > 3


@pytest.mark.parametrize(
    "given",
    ["fastervlm-64", "fastervlm:64", {"stages": ["fastervlm:64"]}, ["fastervlm:64"], [{"fastervlm": {"keep": 64}}]],
    ids=repr,
)
def test_a_pipeline_is_read_from_the_config(given):
    (stage,) = plan.pipeline_of(config_with(given)).stages
    assert stage.name == "fastervlm" and stage.keep.tokens == 64


@pytest.mark.parametrize(
    "config",
    [SimpleNamespace(), config_with(None), config_with("none"), config_with([]), config_with("none,positions=compact")],
    ids=repr,
)
def test_no_pipeline(config):
    assert plan.pipeline_of(config) is None


@pytest.mark.parametrize("inner", ["text_config", "vision_config"])
def test_a_pipeline_in_an_inner_config_is_not_forgotten(inner):
    with pytest.raises(ConfigError, match=f"`vtoken` stands in {inner}.* write it beside"):
        plan.pipeline_of(SimpleNamespace(**{inner: config_with("fastervlm-64")}))
    both = SimpleNamespace(vtoken="none", **{inner: config_with("fastervlm-64")})
    assert plan.pipeline_of(both) is None


def test_a_pipeline_among_the_processors_options_is_not_forgotten():
    for options in (None, {}, {"min_pixels": 4}):
        plan.check_processor_options(options)
    with pytest.raises(ConfigError, match=r"an engine has one pipeline.*--hf-overrides '\{\"vtoken\": "):
        plan.check_processor_options({"vtoken": {"keep": 32}})


def test_a_crop_grid_without_stages_is_not_forgotten():
    assert plan.pipeline_of(config_with({"anyres": "2x2", "stages": []})) is not None
    everything = {"anyres": "2x2", "newline": "keep", "positions": "compact", "stages": ["uniform:100%"]}
    plan.check(config.load(everything), some(crops=True))


@pytest.mark.parametrize(
    ("given", "words"), [("fastervm-64", "did you mean"), (object(), "plain data"), (3, "not int")]
)
def test_what_does_not_read_says_where_it_stands(given, words):
    with pytest.raises(ConfigError, match="`vtoken` of the model's config: ") as caught:
        plan.pipeline_of(config_with(given))
    assert words in str(caught.value)


def test_fingerprints_tell_pipelines_and_prompts_apart():
    written = ["fastervlm-64", "fastervlm-128", "fastervlm-64,positions=original", "fastervlm-64,min_visual_tokens=9"]
    pipelines = [config.load(each) for each in written]
    assert len({plan.fingerprint(each, [1, 2]) for each in pipelines}) == len(written)
    assert plan.fingerprint(pipelines[0], [1, 2]) == plan.fingerprint(config.load("fastervlm-64"), [3])
    text = config.load("cdpruner:64")
    assert plan.reads_text(text) and not plan.reads_text(pipelines[0])
    assert plan.fingerprint(text, [1, 2]) != plan.fingerprint(text, [3]) == plan.fingerprint(text, [3])


def test_fingerprints_follow_the_files_that_stages_name(tmp_path):
    (path := tmp_path / "thresholds.json").write_text("1")
    marks = []
    for content in ("1", "2"):
        path.write_text(content)
        plan._written.cache_clear()
        stage = registry.stage("dyvte").model_construct(gates=str(path))
        pipeline = config.Pipeline("x", "compact", (stage,))
        marks.append(plan.fingerprint(pipeline, []))
    assert marks[0] != marks[1]


def test_planning_imports_no_torch():
    code = "import sys, vtoken.serving.plan, vtoken.serving.vllm; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
