"""Known answers of stages that steer attention: uniform weights by hand, and weights written out one by one."""

from __future__ import annotations

from math import log

import pytest
import torch
from pydantic import ValidationError

from vtoken import registry
from vtoken.stages import SteeredLayer


def layer(q, k, v, visual, *, new=None, behind=None, images=(), hidden=None, marked=None, number=2):
    """One row whose last `new` of S slots are new; attention as a model has it."""
    new, slots = new or q.shape[2], k.shape[2]

    def attend(q, k, v):
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        seen = torch.ones(new, slots, dtype=torch.bool).tril(slots - new)
        scores = (q @ k.transpose(2, 3) * 0.5).masked_fill(~seen, -torch.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2)

    visual = torch.tensor(visual)[None].bool()
    if behind is None:
        behind = (~visual & (visual.cumsum(1) > 0))[:, -new:]
    return SteeredLayer(q, k, v, attend, 0.5, number, visual, behind, None, images, hidden, marked)


def amplify():
    stage = registry.stage("amplify")
    # All scores are 0, values are one-hot: outputs are the weights. Slots: text, two visual ones, text, text.
    q, k, v = torch.zeros(1, 2, 5, 4), torch.zeros(1, 1, 5, 4), torch.eye(5)[None, None]
    x = layer(q, k, v, [0, 1, 1, 0, 0])
    out = stage(gamma=3.0).steer(x)
    assert out.shape == (1, 5, 2, 5)
    assert out[0, 2, 0].tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0, 0]), "a visual query keeps its weights"
    assert out[0, 3, 0].tolist() == pytest.approx([1 / 8, 3 / 8, 3 / 8, 1 / 8, 0])
    assert out[0, 4, 1].tolist() == pytest.approx([1 / 9, 3 / 9, 3 / 9, 1 / 9, 1 / 9])
    damped = stage(gamma=0.5, heads=((2, 1),)).steer(x)
    assert damped[0, 4, 0].tolist() == pytest.approx([0.2] * 5), "the other head"
    assert damped[0, 4, 1].tolist() == pytest.approx([0.25, 0.125, 0.125, 0.25, 0.25])
    assert stage(gamma=1.0).steer(x) is None and stage(gamma=2.0, last=1).layers(4) == (0, 1)
    # Bfloat16 holds ln gamma / scale to three digits; in two parts the bias is as good as in float32.
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, 9, 8, generator=g).bfloat16() for h in (4, 2, 2))
    rows = torch.ones(1, 9, dtype=torch.bool)
    gain = torch.tensor([log(1.7), 0.0, log(0.3), log(30.0)])
    half = layer(q, k, v, [0, 1, 1, 1, 0, 0, 0, 0, 0], behind=rows)
    seen = []
    replaced = SteeredLayer(**{**vars(half), "attend": lambda q, k, v: seen.append((q, k)) or half.attend(q, k, v)})
    replaced.biased(gain, rows, half.visual)
    ((wide, keys),) = seen
    bias = torch.einsum("hc,c->h", wide[0, :, 5, 8:].double(), keys[0, 0, 2, 8:].double()) * 0.5
    torch.testing.assert_close(bias, gain.double(), atol=1e-4, rtol=1e-4)
    assert not keys[0, 0, 5, 8:].any(), "text keys have none"
    salient(stage)
    for options, match in (({"gamma": 0.0}, "gamma"), ({"gamma": 2.0, "keep": {"per_crop": 3}}, "per_crop")):
        with pytest.raises((ValidationError, ValueError), match=match):
            stage(**options)


def salient(stage):
    """Weights by hand: of text rows 4, 5 and 6 behind the picture in slots 1 to 3."""
    wanted = [[0.1, 0.5, 0.1, 0.1, 0.2, 0, 0], [0.1, 0.1, 0.3, 0.1, 0.2, 0.2, 0], [0.1, 0.2, 0.1, 0.3, 0.1, 0.1, 0.1]]
    # One-hot queries read a row of log weights off the keys; what comes later is hidden.
    q = torch.zeros(1, 1, 7, 3)
    for row in range(3):
        q[0, 0, 4 + row, row] = 1 / 0.5
    k = torch.tensor(wanted).clamp(min=1e-9).log().T[None, None]
    x = layer(q, k, torch.eye(7)[None, None], [0, 1, 1, 1, 0, 0, 0], images=((0, torch.tensor([1, 2, 3])),), number=1)
    # Gains: slot 1: 0 + 0.1, slot 2: 0.2 + 0, slot 3: 0 + 0.2 (0.1 -> 0.1 -> 0.3).
    s = stage(gamma=2.0, tokens="salient", keep=2, measured=1)
    assert s.mark(x)[0].nonzero()[:, 0].tolist() == [2, 3]
    assert s.layers(4) == (2, 3) and s.marked_by(3) == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vtoken.stages.steering.CHUNK", 1)
        assert s.mark(x)[0].nonzero()[:, 0].tolist() == [2, 3], "query by query"
    assert stage(gamma=2.0, tokens="salient", keep="34%", measured=1).mark(x)[0].sum() == 1


def var():
    stage = registry.stage("var")
    # By hand: weights of the last text row are 0.4 at a text sink, 0.1 and 0.3 at visual tokens, of which the first is a
    # sink, and 0.2 at itself. Freed: 0.4 of 0.4 + 0.1 = 0.2, all to the other visual token.
    weights = torch.tensor([0.4, 0.1, 0.3, 0.2])
    q = torch.full((1, 1, 1, 1), 2.0)
    k, v = weights.log()[None, None, :, None], torch.eye(4)[None, None]
    marked = torch.tensor([[True, True, False, False]])
    x = layer(q, k, v, [0, 1, 1, 0], new=1, behind=torch.ones(1, 1, dtype=torch.bool), marked=marked)
    assert stage().steer(x)[0, 0, 0].tolist() == pytest.approx([0.24, 0.06, 0.5, 0.2])
    assert stage(p=0.0).steer(x)[0, 0, 0].tolist() == pytest.approx([0, 0, 0.8, 0.2])
    same = pytest.approx(weights.tolist())
    for options in ({"rho": 0.24}, {"summ": 0.41}):  # the sink has 0.25 of the visual 0.4
        assert stage(**options).steer(x)[0, 0, 0].tolist() == same
    text = layer(q, k, v, [0, 1, 1, 0], new=1, marked=torch.tensor([[True, False, False, False]]), behind=x.behind)
    assert stage().steer(text)[0, 0, 0].tolist() == same, "no visual sink"
    every = layer(q, k, v, [0, 1, 1, 0], new=1, marked=torch.tensor([[True, True, True, False]]), behind=x.behind)
    assert stage(rho=1.0).steer(every)[0, 0, 0].tolist() == same, "nowhere to go"
    before = layer(q, k, v, [0, 1, 1, 0], new=1, marked=marked, behind=~x.behind)
    assert stage().steer(before)[0, 0, 0].tolist() == same, "not behind a picture"
    written_out(stage)
    hidden = torch.full((1, 3, 16), 0.1)
    hidden[0, 1, 3] = 30.0  # 4 root mean squares, see var_filter
    shown = layer(torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 3, 2), [0, 1, 0], hidden=hidden)
    assert stage(tau=3.9).mark(shown).tolist() == [[False, True, False]]
    assert not stage(tau=3.9, dims=(4,)).mark(shown).any() and not stage().mark(shown).any()
    assert "of LLaMA-2-7B, not" in stage(dims=(1415, 2533)).incompatibility(28, 3584)


def written_out(stage):
    """Two rows, grouped heads, a prompt of 12: every weight by itself, in float64."""
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, h, 12, 8, generator=g) for h in (4, 2, 2))
    shown = torch.zeros(2, 12, dtype=torch.bool)
    shown[0, 2:8], shown[1, 1:5] = True, True
    marked = torch.zeros_like(shown)
    marked[0, [0, 3]], marked[1, [0, 2, 4, 9]] = True, True
    one = layer(q, k, v, [0] * 12)
    behind = ~shown & (shown.cumsum(1) > 0)
    x = SteeredLayer(**{**vars(one), "visual": shown, "behind": behind, "marked": marked})
    got, changed = stage(rho=0.6, summ=0.3, p=0.25).steer(x), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vtoken.stages.steering.CHUNK", 100)
        torch.testing.assert_close(stage(rho=0.6, summ=0.3, p=0.25).steer(x), got)
    for b in range(2):
        for h in range(4):
            for i in range(12):
                w = (k[b, h // 2, : i + 1].double() @ q[b, h, i].double() * 0.5).softmax(0).tolist()
                mass = sum(w[j] for j in range(i + 1) if shown[b, j])
                sink = sum(w[j] for j in range(i + 1) if shown[b, j] and marked[b, j])
                if behind[b, i] and 0 < sink <= 0.6 * mass and mass >= 0.3:
                    freed, changed = 0.75 * sum(w[j] for j in range(i + 1) if marked[b, j]), changed + 1
                    for j in range(i + 1):
                        if marked[b, j]:
                            w[j] *= 0.25
                        elif shown[b, j]:
                            w[j] += freed * w[j] / (mass - sink)
                want = sum(w[j] * v[b, h // 2, j].double() for j in range(i + 1))
                torch.testing.assert_close(got[b, i, h].double(), want, atol=1e-5, rtol=1e-5)
    assert 10 < changed < 40
