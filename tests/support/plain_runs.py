"""Runs of LLaVA-1.5 on plain prompts, with and without the oracle beside them."""

from __future__ import annotations

import oracle
import tiny
import torch

import vtoken

NEW = 8
BATCHES = {
    "one": [[3, "img", 5]],
    "two images": [[2, "img", 3, "img", 4]],
    "ragged": [[3, "img", 5], [1, "img", 2, "img", 7], [4]],
    "padded": [[9, "img", 5], [1, "img", 2], [1, "img", 1]],
}


def run(model, batch, **options):
    return model.generate(
        **batch, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, output_logits=True, **options
    )


def compare(model, batch, pipeline, **options):
    """Runs wrapped, then holds tokens and logits against the oracle; returns the trace."""
    p = oracle.prompt(model, batch)
    with vtoken.wrapped(model, pipeline):
        out = run(model, batch, **options)
        trace = vtoken.trace(model)
    compact = pipeline["positions"] == "compact"
    entry = [s for s in trace.stages if s.site != "decoder"]
    keep = oracle.keep_mask(p, entry[-1].kept if entry else [torch.arange(n) for n in trace.visual_tokens], tiny.TOKENS)
    inner = {s.layer: oracle.keep_mask(p, s.kept, tiny.TOKENS) for s in trace.stages if s.site == "decoder"}
    tokens, logits = oracle.generate(model, p, keep, NEW, compact, inner)
    assert torch.equal(out.sequences[:, -NEW:], tokens)
    torch.testing.assert_close(torch.stack(out.logits), logits, atol=2e-4, rtol=1e-4)
    return trace
