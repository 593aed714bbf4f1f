"""Stages that choose frames before the vision tower, inside models: every family that takes videos."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import tiny
import torch
from against_oracle import compare
from batches import inside, rows_for, suited
from contrast import Some, batch_of, rows
from flop_counts import SDPA, Pipe, part
from modes import alone, greedy
from probes import Deep, Inside, InsideMerge, Ragged
from torch.utils.flop_counter import FlopCounterMode
from usual import CACHE, SPARSE, stage

import vtoken
from vtoken import registry
from vtoken.errors import UnsupportedError
from vtoken.evals.cost.flops import account
from vtoken.hooks.state.decide import STILLS
from vtoken.hooks.state.run import ImageLayout
from vtoken.hooks.vision import frames
from vtoken.pruners.frames.frames_changed import FramesChanged
from vtoken.pruners.frames.frames_farthest import FramesFarthest
from vtoken.pruners.frames.frames_uniform import FramesUniform
from vtoken.stages import Compressor, Keep, Site, VisualTokens

families = pytest.mark.parametrize("family", tiny.VIDEO)


class Off(Compressor):
    """Frames site, does what none may. No paper."""

    site: ClassVar[Site] = "frames"
    merge: bool = False

    def select(self, tokens: VisualTokens) -> Keep:
        if not self.merge:
            return Keep(torch.arange(0), (0,) * len(tokens.lengths))
        first = torch.arange(tokens.lengths[0])
        return Keep(first[:1], (1,), torch.zeros_like(first))


PIPELINES: dict[str, list[Any]] = {
    "farthest": [{"frames_farthest": {"keep": 2}}],
    "ragged": [Some()],
    "twice": [{"frames_uniform": {"keep": 3}}, Some()],
    "then tokens": [Some(), {"fastervlm": {"keep": {"per_frame": 2}}}, {"pool": {"size": 2}}],
    "then everywhere": [Some(), Inside(at=(1,)), Ragged(), Deep()],
    "then merged inside": [Some(), InsideMerge(at=(1,))],
}


@families
@pytest.mark.parametrize("stages", PIPELINES)
def test_equals_recomputation(family: str, stages: str) -> None:
    model = tiny.make(family)
    pipeline = inside(family, PIPELINES[stages])
    trace = compare(model, batch_of(family, model), {"stages": pipeline})
    first = trace.stages[0]
    assert first.site == "frames" and first.tokens_in == trace.visual_tokens
    assert sum(first.tokens_out) < sum(first.tokens_in)
    for before, after in zip(trace.stages, trace.stages[1:], strict=False):
        assert after.tokens_in == before.tokens_out
    if stages == "ragged":
        assert len({len(f) for f, parts in zip(first.frames, trace.parts, strict=True) if parts[0][0] > 1}) > 1


@families
def test_what_stays_are_the_features_of_these_frames(family: str) -> None:
    """Frames do not see each other in the tower: the stock model's features of the whole video, where the frame
    stayed."""
    model = tiny.make(family)
    batch = batch_of(family, model)
    names = ("pixel_values_videos", "video_grid_thw")
    given = [batch[name] for name in names if name in batch]
    seen: dict[str, Any] = {}
    with torch.no_grad():
        stock = model.model.get_video_features(*given, return_dict=True).pooler_output
        if not torch.is_tensor(stock):
            stock = torch.cat(list(stock))
        else:
            stock = stock[:, 1:] if tiny.family(family).frames_led else stock[:, : stock.shape[1] - stock.shape[1] % 4]
        with vtoken.wrapped(model, [Some()]):
            hook = model.get_decoder().register_forward_pre_hook(lambda m, a, k: seen.update(k), with_kwargs=True)
            model(**batch)
            hook.remove()
            trace = vtoken.trace(model)
    stage = trace.stages[0]
    video = [i for i, parts in enumerate(trace.parts) if parts[0][0] > 1]
    whole = iter(stock.flatten(0, -2).split([trace.visual_tokens[i] for i in video]))
    for i in video:
        tokens, each = next(whole), trace.visual_tokens[i] // trace.parts[i][0][0]
        want = [f * each + j for f in stage.frames[i] for j in range(each)]
        assert stage.kept[i].tolist() == want
        row = seen["inputs_embeds"][trace.row[i]]
        near = (tokens[want][:, None] - row).abs().amax(2).min(1).values
        assert near.max() < 1e-4


@families
def test_the_layers_of_the_tower_see_fewer_patches(family: str) -> None:
    model = tiny.make(family)
    batch = tiny.build(model, [rows(family)[0]], seed=3)
    found: list[int] = []
    encoder = tiny.adapter(model).encoder
    layers = [layer for tower in (encoder.layers, *(more for _, more in encoder.twins)) for layer in tower]
    with vtoken.wrapped(model, FramesFarthest(keep=2)), torch.no_grad():
        hooks = [
            layer.register_forward_hook(
                lambda m, a, out: found.append((out[0] if isinstance(out, tuple) else out).numel() // 32)
            )
            for layer in layers
        ]
        model(**batch)
        for hook in hooks:
            hook.remove()
        (stage,) = vtoken.trace(model).stages
    seen = 2 * (16 + tiny.adapter(model).encoder.cls)
    assert found == [seen] * 4 and stage.patches == [2 * 16] and len(stage.frames[0]) == 2


@families
@pytest.mark.parametrize(
    "stages",
    [
        [Some()],
        [FramesFarthest(keep=2)],
        [FramesUniform(keep=3)],
        [FramesChanged(similarity=0.0)],
        [Some(), SPARSE, CACHE],
    ],
    ids=str,
)
def test_a_row_of_a_batch_is_what_it_is_alone(family: str, stages: list[Any]) -> None:
    model = tiny.make(family)
    batch = batch_of(family, model)
    options: dict[str, Any] = {"n": 3, "return_dict_in_generate": True, "output_logits": True}
    with vtoken.wrapped(model, stages):
        together = torch.stack(greedy(model, batch, **options).logits, 1)
        whole = vtoken.trace(model)
        for row in range(len(together)):
            single = torch.stack(greedy(model, alone(model, batch, row), **options).logits, 1)
            torch.testing.assert_close(together[row : row + 1], single, atol=2e-4, rtol=1e-4)
            found = vtoken.trace(model).stages
            mine = [f for f, r in zip(whole.stages[0].frames, whole.row, strict=True) if r == row]
            assert mine == (found[0].frames if found else [])


@pytest.mark.parametrize("family", tiny.families(takes_video=True, video_beams=True))
def test_beams_and_return_sequences(family: str) -> None:
    """`generate` repeats the rows of a batch after the frames were chosen."""
    model = tiny.make(family)
    batch = tiny.build(model, [rows(family)[0]], seed=3)
    with vtoken.wrapped(model, FramesFarthest(keep=2)):
        want = greedy(model, batch)
        kept = vtoken.trace(model).stages[0].frames
        got = model.generate(**batch, max_new_tokens=6, do_sample=False, num_beams=2, num_return_sequences=2)
        assert vtoken.trace(model).stages[0].frames == kept * 2
    assert len(got) == 2 and got.shape[1] == want.shape[1]


@families
def test_keeping_everything_is_the_identity(family: str) -> None:
    model = tiny.make(family)
    batch = batch_of(family, model)
    options: dict[str, Any] = {"return_dict_in_generate": True, "output_logits": True}
    want = torch.stack(greedy(model, batch, **options).logits)
    with vtoken.wrapped(model, FramesUniform(keep="100%")):
        assert torch.equal(torch.stack(greedy(model, batch, **options).logits), want), "bit for bit"


@families
@pytest.mark.parametrize(
    "stage, says", [(Off(), "dropped every frame of a video"), (Off(merge=True), "merged frames")], ids=str
)
def test_what_no_stage_may_do(family: str, stage: Any, says: str) -> None:
    model = tiny.make(family)
    batch = tiny.build(model, [rows(family)[0]], seed=3)
    want = greedy(model, batch)
    with vtoken.wrapped(model, [stage]), pytest.raises(ValueError, match=f"stage off {says}|stage test_frames {says}"):
        greedy(model, batch)
    assert torch.equal(greedy(model, batch), want)


@pytest.mark.parametrize("family", tiny.families(takes_video=False))
def test_families_without_videos_are_refused(family: str) -> None:
    with pytest.raises(UnsupportedError, match=f"frames_farthest chooses frames of videos, and {family} takes none"):
        vtoken.wrap(tiny.make(family), "frames_farthest:2")


@families
def test_images_pass(family: str) -> None:
    model = tiny.make(family)
    batch = tiny.build(model, rows_for(family, "ragged"), seed=3)
    want = greedy(model, batch)
    with vtoken.wrapped(model, "frames_farthest:1"):
        assert torch.equal(greedy(model, batch), want)
        (stage,) = vtoken.trace(model).stages
    assert stage.frames == [[0]] * 3 and stage.tokens_in == stage.tokens_out


@families
def test_flops(family: str) -> None:
    """What the account says of the tower is what it runs; the prompt is as long as it says."""
    model = tiny.make(family)
    batch = tiny.build(model, [[2, ("video", 4), 3]], seed=3)
    (video,) = tiny.family(model).found(batch)[1]
    _, patches = tiny.family(model).frames(video.spec)
    frames_given = 4 * getattr(model.config.vision_config, "temporal_patch_size", 1)
    stage = FramesFarthest(keep=1)
    text = int((batch["input_ids"] < tiny.IMG).sum() + (batch["input_ids"] > tiny.VID).sum())
    claimed = account(model.config, Pipe((stage,)), image_size=56, frames=frames_given, text_tokens=text, new_tokens=1)
    dense = account(model.config, image_size=56, frames=frames_given, text_tokens=text, new_tokens=1)
    with vtoken.wrapped(model, stage), torch.no_grad():
        with FlopCounterMode(display=False, custom_mapping=SDPA) as counter:
            greedy(model, batch, n=1)
        trace = vtoken.trace(model)
    others = (model.get_decoder(), "language_model"), (model.lm_head, "lm_head")
    behind = sum(sum(part(counter, module, name).values()) for module, name in others)
    # Similarities are products of a matrix and a vector, which the counter leaves out.
    assert claimed.tower + claimed.projector == counter.get_total_flops() - behind
    # Packed towers embed the patches of all frames before any is left out.
    embedding = 2 * 4 * patches * 1176 * 32 if tiny.family(model).varlen else 0
    assert (claimed.tower - embedding) * 4 == dense.tower - embedding
    assert claimed.stages == 2 * 4 * 3 * 16**2
    assert trace.prompt_tokens == [text + claimed.visual_entry + claimed.newline_entry]
    assert claimed.visual_entry * 4 == dense.visual_entry


def test_a_second_stage_sees_what_the_first_left() -> None:
    """Frames 0, 2 and 3 of the first video, 1 of the second; then the last of each."""
    seen: list[VisualTokens] = []

    class First(Compressor):
        """No paper."""

        site: ClassVar[Site] = "frames"

        def select(self, tokens: VisualTokens) -> Keep:
            seen.append(tokens)
            return Keep(torch.tensor([0, 2, 3, 5]), (3, 1))

    class Second(Compressor):
        """No paper."""

        site: ClassVar[Site] = "frames"

        def select(self, tokens: VisualTokens) -> Keep:
            seen.append(tokens)
            return Keep(torch.tensor([2, 3]), (1, 1))

    x = torch.arange(6.0)[:, None]
    found = frames.choose([First(), Second()], x, (4, 2))
    assert found.index.tolist() == [3, 5]
    assert [[p.tolist() for p in step.kept] for step in found.steps] == [[[0, 2, 3], [1]], [[3], [1]]]
    first, second = seen
    assert first.lengths == (4, 2) and second.lengths == (3, 1)
    assert first.raster_index.tolist() == [0, 1, 2, 3, 0, 1] and second.raster_index.tolist() == [0, 2, 3, 1]
    assert second.x[:, 0].tolist() == [0, 2, 3, 5] and second.parts == (((4, 1, 1),), ((2, 1, 1),))


def test_thumbnails_of_patches_are_those_of_the_pictures() -> None:
    """What the image processor of Qwen cut into patches gives the thumbnails of the pictures it was given."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    pictures = [torch.randint(0, 255, (h, w, 3), dtype=torch.uint8).numpy() for h, w in ((448, 448), (896, 448))]
    processor = Qwen2VLImageProcessorPil(patch_size=14, merge_size=2, temporal_patch_size=2)
    cut = processor(images=pictures, return_tensors="pt")
    layouts = [ImageLayout(((t, h // 2, w // 2),)) for t, h, w in cut["image_grid_thw"].tolist()]
    got = frames.packed_thumbnails(cut["pixel_values"], layouts, 2, 2 * 14 * 14)
    mean, std = (torch.tensor(x)[:, None, None] for x in (processor.image_mean, processor.image_std))
    want = [frames.thumbnails(((torch.tensor(p).permute(2, 0, 1) / 255 - mean) / std)[None]) for p in pictures]
    torch.testing.assert_close(got, torch.cat(want), atol=1e-5, rtol=1e-4)


VIDEOS_ONLY = [name for name, cls in registry.catalogue()[0].items() if cls.videos_only]


@pytest.mark.parametrize("name", VIDEOS_ONLY)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_what_works_on_videos_says_so_of_pictures(family, name):
    """Nobody takes it for a method that keeps everything; a picture beside a video is part of what it did."""
    model = tiny.make(family)
    try:
        vtoken.wrap(model, [stage(name)])
    except UnsupportedError as error:
        pytest.skip(str(error))
    model.generate(**tiny.build(model, [[3, "img", 4]], seed=1), max_new_tokens=1)
    (entry,) = vtoken.trace(model).stages
    assert entry.stood_aside == STILLS and entry.tokens_out == entry.tokens_in
    if family in tiny.VIDEO and not tiny.family(family).one_placeholder:
        rows = suited(family, [[3, "img", 4, "video", 2]])
        model.generate(**tiny.build(model, rows, seed=1), max_new_tokens=1)
        (entry,) = vtoken.trace(model).stages
        assert entry.stood_aside is None and entry.tokens_out[0] == entry.tokens_in[0]
