"""The pipeline in a model's config, whether vLLM can serve it, and how many tokens it keeps: all known before anything
is encoded. Importing this file does not import torch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from hashlib import blake2b
from importlib import import_module
from typing import TYPE_CHECKING, Any

import vtoken
from vtoken.errors import ConfigError, UnsupportedError, about, shown, unknown
from vtoken.serving.family import families

if TYPE_CHECKING:
    from vtoken.config import Pipeline
    from vtoken.hooks.state.run import ImageLayout
    from vtoken.stages import Stage

KEY = "vtoken"  # key in the model's config: --hf-overrides '{"vtoken": "fastervlm-64"}'
ELSEWHERE = "serve the pipeline with transformers (`vtoken serve`), or leave the stage out"

FAMILIES = families()
SITES = {
    "pixels": "vLLM's own processor says how many tokens a picture has before the model sees it; smaller pictures are "
    "what --mm-processor-kwargs '{\"max_pixels\": N}' gives",
    "frames": "frames are chosen before vLLM's model is called; N frames at equal distances are what "
    '--media-io-kwargs \'{"video": {"num_frames": N}}\' takes',
    "decoder": f"vLLM runs all decoder layers of a step on one number of tokens, with one block table; {ELSEWHERE}",
    "attention": f"vLLM's attention kernels read paged caches and do not know which tokens are visual; {ELSEWHERE}",
    "cache": f"blocks of vLLM's KV cache belong to all heads and layers alike; {ELSEWHERE}",
    "decode": f"vLLM's attention kernels read whole block tables at every step; {ELSEWHERE}",
}


def pipeline_of(hf_config: Any) -> Pipeline | None:
    """The pipeline in a model's config or its overrides; None if there is none, or if it does nothing.

    Raises:
        ConfigError: it cannot be read, or is in a part of the config that vLLM's models do not read.
    """
    given = getattr(hf_config, KEY, None)
    if given is None:
        for inner in ("text_config", "vision_config"):
            if getattr(getattr(hf_config, inner, None), KEY, None) is not None:
                raise ConfigError(f"`{KEY}` stands in {inner} of the model's config; write it beside, not inside")
        return None
    with about("`vtoken` of the model's config"):
        try:
            written = json.dumps(given)
        except TypeError:
            raise ConfigError(f"write a preset, a short form, a path or plain data, not {shown(given)}") from None
        found = _load(written)
    return found if _acts(found) else None


def _acts(pipeline: Pipeline) -> bool:
    return bool(pipeline.stages or pipeline.contrast) or pipeline.anyres != "model"


def options(pipeline: Pipeline, given: Any, model_config: Any) -> list[str]:
    """The options to append to `vllm serve MODEL` for a pipeline that was written as `given`.

    Raises:
        UnsupportedError: vLLM cannot serve it.
    """
    family: str = model_config.model_type
    if not _acts(pipeline):
        return []
    check_model(pipeline, family, model_config)
    pictures = ["--limit-mm-per-prompt", json.dumps({"video": 0})] if pictures_only(pipeline, family) else []
    return ["--hf-overrides", json.dumps({KEY: given}), *pictures]


def check_processor_options(options: Mapping[str, Any] | None) -> None:
    """Refuses a pipeline among the options of the processor, where it would have no effect.

    Raises:
        ConfigError: there is one.
    """
    if options and KEY in options:
        raise ConfigError(
            f"`{KEY}` in mm_processor_kwargs would do nothing: an engine has one pipeline, named when it starts by "
            f"--hf-overrides '{{\"{KEY}\": ...}}'"
        )


@lru_cache(maxsize=32)
def _load(written: str) -> Pipeline:
    from vtoken import config

    return config.load(json.loads(written))


def check(pipeline: Pipeline, family: str) -> None:
    """Checks a pipeline against what vLLM supports.

    Args:
        family: `model_type` of the model's config.

    Raises:
        UnsupportedError: names the stage or the policy, the reason and what to write instead.
    """
    if family not in FAMILIES:
        raise UnsupportedError(f"{unknown('family', family, FAMILIES)}; {ELSEWHERE}")
    with about(pipeline.written):
        if pipeline.contrast is not None:
            raise UnsupportedError(f"contrast needs a second cache of every prompt, which vLLM has not; {ELSEWHERE}")
        for stage, before in zip(pipeline.stages, _before(pipeline), strict=True):
            if why := refusal(stage, family, before):
                raise UnsupportedError(f"stage {stage.name} cannot be served in vLLM: {why}")
        _check_policies(pipeline, family)


def check_model(pipeline: Pipeline, family: str, model_config: Any) -> None:
    """Checks a pipeline against what vLLM supports for a checkpoint of the family.

    Raises:
        UnsupportedError: as in `check`; or the pipeline does not fit the checkpoint.
    """
    check(pipeline, family)
    module, _, name = FAMILIES[family].tower.partition(":")
    getattr(import_module(module), name)(model_config).check(pipeline)


def pictures_only(pipeline: Pipeline, family: str) -> bool:
    """Whether videos cannot be served: text stands between their frames, and some stage may keep different numbers of
    tokens of them."""
    by_frames = all(_per(stage) == "per_frame" for stage in pipeline.stages)
    return FAMILIES[family].frames_apart and not by_frames


def refusal(stage: Stage, family: str, before: Sequence[Stage] = ()) -> str:
    """Why vLLM cannot serve a stage on a family after the stages `before` it, and what to do; "" if it can."""
    served, budget = FAMILIES[family], getattr(stage, "keep", None)
    from vtoken.stages.facts import of_target

    if any(of_target(need, stage.site) for need in stage.needs()):
        return f"it chooses the tokens of a draft, and vLLM's drafters do not know what is kept; {ELSEWHERE}"
    if stage.site in SITES:
        return f"it acts at site {stage.site}; {SITES[stage.site]}"
    if stage.site == "encoder":
        if served.no_cuts:
            return f"it acts inside the vision tower, and on {family} {served.no_cuts}; {ELSEWHERE}"
        if stage.refills() is not None:
            return f"it estimates patches inside the vision tower, which vLLM's layers do not let; {ELSEWHERE}"
        if stage.merge_point() is not None:
            return f"it merges inside layers of the vision tower, which vLLM's layers do not let; {ELSEWHERE}"
    if budget is not None and budget.total is not None:
        return (
            f"keep: {{total: {budget.total}}} is shared out among the pictures of a prompt, and vLLM encodes each for "
            "itself; write a count (keep: 64) or a share (25%)"
        )
    if not _known_beforehand(stage, before, whole=not served.crops):
        mend = "give it a budget (keep: 64), or " if budget is None and "keep" in type(stage).model_fields else ""
        return (
            "its token count is not known before a picture is encoded, and vLLM counts placeholders first; "
            f"{mend}{ELSEWHERE}"
        )
    if _reads_text(stage) and not served.text:
        return f"it reads the prompt, by which pictures of {family} are alike in vLLM's caches; {ELSEWHERE}"
    return ""


def _before(pipeline: Pipeline) -> list[tuple[Stage, ...]]:
    return [pipeline.stages[:k] for k in range(len(pipeline.stages))]


def _known_beforehand(stage: Stage, before: Sequence[Stage], whole: bool) -> bool:
    """Whether the number of tokens left by a stage follows from the picture's size, as `counts` computes it. Inside the
    tower this is the number after the stage's last cut.

    Args:
        before: stages that act earlier; whole: no padding was removed from crops.
    """
    if stage.counts_are_exact(whole=whole and not before):
        return True
    # The number of tokens per crop or frame is known until a stage with another kind of budget has run.
    per = _per(stage)
    return per is not None and all(_per(each) == per for each in before) and stage.counts_are_exact()


def _per(stage: Stage) -> str | None:
    """The unit of the stage's budget, "per_frame" or "per_crop", if the stage spends the same on each; else None."""
    return stage.even_per()


def _check_policies(pipeline: Pipeline, family: str) -> None:
    served = FAMILIES[family]
    if pipeline.anyres != "model" and not served.crops:
        raise UnsupportedError(
            f"anyres: {pipeline.anyres} chooses how pictures are cut, and {family} does not cut them; leave it out"
        )
    if pipeline.anyres != "model" and not pipeline.stages:
        raise UnsupportedError(
            f"anyres: {pipeline.anyres} is served with stages only; write a stage that keeps everything "
            '("uniform:100%"), with newline: keep and positions: compact'
        )
    if served.newlines and pipeline.newline == "keep_if_row_has_token":
        raise UnsupportedError(
            "newline: keep_if_row_has_token leaves a number of newline tokens that depends on the picture, and vLLM "
            "counts placeholders before it encodes; write newline: keep or newline: drop"
        )
    if pipeline.stages and pipeline.positions != served.positions:
        why = "numbers tokens without gaps" if served.positions == "compact" else "keeps the positions of M-RoPE"
        raise UnsupportedError(
            f"positions: {pipeline.positions} cannot be had in vLLM, which on {family} {why}; write "
            f"--hf-overrides '{{\"{KEY}\": {_rewritten(pipeline, served.positions)}}}'"
        )


def _rewritten(pipeline: Pipeline, positions: str) -> str:
    """The pipeline with these positions, as JSON."""
    from vtoken.config import POLICY_KEYS

    line = re.fullmatch(r'(?:preset|pipeline) "([^"]+)"', pipeline.written)
    if line is not None and "positions=" not in line[1] and "..." not in line[1]:
        return json.dumps(f"{line[1]},positions={positions}")
    usual = type(pipeline)("", "original", ())
    policies = {key: getattr(pipeline, key) for key in POLICY_KEYS if getattr(pipeline, key) != getattr(usual, key)}
    stages = [{stage.name: stage.model_dump(mode="json", exclude_defaults=True)} for stage in pipeline.stages]
    return json.dumps({**policies, "positions": positions, "stages": stages})


def _reads_text(stage: Stage) -> bool:
    return any(need.name == "text" for need in stage.needs())


def reads_text(pipeline: Pipeline | None) -> bool:
    """Whether the kept tokens of a picture depend on the prompt around it."""
    return pipeline is not None and any(_reads_text(stage) for stage in pipeline.stages)


def counts(pipeline: Pipeline, layout: ImageLayout) -> tuple[int, ...]:
    """Tokens kept of one picture or video after every stage, without newlines.

    Args:
        layout: its rasters and, if it is cut into crops or frames, the segment of each token.
    """
    length = layout.tokens
    if length < pipeline.min_visual_tokens:
        return (length,) * len(pipeline.stages)
    segments: list[int] | None = None if layout.segment is None else layout.segment.bincount().tolist()
    left = []
    for stage in pipeline.stages:
        if segments is not None and _per(stage):
            budget = stage.keep  # type: ignore[attr-defined]
            # To a per_crop budget a video is one segment; to a per_frame budget a picture is.
            alike = (len(layout.parts) == 1) == (budget.per == "per_frame")
            segments = [min(n, budget.tokens) for n in segments] if alike else segments
            length = sum(segments) if alike else min(length, budget.tokens)
        else:
            (length,) = stage.expected_counts((length,), (layout.parts,), (0,))
        left.append(length)
    return tuple(left)


def kept(pipeline: Pipeline | None, layout: ImageLayout) -> int:
    """Tokens kept of one picture or video, without newlines."""
    return layout.tokens if pipeline is None else counts(pipeline, layout)[-1]


def newlines(pipeline: Pipeline | None, layout: ImageLayout) -> int:
    """Newline tokens kept of a picture. A picture that is too small for the stages keeps all, whatever the policy."""
    if pipeline is not None and pipeline.newline == "drop" and layout.tokens >= pipeline.min_visual_tokens:
        return 0
    return layout.length - layout.tokens


def placeholders(pipeline: Pipeline | None, layout: ImageLayout) -> int:
    """Number of placeholders of a picture or video in the prompt: tokens and newlines."""
    return kept(pipeline, layout) + newlines(pipeline, layout)


def fingerprint(pipeline: Pipeline, prompt: list[int]) -> str:
    """A digest of the pipeline and, if a stage reads it, of the prompt's token ids, for the keys of cached pictures."""
    key = _written(pipeline) + (repr(prompt) if reads_text(pipeline) else "")
    return blake2b(key.encode(), digest_size=16).hexdigest()


@lru_cache(maxsize=32)
def _written(pipeline: Pipeline) -> str:
    """The pipeline, this version, and the contents of the files that stages name."""
    from vtoken import config

    files = [getattr(stage, option) for stage in pipeline.stages for option in stage.file_options()]
    return "\n".join([vtoken.__version__, config.dump(pipeline), *(_digest(file) for file in files if file)])


def _digest(file: str) -> str:
    try:
        with open(file, "rb") as opened:
            return blake2b(opened.read()).hexdigest()
    except OSError:
        return ""
