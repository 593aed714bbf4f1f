"""Wrapped generation held against a full recomputation over the kept tokens."""

from __future__ import annotations

import oracle
import tiny
import torch

import vtoken
from vtoken import config

NEW = 6


def encode(model, batch, p, stages):
    """Puts the features that the wrapped model encodes, zeros where dropped, into the prompt; DeepStack's too, means
    where merged."""
    seen = {}

    def look(module, args, kwargs):
        seen.update(kwargs if not seen else {})

    hook = model.get_decoder().register_forward_pre_hook(look, with_kwargs=True, prepend=True)
    model.generate(**batch, max_new_tokens=1, do_sample=False)
    hook.remove()
    p.embeds = seen["inputs_embeds"]
    for d, features in zip(p.deep, seen.get("deepstack_visual_embeds") or [], strict=True):
        # Of merged tokens, those count that had a value when the features were tapped.
        d[seen["visual_pos_masks"]] = features.masked_fill(~features.any(-1, keepdim=True), torch.nan)
        for image, into in zip(p.images, stages[-1].into or [], strict=False):
            x = d[image.row, image.columns].clone()
            for k in into.unique().tolist():
                d[image.row, image.columns[k]] = x[into == k].nanmean(0)
        d.nan_to_num_()


def merge(p, trace):
    """Puts the means of merged tokens at the places of those that absorbed them."""
    last = [s for s in trace.stages if s.site == "tokens" and s.into is not None]
    inside = [s.kept for s in trace.stages if s.site in ("pixels", "frames", "encoder")]
    if not last:
        return
    for i, (image, into) in enumerate(zip(p.images, last[-1].into, strict=True)):
        columns = image.columns[~p.newline[image.row, image.columns]]
        alive = torch.zeros(len(columns), dtype=torch.bool)
        alive[inside[-1][i] if inside else slice(None)] = True
        for values in (p.embeds, *p.deep):
            x = values[image.row, columns].clone()
            for k in last[-1].kept[i].tolist():
                values[image.row, columns[k]] = x[(into == k) & alive].mean(0)


def compare(model, batch, pipeline, new=NEW, weighted=False):
    """Runs wrapped, then holds tokens and logits against the oracle; returns the trace.

    With `weighted` what merged tokens became is taken from what enters the decoder (the methods' own tests hold it),
    else it is the mean of the members.
    """
    p, entered = oracle.prompt(model, batch), {}
    with vtoken.wrapped(model, pipeline):
        hook = model.get_decoder().register_forward_pre_hook(
            lambda m, a, k: entered.update(k if not entered else {}), with_kwargs=True
        )
        out = model.generate(
            **batch, max_new_tokens=new, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        trace = vtoken.trace(model)
        hook.remove()
        early = [s for s in trace.stages if s.site in ("pixels", "frames", "encoder")]
        if early:
            encode(model, batch, p, early)
    if not weighted:
        merge(p, trace)
    policy = pipeline.get("newline", "keep_if_row_has_token")
    entry = [s for s in trace.stages if s.site != "decoder"]
    first = entry[-1].kept if entry else [torch.arange(n) for n in trace.visual_tokens]
    keep = oracle.keep_mask(p, first, newlines=policy)
    if weighted and any(s.into is not None for s in trace.stages):
        alive, merged = entered["inputs_embeds"], keep & p.mask
        for row, stay in enumerate(merged):
            p.embeds[row, stay] = alive[row, alive.shape[1] - int(stay.sum()) :]
        for k, d in enumerate(p.deep):
            d[keep & p.visual] = entered["deepstack_visual_embeds"][k]
    deeper = {s.layer: oracle.keep_mask(p, s.kept, newlines=policy) for s in trace.stages if s.site == "decoder"}
    mixed, alive = {}, first
    for s in trace.stages:
        if s.site == "decoder":
            if s.into is not None:
                mixed[s.layer] = oracle.means(p, s.kept, s.into, alive)
            alive = s.kept
    compact = pipeline.get("positions") == "compact"
    clearing = {stage.name for stage in config.load(pipeline).stages if stage.clears_earlier_layers()}
    cleared = max((s.layer for s in trace.stages if s.name in clearing and s.layer in deeper), default=None)
    tokens, logits = oracle.generate(model, p, keep, new, compact, deeper, layer_mix=mixed, cleared=cleared)
    torch.testing.assert_close(torch.stack(out.logits), logits, atol=tiny.family(model).float32_error, rtol=1e-4)
    assert torch.equal(out.sequences[:, -new:], tokens)
    assert trace.prompt_tokens == keep.sum(1).tolist()
    return trace
