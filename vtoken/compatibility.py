"""Checks a pipeline against a model before anything is installed: sites, facts, layers, and what goes together."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import transformers
from torch import nn

from vtoken import registry
from vtoken.adapters.base import Adapter
from vtoken.config import Pipeline
from vtoken.errors import ConfigError, OtherModelError, UnsupportedError, warn
from vtoken.hooks.attention.sparse_prefill import check_attention
from vtoken.hooks.attention.steering_checks import check_steering, thins
from vtoken.hooks.cache.clear import check_cleared
from vtoken.hooks.cache.shrink import check_cache
from vtoken.hooks.decode.choose import check_decode
from vtoken.hooks.state.cache_argument import CACHE
from vtoken.hooks.state.layer_kinds import SLIDING, kinds_of
from vtoken.hooks.vision.pixels import check_pixels
from vtoken.stages import FACTS, SITES, Fact, OtherModel, Stage, spec_of
from vtoken.stages.attention import SparseAttention
from vtoken.stages.facts import encoded, of_target


def check_whole(model: Any) -> None:
    """Checks that the object is a whole VLM.

    Raises:
        UnsupportedError: says what to wrap instead.
    """
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise UnsupportedError(f"expected a Hugging Face model, the whole VLM, got {type(model).__name__}")
    kind, known = getattr(model.config, "model_type", None), registry.adapters()
    if kind not in (*known, *registry.REFUSED) and not hasattr(model.config, "vision_config"):
        raise UnsupportedError(
            f"{type(model).__name__} (model_type {kind!r}) is no VLM of a supported family; if it is a part of one, "
            f"wrap the whole VLM, model and not model.model.language_model. Known: {', '.join(known)}; see "
            "vtoken/adapters/base.py to add a family"
        )


def check(adapter: Adapter, pipeline: Pipeline) -> None:
    """Checks every stage against what the family and this version support.

    Raises:
        UnsupportedError: names the stage, the reason and the nearest alternative that works.
    """
    if pipeline.positions == "compact" and adapter.mrope:
        raise UnsupportedError(
            f"positions: compact cannot be had on {adapter.model_type}: its positions have three axes (M-RoPE), which "
            "a renumbering would tear apart; use positions: original"
        )
    if pipeline.anyres != "model" and not hasattr(adapter.model.config, "image_grid_pinpoints"):
        raise UnsupportedError(
            f"anyres: {pipeline.anyres} chooses among the crop grids of LLaVA-NeXT and OneVision "
            f"(image_grid_pinpoints), which {adapter.model_type} does not have; leave the key out"
        )
    if CACHE not in inspect.signature(adapter.lm.forward).parameters:
        raise UnsupportedError(
            f"{type(adapter.lm).__name__} takes no {CACHE}, by which transformers {transformers.__version__} hands the "
            "KV cache on, so nothing would be pruned; use a version from 5.14 to 5.24"
        )
    check_pixels([stage for stage in pipeline.stages if stage.site == "pixels"], adapter)
    check_unmerging(pipeline, adapter)
    check_windows(pipeline, adapter)
    for stage in pipeline.stages:
        check_stage(stage, adapter)
    check_steering(pipeline.stages, adapter.lm, adapter.attending)
    check_attention([stage for stage in pipeline.stages if thins(stage)], adapter.lm, adapter.attending)
    check_cache([stage for stage in pipeline.stages if stage.site == "cache"])
    check_decode(pipeline.stages, adapter.lm, adapter.attending)
    check_cleared(pipeline.stages, adapter.lm.config)


def check_stage(stage: Stage, adapter: Adapter) -> None:
    """Checks one stage against what the family supports."""
    if stage.site not in SITES:
        raise UnsupportedError(
            f"stage {stage.name} acts at site {stage.site!r}, which this version of vtoken does not serve yet"
        )
    try:
        why = stage.incompatibility(len(adapter.lm.layers), adapter.lm.config.hidden_size)
    except ValueError as error:  # a file has changed since the pipeline was read
        raise ConfigError(f"stage {stage.name}: {error}") from error
    if why:
        raise OtherModelError(f"stage {stage.name}: {why}")
    if why := stage.tower_incompatibility(adapter.encoder.width, adapter.encoder.unit):
        raise UnsupportedError(f"stage {stage.name}: {why}")
    for need in stage.needs():
        check_fact(stage, need, adapter)
    check_layers(stage, adapter)
    check_order_of_layers(stage, adapter)
    check_attending(stage, adapter)


def check_fact(stage: Stage, need: Fact, adapter: Adapter) -> None:
    """Refuses facts that are unknown, missing in the family or at the stage's site, or of a layer that is not there."""
    known = dict.fromkeys(spec.name for spec in FACTS)
    if need.name not in known:
        raise UnsupportedError(f"stage {stage.name} needs the unknown fact {need.name!r}; known: {', '.join(known)}")
    if need.name in adapter.missing:
        raise UnsupportedError(f"stage {stage.name} needs {need.name}: {adapter.missing[need.name]}")
    if spec_of(need.name, stage.site) is None:
        there = sorted(name for name in known if spec_of(name, stage.site))
        raise UnsupportedError(
            f"stage {stage.name} needs {need.name}, which does not exist yet at site {stage.site!r}; "
            f"there it can have {', '.join(there)}"
        )
    depth = len(layers_of(stage, need, adapter))
    if need.layer is not None and not of_target(need, stage.site) and not -depth <= need.layer < depth:
        raise UnsupportedError(
            f"stage {stage.name} needs {need.name} of layer {need.layer}; there are {depth}, 0 to {depth - 1} (or -1 "
            "for the last)"
        )


def layers_of(stage: Stage, need: Fact, adapter: Adapter) -> Sequence[Any]:
    """The layers that a fact's layer number is an index into: of the decoder or of the encoder."""
    decoder = stage.site == "decoder" and not encoded(need, stage.site)
    found: Sequence[Any] = adapter.lm.layers if decoder else adapter.encoder.layers
    return found


def check_order_of_layers(stage: Stage, adapter: Adapter) -> None:
    """Refuses facts of a layer that runs after the stage acts."""
    own = adapter.lm.layers if stage.site == "decoder" else adapter.encoder.layers
    for need in stage.needs() if stage.site in ("encoder", "decoder") else ():
        if need.layer is None or layers_of(stage, need, adapter) is not own:
            continue
        first, layer = min(stage.layers(len(own))), need.layer % len(own)
        acts, last = ("after", first) if stage.site == "encoder" else ("before", first - 1)
        if layer > last:
            raise UnsupportedError(
                f"stage {stage.name} acts {acts} {stage.site} layer {first} and needs {need.name} of layer {layer}, "
                f"which runs later; ask for layer {last} or an earlier one"
            )


def check_attending(stage: Stage, adapter: Adapter) -> None:
    """Refuses what decoder layers without attention cannot do: give facts about it, or keep tokens apart."""
    depth, attending = len(adapter.lm.layers), adapter.attending
    if isinstance(stage, SparseAttention) and stage.keeps_apart and len(attending) < depth:
        raise UnsupportedError(
            f"stage {stage.name} keeps visual tokens from reading each other, and {depth - len(attending)} of this "
            f"decoder's {depth} layers keep a state that mixes all of them; leave the stage out"
        )
    for need in stage.needs() if stage.site == "decoder" else ():
        spec = spec_of(need.name, stage.site)
        if spec is None or spec.read not in ("decoder layer", "next layer", "blocks"):
            continue
        before = spec.read != "next layer"  # the layer in front of the cut, not the one after it
        read = [k - before for k in stage.layers(depth)] if need.layer is None else [need.layer % depth]
        if spec.read == "blocks" and need.layer is not None:
            read = [*range(read[0], max(stage.layers(depth)))]
        if lacking := sorted(set(read) - set(attending)):
            raise UnsupportedError(
                f"stage {stage.name} needs {need.name} of decoder layers {lacking}, which keep a state instead of "
                f"attention; of this decoder's {depth} layers {list(attending)} have attention"
                + ("" if need.layer is not None else f", so let it act at {[k + before for k in attending][:-1]}")
            )


def check_unmerging(pipeline: Pipeline, adapter: Adapter) -> None:
    """Refuses what cannot be combined with virtual unmerging.

    Raises:
        UnsupportedError: names the other stage or policy, or the layers that keep a state.
    """
    for stage in pipeline.stages:
        if not stage.unmerge_mode():
            continue
        depth = len(adapter.lm.layers)
        if states := depth - len(adapter.attending):
            raise UnsupportedError(
                f"stage {stage.name} lets merged tokens be attended to at all their places, and {states} of the "
                f"{depth} layers of this decoder keep a state, which takes a token in once; leave {stage.name} out"
            )
        if pipeline.positions == "compact":
            raise UnsupportedError(
                f"stage {stage.name} gives merged tokens the positions of all their members, which positions: compact "
                "would renumber; use positions: original"
            )
        others = [s for s in pipeline.stages if s is not stage and SITES.index(s.site) >= SITES.index("decoder")]
        if others:
            raise UnsupportedError(
                f"stage {stage.name} makes decoder layers attend at places that {others[0].name} (site "
                f"{others[0].site}) knows nothing of; leave one of the two out. Stages of site encoder and tokens go "
                f"with {stage.name}"
            )


def check_windows(pipeline: Pipeline, adapter: Adapter) -> None:
    """Warns if decoder layers attend in sliding windows, and refuses stages that need plain causal attention.

    Raises:
        UnsupportedError: names the stage.
    """
    config = adapter.lm.config
    slides = SLIDING in kinds_of(config)
    unusual = "image tokens attend to each other both ways" if adapter.both_ways else "layers attend in sliding windows"
    for stage in pipeline.stages if slides or adapter.both_ways else ():
        if stage.site == "attention":
            raise UnsupportedError(
                f"stage {stage.name} works on causal attention over the whole prompt, and in {config.model_type!r} "
                f"{unusual}; use stages of site encoder, tokens or decoder"
            )
        if stage.site in ("cache", "decode") and slides:
            does = "shrinks the KV cache" if stage.site == "cache" else "chooses from the KV cache"
            raise UnsupportedError(
                f"stage {stage.name} {does} of every layer, and of sliding windows {config.model_type!r} "
                f"holds {config.sliding_window - 1} tokens at most; use stages of site encoder, tokens or decoder"
            )
    if slides and pipeline.stages:
        warn(
            f"decoder {config.model_type!r} attends in sliding windows of {config.sliding_window} tokens: with tokens "
            "dropped, a window reaches further back in the prompt than the model was trained to see"
        )


def check_layers(stage: Stage, adapter: Adapter) -> None:
    """Refuses layers that do not exist, or whose output is no longer read."""
    if stage.site in ("pixels", "frames", "encoder"):
        check_tower(stage, adapter)
    if stage.site not in ("encoder", "decoder"):
        return
    depth = len(adapter.encoder.layers if stage.site == "encoder" else adapter.lm.layers)
    check_inside(stage, adapter)
    try:
        layers = stage.layers(depth)
    except OtherModel as error:
        raise OtherModelError(f"stage {stage.name}: {error}") from error
    except ValueError as error:
        raise UnsupportedError(f"stage {stage.name}: {error}") from error
    first, last = (0, min(adapter.encoder.feature_layers) - 1) if stage.site == "encoder" else (1, depth - 1)
    if stage.merge_point():
        last = depth - 1  # layers after the feature layer are skipped, not refused
    if not layers or min(layers) < first or max(layers) > last:
        allowed = f"{first} to {last}" if first <= last else "none"
        raise UnsupportedError(
            f"stage {stage.name} acts at {stage.site} layers {list(layers)}; this model allows {allowed}"
            + (" (features are read after that)" if stage.site == "encoder" else "")
        )


def check_tower(stage: Stage, adapter: Adapter) -> None:
    """Refuses stages that cannot run in the vision tower."""
    frames = stage.site == "frames"
    if frames and "video" not in adapter.features:
        raise UnsupportedError(
            f"stage {stage.name} chooses frames of videos, and {adapter.model_type} takes none in transformers; leave "
            "it out, or use a family that does "
            f"({', '.join(name for name in registry.adapters() if 'video' in registry.adapter(name).features)})"
        )
    if frames and not adapter.encoder.packed:
        return  # the tower gets fewer frames; nothing changes inside it
    if adapter.tower.config._attn_implementation == "flex_attention":
        raise UnsupportedError(
            f"stage {stage.name} drops tokens inside the vision tower, which needs attention masks that flex_attention "
            'does not take there; load the model with attn_implementation="sdpa"'
        )


def check_inside(stage: Stage, adapter: Adapter) -> None:
    """Refuses stages that merge inside encoder layers in families whose towers do not allow that."""
    if stage.merge_point() is None:
        return
    if adapter.encoder.packed and adapter.encoder.unit == 1:
        raise UnsupportedError(
            f"stage {stage.name} merges single patches inside encoder layers, which needs crops in a batch; "
            f"this {adapter.model_type} has all patches in one sequence. Use a stage that merges after it (dtome_post)"
        )
    if adapter.encoder.unit != 1:
        raise UnsupportedError(
            f"stage {stage.name} merges single patches inside encoder layers; {adapter.model_type} joins "
            f"{adapter.encoder.unit} neighbouring patches to a token after its encoder and needs them whole. Use a "
            "stage that merges after it (dtome_post)"
        )
    if stage.merge_point() == "proportional" and "flash" in (adapter.tower.config._attn_implementation or ""):
        raise UnsupportedError(
            f"stage {stage.name} adds log(size) to the logits of attention in the vision tower, which flash attention "
            'cannot; load the model with attn_implementation={"vision_config": "sdpa"}, or set proportional: false '
            "(another method)"
        )
