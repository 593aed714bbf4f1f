"""VisionZip's contextual tokens as they enter the LLM: sums of features behind the projector, of embeddings where a token is four patches."""

from __future__ import annotations

import oracle
import pytest
import tiny
import torch
from batches import with_other

import vtoken

ROWS = [[3, "img", 5], [1, "img", 2, "other", 7], [4]]


def entering(model, batch):
    """What the language model is given at prefill."""
    seen = {}
    hook = model.get_decoder().register_forward_pre_hook(
        lambda m, a, k: seen.update(k if not seen else {}), with_kwargs=True
    )
    model.generate(**batch, max_new_tokens=1, do_sample=False)
    hook.remove()
    return seen["inputs_embeds"].detach()


def features(model, batch):
    """The same with what goes into the projector, in place of what comes out: as wide as the decoder at a time."""
    projector, width = tiny.adapter(model).projectors[0], model.config.text_config.hidden_size
    found, wide = [], [width]

    def forward(x):
        wide[0] = x.shape[-1]
        return x[..., len(found) * width :][..., :width]

    projector.forward = forward
    try:
        while len(found) * width < wide[0]:
            found.append(entering(model, batch))
    finally:
        del projector.forward
    return torch.cat(found, -1)


@torch.no_grad()
@pytest.mark.parametrize("halve", [False, True])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_contextual_tokens(family, halve):
    model = tiny.make(family)
    batch = tiny.build(model, with_other(family, ROWS))
    p, dense, packed = oracle.prompt(model, batch), entering(model, batch), tiny.family(family).unit > 1
    before = dense if halve or packed else features(model, batch)
    with vtoken.wrapped(model, [{"visionzip": {"keep": 5, "contextual": 2, "halve": halve}}]):
        pruned, trace = entering(model, batch), vtoken.trace(model)
    (stage,) = trace.stages
    summed = 0
    policy = oracle.keep_mask(p, stage.kept, newlines="keep_if_row_has_token")
    for image, kept, into in zip(p.images, stage.kept, stage.into, strict=True):
        row = image.row
        columns = image.columns[~p.newline[row, image.columns]]
        places = policy[row].nonzero()[:, 0].tolist()
        for token in kept.tolist():
            members = [m for m in (into == token).nonzero()[:, 0].tolist() if m != token]
            own = before[row, columns[token]]
            want = dense[row, columns[token]]
            if members:
                mean = torch.stack([before[row, columns[m]] for m in members]).double().mean(0).float()
                want = (own + mean) / 2 if halve else own + mean
                if not (halve or packed):
                    want = tiny.adapter(model).projectors[0](want)
                summed += 1
            got = pruned[row, pruned.shape[1] - len(places) + places.index(int(columns[token]))]
            torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
    assert summed >= 2, "tokens were put together"


@torch.no_grad()
@pytest.mark.parametrize("family", tiny.each("anyres", mrope=False, window=None))
def test_alone_as_in_a_batch(family):
    model, pipeline = tiny.make(family), [{"visionzip": {"keep": 5}}]
    batch = tiny.build(model, [[3, "img", 5], [2, "img", 9]])
    alone = {**tiny.build(model, [[3, "img", 5]]), "pixel_values": batch["pixel_values"][:1]}
    with vtoken.wrapped(model, pipeline):
        together, single = entering(model, batch), entering(model, alone)
    torch.testing.assert_close(together[0, -single.shape[1] :], single[0], atol=1e-5, rtol=1e-4)
