"""What only holds where torchvision is installed: stock processors of the shipped models, videos included."""

import numpy as np
import pytest
import torch
from PIL import Image

import vtoken
from vtoken.evals import processors, reference

pytest.importorskip("torchvision")


@pytest.fixture(scope="module", params=reference.names())
def folder(request):
    return reference.path(request.param)


def test_stock_processors_answer_as_the_pillow_ones_do(folder):
    """Pixels differ by rounding; answers to easy questions do not, dense or pruned."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    torch.set_num_threads(1)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    stock = AutoProcessor.from_pretrained(folder)
    stock.tokenizer.padding_side = "left"
    both = [stock, processors.load(folder), processors.load(folder, pillow=True)]
    kinds = [type(processor.image_processor).__name__.endswith("Pil") for processor in both]
    assert kinds == [False, False, True] and len({type(processor) for processor in both}) == 1
    asked = reference.questions(12)
    for pipeline in ("none", "fastervlm:64"):
        with vtoken.wrapped(model, pipeline):
            right = [
                sum(r for r, _ in reference.score(asked, reference.answers(model, p, asked)).values()) for p in both
            ]
        assert min(right) >= 11


def test_videos_of_the_shipped_qwen():
    """The stock processor prepares frames; a budget per frame holds; pictures still go through Pillow."""
    model, processor = reference.load("tiny-qwen2.5-vl")
    processors.check_video(processor)
    images = [Image.open(question.image).convert("RGB").resize((96, 64)) for question in reference.questions(24)[::6]]
    frames = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what digit is red?"}]}
    text = processor.apply_chat_template([message], add_generation_prompt=True).replace(
        "<|image_pad|>", "<|video_pad|>"
    )
    inputs = processor(videos=[frames], text=[text], return_tensors="pt", do_sample_frames=False)
    assert inputs["video_grid_thw"].tolist() == [[2, 8, 12]]
    with vtoken.wrapped(model, [{"uniform": {"keep": {"per_frame": 4}}}]):
        out = model.generate(**inputs, max_new_tokens=2, do_sample=False)
        trace = vtoken.trace(model)
    assert out.shape[1] > inputs["input_ids"].shape[1]
    assert trace.visual_tokens == [48] and trace.tokens_out == [8]
