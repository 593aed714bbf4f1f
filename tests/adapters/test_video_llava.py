"""Video-LLaVA: a tower for each kind of input, and CLS tokens of frames, which no stage sees."""

from __future__ import annotations

from typing import Any, ClassVar

import oracle
import pytest
import tiny
import torch
from against_oracle import compare
from probes import Inside, Ragged
from tiny_models import TOKENS

import vtoken
from vtoken.errors import UnsupportedError
from vtoken.stages import Compressor, Keep, Site, VisualTokens

FAMILY = "video_llava"
ROWS: list[list[tiny.Item]] = [[3, ("video", 3), 2, "img", 4], [1, ("video", 3), 2]]
LED = TOKENS + 1


class Second(Compressor):
    """Keeps tokens of the second frame of every video, all of it at sites frames, three tokens elsewhere. No paper."""

    site: ClassVar[Site] = "tokens"

    def select(self, tokens: VisualTokens) -> Keep:
        index, lengths, start = [], [], 0
        for n, parts in zip(tokens.lengths, tokens.parts, strict=True):
            each = n // parts[0][0]
            kept = torch.arange(each, each + min(3, each)) if parts[0][0] > 1 else torch.arange(n)
            index.append(kept + start)
            lengths.append(len(kept))
            start += n
        return Keep(torch.cat(index), tuple(lengths))


class SecondFrame(Second):
    """No paper."""

    site: ClassVar[Site] = "frames"


class SecondInside(Second):
    """In the tower, where each frame stands alone: three tokens of every second, none of the others. No paper."""

    site: ClassVar[Site] = "encoder"

    def layers(self, depth: int) -> tuple[int, ...]:
        return (1,)

    def select(self, tokens: VisualTokens) -> Keep:
        frames = range(len(tokens.lengths))
        lengths = tuple(3 if i % 3 == 1 else 0 for i in frames)
        return Keep(torch.cat([torch.arange(n) + i * TOKENS for i, n in zip(frames, lengths, strict=True)]), lengths)


@pytest.fixture
def model() -> Any:
    return tiny.make(FAMILY)


def entered(model: Any, batch: dict[str, Any], pipeline: dict[str, Any]) -> torch.Tensor:
    """What enters the decoder of a single row."""
    seen: dict[str, Any] = {}
    with vtoken.wrapped(model, pipeline), torch.no_grad():
        hook = model.get_decoder().register_forward_pre_hook(lambda m, a, k: seen.update(k), with_kwargs=True)
        model(**batch)
        hook.remove()
    return seen["inputs_embeds"][0]


@pytest.mark.parametrize("kind", ["img", "video"])
def test_every_kind_has_its_tower(model: Any, kind: str) -> None:
    """Stages act in the one that runs, and facts are of that one."""
    batch = tiny.build(model, [[2, kind, 3]], seed=3)
    ran: list[str] = []
    towers = {"img": model.model.image_tower, "video": model.model.video_tower}
    hooks = [t.register_forward_hook(lambda *_, name=name: ran.append(name)) for name, t in towers.items()]
    trace = compare(model, batch, {"stages": [Inside(at=(1,)), {"fastervlm": {"keep": 4}}]})
    for hook in hooks:
        hook.remove()
    assert {*ran} == {kind} and trace.tokens_out == [4]
    assert 0 < sum(trace.stages[0].tokens_out) < sum(trace.stages[0].tokens_in)


def test_towers_do_not_share_what_they_say(model: Any) -> None:
    """With the towers exchanged, stages choose as the other one sees it."""
    batch = tiny.build(model, [[2, "img", 3]], seed=3)
    with vtoken.wrapped(model, "fastervlm:5"), torch.no_grad():
        model(**batch)
        first = vtoken.trace(model).kept[0].tolist()
    model.model.image_tower, model.model.video_tower = model.model.video_tower, model.model.image_tower
    with vtoken.wrapped(model, "fastervlm:5"), torch.no_grad():
        model(**batch)
        second = vtoken.trace(model).kept[0].tolist()
    frames = {"pixel_values_videos": batch[tiny.family(FAMILY).pixels][:, None]}
    video = {**tiny.build(model, [[2, ("video", 1), 3]], seed=3), **frames}
    model.model.image_tower, model.model.video_tower = model.model.video_tower, model.model.image_tower
    with vtoken.wrapped(model, "fastervlm:5"), torch.no_grad():
        model(**video)
        assert vtoken.trace(model).kept[0].tolist() == second != first


@pytest.mark.parametrize("policy", ["keep_if_row_has_token", "keep", "drop"])
@pytest.mark.parametrize("stage", [Second(), Ragged()], ids=str)
def test_cls_tokens_follow_the_newline_policy(model: Any, policy: Any, stage: Any) -> None:
    compare(model, tiny.build(model, ROWS, seed=3), {"stages": [stage], "newline": policy})


@pytest.mark.parametrize(
    ("policy", "left"), [("keep_if_row_has_token", [LED]), ("keep", [0, LED, 2 * LED]), ("drop", [])]
)
def test_which_cls_tokens_stay(model: Any, policy: str, left: list[int]) -> None:
    """The values that enter are those of the stock model, at these places."""
    batch = tiny.build(model, [[2, ("video", 3), 3]], seed=3)
    stock = oracle.prompt(model, batch).embeds[0]
    got = entered(model, batch, {"stages": [Second()], "newline": policy})
    kept = sorted([*left, *(LED + 1 + n for n in range(3))])
    assert torch.equal(got, stock[[0, 1, *(2 + n for n in kept), *range(len(stock) - 3, len(stock))]])


@pytest.mark.parametrize("stage", [SecondFrame(), SecondInside()], ids=str)
@pytest.mark.parametrize("policy", ["keep_if_row_has_token", "keep", "drop"])
def test_a_frame_that_the_tower_leaves_out_takes_its_cls_token_along(model: Any, policy: str, stage: Any) -> None:
    """It was never made, so `keep` cannot keep it. A frame that stays has the CLS token that the stock model makes."""
    batch = tiny.build(model, [[2, ("video", 3), 3]], seed=3)
    got = entered(model, batch, {"stages": [stage], "newline": policy})
    cls = int(policy != "drop")
    assert len(got) == 5 + cls + (TOKENS if stage.site == "frames" else 3)
    assert (got.abs().amax(1) > 0).all()
    if cls and stage.site == "frames":
        torch.testing.assert_close(got[2], oracle.prompt(model, batch).embeds[0, 2 + LED], atol=1e-5, rtol=1e-4)


def test_cls_tokens_of_a_shortened_tower(model: Any) -> None:
    """Later layers attend to what is left: recomputed layer by layer with the stock tower's own."""
    batch = tiny.build(model, [[2, ("video", 3), 3]], seed=3)
    got = entered(model, batch, {"stages": [SecondInside()]})
    tower = model.model.video_tower
    nested = getattr(tower, "vision_model", tower)
    with torch.no_grad():
        hidden = nested.pre_layrnorm(nested.embeddings(batch["pixel_values_videos"][0][1:2]))
        for number, layer in enumerate(nested.encoder.layers[:3]):
            if number == 2:
                hidden = hidden[:, :4]
            out = layer(hidden, attention_mask=None)
            hidden = out[0] if isinstance(out, tuple) else out
        want = model.model.multi_modal_projector(hidden)[0]
    torch.testing.assert_close(got[2:6], want, atol=1e-4, rtol=1e-4)


def test_no_stage_sees_a_cls_token(model: Any) -> None:
    seen: list[VisualTokens] = []

    class Look(Compressor):
        """No paper."""

        site: ClassVar[Site] = "tokens"

        def select(self, tokens: VisualTokens) -> Keep:
            seen.append(tokens)
            return Keep(torch.arange(len(tokens.x)), tokens.lengths)

    batch = tiny.build(model, [[2, ("video", 3), 3]], seed=3)
    stock = oracle.prompt(model, batch).embeds[0, 2 : 2 + 3 * LED]
    with vtoken.wrapped(model, [Look()]), torch.no_grad():
        model(**batch)
        assert vtoken.trace(model).visual_tokens == [3 * TOKENS]
    patches = stock.unflatten(0, (3, LED))[:, 1:].flatten(0, 1)
    assert torch.equal(seen[0].x, patches) and seen[0].parts == (((3, 4, 4),),)


def test_pixels_of_pictures_under_their_older_name(model: Any) -> None:
    batch = tiny.build(model, [[2, "img", 3], [1, "img", 2]], seed=3)
    pixels = batch.pop(tiny.family(FAMILY).pixels)
    pipeline = {"stages": [Inside(at=(1,)), {"fastervlm": {"keep": 4}}], "min_visual_tokens": 8}
    with vtoken.wrapped(model, pipeline):
        want = model.generate(**batch, **{tiny.family(FAMILY).pixels: pixels}, max_new_tokens=4, do_sample=False)
        first = vtoken.trace(model)
        got = model.generate(**batch, pixel_values_images=pixels, max_new_tokens=4, do_sample=False)
        second = vtoken.trace(model)
    assert torch.equal(got, want) and second.tokens_out == first.tokens_out == [4, 4]
    assert second.stages[0].tokens_out == first.stages[0].tokens_out != first.stages[0].tokens_in


def test_cls_among_the_patches_of_pictures_is_refused(model: Any) -> None:
    model.config.vision_feature_select_strategy = "full"
    with pytest.raises(UnsupportedError, match="keeps the CLS token among the patches; use 'default'"):
        vtoken.wrap(model, "uniform:50%")


def test_another_model_is_refused(model: Any) -> None:
    with pytest.raises(UnsupportedError, match="expected a video_llava model with its language-model head"):
        tiny.registry.adapter(FAMILY)(model.model)
