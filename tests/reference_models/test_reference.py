"""The reference VLMs: stock loading, the held-out set, the generator and the recipes."""

import json
import subprocess
import sys
from hashlib import sha256

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

import vtoken
from vtoken.cli import main
from vtoken.evals import reference

# Per model: its classes, visual placeholders of a shipped picture, and how many of them are newlines.
SHIPPED = {
    "tiny-llava": ("Llava", 576, 0),
    "tiny-llava-next": ("LlavaNext", 744, 24),
    "tiny-qwen2.5-vl": ("Qwen2_5_VL", 144, 0),
}


# sha256 of names and tensors as they were trained, in the model that `from_pretrained` makes.
TENSORS = {
    "tiny-llava": "bd6238b51522f045",
    "tiny-llava-next": "64f3ce88c425244d",
    "tiny-qwen2.5-vl": "e0f337f66ff46a57",
}
# How tensors begin in the checkpoints of llava-hf/llava-1.5-7b-hf, llava-v1.6-vicuna-7b-hf and Qwen2.5-VL on the Hub.
LLAVA = ("language_model.model.", "language_model.lm_head.", "multi_modal_projector.", "vision_tower.vision_model.")
HUB = {"Llava": LLAVA, "LlavaNext": (*LLAVA, "image_newline"), "Qwen2_5_VL": ("model.", "lm_head.", "visual.")}


@pytest.fixture(scope="module", params=SHIPPED)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def loaded(name):
    import torch

    torch.set_num_threads(1)
    return reference.load(name)


def test_import_needs_neither_torch_nor_transformers():
    code = (
        "import sys, vtoken.evals.reference as r; r.path(); r.questions(1); assert not {'torch', 'transformers'} & "
        "set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names_and_paths():
    assert reference.names() == tuple(SHIPPED) and reference.path() == reference.path("tiny-llava")
    assert all((reference.path(name) / "model.safetensors").stat().st_size <= 8e6 for name in SHIPPED)
    with pytest.raises(ValueError, match="did you mean 'tiny-llava'"):
        reference.path("tiny-lava")


def begins(folder, kind):
    """Whether every tensor in a saved model begins as one on the Hub does, and every such beginning occurs."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        found = {next((start for start in HUB[kind] if key.startswith(start)), key) for key in file.keys()}
    return found == {*HUB[kind]}


def test_weights_are_those_that_were_trained(name, loaded):
    tensors, found = loaded[0].state_dict(), sha256()
    for key in sorted(tensors):
        found.update(key.encode() + tensors[key].numpy().tobytes())
    assert found.hexdigest()[:16] == TENSORS[name]


def test_others_than_transformers_5_read_the_files(name):
    folder = reference.path(name)
    assert begins(folder, SHIPPED[name][0])
    assert [file.name for file in folder.glob("*.safetensors")] == ["model.safetensors"], "loaders take every one"
    text = json.loads((folder / "config.json").read_text(encoding="utf-8"))["text_config"]
    assert text["rope_theta"] == text["rope_parameters"]["rope_theta"] == 1e6
    section = text["rope_parameters"].get("mrope_section")
    assert text.get("rope_scaling") == (section and {"mrope_section": section, "type": "mrope"})


def test_an_installed_wheel_says_where_the_other_models_are(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(reference, "_REPOSITORY", tmp_path / "site-packages" / "reference_models")
    monkeypatch.chdir(tmp_path)
    assert reference.path().is_dir()
    picture = str(reference.questions(1)[0].image)
    for words in ("flops {}", "bench {}", f"show {{}} none {picture}", "calibrate vtw {}", "demo --model {}"):
        assert main(words.format("tiny-qwen2.5-vl").split()) == 2
        assert "tiny-qwen2.5-vl lies in reference_models/ of vtoken's repository" in capsys.readouterr().err
    (tmp_path / "reference_models" / "tiny-qwen2.5-vl").mkdir(parents=True)
    assert reference.path("tiny-qwen2.5-vl").parent == tmp_path / "reference_models"


def test_stock_model_and_processor(name, loaded):
    (model, processor), kind = loaded, SHIPPED[name][0]
    assert type(model).__name__ == f"{kind}ForConditionalGeneration" and not model.training
    assert type(processor).__name__ == f"{kind}Processor"
    assert type(processor.image_processor).__name__.endswith("Pil")
    assert processor.tokenizer.padding_side == "left"


def test_visual_tokens(name, loaded):
    model, processor = loaded
    _, placeholders, newlines = SHIPPED[name]
    question = reference.questions(1)[0]
    picture = Image.open(question.image)
    inputs = processor(images=[picture], text=[reference.prompt(processor, question)], return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == placeholders
    assert inputs["input_ids"][0, 0] == model.config.text_config.bos_token_id
    with vtoken.wrapped(model, "random:8"):
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
        assert vtoken.trace(model).visual_tokens == [placeholders - newlines]


def test_every_word_of_the_held_out_set_is_known(loaded):
    tokenizer = loaded[1].tokenizer
    for question in reference.questions():
        assert tokenizer.unk_token_id not in tokenizer(f"{question.question} {question.answer}").input_ids


def test_held_out_set():
    asked = reference.questions()
    assert len(asked) >= 500 and {q.kind for q in asked} == set(reference.KINDS)
    assert reference.questions(7) == asked[:7]
    for question in asked[:: len(reference.KINDS)]:
        with Image.open(question.image) as image:
            assert image.size == (192, 192)
        assert all(0 <= left < right <= 192 and 0 <= top < bottom <= 192 for left, top, right, bottom in question.boxes)
    assert sum(file.stat().st_size for file in asked[0].image.parent.iterdir()) <= 3e6


def test_score():
    asked = reference.questions(2)
    assert reference.score(asked, [f" {asked[0].answer} ", "wrong"]) == {asked[0].kind: (1, 1), asked[1].kind: (0, 1)}
    with pytest.raises(ValueError, match="2 questions but 1 answers"):
        reference.score(asked, ["7"])


def test_answers_in_a_batch_equal_answers_alone(loaded):
    asked = reference.questions(6)
    seen = []
    together = reference.answers(*loaded, asked, batch_size=4, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(4, 6), (6, 6)]
    assert together == reference.answers(*loaded, asked, batch_size=1)


def test_the_weights_do_what_their_figures_say(name, loaded):
    """The first 96 questions, against the accuracy on all of them that figures.json and the card state."""
    overall = json.loads((reference.path(name) / "figures.json").read_text())["overall"]
    asked = reference.questions(96)
    table = reference.score(asked, reference.answers(*loaded, asked))
    assert sum(right for right, _ in table.values()) / len(asked) >= overall["right"] / overall["n"] - 0.05


@pytest.fixture(scope="module")
def pictures():
    for package in ("sklearn", "skimage", "matplotlib"):
        pytest.importorskip(package)
    from reference_models import pictures

    return pictures


def test_generator_is_deterministic(pictures):
    one, two = (pictures.picture(np.random.RandomState(3)) for _ in range(2))
    assert one.glyphs == two.glyphs and np.array_equal(np.asarray(one.image), np.asarray(two.image))
    assert pictures.picture(np.random.RandomState(4)).glyphs != one.glyphs


def test_training_and_test_share_no_pixel_of_a_photograph(pictures):
    seen = {"train": {}, "test": {}}
    fonts = {"train": set(), "test": set()}
    for split in seen:
        rng = np.random.RandomState(0)
        for _ in range(150):
            picture = pictures.picture(rng, split)
            left = picture.corner[0]
            first, last = seen[split].get(picture.photo, (left, left))
            seen[split][picture.photo] = (min(first, left), max(last, left + pictures.SIZE))
            fonts[split] |= {glyph.font for glyph in picture.glyphs}
    assert set(seen["train"]) == set(seen["test"]) and len(seen["train"]) == len(pictures.PHOTOS)
    for photo, (_, last) in seen["train"].items():
        assert last <= seen["test"][photo][0]
    assert fonts["test"] - fonts["train"] == set(pictures.UNSEEN_FONTS)


def test_reading_order_is_plain(pictures):
    rng = np.random.RandomState(1)
    for _ in range(50):
        picture = pictures.picture(rng)
        centres = sorted(picture.centre(k) for k in range(len(picture.glyphs)))
        assert np.diff(centres).min() >= 8


def test_shipped_set_is_what_the_generator_makes(pictures):
    from reference_models.heldout import generate

    folder = reference.questions(1)[0].image.parent
    rows = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    made = [(image, row) for image, some in generate() for row in some]
    keys = ("image", "question", "answer", "kind", "fonts", "photo")
    assert [[row[key] for key in keys] for row in rows] == [[row[key] for key in keys] for _, row in made]
    for image, row in made[:: 6 * 16]:
        shipped = np.asarray(Image.open(folder / row["image"]), float)
        assert np.abs(shipped - np.asarray(image)).mean() < 4  # JPEG


def test_development_set_is_another_one(pictures, tmp_path):
    from reference_models import heldout

    heldout.write(tmp_path, 2, seed=heldout.DEVELOPMENT)
    asked = reference.questions(12, tmp_path)
    assert [q.kind for q in asked] == 2 * list(reference.KINDS) and all(q.image.parent == tmp_path for q in asked)
    assert [q.boxes for q in asked] != [q.boxes for q in reference.questions(12)]


def test_varied_shapes_move_no_glyph_to_another_place(pictures):
    plain, varied = (pictures.picture(np.random.RandomState(5), shapes=shapes) for shapes in ("plain", "varied"))
    assert [(g.digit, g.colour, g.font) for g in plain.glyphs] == [(g.digit, g.colour, g.font) for g in varied.glyphs]
    assert [g.box for g in plain.glyphs] != [g.box for g in varied.glyphs]
    middles = np.array([[g.box for g in p.glyphs] for p in (plain, varied)]).reshape(2, -1, 2, 2).mean(2)
    assert np.abs(middles[0] - middles[1]).max() <= 8


FAMILIES = ("tiny-llava", "tiny-llava-next", "tiny-qwen2.5-vl")


@pytest.fixture(scope="module", params=FAMILIES)
def begun(pictures, request):
    """A family, its model as training begins, and its processor."""
    import torch

    from reference_models.train import FAMILIES as known

    assert tuple(known) == FAMILIES
    torch.manual_seed(0)
    family = known[request.param]
    return family, family.model().eval(), family.processor()


def test_training_sees_what_the_stock_model_sees(begun):
    """Pictures through the recipe's shortcut and through the stock processor and model give the same visual tokens and
    the same logits."""
    import torch

    from reference_models.batches import draw
    from reference_models.family import Heads

    family, model, processor = begun
    batch = draw(np.random.RandomState(3), 2, 192, (3, 5))
    text = [reference.prompt(processor, "what digit is red?")] * 2
    inputs = processor(images=[p.image for p in batch.pictures], text=text, return_tensors="pt")
    pixels = {key: inputs[key] for key in ("pixel_values", "image_sizes", "image_grid_thw") if key in inputs}
    with torch.inference_mode():
        seen, _ = family.see(model, Heads(), batch)
        stock = torch.stack(list(model.model.get_image_features(**pixels, return_dict=True).pooler_output))
        # LLaVA-NeXT: the base crop differs by the rounding of a byte
        assert seen.shape == (2, family.tokens, 128) and (seen - stock).abs().max() < 0.02 * stock.abs().max()
        around = len(family.prefix) + family.tokens + len(family.suffix)
        keep = torch.arange(family.tokens).expand(2, -1)
        ours = family.inputs(model, stock, keep, inputs["input_ids"][:, around:])
        logits = model.lm_head(model.get_decoder()(**ours, use_cache=False).last_hidden_state)
        assert torch.allclose(logits, model(**inputs).logits, atol=1e-4)


def test_a_thinned_prompt_keeps_its_positions(begun):
    import torch

    family, model, _ = begun
    text = torch.tensor([[5, 6]])
    whole, part = torch.arange(family.tokens)[None], torch.tensor([[1, 7, 100]])
    full, thin = (
        family.inputs(model, torch.zeros(1, family.tokens, 128), keep, text)["position_ids"] for keep in (whole, part)
    )
    start, behind = len(family.prefix), len(family.suffix) + 2
    assert torch.equal(thin[..., start : start + 3], full[..., start : start + family.tokens][..., part[0]])
    assert torch.equal(thin[..., :start], full[..., :start]) and torch.equal(thin[..., -behind:], full[..., -behind:])


def test_qwen_takes_pictures_of_any_size(pictures):
    from reference_models.train import FAMILIES as known

    family = known["tiny-qwen2.5-vl"]
    processor = family.processor()
    image = Image.new("RGB", (160, 96))
    inputs = processor(
        images=[image], text=[reference.prompt(processor, "how many digits are there?")], return_tensors="pt"
    )
    assert inputs["image_grid_thw"].tolist() == [[1, 12, 20]]
    assert (inputs["input_ids"] == family.model().config.image_token_id).sum() == 6 * 10


@pytest.mark.parametrize("name", FAMILIES)
def test_smoke_recipe(pictures, tmp_path, name):
    """A few steps of every stage, and what they write loads as a stock model does."""
    from transformers import AutoModelForImageTextToText

    from reference_models import train

    family = train.FAMILIES[name]
    train.train(family, tmp_path, family.recipe.smoke(), limit=6)
    folder = tmp_path / name
    assert (folder / "model.safetensors").stat().st_size <= 8e6
    figures = json.loads((folder / "figures.json").read_text())
    assert figures["overall"]["n"] == 6
    assert begins(folder, SHIPPED[name][0]), "as the shipped ones are written"
    assert {file.stem for file in (tmp_path / "stages").glob("*.pt")} == set(family.plan)
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), reference.processor(folder)
    asked = reference.questions(2)
    again = reference.score(asked, reference.answers(model.eval(), processor, asked))
    assert sum(n for _, n in again.values()) == 2 and processor.tokenizer.padding_side == "left"


def test_a_finished_cycle_is_not_run_again(pictures, tmp_path, capsys):
    from reference_models import train

    family = train.FAMILIES["tiny-qwen2.5-vl"]
    for _ in range(2):
        train.train(family, tmp_path, family.recipe.smoke(), only=["c1"], limit=6)
    assert capsys.readouterr().out.count("C1 0/") == 1 and not (tmp_path / family.name).exists()
