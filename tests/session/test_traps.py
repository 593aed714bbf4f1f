"""The silent failures of simpler approaches. Each test shows that the trap is real on stock code and that the wrapped
model avoids it."""

from __future__ import annotations

import flash_stand_in
import oracle
import pytest
import tiny
import torch
from batches import suited
from modes import ROWS, VIDEOS
from plain_runs import BATCHES, compare, run
from probes import Deep, Ragged

import vtoken


@pytest.fixture
def model():
    return tiny.llava()


def test_fewer_features_than_placeholders(model):
    """Returning fewer features upstream raises; wrapped, the prompt keeps its placeholders and only the decoder sees
    fewer."""
    batch = tiny.build(model, BATCHES["one"], seed=3)
    few = model.model.get_image_features(batch["pixel_values"], return_dict=True).pooler_output[0][::2]
    with pytest.raises((ValueError, RuntimeError)):
        model.model.get_placeholder_mask(
            batch["input_ids"], model.get_input_embeddings()(batch["input_ids"]), few[None]
        )
    with vtoken.wrapped(model, "random:3"):
        out = run(model, batch)
    assert (out.sequences == tiny.IMG).sum() == tiny.TOKENS


def test_masks_have_physical_length(model):
    """Ragged rows: the logical 2D mask is misread without an error when keys are fewer than mask columns."""
    batch = tiny.build(model, BATCHES["padded"], seed=3)
    p = oracle.prompt(model, batch)
    with vtoken.wrapped(model, [Ragged()]):
        good = run(model, batch)
        kept = vtoken.trace(model).kept
    keep = oracle.keep_mask(p, kept, tiny.TOKENS)
    _, logits = oracle.generate(model, p, keep, 8)
    torch.testing.assert_close(torch.stack(good.logits), logits, atol=2e-4, rtol=1e-4)

    from vtoken.hooks.state.left_padding import left_pad, take

    index = left_pad(keep)
    valid = keep.gather(1, index)
    lm = model.get_decoder()

    def naive(module, args, kwargs):
        if kwargs["inputs_embeds"].shape[1] > 1:
            kwargs.update(
                inputs_embeds=take(kwargs["inputs_embeds"], index, 1),
                position_ids=take(kwargs["position_ids"], index, -1),
                attention_mask=valid.long(),
            )
        return args, kwargs

    hook = lm.register_forward_pre_hook(naive, with_kwargs=True)
    wrong = run(model, batch)
    hook.remove()
    assert (torch.stack(wrong.logits) - logits).abs().max() > 0.1, (
        "the trap is gone upstream: this test proves nothing any more"
    )


def test_second_turn_is_not_fed_twice(model):
    """generate slices ids by the cache's length, so that length has to be the prompt's."""
    batch = tiny.build(model, BATCHES["one"], seed=3)
    with vtoken.wrapped(model, "random:3"):
        out = run(model, batch)
        cache = out.past_key_values
        assert cache.get_seq_length() == out.sequences.shape[1] - 1
        assert cache.layers[0].keys.shape[2] == out.sequences.shape[1] - 1 - (tiny.TOKENS - 3)


def test_gaps_in_positions_are_not_packed_sequences(model):
    """Without cache and mask, gaps in position_ids are taken for several packed sequences."""
    lm = model.get_decoder()
    x, gaps = torch.randn(1, 6, 32), torch.tensor([[0, 1, 5, 6, 9, 10]])
    with torch.no_grad():
        packed = lm(inputs_embeds=x, position_ids=gaps, use_cache=False).last_hidden_state
        whole = lm(
            inputs_embeds=x, position_ids=gaps, use_cache=False, attention_mask=torch.ones(1, 6)
        ).last_hidden_state
    assert (packed - whole).abs().max() > 0.1, "the trap is gone upstream: this test proves nothing any more"
    batch = tiny.build(model, BATCHES["one"], seed=3)
    batch.pop("attention_mask")
    with vtoken.wrapped(model, "random:3"), torch.no_grad():
        plain = model(**batch, use_cache=False).logits[:, -1]
        cached = model(**batch).logits[:, -1]
    torch.testing.assert_close(plain, cached, atol=1e-4, rtol=1e-4)


# Under flash attention images whose tokens see each other both ways are causal, in the stock model too.
@pytest.mark.parametrize("family", tiny.families(both_ways=False))
@pytest.mark.parametrize("rows", [ROWS[:1], ROWS, VIDEOS], ids=["one", "ragged", "videos"])
@pytest.mark.parametrize("stages", [[Ragged()], [Ragged(), Deep()]], ids=["tokens", "deep"])
def test_two_dimensional_masks(family, rows, stages):
    """Backends of the flash kind take 2D masks, read their tail, and must not see gaps in position ids."""
    if rows is VIDEOS and family not in tiny.VIDEO:
        pytest.skip("stock LLaVA-1.5 and NeXT take no video")
    model = tiny.make(family)
    lm = model.get_decoder()
    batch = tiny.build(model, suited(family, rows), seed=3)
    with vtoken.wrapped(model, stages):
        want = run(model, batch)
    lm.config._attn_implementation_internal = flash_stand_in.NAME
    with vtoken.wrapped(model, stages):
        got = run(model, batch)
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), atol=2e-4, rtol=1e-4)


def test_budget_in_a_share_of_ragged_images(model):
    batch = tiny.build(model, BATCHES["two images"], seed=3)
    trace = compare(model, batch, {"positions": "original", "stages": [Ragged(), {"random": {"keep": "50%"}}]})
    first, second = trace.stages
    assert second.tokens_in == first.tokens_out
    assert second.tokens_out == [max(1, n // 2) for n in first.tokens_out]
