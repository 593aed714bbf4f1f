"""What the bridge stands on, without lmms-eval: prompts of every family in batches, videos, pixels, and what is
recorded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from batches import inside, suited
from PIL import Image
from probes import Deep, Failing, Ragged
from tiny import FAMILIES, VIDEO, make
from tiny_processors import processor, save

from vtoken import config, registry, trace, wrapped
from vtoken.cli import main
from vtoken.errors import ConfigError, UnsupportedError
from vtoken.evals import processors
from vtoken.evals.lmms.generation import TextGenerator, ended
from vtoken.evals.lmms.prompts import Prompt, clip, encode, from_chat, limit_pixels, pixels
from vtoken.evals.lmms.records import dense_tokens, pruned_tokens
from vtoken.evals.shared import models

OPTIONS = {"max_new_tokens": 4, "temperature": 0, "do_sample": False, "until": ["\n\n"]}
families = pytest.mark.parametrize("family", FAMILIES)


def picture(seed: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    noise = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(noise.to(torch.uint8).numpy())


def chat(*parts: Any) -> list[dict[str, Any]]:
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "video" if isinstance(part, list) else "image", "url": part}
        for part in parts
    ]
    return [{"role": "user", "content": content}]


PROMPTS = [
    from_chat(chat(picture(1), "w20 w21"), 8),
    from_chat(chat(picture(2), "w22", picture(3, (90, 50)), "w23 w24 w25"), 8),
    from_chat(chat("w26 w27"), 8),
    from_chat(chat(picture(4, (50, 90)), "w28 w29 w30 w31"), 8),
]


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, TextGenerator] = {}

    def get(family: str) -> TextGenerator:
        if family not in made:
            folder = save(family, tmp_path_factory.mktemp(family))
            # transformers loads the words of Qwen3.5 as a tokenizer of its own kind, which does not know them.
            own = processor(family) if tiny.family(family).states else processors.load(folder)
            own.tokenizer.padding_side = "left"
            made[family] = TextGenerator(models.load(str(folder), device="cpu"), own)
        made[family].use(None)
        return made[family]

    return get


@families
@pytest.mark.parametrize("pipeline", [None, "random:60%", [Ragged(), Deep(at=(1, 3), factor=0.95)]], ids=str)
def test_a_batch_is_its_rows(family: str, pipeline: Any, generator: Any) -> None:
    """Pictures of several sizes, two of them, none at all: answers and counts are those of each prompt alone."""
    asked = generator(family)
    stages = inside(family, pipeline) if isinstance(pipeline, list) else pipeline
    asked.use(None if stages is None else config.load(stages))
    together = asked.generate(PROMPTS, OPTIONS)
    alone = [asked.generate([prompt], OPTIONS)[0] for prompt in PROMPTS]
    assert [reply.text for reply in together] == [reply.text for reply in alone]
    assert len({reply.text for reply in alone}) >= 3, "answers depend on the prompt"
    for one, other in zip(together, alone, strict=True):
        assert one.cost.batch == 4 and other.cost.batch == 1
        timed: dict[str, Any] = {"batch": 1, "preprocess_s": 0.0, "ttft_s": 0.0, "decode_s": 0.0, "stages": {}}
        # Alone, a prompt without a picture has nothing to decide.
        assert set(other.cost.stages) == (set(one.cost.stages) if other.cost.visual_tokens else set())
        assert bool(one.cost.stages) == (pipeline is not None)
        assert replace(one.cost, **timed) == replace(other.cost, **timed)
        assert one.cost.new_tokens == 4 and one.cost.prompt_tokens > one.cost.visual_tokens
        assert min(one.cost.preprocess_s, one.cost.ttft_s, one.cost.decode_s) > 0
    assert together[2].cost.visual_tokens == together[2].cost.visual_tokens_entry == 0
    fewer = [reply.cost.visual_tokens_mean < reply.cost.visual_tokens_entry for reply in together]
    assert any(fewer) == isinstance(pipeline, list)
    for reply in together[:2]:
        dropped = reply.cost.visual_tokens - reply.cost.visual_tokens_entry
        assert (dropped > 0) == (pipeline is not None)
        assert reply.cost.visual_tokens_mean <= reply.cost.visual_tokens_entry
        # Newline tokens may go with what is dropped.
        assert reply.cost.input_tokens <= reply.cost.prompt_tokens - dropped


def test_answers_are_those_of_the_stock_call(generator: Any) -> None:
    """Against transformers' own chat template with pictures in it, decoded from what `generate` adds."""
    asked = generator("llava")
    message = {"role": "user", "content": [{"type": "image", "image": picture(1)}, {"type": "text", "text": "w20 w21"}]}
    inputs = asked.processor.apply_chat_template(
        [message], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    out = asked.model.generate(**inputs, do_sample=False, max_new_tokens=4)
    text = asked.processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert asked.generate(PROMPTS[:1], OPTIONS)[0].text == text != ""


@families
@pytest.mark.parametrize("kinds", ["images", "videos", "both"])
def test_tokens_are_counted_without_a_trace_as_with_one(family: str, kinds: str) -> None:
    if kinds != "images" and family not in VIDEO:
        return
    rows: list[list[Any]] = {
        "images": [[3, "img", 2, "img", 5], [1, "img", 2], [4]],
        "videos": [[4], [2, "video", 3], [1, "video", 6]],
        "both": [[2, "video", 1, "img", 3], [1, "img", 6], [3]],
    }[kinds]
    model = make(family)
    rows = suited(family, rows)
    batch = tiny.build(model, rows)
    adapter = registry.adapter(family)(model)
    with torch.no_grad(), wrapped(model, [Ragged()]):
        model.generate(**batch, max_new_tokens=1, do_sample=False)
        seen = trace(model)
        pruned = pruned_tokens(batch, seen, range(len(rows)))
    dense = dense_tokens(adapter, batch)
    assert [t.visual_tokens for t in dense] == [t.visual_tokens for t in pruned]
    assert sum(t.visual_tokens for t in dense) == sum(seen.visual_tokens) > 0
    for row, tokens in enumerate(pruned):
        own = [k for k, of in enumerate(seen.row) if of == row]
        assert tokens.visual_tokens_entry == tokens.visual_tokens_mean == sum(seen.tokens_out[k] for k in own)
        assert (
            tokens.prompt_tokens
            == dense[row].prompt_tokens
            == dense[row].input_tokens
            == int(batch["attention_mask"][row].sum())
        )
        assert tokens.input_tokens == seen.prompt_tokens[row]


def test_beams_count_every_prompt_once(generator: Any) -> None:
    asked = generator("llava")
    asked.use(config.load("random:5"))
    one, two = (asked.generate(PROMPTS[:2], {**OPTIONS, "num_beams": beams}) for beams in (1, 2))
    assert [r.cost.visual_tokens_entry for r in two] == [r.cost.visual_tokens_entry for r in one] == [5, 10]
    assert [r.cost.input_tokens for r in two] == [r.cost.input_tokens for r in one]


def test_an_error_is_no_answer_and_another_pipeline_goes_on(generator: Any) -> None:
    asked = generator("llava")
    asked.use(config.load([Failing(keep=5)]))
    with pytest.raises(ZeroDivisionError):
        asked.generate(PROMPTS[:1], OPTIONS)
    asked.use(config.load("random:5"))
    assert asked.generate(PROMPTS[:1], OPTIONS)[0].cost.visual_tokens_entry == 5
    with pytest.raises(UnsupportedError):
        asked.use(config.load({"anyres": "2x2", "stages": ["pool"]}))
    assert asked.pipeline is None and asked.generate(PROMPTS[:1], OPTIONS)[0].cost.visual_tokens_entry == tiny.TOKENS


def test_crops_follow_the_pipeline_and_come_back(generator: Any) -> None:
    asked = generator("llava_next")
    wide = [from_chat(chat(picture(5, (56, 34)), "w20"), 8)]
    counts = []
    for pipeline in (None, config.load({"anyres": "2x2", "stages": [{"random": {"keep": 5}}]}), None):
        asked.use(pipeline)
        counts.append(asked.generate(wide, OPTIONS)[0].cost.visual_tokens)
    assert counts[0] == counts[2] != counts[1]


def test_where_answers_end(generator: Any) -> None:
    assert ended("a\n\nb", ["\n\n"]) == ended("a\n\nb", None) == "a\n\nb"
    assert ended("a. b", ".") == ended("a. b", ["\n\n", "", "."]) == "a"
    asked = generator("llava")
    asked.model.generation_config.eos_token_id = [7, 9]
    assert asked._length([3, 9, 0, 0]) == 2 and asked._length([3, 4]) == 2 and asked._length([7]) == 1
    asked.model.generation_config.eos_token_id = None
    with pytest.raises(ConfigError, match="max_new_tokens must be at least 1"):
        TextGenerator(asked.model, asked.processor, 0)


def test_sampling_is_what_the_task_asks(generator: Any) -> None:
    greedy, warm = (generator("llava")._arguments(options) for options in (OPTIONS, {"temperature": 0.7, "top_p": 0.9}))
    assert not greedy["do_sample"] and greedy["temperature"] is None and greedy["max_new_tokens"] == 4
    assert warm["do_sample"] and (warm["temperature"], warm["top_p"], warm["max_new_tokens"]) == (0.7, 0.9, 128)


@families
def test_system_prompts_come_first_or_are_refused(family: str) -> None:
    kind, model = processor(family), SimpleNamespace(device="cpu", dtype=torch.float32)
    given = [{"role": "system", "content": [{"type": "text", "text": "w5"}]}, *chat(picture(1), "w20")]
    kept, replaced = from_chat(given, 8), from_chat(given, 8, "w6 w7")
    assert [p.messages[0]["content"][0]["text"] for p in (kept, replaced)] == ["w5", "w6 w7"]
    assert encode(kind, [replaced], model)["input_ids"][0, :2].tolist() == [6, 7]
    kind.chat_template = "{{ messages[-1]['content'][-1]['text'] }}"
    with pytest.raises(ConfigError, match="leaves the system prompt out"):
        encode(kind, [Prompt(replaced.messages)], model)
    kind.chat_template = None
    with pytest.raises(ConfigError, match="no chat template"):
        encode(kind, [kept], model)


def test_a_template_that_writes_bos_gets_no_second_one() -> None:
    kind, model = processor("llava"), SimpleNamespace(device="cpu", dtype=torch.float32)
    seen: list[dict[str, Any]] = []

    def call(text: list[str], **options: Any) -> Any:
        seen.append(options)
        return SimpleNamespace(to=lambda device: {})

    fields = {"tokenizer": kind.tokenizer, "chat_template": "x", "__call__": lambda self, **options: call(**options)}
    stub = type("Stub", (), fields)()
    for written in ("<bos> w20", "w20"):
        stub.apply_chat_template = lambda *a, written=written, **k: written
        encode(stub, [Prompt(({"role": "user", "content": []},))], model)
    assert [each.get("add_special_tokens", True) for each in seen] == [False, True]


def test_frames_are_spread_evenly(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), (20 * k, 0, 0)) for k in range(10)]
    short = clip(frames, 4)
    assert short.indices == (0, 3, 6, 9) and [f.getpixel((0, 0))[0] for f in short.frames] == [0, 60, 120, 180]
    assert short.metadata == {"fps": 1.0, "total_num_frames": 10, "frames_indices": [0, 3, 6, 9], "duration": 10.0}
    assert clip(frames, 40).indices == tuple(range(10)) and clip(frames, 1).indices == (0,)
    for k, frame in enumerate(frames):
        frame.save(tmp_path / f"{k}.png")
    assert clip(str(tmp_path), 4).indices == (0, 3, 6, 9) and clip([str(tmp_path)], 4).indices == (0, 3, 6, 9)
    with pytest.raises(UnsupportedError, match="a video is a file, a folder or a list of pictures, not dict"):
        clip({"video_start": 1}, 4)


def test_video_files_are_decoded(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    file = tmp_path / "clip.mkv"
    with av.open(str(file), "w") as out:
        stream = out.add_stream("ffv1", rate=5)
        stream.width = stream.height = 16
        stream.pix_fmt = "bgr0"
        for k in range(10):
            frame = av.VideoFrame.from_image(Image.new("RGB", (16, 16), (20 * k, 0, 0))).reformat(format="bgr0")
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    found = clip(str(file), 4)
    assert found.indices == (0, 3, 6, 9) and (found.fps, found.total) == (5.0, 10)
    assert [frame.getpixel((0, 0))[0] for frame in found.frames] == [0, 60, 120, 180]
    file.write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="cannot read video"):
        clip(str(file), 4)


@pytest.mark.parametrize("family", VIDEO)
def test_videos_reach_the_processor_with_their_clock(family: str) -> None:
    """With a stand-in for the video half of the processor, which needs torchvision."""
    stock = processor(family)
    seen: list[dict[str, Any]] = []

    class Stub(type(stock)):  # type: ignore[misc]
        def __init__(self) -> None:
            vars(self).update(vars(stock))

        def __call__(self, **given: Any) -> Any:
            seen.append(given)
            return SimpleNamespace(to=lambda device: {"pixel_values_videos": torch.zeros(1, dtype=torch.float64)})

    model = SimpleNamespace(device="cpu", dtype=torch.float32)
    frames = [Image.new("RGB", (16, 16), (k, 0, 0)) for k in range(6)]
    prompts = [from_chat(chat(frames, "w20"), 4), from_chat(chat(picture(1), frames[:2], "w21"), 4)]
    with pytest.raises(UnsupportedError, match="need torchvision"):
        encode(stock, prompts, model)
    stub = Stub()
    stub.video_processor = object()
    inputs = encode(stub, prompts, model)
    (given,) = seen
    assert inputs["pixel_values_videos"].dtype == torch.float32
    assert [len(video) for video in given["videos"]] == [4, 2] and given["do_sample_frames"] is False
    assert [m["frames_indices"] for m in given["video_metadata"]] == [[0, 2, 3, 5], [0, 1]]
    assert [len(images) for images in given["images"]] == [1] and all(stock.video_token in t for t in given["text"])


def test_what_no_family_takes_is_refused() -> None:
    def message(**part: Any) -> list[dict[str, Any]]:
        return [{"role": "user", "content": [part]}]

    with pytest.raises(UnsupportedError, match="this request has audio"):
        from_chat(message(type="audio", url="x.wav"), 8)
    with pytest.raises(UnsupportedError, match="shows a part of a video"):
        from_chat(message(type="video", url="x.mp4", start_time=0.0, end_time=3.0), 8)


def test_pixel_limits_are_explicit(generator: Any) -> None:
    kind = processor("qwen2_5_vl")
    assert pixels(kind)["size"] == {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}
    big = [from_chat(chat(picture(1, (112, 112)), "w20"), 8)]
    model = SimpleNamespace(device="cpu", dtype=torch.float32)
    assert encode(kind, big, model)["image_grid_thw"].tolist() == [[1, 8, 8]]
    limit_pixels(kind, None, 56 * 56)
    assert pixels(kind)["size"] == {"shortest_edge": 56 * 56, "longest_edge": 56 * 56}
    assert encode(kind, big, model)["image_grid_thw"].tolist() == [[1, 4, 4]]
    with pytest.raises(ConfigError, match="0 < min <= max"):
        limit_pixels(kind, 200000, 100)
    with pytest.raises(UnsupportedError, match="LlavaProcessor does not resize pictures by their area"):
        limit_pixels(processor("llava"), 100, 200)


def test_the_command_says_what_it_needs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("vtoken.evals.lmms.prepare.find_spec", lambda name: None)
    assert main(["eval", "tiny-llava", "--tasks", "smoke"]) == 2
    assert "vtoken eval needs lmms-eval: `make eval-venv`" in capsys.readouterr().err
